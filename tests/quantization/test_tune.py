"""What end-to-end tuning is made of: the divergence and its gradient, the schedule, the heads it knows."""

import pytest
import torch

from bitassay.errors import BitassayError
from bitassay.models.hooks import hooked
from bitassay.quantization.recipe.solvers import Tune
from bitassay.quantization.solvers import tune
from bitassay.quantization.solvers.descent import Adam, learning_rate, sample_order
from bitassay.quantization.solvers.distillation import head_weight, last_states
from bitassay.quantization.solvers.layerwise import hessian_of
from bitassay.quantization.solvers.learned import relative_error
from bitassay.quantization.solvers.tune import (
    divergence,
    layers_computed_again,
    memory_of,
    tunable_norms,
)
from bitassay.testing.tiny import tiny_model


def test_the_divergence_and_its_gradient(monkeypatch):
    monkeypatch.setattr(tune, "CHUNK_TOKENS", 7)
    g = torch.Generator().manual_seed(0)
    states, base_states = torch.randn(2, 10, 8, generator=g), torch.randn(2, 10, 8, generator=g)
    head, base_head = torch.randn(30, 8, generator=g), torch.randn(30, 8, generator=g)
    value, gradient = divergence(states, base_states, head, base_head)
    wanted = states.clone().requires_grad_()
    p, q = (base_states @ base_head.T).log_softmax(-1), (wanted @ head.T).log_softmax(-1)
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum") / 20
    kl.backward()
    assert value == pytest.approx(kl.item(), rel=1e-5)
    assert torch.allclose(gradient, wanted.grad, atol=1e-6)


def test_neither_massive_activations_nor_the_other_tokens_are_drowned():
    target = torch.ones(1, 4, 8)
    target[0, 0] = 1e4
    others_off = target * torch.tensor([1, 1, 1, 1.5])[:, None]
    assert relative_error(others_off, target).item() == pytest.approx(0.5**2 / 4 / 2, rel=1e-3)
    massive_off = target * torch.tensor([1.5, 1, 1, 1])[:, None]
    assert relative_error(massive_off, target).item() == pytest.approx((0.5**2 / 4 + 0.5**2) / 2, rel=1e-3)
    assert relative_error(torch.ones(1, 1, 8), torch.zeros(1, 1, 8)).isfinite()


def test_memory_follows_the_batch_and_the_weights():
    shapes, small = [(64, 32), (32, 64)], Tune(batch=1)
    for short, a_feature in ((True, 2.6), (False, 5.2)):
        least = memory_of(small, 8, 16, shapes, 1, 32, 5000, 1, short=short)
        larger = memory_of(Tune(batch=3), 8, 16, shapes, 1, 32, 5000, 1, short=short)
        assert larger - least == pytest.approx(2 * 16 * (192 * a_feature + 2 * 4 * 32), abs=1)
        twice = memory_of(small, 8, 16, shapes * 2, 2, 32, 5000, 1, short=short)
        assert twice - least >= 8 * 4096  # a position, two moments in 16 bits
    opened = [
        memory_of(small, 8, 16, shapes * n, n, 32, 5000 * n, 1, short=True, opened=True) for n in (1, 2)
    ]
    assert opened[1] - opened[0] == 4 * 16 * 32  # states between layers alone


def test_layers_are_computed_again_for_the_way_back_and_give_the_same_gradients():
    ids = torch.randint(3, 500, (2, 20), generator=torch.Generator().manual_seed(0))
    model = tiny_model("llama").requires_grad_(True)

    def gradients() -> tuple[list[torch.Tensor], list[int]]:
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
            states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        found = torch.autograd.grad(states.square().mean(), list(model.get_decoder().layers.parameters()))
        return list(found), kept

    plain, all_kept = gradients()
    with layers_computed_again(model):
        again, kept = gradients()
    assert all(map(torch.equal, plain, again))
    assert sum(kept) < sum(all_kept) / 4
    assert all("forward" not in layer.__dict__ for layer in model.get_decoder().layers)


def test_a_model_does_not_diverge_from_itself():
    model = tiny_model("qwen2")
    tokens = torch.randint(3, 500, (3, 20), generator=torch.Generator().manual_seed(0))
    states, head = last_states(model, tokens), head_weight(model)
    value, gradient = divergence(states, states, head.bfloat16(), head.bfloat16())
    assert abs(value) < 1e-6
    assert gradient.abs().max() < 1e-6


def test_the_learning_rate_warms_up_and_dies_down():
    rates = [learning_rate(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3
    assert learning_rate(0, 1, 0) == 1


def test_every_sample_is_seen_before_any_is_seen_again():
    order = sample_order(10, 25, seed=3)
    assert sorted(order[:10].tolist()) == sorted(order[10:20].tolist()) == list(range(10))
    assert len(order) == 25
    assert torch.equal(order, sample_order(10, 25, seed=3))
    assert not torch.equal(order, sample_order(10, 25, seed=4))


def test_norms_of_its_own():
    model = tiny_model("qwen3")
    before = model.model.norm.weight
    norms = tunable_norms(model)
    assert len(norms) == 4 * 3 + 1  # two of the layer, those of queries and keys, and the last
    assert model.model.norm.weight is not before
    assert any(norm is model.model.norm.weight for norm in norms)


def test_a_capped_head_is_refused():
    model = tiny_model("llama")
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(BitassayError, match="final_logit_softcapping"):
        head_weight(model)


@pytest.mark.parametrize("block", [1, 4, 6, 100])
def test_the_hessian_is_summed_over_chunks(monkeypatch, block):
    monkeypatch.setattr("bitassay.quantization.solvers.layerwise.CHUNK_ROWS", 8)
    monkeypatch.setattr("bitassay.quantization.solvers.layerwise.BLOCK_COLUMNS", block)
    x = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(0))
    flat = x.reshape(-1, 6).double()
    assert torch.allclose(hessian_of(x), flat.T @ flat, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_parameters_move_as_adam_says_within_the_backward_pass(dtype, most):
    generator = torch.Generator().manual_seed(0)
    moved = [torch.nn.Parameter(torch.randn(8, 9, generator=generator)) for _ in range(3)]
    wanted = [torch.nn.Parameter(parameter.detach().clone()) for parameter in moved]
    adam = Adam([(moved[:2], 1e-2), (moved[2:], 3e-3)], dtype)
    groups = [{"params": wanted[:2], "lr": 1e-2}, {"params": wanted[2:], "lr": 3e-3}]
    oracle = torch.optim.Adam(groups, betas=(0.9, 0.95))
    held = []
    adam.move = lambda parameter, move=adam.move: (held.append(gradients(moved)), move(parameter))[1]
    with hooked(adam.moving()):
        for _ in range(20):
            target = torch.randn(8, 9, generator=generator)
            for parameters in (moved, wanted):
                sum((parameter - target).square().sum() for parameter in parameters).backward()
            adam.step += 1
            oracle.step()
            oracle.zero_grad()
    assert max(held) == 1
    assert gradients(moved) == 0
    for parameter, other in zip(moved, wanted, strict=True):
        assert (parameter - other).abs().max() < most


def gradients(parameters):
    return sum(parameter.grad is not None for parameter in parameters)
