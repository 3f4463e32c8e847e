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


def rope_parameters(
    keys: Mapping[str, Any], tensors: Mapping[str, np.ndarray], rotary_size: int, context: int
) -> dict[str, Any]:
    """`rope_parameters` of a model whose heads rotate `rotary_size` numbers. `keys` are without the
    architecture's prefix."""
    theta = float(keys.get("rope.freq_base", 10_000.0))
    plain = {"rope_type": "default", "rope_theta": theta}
    original = int(keys.get("rope.scaling.original_context_length", context))
    # Without a type, a factor is one of linear scaling.
    kind = str(keys.get("rope.scaling.type", "linear"))
    factor = float(keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0.0))) or 1.0
    attention = float(keys.get("rope.scaling.attn_factor", 1.0))
    if LONG in tensors or SHORT in tensors:
        return _longrope(theta, tensors, rotary_size, context, original, keys.get("rope.scaling.attn_factor"))
    if kind == "longrope":
        raise BitassayError(f"rope.scaling.type = longrope without the tensors {SHORT} and {LONG}")
    stretched = kind != "none" and factor != 1.0
    if FREQUENCIES in tensors:
        if stretched:
            raise BitassayError(f"rope.scaling.factor = {factor} together with {FREQUENCIES} is not read")
        return _divided(plain, tensors[FREQUENCIES], rotary_size, context)
    if stretched and kind == "yarn":
        scale = 0.1 * math.log(max(factor, 1.0)) + 1.0
        if not math.isclose(keys.get("rope.scaling.yarn_attn_factor", scale), scale, rel_tol=1e-4):
            raise BitassayError(
                f"rope.scaling.yarn_attn_factor = {keys['rope.scaling.yarn_attn_factor']}: llama.cpp ignores "
                f"it and scales by {scale:.4f}, so it is not clear what is meant"
            )
        more = {
            ours: float(keys[f"rope.scaling.yarn_{ours}"])
            for ours in ("beta_fast", "beta_slow")
            if f"rope.scaling.yarn_{ours}" in keys
        }
        return {
            **plain,
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": scale * attention,
            **more,
        }
    if stretched and kind != "linear":
        raise BitassayError(f"rope.scaling.type = {kind} is not read")
    if attention != 1.0:
        raise BitassayError(f"rope.scaling.attn_factor = {attention} is not read without yarn or longrope")
    return {**plain, "rope_type": "linear", "factor": factor} if stretched else plain


def _longrope(
    theta: float,
    tensors: Mapping[str, np.ndarray],
    rotary_size: int,
    context: int,
    original: int,
    attention: float | None,
) -> dict[str, Any]:
    if not (SHORT in tensors and LONG in tensors):
        raise BitassayError(f"of {SHORT} and {LONG} only one is there")
    factors = {name: [float(f) for f in _checked(tensors[name], name, rotary_size)] for name in (SHORT, LONG)}
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": factors[SHORT],
        "long_factor": factors[LONG],
        "factor": context / original,
        "original_max_position_embeddings": original,
        "attention_factor": 1.0 if attention is None else float(attention),
    }


def _checked(factors: np.ndarray, name: str, rotary_size: int) -> np.ndarray:
    if factors.shape != (rotary_size // 2,):
        raise BitassayError(f"{name} has {factors.size} factors, but heads rotate {rotary_size} numbers")
    return factors


def _divided(plain: dict[str, Any], factors: np.ndarray, rotary_size: int, context: int) -> dict[str, Any]:
    """Frequencies divided by `factors`: as Llama 3's scheme where it gives these factors, else as longrope
    with the same factors for all lengths, which divides by any."""
    factors = _checked(factors, FREQUENCIES, rotary_size).astype(np.float64)
    if np.allclose(factors, 1.0, rtol=1e-6):
        return plain
    theta = plain["rope_theta"]
    wavelengths = 2 * math.pi * theta ** (np.arange(0, rotary_size, 2) / rotary_size)
    most = float(np.float32(factors.max()))
    for low, high, original in _llama3_guesses(factors, wavelengths, most):
        if np.allclose(_llama3(wavelengths, most, low, high, original), factors, rtol=1e-5):
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": float(str(np.float32(most))),
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    same = [float(factor) for factor in factors]
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": same,
        "long_factor": same,
        "factor": 1.0,
        "original_max_position_embeddings": context,
        "attention_factor": 1.0,
    }


def _llama3(wavelengths: np.ndarray, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """By what Llama 3.1 divides frequencies (its own code, `apply_scaling`): nothing for short waves,
    `factor` for long ones, something between in the middle."""
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _llama3_guesses(
    factors: np.ndarray, wavelengths: np.ndarray, factor: float
) -> list[tuple[float, float, int]]:
    """What Llama 3's parameters may have been: the published ones, and those of the straight line through two
    factors in the middle. Only the ratios of the three show, so the lowest is taken to be 1."""
    guesses = [(1.0, 4.0, original) for original in (8192, 4096, 2048, 16384, 32768)]
    middle = np.flatnonzero((factors > 1.0 + 1e-6) & (factors < factor * (1 - 1e-6)))
    if len(middle) > 1:
        smooth = (1.0 / factors[middle] - 1.0 / factor) / (1.0 - 1.0 / factor)
        slope, offset = np.polyfit(1.0 / wavelengths[middle], smooth, 1)
        if offset < 0:
            high = 1.0 - 1.0 / offset
            guesses.append((1.0, round(high, 6), round(slope * (high - 1.0))))
    return guesses
