"""A model on its way through the steps of a recipe, and what is finished of it in the work folder: layers,
the state of tuning and, in the end, the result, which takes their place.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial

from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.opened import Unread
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
from bitassay.record.files import link_or_copy
from bitassay.record.progress import Progress, silent
from bitassay.record.run import RunFolder
from bitassay.record.versions import source_digest

RESULT = "result"
BESIDE = "beside-"  # parts of the parameters of an opened model that changed and are no matrices of codes
BESIDE_BYTES = 2**26  # that such a part has, or one tensor
IN_LAYERS = ("layer-", "tuned-")  # parts of matrices; the later one counts
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


class KeptTensors(Mapping[str, QuantizedTensor]):
    """The matrices in parts of a work folder, in the order of `shapes`, read when they are asked for, of the
    last part asked for all at once; shapes: of every matrix. Raises BitassayError as `read_part` does."""

    def __init__(self, folder: RunFolder, parts: Iterable[str], shapes: Mapping[str, tuple[int, int]]):
        self.folder, self.shapes = folder, shapes
        self.names = {part: list(folder.part(part, dict)) for part in parts}
        self.part_of = {name: part for part, names in self.names.items() for name in names}
        self.last: tuple[str, dict[str, QuantizedTensor], dict[str, Tensor]] = ("", {}, {})

    def __getitem__(self, name: str) -> QuantizedTensor:
        self._read(self.part_of[name])
        return self.last[1][name]

    def beside(self, name: str, what: str) -> Tensor | None:
        """Return a tensor that is kept beside a matrix, where there is one."""
        self._read(self.part_of[name])
        return self.last[2].get(f"{name}/{what}")

    def _read(self, part: str) -> None:
        if part == self.last[0]:
            return
        self.last, known = ("", {}, {}), self.shapes.keys()
        if unknown := [other for other in self.names[part] if other not in known]:
            raise BitassayError(f"{self.folder.path}: {part} has {unknown[0]}, which is no matrix", AGAIN)
        shapes = {other: self.shapes[other] for other in self.names[part]}
        self.last = (part, *read_part(self.folder, part, shapes))

    def __iter__(self) -> Iterator[str]:
        return (name for name in dict.fromkeys((*self.shapes, *self.part_of)) if name in self.part_of)

    def __len__(self) -> int:
        return len(self.part_of)


def layer_part(index: int) -> str:
    """Return the name of the part that holds the matrices of a decoder layer."""
    return f"layer-{index:04d}"


def tuned_part(index: int) -> str:
    """Return the name of the part that takes the place of `layer_part` where layers moved together."""
    return f"tuned-{index:04d}"


def write_result(folder: RunFolder, made: Quantization) -> None:
    """Write the result, and delete what led to it. Matrices that are in the folder stay where they are; from
    the folder of another recipe with the same codes they come along."""
    folder.part("inputs", lambda: {name: asdict(rounding) for name, rounding in made.inputs.items()})
    folder.part("passes", lambda: {str(index): asdict(steps) for index, steps in made.passes.items()})
    stay = {RESULT, "inputs", "passes"}
    if isinstance(kept := made.tensors, KeptTensors):
        for part in kept.names if kept.folder.path != folder.path else ():
            for file in (f"{part}.json", f"{part}.safetensors"):
                link_or_copy(kept.folder.path / "parts" / file, folder.path / "parts" / file)
        stay |= {*kept.names, *_write_beside(folder, made.parameters)}
        write_part(folder, RESULT, {}, {})
    else:
        write_part(folder, RESULT, made.tensors, made.parameters)
    for path in (folder.path / "parts").iterdir():
        if path.stem not in stay:
            path.unlink()


def _write_beside(folder: RunFolder, parameters: Mapping[str, Tensor]) -> list[str]:
    """Write parameters a few at a time, and return the names of the parts."""
    parts, held = list[str](), dict[str, Tensor]()
    for place, name in enumerate(parameters, start=1):
        held[name] = parameters[name].contiguous()
        if place == len(parameters) or sum(value.nbytes for value in held.values()) >= BESIDE_BYTES:
            parts.append(f"{BESIDE}{len(parts):04d}")
            folder.write_tensors(parts[-1], held)
            held = {}
    return parts


def read_result(folder: RunFolder, recipe: Recipe, shapes: Mapping[str, tuple[int, int]]) -> Quantization:
    """Read what `write_result` wrote, for such matrices and copies. Raises BitassayError for damage."""
    if missing := [name for name in ("inputs", "passes") if not folder.has(name)]:
        raise BitassayError(f"{folder.path}: {missing[0]} is not there", AGAIN)
    names, tensors = folder.part(RESULT, dict), None
    if not names:  # they are where each layer was finished
        found = {path.stem for path in (folder.path / "parts").glob("*.safetensors")}
        layers = {name.rpartition("-")[2]: name for name in sorted(found) if name.startswith(IN_LAYERS)}
        tensors = KeptTensors(folder, layers.values(), shapes)
        if tensors.part_of.keys() != shapes.keys():
            raise BitassayError(f"{folder.path}: does not name the matrices of the recipe", AGAIN)
        shapes = {}
    copies = {name: shapes[of] for name in names if (of := original(name)) in shapes}
    held, parameters = read_part(folder, RESULT, {**shapes, **copies})
    try:
        inputs = TypeAdapter(dict[str, InputRounding]).validate_python(folder.part("inputs", dict))
        passes = TypeAdapter(dict[int, Steps]).validate_python(folder.part("passes", dict))
    except ValidationError as error:
        raise BitassayError(f"{folder.path}: inputs or passes are damaged", AGAIN) from error
    if tensors is None:
        return Quantization(recipe, held, parameters, inputs, passes)
    beside = sorted(path.stem for path in (folder.path / "parts").glob(f"{BESIDE}*.safetensors"))
    read = {
        key: partial(folder.read_tensor, part, key) for part in beside for key in folder.tensor_names(part)
    }
    return Quantization(recipe, tensors, Unread(read), inputs, passes)


def code_digest() -> str:
    """Return the digest of the code that makes results: another version of it may make others."""
    return source_digest("quantization")
