"""Rounding that is not to nearest: right on average, right in sum, and the same in every run."""

import pytest
import torch

from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.recipe.recipe import WeightScheme

FORMATS = [
    {"format": "int4", "granularity": "g32"},
    {"format": "int4", "granularity": "g32", "symmetric": False, "zero_point": "free"},
    {"format": "int3", "granularity": "g36", "symmetric": False},
    {"format": "int4", "granularity": "tensor", "offset": 0.5},
    {"format": "int2", "granularity": "g32", "symmetric": False},
]


def weights(rows: int = 24, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * 0.05


def done(w: torch.Tensor, scheme: dict, name: str = "weight", **options):
    # absmax: nothing is clipped
    return quantize_tensor(w, WeightScheme.model_validate({"scale": "absmax"} | scheme | options), name)


def steps(quantized) -> torch.Tensor:
    """The scale of every weight."""
    columns, sizes = quantized.shape[1], quantized.granularity.group_size
    spread = quantized.scale.float().repeat_interleave(sizes or columns, 1)[:, :columns]
    return spread.expand(quantized.shape)


@pytest.mark.parametrize("scheme", FORMATS)
def test_stochastic_rounding_is_right_on_average(scheme):
    w, tries = weights(12, 96), 200
    first = done(w, scheme, rounding="stochastic")
    total = sum(
        done(w, scheme, rounding="stochastic", seed=seed).dequantize().double() for seed in range(tries)
    )
    step = steps(first).double()
    codes = done(w, scheme).codes()
    inner = (codes > codes.min()) & (
        codes < codes.max()
    )  # a rounded zero point lets the outermost be clipped
    # One step up or down: a standard deviation of at most half a step.
    assert ((total / tries - w).abs() <= 5 * step / 2 / tries**0.5 + step * 0.02)[inner].all()
    error = (first.dequantize() - w).abs()
    assert (error <= step * 1.01).all()
    assert (error > step / 2).any()


def test_stochastic_binary_keeps_the_mean_of_what_lies_between_its_values():
    w = weights(8, 64)
    scheme = WeightScheme(format="binary", rounding="stochastic")
    scale = quantize_tensor(w, scheme).scale.float()
    tries = torch.stack([
        quantize_tensor(w, scheme.model_copy(update={"seed": seed})).dequantize() for seed in range(400)
    ])  # fmt: skip
    expected = torch.maximum(torch.minimum(w, scale), -scale)
    assert ((tries.double().mean(0) - expected).abs() <= 5 * scale / 20).all()


@pytest.mark.parametrize("options", [{"rounding": "stochastic"}, {"noise": 0.3}])
def test_randomness_follows_the_seed_and_the_name(options):
    scheme, w = {"format": "int4", "granularity": "g32"}, weights()
    first = done(w, scheme, **options).codes()
    assert torch.equal(first, done(w, scheme, **options).codes())
    assert not torch.equal(first, done(w, scheme, seed=1, **options).codes())
    assert not torch.equal(first, done(w, scheme, "other", **options).codes())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    done(w, scheme, **options)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("scheme", FORMATS)
def test_feedback_keeps_the_sum_of_every_row_to_half_a_step(scheme):
    w = weights()
    fed, plain = done(w, scheme, rounding="feedback"), done(w, scheme)
    assert torch.equal(fed.scale, plain.scale)
    step = steps(fed)
    running = (fed.dequantize() - w).double().cumsum(1).abs()
    clipped = ((fed.dequantize() - w).abs() > 1.001 * step).any(1)
    # A weight at the end of the range may lose what was carried to it, once a group.
    assert (running[~clipped, -1] <= 2.5 * step[~clipped, -1]).double().mean() > 0.9
    assert running[:, -1].median() < 0.51 * step[:, -1].median()
    assert running[:, -1].square().sum() < (plain.dequantize() - w).double().sum(1).square().sum() / 2
    assert (fed.dequantize() - w).square().sum() > (plain.dequantize() - w).square().sum()


def test_feedback_is_the_loop_over_a_row():
    w = weights(1, 50)
    quantized = done(w, {"format": "int3", "granularity": "g20", "symmetric": False}, rounding="feedback")
    carried = 0.0
    for j, value in enumerate(w[0].tolist()):
        scale, zero = (part[0, j // 20].item() for part in (quantized.scale, quantized.zero_points()))
        code = min(max(round((value + carried) / scale) + zero, 0), 7)
        assert quantized.codes()[0, j].item() == code
        carried = min(max(value + carried - (code - zero) * scale, -scale / 2), scale / 2)


def test_noise_is_in_steps_and_the_grid_is_that_of_the_weights():
    w = weights(200, 96)
    scheme = {"format": "int8", "granularity": "g32"}
    plain = done(w, scheme)
    noisy = done(w, scheme, noise=1.0)
    assert torch.equal(noisy.scale, plain.scale)
    difference = ((noisy.dequantize() - w) / steps(noisy)).double()
    # The variance of the noise and that of rounding, a twelfth of a step squared, add up.
    assert difference.square().mean().item() == pytest.approx(1 + 1 / 12, rel=0.03)
    assert abs(difference.mean().item()) < 0.03


@pytest.mark.sample(8)
@pytest.mark.parametrize("options", [
    {"rounding": "stochastic"}, {"rounding": "feedback"}, {"noise": 1.0}, {"noise": 1.0, "rounding": "feedback"},
])  # fmt: skip
@pytest.mark.parametrize("scheme", [
    *FORMATS, {"format": "binary", "scale": "mse"}, {"format": "binary", "scale": "mse", "symmetric": False},
])  # fmt: skip
def test_edge_values_stay_finite(scheme, options):
    largest = torch.finfo(torch.float16).max / 2
    for w in (
        torch.zeros(3, 70),
        torch.full((2, 70), -3.0),
        weights(2, 70) * 1e-38,
        torch.full((2, 70), largest),
    ):
        assert done(w, scheme, **options).dequantize().isfinite().all()
