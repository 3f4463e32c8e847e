"""A model on its way through the steps of a recipe, and what is finished of it in the work folder: layers,
the state of tuning and, in the end, the result, which takes their place.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.quantization.codes.storage import (
    Stored,
    description,
    expected_tensors,
    read_tensor,
    stored_tensors,
)
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.inputs.activations import InputRounding
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.recipe.replication import Steps
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.runtime.model import Quantization
from bitassay.quantization.runtime.replicas import original
from bitassay.quantization.shapes import Tokens
from bitassay.record.progress import Progress, silent
from bitassay.record.run import RunFolder
from bitassay.record.versions import source_digest

RESULT = "result"
AGAIN = "remove this folder and run the same command again"


@dataclass
class WorkingCopy:
    """A working copy `model` of the base model on its way through the steps of a recipe. schemes: how each
    matrix is stored, None where it is left alone. copies: how many copies each layer has that has several,
    for which `uncopied` is this as it was before it had the first copy's schemes."""

    base: PreTrainedModel
    recipe: Recipe
    model: PreTrainedModel
    schemes: dict[str, WeightScheme | None]
    tokens: Tokens | None
    folder: RunFolder | None = None
    progress: Progress = silent
    copies: dict[int, int] = field(default_factory=dict)
    uncopied: "WorkingCopy | None" = None

    @property
    def text(self) -> Tokens:
        """The calibration text, for steps that need it."""
        assert self.tokens is not None
        return self.tokens


def write_part(
    folder: RunFolder, name: str, tensors: Mapping[str, QuantizedTensor], beside: Mapping[str, Tensor]
) -> None:
    """Keep matrices and other tensors: how each matrix is stored, then the parts, which make it finished."""
    folder.part(name, lambda: {n: description(t).model_dump(mode="json") for n, t in tensors.items()})
    parts = {f"{n}/{part}": value for n, t in tensors.items() for part, value in stored_tensors(t).items()}
    folder.write_tensors(name, {key: value.contiguous() for key, value in (parts | dict(beside)).items()})


def read_part(
    folder: RunFolder, name: str, shapes: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
    """Read what `write_part` wrote. Raises BitassayError for a part that is damaged or of other matrices."""
    kept, parts, tensors = folder.part(name, dict), folder.read_tensors(name), {}
    if not isinstance(kept, dict) or kept.keys() != shapes.keys():
        raise BitassayError(f"{folder.path}: {name} does not name the matrices of the recipe", AGAIN)
    for key, said in kept.items():
        try:
            stored = Stored.model_validate(said)
            expected = expected_tensors(stored, shapes[key])
            values = {part: parts.pop(f"{key}/{part}") for part in expected}
        except (KeyError, ValidationError) as error:
            raise BitassayError(f"{folder.path}: {name} is damaged at {key}", AGAIN) from error
        if any((values[part].dtype, values[part].shape) != what for part, what in expected.items()):
            raise BitassayError(f"{folder.path}: {name} does not fit the model at {key}", AGAIN)
        tensors[key] = read_tensor(values, stored, shapes[key])
    return tensors, parts


def write_result(folder: RunFolder, made: Quantization) -> None:
    """Write the result, and delete what led to it."""
    folder.part("inputs", lambda: {name: asdict(rounding) for name, rounding in made.inputs.items()})
    folder.part("passes", lambda: {str(index): asdict(steps) for index, steps in made.passes.items()})
    write_part(folder, RESULT, made.tensors, made.parameters)
    for path in (folder.path / "parts").iterdir():
        if path.stem not in (RESULT, "inputs", "passes"):
            path.unlink()


def read_result(folder: RunFolder, recipe: Recipe, shapes: Mapping[str, tuple[int, int]]) -> Quantization:
    """Read what `write_result` wrote, for such matrices and copies. Raises BitassayError for damage."""
    if missing := [name for name in ("inputs", "passes") if not folder.has(name)]:
        raise BitassayError(f"{folder.path}: {missing[0]} is not there", AGAIN)
    copies = {name: shapes[of] for name in folder.part(RESULT, dict) if (of := original(name)) in shapes}
    tensors, parameters = read_part(folder, RESULT, {**shapes, **copies})
    try:
        inputs = TypeAdapter(dict[str, InputRounding]).validate_python(folder.part("inputs", dict))
        passes = TypeAdapter(dict[int, Steps]).validate_python(folder.part("passes", dict))
    except ValidationError as error:
        raise BitassayError(f"{folder.path}: inputs or passes are damaged", AGAIN) from error
    return Quantization(recipe, tensors, parameters, inputs, passes)


def code_digest() -> str:
    """Return the digest of the code that makes results: another version of it may make others."""
    return source_digest("quantization")
