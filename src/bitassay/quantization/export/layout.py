"""What an export layout is: how a folder stores the codes of a quantized model.
Each is one file and one row of the table in `registry.py`; `save.py`, `plan.py` and `reload.py` name none but
the two defaults."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from bitassay.quantization.codes.storage import Expected, Stored
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.export.plain_load import Piece
from bitassay.quantization.inputs.activations import InputRounding
from bitassay.quantization.recipe.inputs import InputScheme
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.runtime.model import Quantization


@dataclass(frozen=True)
class Layout:
    """How a folder stores codes. What has a default is only of layouts that say more, or hold less.

    expected_tensors(stored, shape): dtype and shape of every part of a matrix `[out, in]`, by name.
    stored_tensors(tensor, inputs): these parts, of a matrix and of how its inputs are rounded.
    read_tensor(parts, stored, shape): the matrix again. Raises BitassayError for values that no writer makes.
    describe(model, quantization, folder): write into the folder's config.json how codes are stored.
    is_plain: whether plain transformers loads the folder.
    obstacle(model, recipe, matrices, asked): what such a folder cannot hold exactly, None for nothing; asked:
    whether the user named the layout. matrix_obstacle(stored): the same of one matrix.
    with_inputs(stored, inputs): how a matrix is stored whose inputs are rounded so. input_tensors(inputs):
    those of its parts that say so. pieces(model): what each slice of experts is stored as, by its name; only
    slices that are not stored under their own names.
    """

    expected_tensors: Callable[[Stored, tuple[int, int]], Expected]
    stored_tensors: Callable[[QuantizedTensor, InputRounding | None], dict[str, Tensor]]
    read_tensor: Callable[[dict[str, Tensor], Stored, tuple[int, int]], QuantizedTensor]
    describe: Callable[[PreTrainedModel, Quantization, Path], None]
    is_plain: bool = False
    obstacle: Callable[[PreTrainedModel, Recipe, Mapping[str, Stored], bool], str | None] = lambda *_: None
    matrix_obstacle: Callable[[Stored], str | None] = lambda _: None
    with_inputs: Callable[[Stored, InputScheme | InputRounding | None], Stored] = lambda stored, _: stored
    input_tensors: Callable[[InputRounding | None], dict[str, Tensor]] = lambda _: {}
    pieces: Callable[[PreTrainedModel], dict[str, list[Piece]]] = lambda _: {}
