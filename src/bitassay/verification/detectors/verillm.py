"""The VeriLLM statistics (arXiv 2509.24257): compare hidden states by the bit fields of their floating-point
numbers.

For one cell (layer, position), x is the prover's vector and y the verifier's, both rounded to nearest even to
one declared format: fp16 (5 exponent bits, M = 10 mantissa bits), bf16 (8, 7) or fp32 (8, 23).

    V = indices where both are finite;  X = those of V whose exponent fields differ;  C = V without X
    d = |m_x - m_y| / 2^M
    Pe = |X| / |V|
    Pm = share of X with d > e_m
    Pw = share of C with d < e_w     a sign mismatch (both nonzero) is never small
    mean_epsilon = mean of x - y over V

Two near numbers across a power of two have mantissas near 1 and near 0: the honest pattern in X, so a high Pm
is good. Zeros and subnormals have the exponent field 0, and +0 equals -0. X empty: Pm is NaN and holds. C
empty: Pw is 0. V empty: nothing is accepted. One-sided NaN or infinity, or opposite infinities: the cell is
refused whatever else it shows.

Two rule sets: `paper`, and `documents`, that of the VeriLLM experiments (docs/sources.md). The paper's values
of e_m and e_w are not known to us; they are parameters, named in every result. Neither set is calibrated: on
real models the fixed thresholds refuse honest runs, so the verdict does not rest on them.
"""

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitassay.errors import BitassayError, suggestion
from bitassay.verification.detectors.detector import Comparison, Detector, Series
from bitassay.verification.detectors.distance import commit, full_states

# name -> torch dtype, an integer dtype of the same width, mantissa bits, exponent bits
_FORMATS = {
    "fp16": (torch.float16, torch.int16, 10, 5),
    "bf16": (torch.bfloat16, torch.int16, 7, 8),
    "fp32": (torch.float32, torch.int32, 23, 8),
}
FORMAT_OF_DTYPE = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp32"}


@dataclass(frozen=True)
class Rules:
    """A cell is accepted where Pe < max_Pe, Pm > min_Pm, Pw > min_Pw and |mean_epsilon| < max_mean; e_m and
    e_w as above."""

    name: str
    max_Pe: float
    min_Pm: float
    min_Pw: float
    max_mean: float
    e_m: float = 0.75
    e_w: float = 0.05


PAPER = Rules("paper", max_Pe=0.05, min_Pm=0.75, min_Pw=0.80, max_mean=0.01)
DOCUMENTS = Rules("documents", max_Pe=0.05, min_Pm=0.75, min_Pw=0.50, max_mean=0.01)
RULE_SETS = {rules.name: rules for rules in (PAPER, DOCUMENTS)}


@dataclass(frozen=True)
class CellStatistics:
    """One number a cell. compared: |V|; sign_mismatches: indices of V; refused: a one-sided or opposite NaN
    or infinity. Indexed as a tensor of cells is: a slice of it are the statistics of those cells."""

    Pe: Float[Tensor, "*cells"]
    Pm: Float[Tensor, "*cells"]
    Pw: Float[Tensor, "*cells"]
    mean_epsilon: Float[Tensor, "*cells"]
    mean_absolute: Float[Tensor, "*cells"]
    compared: Int[Tensor, "*cells"]
    sign_mismatches: Int[Tensor, "*cells"]
    refused: Bool[Tensor, "*cells"]

    def __getitem__(self, cells: Any) -> "CellStatistics":
        return CellStatistics(*(getattr(self, field.name)[cells] for field in fields(self)))


def cell_statistics(
    prover: Float[Tensor, "*cells hidden"],
    verifier: Float[Tensor, "*cells_ hidden_"],
    rules: Rules,
    format: str,
) -> CellStatistics:
    """Return the statistics of each cell, with the e_m and e_w of `rules`, in `format` (fp16, bf16 or fp32).

    Raises BitassayError where the shapes differ: cells that cannot be compared are never accepted.
    """
    if prover.shape != verifier.shape:
        raise BitassayError(
            f"states of shape {list(prover.shape)} cannot be compared with {list(verifier.shape)}"
        )
    if format not in _FORMATS:
        raise BitassayError(f"unknown format {format!r}; {suggestion(format, _FORMATS)}")
    x, y = prover.to(_FORMATS[format][0]), verifier.to(_FORMATS[format][0])
    sign_x, exponent_x, mantissa_x = bit_fields(x, format)
    sign_y, exponent_y, mantissa_y = bit_fields(y, format)
    V = x.isfinite() & y.isfinite()
    X = V & (exponent_x != exponent_y)
    C = V & ~X
    d = (mantissa_x - mantissa_y).abs().double() / 2.0 ** _FORMATS[format][2]
    signs_differ = V & (sign_x != sign_y) & (x != 0) & (y != 0)
    epsilon = torch.where(V, x.double() - y.double(), 0.0)
    refused = (
        (x.isnan() != y.isnan()) | (x.isinf() != y.isinf()) | (x.isinf() & y.isinf() & (sign_x != sign_y))
    )
    return CellStatistics(
        Pe=_share(X, V),
        Pm=_share(X & (d > rules.e_m), X),
        Pw=_share(C & (d < rules.e_w) & ~signs_differ, C).nan_to_num(0.0),
        mean_epsilon=epsilon.sum(-1) / V.sum(-1),
        mean_absolute=epsilon.abs().sum(-1) / V.sum(-1),
        compared=V.sum(-1),
        sign_mismatches=signs_differ.sum(-1),
        refused=refused.any(-1),
    )


def accepted(cells: CellStatistics, rules: Rules) -> Bool[Tensor, "*cells"]:
    """Return which cells hold to all four rules. A comparison with NaN is false, so V empty (Pe is NaN) is
    not accepted."""
    Pm_holds = (cells.Pm > rules.min_Pm) | cells.Pm.isnan()
    mean_holds = cells.mean_epsilon.abs() < rules.max_mean
    return (cells.Pe < rules.max_Pe) & Pm_holds & (cells.Pw > rules.min_Pw) & mean_holds & ~cells.refused


def accept_rate(cells: CellStatistics, rules: Rules) -> float:
    """Return accepted cells / cells compared; 0 where there are none."""
    return float(accepted(cells, rules).double().mean()) if cells.Pe.numel() else 0.0


def bit_fields(
    x: Float[Tensor, "*cells hidden"], format: str
) -> tuple[Bool[Tensor, "*cells hidden"], Int[Tensor, "*cells hidden"], Int[Tensor, "*cells hidden"]]:
    """Return sign (true: negative), exponent field and mantissa field of numbers stored in `format`."""
    _, integer, mantissa_bits, exponent_bits = _FORMATS[format]
    bits = x.contiguous().view(integer).to(torch.int64)
    exponent = (bits >> mantissa_bits) & (2**exponent_bits - 1)
    return bits < 0, exponent, bits & (2**mantissa_bits - 1)


def summary(cells: CellStatistics, rules: Rules) -> dict[str, Any]:
    """Return means over cells as plain numbers, with the parameters that they depend on."""

    def mean(values: Tensor) -> float | None:
        present = values[~values.isnan()]
        return float(present.mean()) if len(present) else None

    return {
        "rules": rules.name,
        "e_m": rules.e_m,
        "e_w": rules.e_w,
        "cells": cells.Pe.numel(),
        "accept_rate": accept_rate(cells, rules),
        "Pe": mean(cells.Pe),
        "Pm": mean(cells.Pm),
        "Pw": mean(cells.Pw),
        "mean_epsilon": mean(cells.mean_epsilon),
        "mean_absolute": mean(cells.mean_absolute),
        "sign_mismatches": int(cells.sign_mismatches.sum()),
        "refused_cells": int(cells.refused.sum()),
    }


def _share(part: Bool[Tensor, "*cells hidden"], of: Bool[Tensor, "*cells hidden"]) -> Float[Tensor, "*cells"]:
    """Return |part| / |of| in each cell; NaN where `of` is empty."""
    return part.sum(-1).double() / of.sum(-1).double()


def run_statistics(comparison: Comparison) -> CellStatistics:
    """Return the statistics of all shown cells [layers, positions] in the format of the verifier's dtype,
    with the e_m and e_w that both rule sets have."""
    format = FORMAT_OF_DTYPE[str(comparison.dtype).removeprefix("torch.")]
    layers = [
        cell_statistics(*comparison.pair(layer), DOCUMENTS, format) for layer in comparison.header.layers
    ]
    return CellStatistics(
        *(torch.stack([getattr(layer, field.name) for layer in layers]) for field in fields(CellStatistics))
    )


def check(rules: Rules, comparison: Comparison, _: Any) -> list[Series]:
    """Return the share of layers that the rules do not accept, at each generated position, as one series."""
    refused = ~accepted(run_statistics(comparison)[:, comparison.n_prompt :], rules)
    return [Series(tuple(refused.double().mean(0).tolist()))]


VERILLM_PAPER, VERILLM_DOCUMENTS = (
    Detector(
        f"verillm-{rules.name}",
        f"cells that the rules `{rules.name}` do not accept",
        partial(check, rules),
        smallest_sd=0.01,
        prove=commit,
        evidence_bytes=full_states,
    )
    for rules in (PAPER, DOCUMENTS)
)
