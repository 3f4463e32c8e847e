"""Block types of llama.cpp that the installed gguf package does not know or cannot decode.

    Q2_0   id 42, runs of 64, 18 bytes: fp16 d, 2-bit codes q, four to a byte, lowest first; d (q - 1)
    Q1_0   id 41, runs of 128, 18 bytes: fp16 d, bits, lowest first; d for a set bit, else -d

The package reads, writes and decodes by tables of types; here they get what they lack, so that every reader
and writer of this package knows these types. A newer gguf that has them is left as it is.

Source: `ggml-common.h` and `dequantize_row_q2_0`, `dequantize_row_q1_0` in llama.cpp's `ggml-quants.c`.
"""

from collections.abc import Callable
from typing import Any

import gguf.quants
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

Q1_RUN, Q2_RUN, BLOCK_BYTES = 128, 64, 18
FILE_TYPES = {"Q1_0": 40, "Q2_0": 41}  # numbers of general.file_type


class _Decoder:
    """What the package's table of types holds of one that is only decoded."""

    def __init__(self, decode: Callable[[np.ndarray], np.ndarray]):
        self.decode = decode

    def dequantize(self, data: np.ndarray) -> np.ndarray:
        """Return the numbers that rows of blocks stand for, as fp32."""
        blocks = np.ascontiguousarray(data).reshape(*data.shape[:-1], -1, BLOCK_BYTES)
        d = blocks[..., :2].copy().view(np.float16).astype(np.float32)
        return (d * self.decode(blocks[..., 2:])).reshape(*data.shape[:-1], -1)


def _twos(codes: np.ndarray) -> np.ndarray:
    fields = codes[..., None] >> np.array([0, 2, 4, 6], dtype=np.uint8) & 3
    return fields.reshape(*codes.shape[:-1], Q2_RUN).astype(np.float32) - 1


def _signs(codes: np.ndarray) -> np.ndarray:
    return 2 * np.unpackbits(codes, axis=-1, bitorder="little").astype(np.float32) - 1


def _known(name: str, number: int, run: int, decode: Callable[[np.ndarray], np.ndarray]) -> Any:
    """Return the package's type of that number, which it is told where it lacks it."""
    members, kinds = GGMLQuantizationType._value2member_map_, GGMLQuantizationType
    if number not in members:
        kind = int.__new__(kinds, number)
        kind._name_, kind._value_ = name, number
        type.__setattr__(kinds, name, kind)
        kinds._member_map_[name] = members[number] = kind
    kind = kinds(number)
    GGML_QUANT_SIZES.setdefault(kind, (run, BLOCK_BYTES))
    traits: dict[Any, Any] = gguf.quants._type_traits
    traits.setdefault(kind, _Decoder(decode))
    return kind


Q1_0: GGMLQuantizationType = _known("Q1_0", 41, Q1_RUN, _signs)
Q2_0: GGMLQuantizationType = _known("Q2_0", 42, Q2_RUN, _twos)
