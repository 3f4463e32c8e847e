"""One matrix: every format, granularity, symmetry and scale rule against plain loops and against the bounds that must hold."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bitassay.errors import BitassayError
from bitassay.quantize.formats import FORMATS
from bitassay.quantize.recipe import WeightScheme
from bitassay.quantize.scales import SEARCH_FACTORS
from bitassay.quantize.tensor import quantize_tensor

GRANULARITIES = ("tensor", "channel", "g32", "g64")


def schemes():
    """Every scheme that a recipe may ask for."""
    for name, granularity, symmetric, scale in itertools.product(
        FORMATS, GRANULARITIES, (True, False), ("absmax", "mse")
    ):
        try:
            yield WeightScheme(format=name, granularity=granularity, symmetric=symmetric, scale=scale)
        except ValidationError:
            continue


ALL = list(schemes())
IDS = [f"{s.format}-{s.granularity}-{'sym' if s.symmetric else 'asym'}-{s.scale}" for s in ALL]


def weights(seed: int, rows: int = 6, columns: int = 100) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * 0.05
    return w * (1 + 4 * (torch.rand(rows, columns, generator=generator) > 0.97))  # a few outliers


def groups_of(scheme: WeightScheme, w: np.ndarray):
    """Index pairs of each group, and the place of its scale, by the definition of granularity."""
    rows, columns = w.shape
    if scheme.granularity == "tensor":
        yield np.s_[:, :], (0, 0)
        return
    size = columns if scheme.granularity == "channel" else int(scheme.granularity[1:])
    for row in range(rows):
        for index, start in enumerate(range(0, columns, size)):
            yield np.s_[row, start : start + size], (row, index)


def fp16(value: float) -> float:
    return float(np.float16(value))


def nearest_fp8(value: float, dtype: torch.dtype) -> float:
    """The representable number closest to `value`, ties to the one with an even mantissa."""
    every = torch.arange(256, dtype=torch.uint8)
    table = every.view(dtype).double()
    finite = table.isfinite()
    distance = (table - value).abs()
    distance[~finite] = float("inf")
    best = [int(i) for i in (distance == distance.min()).nonzero()]
    return min((int(every[i]) & 1, float(table[i])) for i in best)[1]


def by_hand(w: np.ndarray, scheme: WeightScheme) -> np.ndarray:
    """absmax (and the closed forms of ternary and binary) in plain fp64 loops, scales rounded to fp16."""
    fmt, out = FORMATS[scheme.format], np.zeros_like(w)
    for place, _ in groups_of(scheme, w):
        group = w[place].ravel()
        if fmt.kind == "binary":
            mean = 0.0 if scheme.symmetric else fp16(group.mean())
            scale = fp16(np.abs(group - mean).mean())
            done = [mean + (scale if v >= mean else -scale) for v in group]
        elif fmt.kind == "ternary" and scheme.scale == "mse":
            top = np.sort(np.abs(group))[::-1]
            gain = [top[:k].sum() ** 2 / k for k in range(1, len(top) + 1)]
            scale = fp16(top[: int(np.argmax(gain)) + 1].mean())
            done = [scale * float(np.clip(np.round(v / scale), -1, 1)) for v in group]
        elif fmt.float_dtype is not None:
            scale = float(torch.tensor(np.abs(group).max() / torch.finfo(fmt.float_dtype).max).bfloat16())
            largest = torch.finfo(fmt.float_dtype).max
            done = [
                scale * nearest_fp8(float(np.clip(v / scale, -largest, largest)), fmt.float_dtype)
                for v in group
            ]
        elif scheme.symmetric:
            low, high = fmt.code_range(True)
            scale = fp16(np.abs(group).max() / high)
            done = [scale * float(np.clip(np.round(v / scale), low, high)) for v in group]
        else:
            top = 2**fmt.bits - 1
            low, high = min(group.min(), 0), max(group.max(), 0)
            scale = fp16((high - low) / top)
            zero = float(np.clip(np.round(-low / scale), 0, top))
            done = [scale * (float(np.clip(np.round(v / scale) + zero, 0, top)) - zero) for v in group]
        out[place] = np.array(done).reshape(out[place].shape)
    return out


EXACT = [s for s in ALL if s.scale == "absmax" or FORMATS[s.format].kind in ("ternary", "binary")]


@pytest.mark.parametrize("scheme", EXACT, ids=[IDS[ALL.index(s)] for s in EXACT])
def test_codes_scales_and_zero_points_are_those_of_the_definition(scheme):
    w = weights(1)
    found = quantize_tensor(w, scheme).dequantize().double().numpy()
    expected = by_hand(w.double().numpy(), scheme)
    # fp32 against fp64 may put a value that is midway between two codes on the other side: a rare step is allowed.
    step = np.abs(found - expected) > 1e-6
    assert step.mean() < 0.004
    assert np.abs(found - expected).max() < 1.05 * float(quantize_tensor(w, scheme).scale.float().max()) * (
        32 if FORMATS[scheme.format].kind == "float" else 2
    )


@pytest.mark.parametrize("scheme", ALL, ids=IDS)
@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 2**31), shape=st.sampled_from([(1, 1), (3, 7), (5, 64), (2, 96), (4, 100), (1, 160)])
)
def test_shape_range_and_error(scheme, seed, shape):
    w = weights(seed, *shape)
    done = quantize_tensor(w, scheme)
    fmt, codes, back = done.format, done.codes(), done.dequantize()
    assert back.shape == w.shape
    assert back.isfinite().all()
    if fmt.float_dtype is None:
        assert set(codes.unique().tolist()) <= set(
            range(fmt.code_range(scheme.symmetric)[0], fmt.code_range(scheme.symmetric)[1] + 1)
        )
    scale = np.zeros(shape)
    for place, where in groups_of(scheme, scale):
        scale[place] = float(done.scale[where])
    if scheme.scale == "absmax" and fmt.kind in ("integer", "ternary"):
        # half a step, and what rounding the scale to fp16 can clip at the outermost code
        bound = scale * (0.5 + fmt.code_range(scheme.symmetric)[1] * 2**-10) + 1e-7
        assert (np.abs((back - w).numpy()) <= bound + (0 if scheme.symmetric else 0.5 * scale)).all()
    if scheme.scale == "absmax" and fmt.kind == "float":
        mantissa = {"fp8_e4m3": 3, "fp8_e5m2": 2}[fmt.name]
        bound = (
            np.abs(w.numpy()) * 2.0 ** -(mantissa + 1) * 1.01
            + scale * torch.finfo(fmt.float_dtype).smallest_normal
        )
        assert (np.abs((back - w).numpy()) <= bound).all()


@pytest.mark.parametrize("name", ["int8", "int4", "int3", "int2", "fp8_e4m3", "ternary"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_searched_scales_are_never_worse_than_absmax(name, granularity):
    w = weights(3)
    errors = {}
    for rule in ("absmax", "mse"):
        back = quantize_tensor(w, WeightScheme(format=name, granularity=granularity, scale=rule)).dequantize()
        errors[rule] = (back - w).double().square().sum()
    assert errors["mse"] <= errors["absmax"] * (1 + 1e-6)
    if name == "int2":
        assert errors["mse"] < errors["absmax"]


def test_the_search_finds_the_best_of_its_factors():
    w = weights(4, 1, 64)
    scheme = WeightScheme(format="int3", granularity="channel", scale="mse")
    widest = float(np.float16(w.abs().max() / 3))
    errors = []
    for factor in SEARCH_FACTORS:
        scale = float(np.float16(widest * factor))
        errors.append((((w / scale).round().clamp(-4, 3) * scale - w) ** 2).sum().item())
    done = quantize_tensor(w, scheme)
    assert ((done.dequantize() - w) ** 2).sum().item() == pytest.approx(min(errors), rel=1e-4)


def test_ternary_beats_every_other_scale():
    w = weights(5, 1, 48)
    scheme = WeightScheme(format="ternary", granularity="channel", scale_dtype="float32")
    best = ((quantize_tensor(w, scheme).dequantize() - w) ** 2).sum()
    for scale in torch.linspace(0.001, float(w.abs().max()), 400):
        assert best <= (((w / scale).round().clamp(-1, 1) * scale - w) ** 2).sum() * (1 + 1e-5)


def test_two_bits_come_near_the_best_uniform_quantizer():
    """Four uniform levels leave 0.1188 of a Gaussian's variance at best (Max 1960, table II); absmax in groups of 64 leaves more than half as much again."""
    w = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    noise = {}
    for rule in ("absmax", "mse"):
        scheme = WeightScheme(format="int2", granularity="g64", symmetric=False, scale=rule)
        noise[rule] = (quantize_tensor(w, scheme).dequantize() - w).square().mean().item()
    assert noise["mse"] == pytest.approx(0.1188, rel=0.08)
    assert noise["absmax"] > 1.5 * noise["mse"]


def test_fp8_scales_of_small_weights_keep_their_precision():
    w = weights(11) * 1e-3
    for name, worst in (("fp8_e4m3", 0.04), ("fp8_e5m2", 0.08)):
        back = quantize_tensor(w, WeightScheme(format=name)).dequantize()
        assert (back - w).norm() / w.norm() < worst


@pytest.mark.parametrize("scheme", ALL, ids=IDS)
def test_edge_values_leave_no_nan(scheme):
    for w in (
        torch.zeros(3, 70),
        torch.full((2, 70), 0.25),
        torch.full((2, 70), -3.0),
        torch.cat([torch.zeros(2, 64), torch.ones(2, 6)], 1),
        weights(0, 4, 70) * 1e-38,
        weights(0, 4, 70) * 1e5,
    ):
        back = quantize_tensor(w, scheme).dequantize()
        assert back.isfinite().all()
        if not w.any():
            assert not back.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused_by_name(value):
    w = weights(0)
    w[2, 3] = value
    with pytest.raises(BitassayError, match=r"layers\.3\.up_proj"):
        quantize_tensor(w, WeightScheme(format="int4"), "layers.3.up_proj")


def test_weights_beyond_the_scales_dtype_are_refused():
    with pytest.raises(BitassayError, match="float16"):
        quantize_tensor(torch.full((1, 4), 1e6), WeightScheme(format="int8"))
    wide = WeightScheme(format="int8", scale_dtype="float32")
    assert quantize_tensor(torch.full((1, 4), 1e6), wide).dequantize().allclose(torch.tensor(1e6), rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_views_are_quantized_as_their_fp32_values(dtype):
    w = weights(7, 100, 6).to(dtype).T  # not contiguous
    scheme = WeightScheme(format="int4", granularity="g32")
    assert torch.equal(
        quantize_tensor(w, scheme).dequantize(), quantize_tensor(w.float().contiguous(), scheme).dequantize()
    )


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_stored_scales_are_the_ones_that_were_used(scale_dtype):
    """Quantizing what came out, on the same grid, changes nothing: no scale was rounded after the codes were made."""
    w = weights(8)
    done = quantize_tensor(w, WeightScheme(format="int8", granularity="g32", scale_dtype=scale_dtype))
    assert done.scale.dtype == getattr(torch, scale_dtype)
    scales = torch.cat(
        [done.scale.float()[:, i : i + 1].expand(-1, min(32, 100 - 32 * i)) for i in range(4)], 1
    )
    assert torch.equal(done.dequantize(), (w / scales).round().clamp(-128, 127) * scales)


@pytest.mark.parametrize(("scheme", "bits"), [
    ({"format": "int8", "granularity": "channel"}, 128 * 8 + 16),
    ({"format": "int4", "granularity": "g64", "symmetric": False}, 128 * 4 + 2 * 16 + 2 * 4),
    ({"format": "int2", "granularity": "g32"}, 128 * 2 + 4 * 16),
    ({"format": "int3", "granularity": "g64", "scale_dtype": "float32"}, 128 * 3 + 2 * 32),
    ({"format": "binary", "granularity": "g64", "symmetric": False}, 128 + 2 * 16 * 2),
    ({"format": "fp8_e5m2", "granularity": "channel"}, 128 * 8 + 16),
])  # fmt: skip
def test_every_stored_bit_is_counted(scheme, bits):
    assert quantize_tensor(weights(0, 40, 128), WeightScheme(**scheme)).stored_bits == 40 * bits


def test_compressed_tensors_agrees_on_codes():
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize as their_quantize

    for bits in (8, 4):
        w = weights(9, 8, 128)
        done = quantize_tensor(w, WeightScheme(format=f"int{bits}", granularity="g64", scale="absmax"))
        theirs = QuantizationArgs(num_bits=bits, symmetric=True, strategy="group", group_size=64)
        zero = torch.zeros_like(done.scale.float())
        assert torch.equal(their_quantize(w, done.scale.float(), zero, theirs), done.codes())
