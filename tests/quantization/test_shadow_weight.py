"""Latent weights: they start on the codes that they are given, learn with the gradients that the header of
`shadow_weight.py` states, and pack what they compute."""

import pytest
import torch
from torch import nn

from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.solvers.shadow_weight import ShadowWeight, shadow_linears

SCHEMES = [
    WeightScheme(format="int2", granularity="g16", symmetric=False),
    WeightScheme(format="int2", granularity="g16", offset=0.5),
    WeightScheme(format="int2", granularity="g64", symmetric=False, zero_point="middle"),
    WeightScheme(format="int3", granularity="channel"),
    WeightScheme(format="int4", granularity="g64", symmetric=False, zero_point="free", scale="mse"),
    WeightScheme(format="int4", granularity="g16", symmetric=False, zero_point="minimum", scale="mse"),
    WeightScheme(format="int8", granularity="g16", restricted=True),
    WeightScheme(format="ternary", granularity="g16"),
    WeightScheme(format="binary", granularity="g16", symmetric=False),
    WeightScheme(format="binary", granularity="channel"),
    *(WeightScheme(format=name) for name in ("q2_k", "q3_k", "q4_k", "iq4_nl", "iq4_xs")),
]


def name_of(scheme):
    return f"{scheme.format}-{scheme.granularity}"


def columns_of(scheme):
    return 40 if scheme.number_format.fixed_group is None else 512


def latent_of(scheme, seed=0):
    weight = torch.randn(6, columns_of(scheme), generator=torch.Generator().manual_seed(seed))
    tensor = quantize_tensor(weight, scheme)
    return ShadowWeight(scheme, weight, tensor.grid), tensor, weight


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_it_starts_where_rounding_to_nearest_left_off(scheme):
    latent, tensor, _ = latent_of(scheme)
    packed = latent.quantized()
    assert torch.equal(packed.codes(), tensor.codes())
    assert packed.stored_bits == tensor.stored_bits
    assert torch.allclose(packed.dequantize(), tensor.dequantize(), atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_what_is_computed_with_is_what_is_packed(scheme):
    latent, _, _ = latent_of(scheme)
    with torch.no_grad():
        for parameter in [latent.u, *latent.grid_parameters()]:
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    latent.clamp()
    assert torch.allclose(latent().detach(), latent.quantized().dequantize(), atol=1e-5)


def test_a_latent_goes_on_from_another():
    latent, tensor, _ = latent_of(SCHEMES[0])
    again = ShadowWeight(SCHEMES[0], latent.weight(), tensor.grid)
    assert torch.allclose(again.u, latent.u, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_gradients(scheme):
    latent, tensor, _ = latent_of(scheme)
    wanted = torch.randn(6, columns_of(scheme), generator=torch.Generator().manual_seed(2))
    (latent() * wanted).sum().backward()
    bounds, grid = latent.sizes.tolist(), tensor.grid
    wide = grid.scale.repeat_interleave(latent.sizes, dim=1) * scheme.number_format.step
    assert torch.allclose(latent.u.grad, wanted * wide)
    mean = 0 if grid.mean is None else grid.mean.repeat_interleave(latent.sizes, dim=1)
    of_scale = [part.sum(1) for part in (wanted * (tensor.dequantize() - mean)).split(bounds, dim=1)]
    assert torch.allclose(latent.gain.grad, torch.stack(of_scale, 1), atol=5e-3)
    sums = torch.stack([part.sum(1) for part in wanted.split(bounds, dim=1)], 1)
    if scheme.zero_point == "free":
        assert torch.allclose(latent.zero.grad, -tensor.scale.float() * sums, atol=1e-4)
    levels = scheme.number_format.levels
    if tensor.mean is not None:  # minima of integers move in steps
        step = 1 if scheme.number_format.kind == "binary" else grid.scale
        assert torch.allclose(latent.mean.grad, sums * step, atol=1e-3)
    if levels is not None:  # d and e are of all groups of a run
        of_runs = [torch.stack(of_scale, 1)] + ([] if grid.mean is None else [grid.mean * sums])
        for which, part in enumerate(of_runs):
            of_run = part.view(6, 2, -1).sum(2)
            assert torch.allclose(latent.unit_gain.grad[which], of_run, atol=2e-2)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_a_group_of_zeros_is_not_moved(scheme):
    weight = torch.randn(6, columns_of(scheme), generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    tensor = quantize_tensor(weight, scheme)
    latent = ShadowWeight(scheme, weight, tensor.grid)
    (latent() - 1).square().sum().backward()
    with torch.no_grad():
        for parameter in (latent.u, *latent.grid_parameters()):
            parameter -= 3 * parameter.grad.sign() * (1 if parameter is latent.u else 0.1)
    found = latent.quantized().dequantize()
    assert torch.equal(found[3], tensor.dequantize()[3])
    assert not torch.equal(found, tensor.dequantize())


def test_clipped_positions_come_back_within_half_a_step():
    latent, _, _ = latent_of(SCHEMES[0])
    with torch.no_grad():
        latent.u += 100
    latent.clamp()
    assert latent.u.max() < 3.5
    assert torch.equal(latent.quantized().codes(), torch.full((6, 40), 3.0))


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_settling_leaves_codes_and_takes_latents_from_the_thresholds(scheme):
    latent, _, _ = latent_of(scheme)
    before, codes = latent().detach().clone(), latent.quantized().codes()
    places = codes / scheme.number_format.step
    away = (latent.u.detach() - places).abs()
    latent.shrink_to_grid(0.5)
    assert torch.equal(latent(), before)
    assert torch.equal(latent.quantized().codes(), codes)
    if scheme.number_format.kind != "binary":
        places = places + latent.zero.new_zeros(())
        assert torch.allclose((latent.u - places).abs(), away / 2, atol=1e-5)


def test_linears_compute_with_latents_only_inside():
    model = nn.Sequential(nn.Linear(40, 6), nn.ReLU())
    latent, tensor, _ = latent_of(SCHEMES[0])
    x, own = torch.randn(3, 40), model[0]
    with shadow_linears(model, {"0": latent}):
        assert torch.allclose(model(x), (x @ tensor.dequantize().T + own.bias).relu(), atol=1e-4)
    assert torch.equal(model(x), own(x).relu())
