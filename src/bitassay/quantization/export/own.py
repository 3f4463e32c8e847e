"""Our own layout, for what no standard format can express: `codes/storage.py` says how it stores a matrix.
`bitassay.load` reads such a folder, plain transformers refuses it."""

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from bitassay.quantization.codes import storage
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.export.layout import Layout
from bitassay.quantization.inputs.activations import InputRounding
from bitassay.quantization.runtime.model import Quantization
from bitassay.record.files import read_json, write_json


def stored_tensors(tensor: QuantizedTensor, inputs: InputRounding | None) -> dict[str, Tensor]:
    """Return the parts of a matrix; how its inputs are rounded is in the card alone."""
    return storage.stored_tensors(tensor)


def describe(model: PreTrainedModel, quantization: Quantization, folder: Path) -> None:
    """Say in config.json what reads the folder; without a `quant_method` transformers refuses it."""
    config = read_json(folder / "config.json")
    write_json(
        folder / "config.json",
        config | {"quantization_config": {"format": "bitassay", "read_by": "bitassay.load"}},
    )


LAYOUT = Layout(storage.expected_tensors, stored_tensors, storage.read_tensor, describe)
