"""Plain matrices, such as the embedding and the head, rounded to a block type of llama.cpp.

A block is `d` times levels of a fixed table. Its d, of either sign, is the one that puts the largest
magnitude on the outermost level, times one of FACTORS, or the least-squares fit to the codes that this gives,
whichever leaves the least squared error; d is rounded to fp16 before codes are chosen. Q8_0 takes the
largest magnitude over 127, as llama.cpp does. Q6_K has sixteen weights a scale, which is d times an int8;
the others are searched as those of a recipe are (`gguf_schemes.py`).
"""

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from jaxtyping import Float
from torch import Tensor

from bitassay.errors import BitassayError, suggestion
from bitassay.models.gguf_types import Q2_0, Q2_RUN
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.export import gguf_bytes as to_bytes
from bitassay.quantization.export.gguf_blocks import Blocks, as_blocks, bits_of
from bitassay.quantization.export.gguf_bytes import BLOCK, SUPER
from bitassay.quantization.export.gguf_schemes import SCHEMES
from bitassay.quantization.recipe.formats import NONLINEAR
from bitassay.quantization.shapes import Matrix

FACTORS = tuple(1 - 0.04 * step for step in range(-2, 10))
ROWS_ELEMENTS = 2**21  # weights that are rounded together
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WIDEST = 32.0  # the outermost level of Q6_K


def _whole(low: int, high: int) -> Float[Tensor, " levels"]:
    return torch.arange(low, high + 1.0)


# The run, the levels, and the number of the first level in the bytes.
TABLES = {
    "Q2_0": (Q2_0, Q2_RUN, _whole(-1, 2), -1, to_bytes.q2_0),
    "Q4_0": (Kind.Q4_0, BLOCK, _whole(-8, 7), -8, to_bytes.q4_0),
    "Q5_0": (Kind.Q5_0, BLOCK, _whole(-16, 15), -16, to_bytes.q5_0),
    "IQ4_NL": (Kind.IQ4_NL, BLOCK, torch.tensor(NONLINEAR, dtype=torch.float32), 0, to_bytes.iq4_nl),
}
SEARCHED = tuple(kind.name for kind in SCHEMES if kind.name not in (*TABLES, "Q8_0", "Q6_K"))
TYPES = (*PLAIN, "Q8_0", "Q6_K", *TABLES, *SEARCHED)


def check_type(name: str) -> None:
    """Raise BitassayError for a type that plain matrices are not rounded to."""
    if name not in TYPES:
        raise BitassayError(
            f"no type {name!r} for embeddings; {suggestion(name, TYPES)}", "--embeddings Q8_0, or F16"
        )


def fitting(name: str, columns: int) -> str:
    """Return the type, or what takes its place in rows that its blocks do not divide: Q8_0, else F16."""
    run = 1 if name in PLAIN else gguf.GGML_QUANT_SIZES[Kind[name]][0]
    if columns % run == 0:
        return name
    return "Q8_0" if columns % BLOCK == 0 else "F16"


def bits_of_type(name: str, columns: int) -> float:
    """Return the bits that a weight takes in such rows."""
    name = fitting(name, columns)
    if name in PLAIN:
        return PLAIN[name].itemsize * 8.0
    return bits_of(Kind[name])


def rounded(weight: Matrix, name: str) -> Blocks:
    """Return a matrix `[out, in]` in the type of this name, which must be one that fits."""
    rows = max(1, ROWS_ELEMENTS // weight.shape[1])
    parts = [_rounded(part.float().cpu(), name) for part in weight.split(rows)]
    return Blocks(parts[0].kind, np.concatenate([part.data for part in parts]))


def _rounded(w: Matrix, name: str) -> Blocks:
    if name == "Q8_0":
        blocks = w.reshape(len(w), -1, BLOCK)
        d = _stored(blocks.abs().amax(2) / 127)
        q = (blocks / _safe(d)[..., None]).round().clamp(-127, 127)
        return Blocks(Kind.Q8_0, to_bytes.q8_0(q.reshape(w.shape), d))
    if name == "Q6_K":
        return _six_bits(w)
    if name in SEARCHED:
        blocks = as_blocks(quantize_tensor(w, SCHEMES[Kind[name]]), Kind[name])
        assert blocks is not None
        return blocks
    kind, run, levels, first, pack = TABLES[name]
    d, places = fitted(w.reshape(-1, run), levels)
    return Blocks(kind, pack((places + first).reshape(w.shape), d.reshape(len(w), -1)))


def fitted(
    w: Float[Tensor, "blocks run"], levels: Float[Tensor, " levels"]
) -> tuple[Float[Tensor, "blocks 1"], Float[Tensor, "blocks run"]]:
    """Return the scale of each block, as fp16 holds it, and the place of each weight's level."""
    edges = (levels[1:] + levels[:-1]) / 2
    peak = w.gather(1, w.abs().argmax(1, keepdim=True))
    best, least = torch.zeros_like(peak), w.square().sum(1, keepdim=True)
    places = torch.full_like(w, float((levels.abs()).argmin()))
    if levels.abs().min() > 0:
        least = torch.full_like(least, torch.inf)
    for end in (levels[0], levels[-1]):
        for factor in FACTORS:
            d = _stored(peak / end * factor)
            for _ in range(2):
                codes = torch.bucketize(w / _safe(d), edges)
                values = levels[codes]
                error = (w - d * values).square().sum(1, keepdim=True)
                better = error < least
                best, least = torch.where(better, d, best), torch.where(better, error, least)
                places = torch.where(better, codes.float(), places)
                d = _stored(
                    (w * values).sum(1, keepdim=True) / values.square().sum(1, keepdim=True).clamp(min=1e-30)
                )
    return best, places


def _six_bits(w: Matrix) -> Blocks:
    sixteens = w.reshape(-1, 16)
    d, _ = fitted(sixteens, _whole(-32, 31))
    scales = d.reshape(len(w), -1, SUPER // 16)
    peak = scales.gather(2, scales.abs().argmax(2, keepdim=True))
    overall = _stored(peak / -128)
    a = (scales / _safe(overall)).round().clamp(-128, 127)
    step = (a * overall).reshape(-1, 1)
    q = (sixteens / _safe(step)).round().clamp(-WIDEST, WIDEST - 1)
    return Blocks(Kind.Q6_K, to_bytes.q6_k(q.reshape(w.shape), a.reshape(len(w), -1), overall[..., 0]))


def _stored(d: Tensor) -> Tensor:
    limit = torch.finfo(torch.float16).max
    return d.clamp(-limit, limit).half().float()


def _safe(d: Tensor) -> Tensor:
    """Divisors: where a scale is zero all is on the level of zero."""
    return torch.where(d == 0, torch.inf, d)
