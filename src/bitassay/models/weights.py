"""Which files of a folder hold the model's weights: those that transformers loads, and no others.

    model.safetensors              where it is there
    model.safetensors.index.json   else, the shards that its `weight_map` names
    transformers_weights           in config.json: another file, or index, to be used instead

(`_get_resolved_checkpoint_files` in transformers' `modeling_utils.py`.) What is hashed, checked and counted
is what these files hold, so that a model's identity is that of the weights that run. A folder in which it is
open which weights those are is refused, by the name of the file: two files with one tensor, an index that
does not fit its shards, two sets of weights, an adapter. A file beside them that nothing loads is no part of
the model; `stray_files` names it. `consolidated*.safetensors` is the same model in Mistral's own layout.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from bitassay.errors import BitassayError
from bitassay.record.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
OTHER_LAYOUT = "consolidated*.safetensors"
# torch.distributed's own checkpoints: where a folder has one, transformers loads nothing else.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def weight_files(folder: Path) -> list[Path]:
    """The files whose tensors are the model, sorted by name. Raises BitassayError where the folder has none,
    or more than one answer."""
    for path in sorted(folder.glob("*.safetensors")):
        if _DISTRIBUTED.fullmatch(path.name):
            raise BitassayError(
                f"{path}: a part of a distributed checkpoint, which transformers loads instead of {WEIGHTS}",
                "save the model as a whole: model.save_pretrained(folder)",
            )
    if (folder / ADAPTER).is_file():
        raise BitassayError(
            f"{folder / ADAPTER}: an adapter, which is added to the weights only where peft is installed",
            "save the merged model (model.merge_and_unload()), or remove the adapter's files",
        )
    if (chosen := _named_in_config(folder)) is not None:
        return [chosen] if chosen.suffix == ".safetensors" else _shards(chosen)
    whole, index = folder / WEIGHTS, folder / INDEX
    if not whole.is_file():
        if index.is_file():
            return _shards(index)
        raise BitassayError(f"{folder}: {_what_is_there(folder)}", "model.save_pretrained(folder) writes it")
    if index.is_file() and set(_weight_map(index).values()) != {WEIGHTS}:
        raise BitassayError(
            f"{folder}: two sets of weights: {WEIGHTS}, and the shards that {INDEX} names",
            "remove the one that is not the model, or save the model into an empty folder",
        )
    return [whole]


def stray_files(folder: Path) -> list[Path]:
    """The safetensors files that are no part of the model."""
    known = {*weight_files(folder), *folder.glob(OTHER_LAYOUT)}
    return sorted(set(folder.glob("*.safetensors")) - known)


def stored_tensors(folder: Path) -> "Iterator[tuple[str, Tensor]]":
    """All tensors of the model's files, sorted by name, read one at a time."""
    where = check_files(folder)
    open_path, file = None, None
    for name in sorted(where):
        if where[name] != open_path:
            open_path, file = where[name], safe_open(where[name], framework="pt")
        assert file is not None
        yield name, file.get_tensor(name)


def stored_bytes(folder: Path) -> int:
    """Bytes of the model's files."""
    return sum(path.stat().st_size for path in weight_files(folder))


def stored_bits(folder: Path) -> dict[str, int]:
    """Bits of each module that the files hold as codes: all its tensors together but for a bias. Modules
    whose weight is a plain number a parameter are left out."""
    import torch
    from transformers.modeling_utils import str_to_torch_dtype

    bits: dict[str, int] = {}
    plain: set[str] = set()
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                module, _, part = name.rpartition(".")
                entry = file.get_slice(name)
                dtype = str_to_torch_dtype.get(entry.get_dtype(), torch.uint8)
                if part == "weight" and dtype.is_floating_point and dtype.itemsize > 1:
                    plain.add(module)
                elif part != "bias":
                    size = 8 * dtype.itemsize * math.prod(entry.get_shape())
                    bits[module] = bits.get(module, 0) + size
    return {module: count for module, count in bits.items() if module not in plain}


def check_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor, from the files' headers alone. Raises BitassayError that names the file where
    one is truncated, malformed or missing, or has a tensor that another has too, and where an index says
    something else than the files."""
    files = weight_files(folder)
    where: dict[str, Path] = {}
    for path in files:
        for name in _tensor_names(path):
            if name in where:
                raise BitassayError(
                    f"{path}: the tensor {name} is in {where[name].name} too",
                    "remove the file that is not the model's, or save the model into an empty folder",
                )
            where[name] = path
    index = _index_in_force(folder, files)
    for name, file in _weight_map(index).items() if index is not None else ():
        if name not in where or where[name].name != file:
            found = f"it is in {where[name].name}" if name in where else "it is not there"
            raise BitassayError(
                f"{index}: says that {name} is in {file}, but {found}", "download or save the model again"
            )
    return where


def _tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise BitassayError(
            f"{path}: truncated or not a safetensors file ({error})", "download or save it again"
        ) from error


def _named_in_config(folder: Path) -> Path | None:
    """The file that config.json's `transformers_weights` names."""
    if not (folder / "config.json").is_file():
        return None
    said = read_config_file(folder).get("transformers_weights")
    if said is None:
        return None
    if not isinstance(said, str) or not said.endswith((".safetensors", ".safetensors.index.json")):
        raise BitassayError(f"{folder / 'config.json'}: transformers_weights is {said!r:.80}, no such file")
    return _inside(folder / "config.json", said)


def read_config_file(folder: Path) -> dict[str, Any]:
    """The content of config.json. Raises BitassayError where it is no JSON object."""
    content = read_json(folder / "config.json")
    if not isinstance(content, dict):
        raise BitassayError(f"{folder / 'config.json'}: not an object", "download or save the model again")
    return content


def _index_in_force(folder: Path, files: list[Path]) -> Path | None:
    chosen = _named_in_config(folder)
    index = folder / INDEX if chosen is None else chosen
    return index if index.suffix == ".json" and index.is_file() else None


def _shards(index: Path) -> list[Path]:
    return sorted({_inside(index, name) for name in _weight_map(index).values()})


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise BitassayError(
            f"{index}: no weight_map of tensors and files", "download or save the model again"
        )
    return found


def _inside(owner: Path, name: str) -> Path:
    """The file `name` beside `owner`, which names it. Raises BitassayError for any other place, and where
    there is none."""
    path = owner.parent / name
    if Path(name).name != name or path.suffix not in (".safetensors", ".json"):
        raise BitassayError(
            f"{owner}: names {name!r:.80}, which is no safetensors file of its own folder",
            "download or save the model again",
        )
    if not path.is_file():
        raise BitassayError(
            f"{path}: {owner.name} names this file, and it is missing", "download or save the model again"
        )
    return path


def _what_is_there(folder: Path) -> str:
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return f"no {WEIGHTS} and no {INDEX}, which transformers loads, only {', '.join(others[:4])}"
    return "no .safetensors file (pickled .bin checkpoints are not read)"
