"""A model that another engine runs: its shapes, tokenizer and identity here, its weights there.

It is the transformers model of the same files without weights, so that everything that asks who runs a model
(`engine_of`) works on it as on any other: what is asked is the same, and who answers is another. What is not
asked of an engine, such as quantizing, refuses it by name.
"""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from bitassay.engines.engine import ENGINES
from bitassay.errors import BitassayError
from bitassay.models.empty import empty_model
from bitassay.models.identity import attach, identity
from bitassay.models.load import load_checkpoint
from bitassay.models.options import LoadOptions
from bitassay.models.source import Source
from bitassay.quantization.export.card import read_card
from bitassay.record.progress import Progress, silent

GENERATION = "generation_config.json"


def check_engine(engine: str, *, device: str = "cpu", packed: bool = False, opened: bool = False) -> None:
    """Raise BitassayError for an engine that there is not, or for what only transformers does, MissingError
    where what the engine needs is not installed."""
    kind = ENGINES[engine]
    getattr(kind, "check_installed", lambda: None)()
    for asked, what in (
        (device != "cpu", f"device {device}: bitassay runs it on the CPU"),
        (packed, "packed: it has codes of its own"),
        (opened, "a layer at a time: it reads all weights"),
    ):
        if asked:
            raise BitassayError(f"engine {engine} with {what}", "leave it out, or --engine transformers")


def load_hosted(
    source: Source,
    engine: str,
    options: LoadOptions = LoadOptions(),  # noqa: B008 (frozen)
    progress: Progress = silent,
) -> PreTrainedModel:
    """Return the model of a checkpoint that `engine` runs: without weights, with `.tokenizer`, `.identity`
    and `.engine`. Raises BitassayError where the engine does not read it, MissingError where it is not here.
    """
    kind = ENGINES[engine]
    model = load_checkpoint(source, options, progress, _read_without_weights)
    if (card := read_card(source.folder)) is not None:
        attach(model, identity=identity(model).with_recipe(card.recipe.recipe_id, card.recipe.name))

    def forward(*_arguments: Any, **_options: Any) -> None:
        raise BitassayError(
            f"{engine} runs {source.name}, and this is not asked of it", "load it without engine="
        )

    progress(f"loading {source.name} into {engine}")
    attach(model, forward=forward, engine=kind(model), engine_name=engine)
    return model


def _read_without_weights(folder: Path, config: PretrainedConfig, options: LoadOptions) -> PreTrainedModel:
    model = empty_model(
        config, options.dtype, attention=options.attention, trust_remote_code=options.trust_remote_code
    )
    if (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model
