"""One matrix: every format, granularity, symmetry and scale rule, equal to the last bit to plain loops over its groups, and within the bounds that must hold."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bitassay.errors import BitassayError
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.codes.scales import SEARCH_FACTORS, middle_zero_points
from bitassay.quantization.codes.tensor import LowRank
from bitassay.quantization.recipe.formats import FORMATS
from bitassay.quantization.recipe.recipe import WeightScheme

GRANULARITIES = ("tensor", "channel", "g32", "g64")
DTYPES = ("float16", "bfloat16", "float32")
SHAPES = [(1, 1), (3, 1), (3, 7), (5, 64), (2, 96), (4, 100), (1, 160)]
FLOAT32 = np.float32
WEIGHTS = ("format", "granularity", "symmetric", "scale", "scale_dtype")


ZERO_POINTS = ("searched", "middle", "free")
OPTIONS = ({}, *({"zero_point": z} for z in ZERO_POINTS), {"offset": 0.5}, {"restricted": True})


def schemes():
    """Every scheme that a recipe may ask for, but for the dtype of its scales and how weights are rounded."""
    for name, granularity, symmetric, scale, options in itertools.product(
        FORMATS, GRANULARITIES, (True, False), ("absmax", "percentile", "mse"), OPTIONS
    ):
        if options and (name not in ("int4", "int2") or granularity != "g32" or scale == "percentile"):
            continue
        if scale == "percentile" and granularity not in ("tensor", "g32"):
            continue
        if FORMATS[name].levels is not None:  # test_two_levels.py
            continue
        try:
            yield WeightScheme(
                format=name, granularity=granularity, symmetric=symmetric, scale=scale, **options
            )
        except ValidationError:
            continue


def label(s: WeightScheme) -> str:
    idle = WeightScheme(format=s.format)
    options = [f"{k}={v}" for k, v in s.model_dump().items() if k not in WEIGHTS and v != getattr(idle, k)]
    return "-".join([s.format, s.granularity, "sym" if s.symmetric else "asym", s.scale, *options])


ALL = list(schemes())
every_scheme = pytest.mark.parametrize("scheme", ALL, ids=label)
STEPS = [
    scheme for scheme in ALL if scheme.number_format.table is None
]  # tables: test_gguf_blocks.py, test_two_levels.py
every_scheme_of_steps = pytest.mark.parametrize("scheme", STEPS, ids=label)


def weights(seed: int, rows: int = 6, columns: int = 100) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * 0.05
    return w * (1 + 4 * (torch.rand(rows, columns, generator=generator) > 0.97))  # a few outliers


def groups_of(scheme: WeightScheme, shape: tuple[int, int]):
    """Index of each group, and the place of its scale, by the definition of granularity."""
    rows, columns = shape
    if scheme.granularity == "tensor":
        yield np.s_[:, :], (0, 0)
        return
    size = columns if scheme.granularity == "channel" else int(scheme.granularity[1:])
    for row in range(rows):
        for index, start in enumerate(range(0, columns, size)):
            yield np.s_[row, start : start + size], (row, index)


def stored(value: float, dtype: str) -> FLOAT32:
    """`value` as it reads back from `dtype`."""
    return FLOAT32(torch.tensor(float(value), dtype=torch.float64).to(getattr(torch, dtype)).item())


def stored_scale(value: FLOAT32, dtype: str) -> FLOAT32:
    smallest = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149}[dtype]
    return stored(max(value, smallest), dtype) if value > 0 else FLOAT32(1)


def nearest_fp8(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The representable numbers closest to `values`, ties to the even mantissa, from the table of all 256."""
    raw = np.array(sorted(range(256), key=lambda byte: byte & 1), dtype=np.uint8)
    table = torch.from_numpy(raw).view(dtype).double().numpy()
    table = table[np.isfinite(table)]
    inside = np.clip(values.astype(np.float64), table.min(), table.max())
    return table[np.abs(inside[:, None] - table).argmin(axis=1)].astype(FLOAT32)


def code_range(scheme: WeightScheme) -> tuple[int, int]:
    fmt, b = FORMATS[scheme.format], int(FORMATS[scheme.format].bits)
    if fmt.kind == "ternary":
        return -1, 1
    return (-(2 ** (b - 1)) + scheme.restricted, 2 ** (b - 1) - 1) if scheme.symmetric else (0, 2**b - 1)


def rounded(w: np.ndarray, scale: FLOAT32, zero: FLOAT32, scheme: WeightScheme) -> np.ndarray:
    fmt = FORMATS[scheme.format]
    if fmt.float_dtype is not None:
        return nearest_fp8(w / scale, fmt.float_dtype)
    low, high = code_range(scheme)
    whole = FLOAT32(round(float(zero)))
    part = zero - whole - FLOAT32(scheme.offset)
    return np.array([min(max(round(float(v + part)) + whole, low), high) for v in w / scale], dtype=FLOAT32)


def weights_of(codes: np.ndarray, scale: FLOAT32, zero: FLOAT32, scheme: WeightScheme) -> np.ndarray:
    return (codes - zero + FLOAT32(scheme.offset)) * scale


def first_by_hand(w: np.ndarray, scheme: WeightScheme) -> tuple[FLOAT32, FLOAT32]:
    """The grid of absmax and percentile, where the search begins."""
    fmt, dtype = FORMATS[scheme.format], scheme.scale_dtype
    percent = scheme.percentile if scheme.scale == "percentile" else 100
    if scheme.symmetric:
        outermost = {
            "int8": 127,
            "int5": 15,
            "int4": 7,
            "int3": 3,
            "int2": 1,
            "ternary": 1,
            "fp8_e4m3": 448,
            "fp8_e5m2": 57344,
        }
        reach = FLOAT32(np.percentile(np.abs(w), percent))
        return stored_scale(reach / FLOAT32(outermost[fmt.name] + scheme.offset), dtype), FLOAT32(0)
    low, high, top = (
        FLOAT32(np.percentile(w, 100 - percent)),
        FLOAT32(np.percentile(w, percent)),
        2**fmt.bits - 1,
    )
    if scheme.zero_point == "free":
        reach = FLOAT32(max(-low, high, 0)) if percent < 100 else np.abs(w).max()
        scale = stored_scale(max((high - low) / FLOAT32(top), reach / FLOAT32(4096)), dtype)
        return scale, stored(-low / scale, dtype)
    low, high = min(low, FLOAT32(0)), max(high, FLOAT32(0))
    scale = stored_scale((high - low) / FLOAT32(top), dtype)
    return scale, FLOAT32(min(max(round(float(FLOAT32(scheme.offset) - low / scale)), 0), top))


def by_hand(w: np.ndarray, scheme: WeightScheme, found_scale: FLOAT32, found_zero: FLOAT32):
    """Scale, zero point, mean, codes and weights of one group. Where the search has the choice, it must not be
    worse than what it began with, and the found grid is taken as given."""
    kind, dtype = FORMATS[scheme.format].kind, scheme.scale_dtype
    if kind == "binary":
        low, high = FLOAT32(-np.abs(np.float64(w)).mean()), FLOAT32(np.abs(np.float64(w)).mean())
        if not scheme.symmetric:  # the best way to part the sorted weights
            ordered = np.sort(np.float64(w))
            parts = [(ordered[:k], ordered[k:] if k < len(w) else ordered[:k]) for k in range(1, len(w) + 1)]
            low, high = min(
                ((FLOAT32(a.mean()), FLOAT32(b.mean())) for a, b in parts),
                key=lambda ends: (np.minimum(*(np.abs(np.float64(w) - end) for end in ends)) ** 2).sum(),
            )
        mean = FLOAT32(0) if scheme.symmetric else stored((high + low) / 2, dtype)
        scale = stored((high - low) / 2, dtype)
        codes = np.where(w < mean, FLOAT32(-1), FLOAT32(1))
        return scale, FLOAT32(0), mean, codes, codes * scale + mean
    scale, zero = first_by_hand(w, scheme)
    if scheme.scale == "mse" and kind == "ternary":
        top = np.sort(np.abs(np.float64(w)))[::-1]
        gain = [top[:k].sum() ** 2 / k for k in range(1, len(top) + 1)]
        scale = stored_scale(FLOAT32(top[: int(np.argmax(gain)) + 1].mean()), dtype)
    elif scheme.scale == "mse":

        def error(scale: FLOAT32, zero: FLOAT32) -> float:
            back = weights_of(rounded(w, scale, zero, scheme), scale, zero, scheme)
            return ((back - w).astype(np.float64) ** 2).sum()

        factors = (1,) if scheme.zero_point == "free" else SEARCH_FACTORS
        starts = [(scale, zero)]
        if scheme.zero_point == "middle":
            top = FLOAT32(2 ** FORMATS[scheme.format].bits - 1)
            places = middle_zero_points(FORMATS[scheme.format]).numpy()
            starts = [(stored_scale(max(-w.min() / z, w.max() / (top - z)), dtype), z) for z in places]
        least = min(
            error(stored_scale(first * FLOAT32(factor), dtype), z)
            for first, z in starts
            for factor in factors
        )
        assert error(found_scale, found_zero) <= least * (1 + 1e-5)
        scale = stored_scale(found_scale, dtype)
        zero = found_zero if scheme.zero_point != "integer" else zero
    elif scheme.scale == "percentile":  # which numpy interpolates in another order
        assert found_scale == pytest.approx(scale, rel=2e-3)
        assert abs(found_zero - zero) <= 1
        scale, zero = found_scale, found_zero
    codes = rounded(w, scale, zero, scheme)
    return scale, zero, FLOAT32(0), codes, weights_of(codes, scale, zero, scheme)


@pytest.mark.sample(20)
@every_scheme_of_steps
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31), shape=st.sampled_from(SHAPES), dtype=st.sampled_from(DTYPES))
def test_scales_zero_points_codes_and_weights_are_those_of_the_definition(scheme, seed, shape, dtype):
    scheme = scheme.model_copy(update={"scale_dtype": dtype})
    w = weights(seed, *shape)
    done = quantize_tensor(w, scheme)
    back, codes, scales = done.dequantize().numpy(), done.codes().numpy(), done.scale.float().numpy()
    zero_points, means = done.zero_points(), None if done.mean is None else done.mean.float().numpy()
    assert done.scale.dtype == getattr(torch, dtype)
    assert back.shape == codes.shape == shape
    for place, where in groups_of(scheme, shape):
        found = scales[where], FLOAT32(0) if zero_points is None else zero_points[where].numpy()
        scale, zero, mean, by_hand_codes, by_hand_back = by_hand(w.numpy()[place].ravel(), scheme, *found)
        assert scales[where] == scale
        assert zero_points is None or zero_points[where].item() == zero
        assert means is None or means[where] == mean
        assert np.array_equal(codes[place].ravel(), by_hand_codes)
        assert np.array_equal(back[place].ravel(), by_hand_back)


@pytest.mark.sample(20)
@every_scheme_of_steps
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**31), shape=st.sampled_from(SHAPES))
@example(seed=657029, shape=(1, 1))
def test_the_error_is_at_most_half_a_step_inside_the_range(scheme, seed, shape):
    w = weights(seed, *shape)
    done = quantize_tensor(w, scheme)
    fmt, w = done.format, w.numpy()
    scale, zero = np.zeros(shape), np.zeros(shape)
    for place, where in groups_of(scheme, shape):
        scale[place] = float(done.scale[where])
        zero[place] = 0 if done.zero_points() is None else float(done.zero_points()[where])
    error = np.abs(done.dequantize().numpy() - w)
    if fmt.kind == "float":
        mantissa, smallest = {"fp8_e4m3": (3, 2.0**-9), "fp8_e5m2": (2, 2.0**-16)}[fmt.name]
        inside = np.abs(w) <= fmt.largest * scale
        bound = np.maximum(np.abs(w) * 2.0 ** -(mantissa + 1), scale * smallest / 2)
    elif fmt.kind == "binary":
        return  # two values: nothing is between them
    else:
        low, high = code_range(scheme)
        zero = zero - scheme.offset
        inside = ((low - zero) * scale <= w) & (w <= (high - zero) * scale)
        bound = scale / 2
    assert (error <= bound * (1 + 1e-5) + 1e-12)[inside].all()
    if scheme.scale == "absmax":  # nothing is outside but by the rounding of scale and zero point
        steps = fmt.largest if scheme.symmetric else fmt.code_range(False)[1]
        rounded = scale * 2.0**-8 + 2.0**-25  # the second for scales that are subnormal in fp16
        shifted = 0 if scheme.symmetric else scale / 2
        if scheme.zero_point == "free":
            shifted = np.abs(w).max() * 2.0**-8  # at most that many steps from zero, in fp16
        assert (error <= bound + steps * rounded + shifted).all()


def test_fp8_is_a_cast_by_torch():
    w = weights(2, 4, 64)
    for name, dtype in (("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)):
        done = quantize_tensor(w, WeightScheme(format=name, scale_dtype="float32"))
        scale = w.abs().amax(1, keepdim=True) / torch.finfo(dtype).max
        assert torch.equal(done.scale, scale)
        assert torch.equal(done.codes(), (w / scale).to(dtype).float())
        assert done.packed.view(dtype).shape == (4 * 64,)


@pytest.mark.parametrize(("name", "largest"), [("fp8_e4m3", 448), ("fp8_e5m2", 57344)])
def test_fp8_values_beyond_the_range_are_clipped(name, largest):
    """A scale that float16 rounds down from 1.4 steps to 1 leaves weights that FP8 has no number for."""
    w = torch.tensor([[1.4, -1.4, 0.5]]) * largest * 2.0**-24
    done = quantize_tensor(w, WeightScheme(format=name, scale_dtype="float16"))
    assert done.scale.item() == 2.0**-24
    assert done.codes().tolist() == [[largest, -largest, largest / 2]]


def test_fp8_scales_of_small_weights_keep_their_precision():
    w = weights(11) * 1e-3
    for name, worst in (("fp8_e4m3", 0.04), ("fp8_e5m2", 0.08)):
        back = quantize_tensor(w, WeightScheme(format=name)).dequantize()
        assert (back - w).norm() / w.norm() < worst


@pytest.mark.sample(24)
@every_scheme
@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_values_stay_finite(scheme, dtype):
    scheme = scheme.model_copy(update={"scale_dtype": dtype})
    largest = torch.finfo(getattr(torch, dtype)).max / 2
    signs = torch.where(weights(0, 4, 70) < 0, -1.0, 1.0)
    for w in (
        torch.zeros(3, 70),
        torch.full((2, 70), -3.0),
        torch.cat([torch.zeros(2, 64), torch.ones(2, 6)], 1),
        weights(0, 70, 1),
        weights(0, 4, 70) * 1e-38,  # partly subnormal in fp32, zero in fp16
        torch.full((2, 70), 1e-45),
        torch.full((2, 70), largest),
        signs * largest,
    ):
        done = quantize_tensor(w, scheme)
        assert done.scale.isfinite().all()
        assert done.dequantize().isfinite().all()
        if not w.any():  # a grid with an offset, or of a table, has no zero
            nearest = min(map(abs, scheme.number_format.table or [scheme.offset]))
            assert (done.dequantize().abs() <= nearest * stored_scale(FLOAT32(1e-45), dtype)).all()


@pytest.mark.sample(8)
@every_scheme
@settings(max_examples=8, deadline=None)
@given(
    values=st.lists(st.floats(-32000, 32000, width=32), min_size=1, max_size=40),
    heights=st.lists(st.floats(0, 1e30), min_size=1, max_size=8),
    weighed=st.booleans(),
)
def test_no_nan_ever_leaves_the_quantizer(scheme, values, heights, weighed):
    w = torch.tensor([values, values[::-1]])
    importance = torch.tensor(heights).repeat(len(values))[: len(values)] if weighed else None
    back = quantize_tensor(w, scheme, importance=importance).dequantize()
    assert back.isfinite().all()
    # A grid may reach beyond the weights, by its outermost code and by the rounding of tiny scales.
    assert (back.abs() <= 4 * w.abs().max() + 256 * 2.0**-24).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_importances_that_are_none_are_refused_by_name(value):
    importance = torch.ones(100)
    importance[3] = value
    for scheme in ({"format": "int2"}, {"format": "binary", "residual": 0.1}):
        with pytest.raises(BitassayError, match=r"(?s)up_proj.*calibration"):
            quantize_tensor(weights(0), WeightScheme(**scheme), "up_proj", importance)


@pytest.mark.sample(10)
@every_scheme
def test_a_group_larger_than_the_row_is_the_row(scheme):
    if not scheme.granularity.startswith("g"):
        return
    w = weights(5, 6, 20)
    larger, row = (scheme.model_copy(update={"granularity": name}) for name in ("g64", "channel"))
    assert torch.equal(quantize_tensor(w, larger).dequantize(), quantize_tensor(w, row).dequantize())


@pytest.mark.parametrize("dtype", DTYPES)
def test_binary_is_exact_for_the_largest_weights_that_are_taken(dtype):
    """A sum of 70 such weights overflows fp32: as inf - inf it would be a NaN in the model."""
    w = torch.full((2, 70), torch.finfo(getattr(torch, dtype)).max / 4)
    for symmetric in (True, False):
        scheme = WeightScheme(format="binary", symmetric=symmetric, scale="mse", scale_dtype=dtype)
        assert torch.allclose(quantize_tensor(w, scheme).dequantize(), w, rtol=0.01)


@pytest.mark.sample(12)
@every_scheme
def test_constant_groups_come_back(scheme):
    tolerance = 0.3 if scheme.format == "int2" else 0.04 if scheme.offset else 0.02
    for value in (0.25, -3.0):
        back = quantize_tensor(torch.full((2, 70), value), scheme).dequantize()
        assert back.numpy() == pytest.approx(np.full((2, 70), value), rel=tolerance)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused_by_name(value):
    w = weights(0)
    w[2, 3] = value
    with pytest.raises(BitassayError, match=r"layers\.3\.up_proj"):
        quantize_tensor(w, WeightScheme(format="int4"), "layers.3.up_proj")


def test_weights_beyond_the_scales_dtype_are_refused_by_name_and_the_remedy_works():
    with pytest.raises(BitassayError, match=r"(?s)layers\.3\.up_proj.*float16.*scale_dtype: float32"):
        quantize_tensor(torch.full((1, 4), 1e6), WeightScheme(format="int8"), "layers.3.up_proj")
    with pytest.raises(BitassayError):  # its range of two times 40000 would overflow
        quantize_tensor(torch.tensor([[4e4, -4e4]]), WeightScheme(format="int4", symmetric=False))
    wide = WeightScheme(format="int8", scale_dtype="float32")
    assert quantize_tensor(torch.full((1, 4), 1e6), wide).dequantize().allclose(torch.tensor(1e6), rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_views_are_quantized_as_their_fp32_values(dtype):
    w = weights(7, 100, 6).to(dtype).T  # not contiguous
    before = w.clone()
    scheme = WeightScheme(format="int4", granularity="g32")
    assert torch.equal(
        quantize_tensor(w, scheme).dequantize(), quantize_tensor(w.float().contiguous(), scheme).dequantize()
    )
    assert torch.equal(w, before)


@pytest.mark.sample(6)
@every_scheme
def test_the_input_is_not_changed(scheme):
    w = weights(12)
    before = w.clone()
    quantize_tensor(w, scheme)
    assert torch.equal(w, before)


@pytest.mark.parametrize(("scheme", "row_bits"), [
    ({"format": "int8", "granularity": "channel"}, 128 * 8 + 16),
    ({"format": "int4", "granularity": "g64", "symmetric": False}, 128 * 4 + 2 * 16 + 2 * 4),
    ({"format": "int2", "granularity": "g32"}, 128 * 2 + 4 * 16),
    ({"format": "int3", "granularity": "g64", "scale_dtype": "float32"}, 128 * 3 + 2 * 32),
    ({"format": "ternary", "granularity": "g64"}, 128 * 1.6 + 2 * 16),
    ({"format": "binary", "granularity": "g64", "symmetric": False}, 128 + 2 * 16 * 2),
    ({"format": "fp8_e5m2", "granularity": "channel"}, 128 * 8 + 16),
    ({"format": "int4", "granularity": "g100"}, 128 * 4 + 2 * 16),
])  # fmt: skip
def test_every_stored_bit_is_counted(scheme, row_bits):
    assert quantize_tensor(weights(0, 40, 128), WeightScheme(**scheme)).stored_bits == 40 * row_bits


@pytest.mark.parametrize(("scheme", "bits"), [
    ({"format": "int4", "symmetric": False}, 4.3125), ({"format": "int2", "symmetric": False}, 2.28125), ({"format": "ternary"}, 1.6 + 16 / 64),
    ({"format": "binary"}, 1.25),
])  # fmt: skip
def test_bits_per_weight_of_groups_of_64(scheme, bits):
    done = quantize_tensor(weights(0, 40, 128), WeightScheme(granularity="g64", **scheme))
    assert done.stored_bits / (40 * 128) == bits


@pytest.mark.parametrize("granularity", ["channel", "g64", "g48"])
def test_importance_is_that_of_the_columns(granularity):
    """A column that counts for all the others together is rounded as if it was alone with its kind."""
    w = weights(3, 40, 128)
    scheme = WeightScheme(format="int2", granularity=granularity, symmetric=False)
    importance = torch.full((128,), 1e-6)
    importance[5::32] = 1
    error, plain = (
        (quantize_tensor(w, scheme, importance=given).dequantize() - w).square()
        for given in (importance, None)
    )
    assert error[:, 5::32].sum() < 0.7 * plain[:, 5::32].sum()
    assert error.sum() > plain.sum()


def test_a_second_plane_and_low_rank_factors_are_added_counted_and_moved():
    w = weights(4, 40, 128)
    scheme = WeightScheme(format="int4", granularity="g64")
    plain, plane = quantize_tensor(w, scheme), quantize_tensor(w * 0.1, scheme)
    factors = LowRank(weights(5, 40, 3).half(), weights(6, 3, 128).half())
    both = replace(plain, residual=plane, low_rank=factors)
    expected = plain.dequantize() + plane.dequantize() + factors.a.float() @ factors.b.float()
    assert torch.equal(both.dequantize(), expected)
    assert both.stored_bits == 2 * plain.stored_bits + 16 * 3 * (40 + 128)
    moved = both.to("meta")
    assert moved.residual.scale.device.type == moved.low_rank.a.device.type == "meta"


@pytest.mark.parametrize("theirs", [
    {"num_bits": 8, "type": "int"}, {"num_bits": 4, "type": "int"}, {"num_bits": 8, "type": "float"},
])  # fmt: skip
@pytest.mark.parametrize("granularity", ["channel", "g64"])
def test_compressed_tensors_agrees_on_codes_and_weights(theirs, granularity):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle import forward

    format = f"int{theirs['num_bits']}" if theirs["type"] == "int" else "fp8_e4m3"
    w = weights(9, 8, 128)
    done = quantize_tensor(
        w, WeightScheme(format=format, granularity=granularity, scale="absmax", scale_dtype="float32")
    )
    layout = {"strategy": "group", "group_size": 64} if granularity == "g64" else {"strategy": "channel"}
    args = QuantizationArgs(symmetric=True, **layout, **theirs)
    zero = torch.zeros_like(done.scale)
    codes = forward.quantize(w, done.scale, zero, args)
    assert torch.equal(codes, done.codes())
    assert torch.equal(forward.dequantize(codes, done.scale, zero, args), done.dequantize())
