"""Our blocks in libggml's own decoders: exactly our weights?

Each type is written from a matrix on its grid and decoded by `ggml_get_type_traits(type)->to_float` of a
shared library of llama.cpp; `difference` is the largest to our weights (of a plain matrix: to the one that
was rounded before). The last column compares our rounding to nearest with that of the library
(`ggml_quantize_chunk`, without importances): the ratio of the squared errors.

Run: python benchmarks/llamacpp_types.py LIBGGML_BASE, the path of libggml-base.so.
"""

import ctypes
import sys
from pathlib import Path

import numpy as np
import torch

from bitassay.models.gguf_types import Q1_0, Q2_0
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.export.gguf_blocks import Blocks, as_blocks
from bitassay.quantization.export.gguf_round import SEARCHED, TYPES, rounded
from bitassay.quantization.recipe.weights import WeightScheme

MIRRORED = {"symmetric": False, "zero_point": "mirrored", "scale": "mse"}
OWN = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs")
SCHEMES = (
    {"format": "binary", "granularity": "g128"},
    {"format": "ternary", "granularity": "g256"},
    {"format": "ternary", "granularity": "g64"},
    {"format": "int2", "granularity": "g64"},
    {"format": "int2", "granularity": "g64"} | MIRRORED,
    {"format": "int4", "granularity": "g32"} | MIRRORED,
    {"format": "int4", "granularity": "g32", "symmetric": False},
    {"format": "int3", "granularity": "g256"},
    {"format": "int5", "granularity": "g32"} | MIRRORED,
    {"format": "int8", "granularity": "g32"},
    *({"format": name} for name in OWN),
)


class Traits(ctypes.Structure):
    """`ggml_type_traits`, up to its decoder."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("run", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("bytes", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def decoded(library: ctypes.CDLL, blocks: Blocks, columns: int) -> torch.Tensor:
    library.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    traits = library.ggml_get_type_traits(int(blocks.kind)).contents
    data = np.ascontiguousarray(blocks.data)
    assert data.shape[1] == columns // traits.run * traits.bytes, traits.name
    out = np.empty((len(data), columns), dtype=np.float32)
    traits.to_float(data.ctypes.data, out.ctypes.data, out.size)
    return torch.from_numpy(out)


def theirs(library: ctypes.CDLL, weight: torch.Tensor, kind: int) -> Blocks:
    library.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    traits = library.ggml_get_type_traits(kind).contents
    rows, columns = weight.shape
    source = np.ascontiguousarray(weight.numpy())
    out = np.empty((rows, columns // traits.run * traits.bytes), dtype=np.uint8)
    chunk = library.ggml_quantize_chunk
    chunk.argtypes = (ctypes.c_int, *(ctypes.c_void_p,) * 2, *(ctypes.c_int64,) * 3, ctypes.c_void_p)
    chunk.restype = ctypes.c_size_t
    assert chunk(kind, source.ctypes.data, out.ctypes.data, 0, rows, columns, None) == out.size
    return Blocks(kind, out)  # type: ignore[arg-type]


def main() -> None:
    library = ctypes.CDLL(str(Path(sys.argv[1]).resolve()))
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) / 20
    print("type    scheme                         difference  squared error, ours / theirs")
    for said in SCHEMES:
        scheme = WeightScheme.model_validate(said)
        tensor = quantize_tensor(weight, scheme)
        blocks = as_blocks(tensor)
        assert blocks is not None
        difference = (decoded(library, blocks, 512) - tensor.dequantize()).abs().max().item()
        other = decoded(library, theirs(library, weight, int(blocks.kind)), 512)
        ratio = (tensor.dequantize() - weight).square().sum() / (other - weight).square().sum()
        name = f"{said['format']} {said.get('granularity', '')} {said.get('zero_point', '')}"
        print(f"{blocks.kind.name:7} {name:30} {difference:10.2g} {ratio:10.3f}")
    for name in TYPES[3:]:
        if name in SEARCHED:  # as above
            continue
        blocks = rounded(weight, name)
        back = decoded(library, blocks, 512)
        again = rounded(back, name)
        difference = (decoded(library, again, 512) - back).abs().max().item()
        other = decoded(library, theirs(library, weight, int(blocks.kind)), 512)
        ratio = (back - weight).square().sum() / (other - weight).square().sum()
        print(f"{name:7} {'plain matrix':30} {difference:10.2g} {ratio:10.3f}")
    assert {Q1_0.value, Q2_0.value} == {41, 42}


if __name__ == "__main__":
    main()
