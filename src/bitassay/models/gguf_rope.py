"""The rotary embedding that a GGUF file describes, in transformers' words.

A file stretches it by keys (`rope.scaling.*`: linear, yarn, longrope) or by tensors: `rope_freqs.weight`
divides each frequency, `rope_factors_short/long.weight` divide them below and above the original length.
llama.cpp multiplies YaRN's scale of the attention, 0.1 ln(factor) + 1, by `attn_factor`, and ignores
`yarn_attn_factor`, by which the program that writes it means to replace that scale: a file in which the two
differ is refused.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitassay.errors import BitassayError

FREQUENCIES = "rope_freqs.weight"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
ROPE_TENSORS = (FREQUENCIES, SHORT, LONG)
PUBLISHED_LENGTHS = (8192, 4096, 2048, 16384, 32768)  # of models with Llama 3's scheme


def rope_parameters(
    keys: Mapping[str, Any], tensors: Mapping[str, np.ndarray], rotary_size: int, context: int
) -> dict[str, Any]:
    """Return `rope_parameters` of a model whose heads rotate `rotary_size` numbers. `keys` are without the
    architecture's prefix. Raises BitassayError for what transformers has no scheme for."""
    for name, factors in tensors.items():
        if factors.shape != (rotary_size // 2,):
            raise BitassayError(f"{name} has {factors.size} factors, but heads rotate {rotary_size} numbers")
    start = "rope.scaling."
    scaling = {key.removeprefix(start): value for key, value in keys.items() if key.startswith(start)}
    plain = {"rope_type": "default", "rope_theta": float(keys.get("rope.freq_base", 10_000.0))}
    original = int(scaling.get("original_context_length", context))
    kind = str(scaling.get("type", "linear"))  # without a type, a factor is one of linear scaling
    factor = float(scaling.get("factor", keys.get("rope.scale_linear", 0.0))) or 1.0
    attention = float(scaling.get("attn_factor", 1.0))
    if LONG in tensors and SHORT in tensors:
        return _longrope(plain, tensors[SHORT], tensors[LONG], context / original, original, attention)
    if LONG in tensors or SHORT in tensors:
        raise BitassayError(f"of {SHORT} and {LONG} only one is there")
    if kind == "longrope":
        raise BitassayError(f"rope.scaling.type = longrope without the tensors {SHORT} and {LONG}")
    stretched = kind != "none" and factor != 1.0
    if FREQUENCIES in tensors:
        if stretched:
            raise BitassayError(f"rope.scaling.factor = {factor} together with {FREQUENCIES} is not read")
        return _divided(plain, tensors[FREQUENCIES].astype(np.float64), context)
    if stretched and kind == "yarn":
        scale = 0.1 * math.log(max(factor, 1.0)) + 1.0
        if not math.isclose(scaling.get("yarn_attn_factor", scale), scale, rel_tol=1e-4):
            raise BitassayError(
                f"rope.scaling.yarn_attn_factor = {scaling['yarn_attn_factor']}: llama.cpp ignores "
                f"it and scales by {scale:.4f}, so it is not clear what is meant"
            )
        betas = ("beta_fast", "beta_slow")
        return {
            **plain,
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": scale * attention,
            **{beta: float(scaling[f"yarn_{beta}"]) for beta in betas if f"yarn_{beta}" in scaling},
        }
    if stretched and kind != "linear":
        raise BitassayError(f"rope.scaling.type = {kind} is not read")
    if attention != 1.0:
        raise BitassayError(f"rope.scaling.attn_factor = {attention} is not read without yarn or longrope")
    return {**plain, "rope_type": "linear", "factor": factor} if stretched else plain


def _longrope(
    plain: dict[str, Any], short: np.ndarray, long: np.ndarray, factor: float, original: int, attention: float
) -> dict[str, Any]:
    return {
        **plain,
        "rope_type": "longrope",
        "short_factor": [float(divisor) for divisor in short],
        "long_factor": [float(divisor) for divisor in long],
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": attention,
    }


def _divided(plain: dict[str, Any], factors: np.ndarray, context: int) -> dict[str, Any]:
    """Frequencies divided by `factors`, as Llama 3's scheme or, where it does not give them, longrope."""
    if np.allclose(factors, 1.0, rtol=1e-6):
        return plain
    size, most = len(factors), float(np.float32(factors.max()))
    wavelengths = 2 * math.pi * plain["rope_theta"] ** (np.arange(size) / size)
    for high, original in _llama3_guesses(factors, wavelengths, most):
        if np.allclose(llama3_divisors(wavelengths, most, 1.0, high, original), factors, rtol=1e-5):
            return {
                **plain,
                "rope_type": "llama3",
                "factor": float(str(np.float32(most))),
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    return _longrope(plain, factors, factors, 1.0, context, 1.0)


def llama3_divisors(
    wavelengths: np.ndarray, factor: float, low: float, high: float, original: int
) -> np.ndarray:
    """Return by what Llama 3.1 divides frequencies of such wavelengths (its `apply_scaling`): long waves by
    `factor`, short ones by 1, those from `original` / `high` to `original` / `low` by something between."""
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _llama3_guesses(factors: np.ndarray, wavelengths: np.ndarray, factor: float) -> list[tuple[float, int]]:
    """Return what the higher frequency factor and the length may have been: published ones, and those of a
    line through the middle factors. Only ratios show, so the lower factor is taken to be 1."""
    guesses = [(4.0, original) for original in PUBLISHED_LENGTHS]
    middle = (factors > 1.0 + 1e-6) & (factors < factor * (1 - 1e-6))
    if middle.sum() > 1:
        smooth = (1.0 / factors[middle] - 1.0 / factor) / (1.0 - 1.0 / factor)
        slope, offset = np.polyfit(1.0 / wavelengths[middle], smooth, 1)
        if offset < 0:
            high = 1.0 - 1.0 / offset
            guesses.append((round(float(high), 5), round(slope * (high - 1.0))))
    return guesses
