"""Which file a recipe's name means, and whether that can be a recipe: what is known of it without torch."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from bitassay.errors import BitassayError, suggestion
from bitassay.record.files import read_yaml

SHIPPED = Path(str(files("bitassay") / "recipes"))
REMEDY = "compare it with `bitassay recipes show w4`"
# Fields that only these tools' files have at their top level; enough of them, and it is such a file.
OTHER_TOOLS = {
    "an LLM Compressor recipe": ("quant_stage", "default_stage", "quantization_stage", "quant_modifiers"),
    "an lm-eval task": ("doc_to_text", "dataset_path", "output_type", "metric_list", "doc_to_target"),
    "an lm-eval group": ("group", "aggregate_metric_list"),
    "a mergekit configuration": ("merge_method", "slices", "base_model"),
    "an Axolotl configuration": ("micro_batch_size", "sequence_len", "adapter", "datasets", "base_model"),
    "an AutoRound configuration": ("auto_round_version", "autoround_version", "enable_quanted_input"),
    "a quantize_config of GPTQ or AWQ": ("desc_act", "w_bit", "q_group_size", "quant_method", "group_size"),
    "a transformers configuration": ("architectures", "model_type", "transformers_version"),
    "a torchtune configuration": ("tokenizer", "checkpointer", "_component_"),
}


def recipe_file(name: str) -> Path:
    """Return the file of a shipped recipe or a path. Raises BitassayError where there is none."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return path
    if path.is_dir() or path.is_file():
        raise BitassayError(
            f"{name}: a {'folder' if path.is_dir() else 'file'} that is no .yaml file, so no recipe",
            "the name of a recipe, such as 'w4' (bitassay recipes list), or the path of a .yaml file",
        )
    names = [file.stem for file in SHIPPED.glob("*.yaml")]
    if name not in names:
        raise BitassayError(
            f"no recipe is called {name!r}; {suggestion(name, names)}",
            "bitassay recipes list, or give the path of a .yaml file",
        )
    return SHIPPED / f"{name}.yaml"


def read_recipe_file(path: Path) -> dict[Any, Any]:
    """Read the fields of a recipe's file. Raises BitassayError that says what else it holds."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        what = "empty" if content is None else f"a {type(content).__name__}, not fields"
        raise BitassayError(f"{path}: not a recipe: {what}", REMEDY)
    if "weights" not in content and (tool := _other_tool(content)):
        raise BitassayError(f"{path}: not a recipe of bitassay: it looks like {tool}", REMEDY)
    return content


def _other_tool(content: Mapping[Any, Any]) -> str:
    """Whose file this is; empty where nothing says so. LLM Compressor names its stages freely."""
    stages = [
        key for key, value in content.items() if str(key).endswith("_stage") and isinstance(value, dict)
    ]
    if stages or any(str(key).endswith("Modifier") or str(key).endswith("_modifiers") for key in content):
        return "an LLM Compressor recipe"
    counts = {tool: sum(key in content for key in keys) for tool, keys in OTHER_TOOLS.items()}
    best = max(counts, key=lambda tool: counts[tool])
    return best if counts[best] else ""
