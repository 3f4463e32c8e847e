"""The pretend accelerator refuses what a real one refuses, and computes what a CPU computes."""

import pytest
import torch
from torch import nn

from bitassay.testing.strict_device import strict_device


@pytest.fixture
def device():
    with strict_device() as made:
        yield made


def test_it_computes_what_the_cpu_computes(device):
    x, linear = torch.randn(5, 4), nn.Linear(4, 3)
    linear(x).square().sum().backward()
    wanted = linear.weight.grad
    linear.zero_grad()
    linear.to(device.name)(x.to(device.name)).square().sum().backward()
    assert linear.weight.grad.device == torch.device(device.name)
    assert torch.equal(linear.weight.grad.cpu(), wanted)


@pytest.mark.parametrize("make", [torch.zeros, torch.empty, torch.ones])
def test_tensors_are_made_there(device, make):
    assert make(3, device=device.name).device == torch.device(device.name)
    assert torch.tensor([1, 2], device=device.name).tolist() == [1, 2]


@pytest.mark.parametrize(
    "mix",
    [
        lambda ours, cpu: ours + cpu,
        lambda ours, cpu: torch.cat([ours, cpu]),
        lambda ours, cpu: ours[cpu.long()],
        lambda ours, cpu: ours.add_(cpu),
        lambda ours, cpu: cpu.add_(ours),
        lambda ours, cpu: ours.gather(0, cpu.long()),
        lambda ours, cpu: torch.where(cpu > 0, ours, 0),
    ],
)
def test_what_is_on_the_cpu_may_not_meet_it(device, mix):
    with pytest.raises(RuntimeError, match="on cpu meets one on strict:0"):
        mix(torch.zeros(2, device=device.name), torch.zeros(2))


def test_numbers_and_copies_may_meet_it(device):
    ours = torch.zeros(2, device=device.name)
    assert (ours + torch.tensor(1.0)).tolist() == [1, 1]
    ours.copy_(torch.ones(2))
    assert ours.tolist() == [1, 1]
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, generator=torch.Generator(), device=device.name)
    with pytest.raises(RuntimeError, match="numpy"):
        ours.numpy()


def test_waits_are_counted(device):
    ours = torch.ones(2, device=device.name)
    before = device.waits
    assert (ours + ours).sum().shape == ()
    assert device.waits == before
    assert ours.sum().item() == 2
    assert bool((ours > 0).all())
    assert ours.cpu().shape == (2,)
    assert device.waits == before + 3


def test_autocast_computes_products_in_16_bits(device):
    x = torch.ones(2, 2, device=device.name)
    with torch.autocast("strict", torch.bfloat16):
        assert nn.functional.linear(x, x).dtype == torch.bfloat16


def test_float64_can_be_taken_away():
    with strict_device(fp64=False) as device, pytest.raises(TypeError, match="float64"):
        torch.ones(2, device=device.name).double()


def test_outside_of_the_context_nothing_works():
    with strict_device() as device:
        ours = torch.ones(2, device=device.name)
    with pytest.raises(RuntimeError, match="outside"):
        ours + ours
