"""The memory that it takes to quantize a model a layer at a time, known from shapes alone."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from bitassay.data.windows import tokenizing_bytes
from bitassay.models.config import text_config
from bitassay.models.precision import short_products
from bitassay.models.walk import decoder_layers, matrices, module_name, walk
from bitassay.quantization.codes.storage import Stored
from bitassay.quantization.inputs.ranges import SAMPLED_TOKENS, SAMPLING
from bitassay.quantization.recipe.calibration import Calibration
from bitassay.quantization.recipe.formats import FORMATS
from bitassay.quantization.recipe.inputs import Activations
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.recipe.solvers import Learned, Tune
from bitassay.quantization.recipe.transforms import Rotation, Smoothing
from bitassay.quantization.solvers import layerwise, tune
from bitassay.quantization.solvers.distillation import writing_bytes
from bitassay.quantization.transforms.residual_stream import CHUNK_VALUES

BASE_BYTES = 500 * 10**6  # the interpreter with torch and transformers
TOKEN_BYTES = 1000  # of each entry of a vocabulary in a tokenizer
# Copies of a matrix in fp32, measured: that rounding it to nearest holds at its peak, where it is rotated, as
# binary planes, and for a second plane of all columns; that reading a folder's codes holds; decoding codes
# that are kept; and such codes in FP8, or with something added to them.
ROUNDING_COPIES, ROTATED_COPIES, PLANES_COPIES, SECOND_PLANE_COPIES = 2.8, 3.3, 7.5, 12
BLOCKS_COPIES = 4  # of a tensor in fp32 that becomes blocks of a GGUF file, or is read from them
READING_COPIES, KEPT_COPIES, FLOAT_COPIES, SUM_COPIES = 2.3, 1.3, 2, 3
PACKING_COPIES = 1.3  # of a matrix in fp32 that turning its solution into packed codes holds
LEARNING_BYTES = 28  # of a weight of the layer that is learned: its position, gradient, two moments and value
ROTATED_BYTES = 12  # of a rotated weight beside the layers: it, and the base model's as it is read
FOLDING_BYTES = 4 + 8 + 8  # of a matrix of which the largest magnitudes are looked up
IN_FP64 = 3 * 8 * CHUNK_VALUES  # of a weight, while it is changed


@dataclass(frozen=True)
class Sizes:
    """What the memory of calibration depends on: shapes of quantized matrices, parameters, bits of codes."""

    model: PreTrainedModel
    text: Calibration
    shapes: list[tuple[int, int]]
    parameters: int
    bits: int


def base_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of a process that has a model's tokenizer, and nothing of the model."""
    return BASE_BYTES + TOKEN_BYTES * text_config(model).vocab_size


def opened_memory(sizes: Sizes, stored: Mapping[str, Stored], recipe: Recipe, solves: bool) -> int:
    """Return the bytes that it takes a layer at a time until all codes are known: the most of what rounding a
    matrix holds, what the parts of the recipe hold, of tokenizing its text and, where it `solves` layers, of
    that."""
    item, shapes = sizes.model.dtype.itemsize, Shapes.of(sizes.model)
    rounding = int(4 * shapes.matrix * max(map(rounding_copies, stored.values())))
    most = [item * shapes.owner + rounding]
    most += [memory_of(part, sizes, shapes, rounding) for memory_of, part in recipe.steps(OPENED_MEMORY)]
    if solves:
        layer = 4 * shapes.layer * (1 if recipe.learned is None and recipe.tune is None else 2)
        most.append(layer + solving_memory(sizes, recipe.learned))
    if recipe.is_calibrated:
        most.append(tokenizing_bytes(recipe.text.corpus))
    return base_bytes(sizes.model) + max(most)


def saving_memory(sizes: Sizes, stored: Mapping[str, Stored]) -> int:
    """Return the bytes that writing and checking an opened model takes: a layer that is run while a matrix is
    read and decoded, with its codes, and what lies beside the layers."""
    item, shapes = sizes.model.dtype.itemsize, Shapes.of(sizes.model)
    copies = max(READING_COPIES, *map(decoding_copies, stored.values()))
    codes = sizes.bits * shapes.layer // sum(map(math.prod, sizes.shapes)) // 8
    checking = item * shapes.layer + codes + int((4 * copies - item) * shapes.matrix)
    return base_bytes(sizes.model) + max(checking, item * shapes.beside)


def gguf_memory(model: PreTrainedModel) -> int:
    """Return the bytes that writing and checking a GGUF file of an opened model takes: a tensor
    with its blocks, or a layer that is run while a matrix is read."""
    item, shapes = model.dtype.itemsize, Shapes.of(model)
    running = item * shapes.layer + 4 * READING_COPIES * shapes.matrix
    return base_bytes(model) + max(4 * BLOCKS_COPIES * max(shapes.matrix, shapes.beside), int(running))


def rounding_copies(stored: Stored) -> float:
    """Return how many copies of a matrix in fp32 rounding it to nearest holds."""
    scheme = stored.scheme
    copies = ROUNDING_COPIES if scheme.turned is None else ROTATED_COPIES
    if scheme.has_planes:
        copies = PLANES_COPIES + SECOND_PLANE_COPIES * scheme.residual
    return copies if stored.residual is None or scheme.residual else copies + 2


def decoding_copies(stored: Stored) -> float:
    """Return how many copies of a matrix in fp32 decoding codes holds that are kept, the result too."""
    scheme = stored.scheme
    if stored.residual is not None or stored.low_rank is not None or scheme.turned is not None:
        return SUM_COPIES
    floats = scheme.column_scales or FORMATS[scheme.format].float_dtype is not None
    return FLOAT_COPIES if floats else KEPT_COPIES


def _rotating(spec: Rotation, sizes: Sizes, shapes: "Shapes", rounding: int) -> int:
    changing = 4 * shapes.layer + IN_FP64
    folded = ROTATED_BYTES if spec.r1 == "folded" else 0
    return max(changing, 4 * shapes.owner + IN_FP64 + rounding, folded * shapes.beside)


def _smoothing(spec: Smoothing, sizes: Sizes, shapes: "Shapes", rounding: int) -> int:
    awq = spec.method == "awq"
    watched = _watching(sizes, shapes, False, SAMPLED_TOKENS if awq else 0, 0)
    folding = 8 * shapes.matrix + rounding if awq else FOLDING_BYTES * shapes.matrix
    clipping = 4 * shapes.layer + rounding if spec.clip else 0  # at every read, by the sampled inputs
    return max(watched.running, watched.kept + max(folding, clipping))


def _ranging(spec: Activations, sizes: Sizes, shapes: "Shapes", rounding: int) -> int:
    if not spec.needs_text:
        return 0
    sampled = SAMPLED_TOKENS if any(scheme.scale in SAMPLING for scheme in spec.schemes) else 0
    each = any(scheme.scale == "moving_average" for scheme in spec.schemes)
    return _watching(sizes, shapes, each, sampled, shapes.decoding).running


class Watching(NamedTuple):
    """Bytes that watching the inputs of all linears holds: in the end, and while the last layer runs."""

    kept: int
    running: int


def _watching(sizes: Sizes, shapes: "Shapes", each_batch: bool, sampled: int, decoding: int) -> Watching:
    """Return what `collect_ranges` holds with all samples between two layers."""
    text, hidden = sizes.text, text_config(sizes.model).hidden_size
    columns = sum(linear.in_features for linear in walk(sizes.model).linears.values())
    kept = columns * (3 * 8 + 4 * sampled + 2 * 4 * (text.samples if each_batch else 1))
    states = 2 * 4 * text.samples * text.tokens * hidden
    return Watching(
        kept,
        kept
        + states
        + 4 * shapes.layer
        + decoding
        + layerwise.memory_of(text.tokens, hidden, shapes.widest, 0),
    )


def solving_memory(sizes: Sizes, learned: Learned | None) -> int:
    """Return the bytes of solving a layer beside the layer in fp32, and its weights before they were rounded
    where learning goes on from them: the states of all samples, and the most of one batch with the statistics
    of an input, of factorising them and rounding what reads it, and of learning. Experts see all samples at
    once."""
    text, hidden, shapes = sizes.text, text_config(sizes.model).hidden_size, Shapes.of(sizes.model)
    state = 4 * text.samples * text.tokens * hidden
    batch = text.samples if walk(sizes.model).experts else min(layerwise.BATCH_SAMPLES, text.samples)
    passing = layerwise.memory_of(batch * text.tokens, hidden, shapes.widest, 0)
    largest = max(map(statistics_bytes, {columns for _, columns in sizes.shapes}))
    steps = [passing + largest, factorising_memory(sizes)]
    if learned is not None:
        streams = layerwise.LEARNED_STREAMS
        at_once = layerwise.memory_of(learned.batch * text.tokens, hidden, shapes.widest, streams)
        steps.append((LEARNING_BYTES - 4) * shapes.layer + at_once)
    return (1 if learned is None else 2) * state + max(*steps, state + passing)


def statistics_bytes(columns: int) -> int:
    """Return the bytes of the Hessian of so many columns."""
    return layerwise.sums_dtype(columns).itemsize * columns**2


def factorising_memory(sizes: Sizes) -> int:
    """Return the bytes of factorising the statistics of an input and rounding what reads it, at most. The
    statistics stay; a factor takes as much, then as much as in fp32. Beside it are the weights and, as
    rounding goes on, codes, each column at its turn and, without the factor, the columns in their order."""
    most = 0
    for rows, columns in set(sizes.shapes):
        matrix, sums = 4 * rows * columns, statistics_bytes(columns)
        together = matrix * (2 if rows > columns else 1)  # a gate and what it opens read the same input
        rounding = max(sums + 2 * together, 4 * columns**2 + 3 * together)
        most = max(most, sums + max(rounding, 4 * together + int(PACKING_COPIES * matrix)))
    return most


class Shapes(NamedTuple):
    """The most weights that are read together: of a decoder layer, a module that owns matrices in it, a
    matrix, and a tensor beside the layers. widest: the most features of a matrix's input or output."""

    layer: int
    owner: int
    matrix: int
    beside: int
    widest: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Shapes":
        """Return those of a model, which may be on the meta device."""
        prefix = f"{module_name(model, decoder_layers(model))}."
        shapes = [view.shape for view in matrices(model).values()]
        layers, owners, beside = Counter[str](), Counter[str](), 0
        for name, value in model.named_parameters():
            if name.startswith(prefix):
                layers[name.removeprefix(prefix).partition(".")[0]] += value.numel()
                owners[name.rpartition(".")[0]] += value.numel()
            else:
                beside = max(beside, value.numel())
        matrix, widest = max(map(math.prod, shapes)), max(map(max, shapes))
        return cls(max(layers.values()), max(owners.values()), matrix, beside, widest)

    @property
    def decoding(self) -> int:
        """The bytes that it takes to decode a matrix."""
        return int(4 * self.matrix * SUM_COPIES)


def tuning_memory(spec: Tune, sizes: Sizes, opened: bool = False) -> int:
    """Return the bytes that tuning all layers together holds; of an opened model, a layer at a time. Or what
    it holds while the base model writes samples: the model in bf16 and, as a whole, as it is."""
    config, layers = text_config(sizes.model), len(decoder_layers(sizes.model))
    writing = 0
    if spec.generated:
        read = 6 * Shapes.of(sizes.model).layer if opened else (4 + 2) * sizes.parameters
        writing = read + 2 * config.vocab_size * config.hidden_size
        writing += writing_bytes(sizes.model, sizes.text.tokens)
    tuning = tune.memory_of(
        spec,
        sizes.text.samples,
        sizes.text.tokens,
        sizes.shapes,
        layers,
        config.hidden_size,
        sizes.parameters,
        config.vocab_size,
        short=short_products(torch.device("cpu"), sizes.model.dtype),
        opened=opened,
    )
    return max(tuning, writing)


# What parts of a recipe hold, by the shapes and by what rounding a matrix holds.
OPENED_MEMORY: dict[str, Callable[[Any, Sizes, Shapes, int], int]] = {
    "rotation": _rotating,
    "smoothing": _smoothing,
    "activations": _ranging,
    "tune": lambda spec, sizes, *_: tuning_memory(spec, sizes, opened=True),
}
