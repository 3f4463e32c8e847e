"""What is registered for a while is gone after it, also where the model raises on the way."""

import pytest
import torch
from torch import nn

from bitassay.engines.decode import generate, prefill
from bitassay.evaluation.likelihood import continuation_scores
from bitassay.models.hooks import forwarded, hooked
from bitassay.models.walk import decoder_layers, fused_experts
from bitassay.quantization.inputs import ranges
from bitassay.quantization.replication import select
from bitassay.quantization.runtime import experts
from bitassay.quantization.solvers import sensitivity, tune
from bitassay.quantization.transforms import folding, rotation
from bitassay.quantization.transforms.residual_stream import residual_stream
from bitassay.testing.tiny import tiny_model
from bitassay.verification.attacks.hosts import skip
from kinds import hook_count

TOKENS = torch.arange(5, 45).view(2, 20)


class Broken(Exception):
    pass


def refused(*_given, **_named):
    raise Broken


def refuse_rotation(model):
    rotation._normed_stream(model, residual_stream(model), TOKENS)


def refuse_gradients(model):
    with sensitivity._kept_products(model):
        model(TOKENS)


def refuse_layers_again(model):
    with tune.layers_computed_again(model):
        model(TOKENS)


def refuse_skip(model):
    with skip(model, 1):
        model(TOKENS)


WORK = {
    "rotation": refuse_rotation,
    "ranges": lambda model: ranges.collect_ranges(model, TOKENS),
    "observe": lambda model: sensitivity.observe(model, TOKENS, lambda *_: None),
    "divergences": lambda model: list(sensitivity.divergences(model, {"x": {}}, TOKENS[0])),
    "gradients": refuse_gradients,
    "folding": lambda model: folding._norm_readers(model),
    "select": lambda model: select.largest_additions(model, TOKENS),
    "generate": lambda model: generate(model, TOKENS.tolist(), max_new_tokens=3, layers=[1, 2]),
    "prefill": lambda model: prefill(model, TOKENS.tolist(), [[5, 6]] * 2, layers=[1, 2]),
    "likelihood": lambda model: continuation_scores(model, [([5, 6, 7], [8, 9])], max_length=50),
    "layers again": refuse_layers_again,
    "skip": refuse_skip,
}


@pytest.mark.parametrize("name", WORK)
def test_nothing_stays_behind(name):
    model = tiny_model("llama")
    before = hook_count(model)
    # Inside the last layer, which a replaced forward would not reach.
    inner = decoder_layers(model)[-1].get_submodule("mlp")
    inner.forward = refused
    with pytest.raises(Broken):
        WORK[name](model)
    del inner.forward
    assert hook_count(model) == before


def test_routes_of_experts():
    model = tiny_model("qwen3_moe")
    before, names = hook_count(model), list(fused_experts(model))
    decoder_layers(model)[-1].forward = refused
    with pytest.raises(Broken):
        experts.routes(model, TOKENS, names)
    del decoder_layers(model)[-1].forward
    assert hook_count(model) == before


def test_hooks_that_cannot_all_be_registered():
    model, before = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 0

    def registered():
        yield model[0].register_forward_hook(refused)
        raise Broken

    with pytest.raises(Broken), hooked(registered()):
        pass
    assert hook_count(model) == before


def test_a_forward_of_a_module_s_own_comes_back():
    """A layer that runs several times is such a module."""
    plain, own = nn.Linear(2, 2), nn.Linear(2, 2)
    own.forward = first = lambda x: x
    with forwarded([(plain, refused), (own, refused)]), pytest.raises(Broken):
        own(torch.zeros(2))
    assert own.forward is first
    assert "forward" not in plain.__dict__
