"""Which model this is: the identity and the tokenizer that a loaded model carries."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitassay.errors import BitassayError
from bitassay.models.config import configuration_digests
from bitassay.models.digests import remembered
from bitassay.models.source import Source
from bitassay.models.weights import stored_tensors, weight_files
from bitassay.record.hashing import digest_file, digest_json, digest_tensors

# File names of vocabularies. "tokenizer.*json" leaves tokenizer_config.json out, which has none.
VOCABULARIES = ("tokenizer.*json", "*.model", "*vocab*", "merges*", "*.tiktoken", "tekken.json")
USUAL_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class Identity:
    """Which model this is. Digests are of the files that are loaded, as stored, whatever dtype the model was
    loaded in; `recipe_id` says which recipe was applied afterwards (None: none). own_code: Python code that
    comes with the model is run, and then belongs to its configuration."""

    source: Source
    recipe_id: str | None = None
    recipe_name: str | None = None
    own_code: bool = False

    @property
    def name(self) -> str:
        return self.source.name

    @cached_property
    def weights_digest(self) -> str:
        folder = self.source.folder
        return remembered(weight_files(folder), lambda: digest_tensors(stored_tensors(folder)))

    @cached_property
    def tokenizer_digest(self) -> str:
        folder = self.source.folder
        usual = [folder / name for name in USUAL_VOCABULARIES if (folder / name).is_file()]
        return digest_json({path.name: digest_file(path) for path in usual or vocabularies(folder)})

    @cached_property
    def configuration(self) -> dict[str, str]:
        """Digests of what the files beside the weights say, by part: see `models/config.py`."""
        return configuration_digests(self.source.folder, own_code=self.own_code)

    @property
    def config_digest(self) -> str:
        return digest_json(self.configuration)

    def with_recipe(self, recipe_id: str, recipe_name: str) -> "Identity":
        return replace(self, recipe_id=recipe_id, recipe_name=recipe_name)


def identity(model: PreTrainedModel) -> Identity:
    """Return the identity of a model that came from `load` or `quantize`. Raises BitassayError for others."""
    if not isinstance(getattr(model, "identity", None), Identity):
        raise BitassayError("this model has no identity", "load it with bitassay.load(...)")
    return model.identity  # type: ignore[return-value]


def tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model. Raises BitassayError for a model without one."""
    if getattr(model, "tokenizer", None) is None:
        raise BitassayError(
            "this model has no tokenizer", "load it with bitassay.load(...), or set model.tokenizer"
        )
    return model.tokenizer  # type: ignore[return-value]


def attach(model: PreTrainedModel, **values: object) -> None:
    """Set attributes of a model past nn.Module's own `__setattr__`, which is for tensors and modules."""
    for name, value in values.items():
        object.__setattr__(model, name, value)


def vocabularies(folder: Path) -> list[Path]:
    """Return the files of a folder that a tokenizer is read from."""
    return sorted({path for pattern in VOCABULARIES for path in folder.glob(pattern) if path.is_file()})
