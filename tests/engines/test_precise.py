"""The next higher precision is that of a copy in it, and leaves a model as it was."""

import copy
import warnings

import pytest
import torch
from torch import nn

import bitassay
from bitassay.engines.decode import prefill
from bitassay.engines.precise import HIGHER, higher_precision
from bitassay.engines.taps import tap_layers
from bitassay.errors import BitassayError
from bitassay.models.walk import decoder_layers
from bitassay.testing.architectures import architectures, tiny_architecture
from bitassay.testing.tiny import ARCHITECTURES, tiny_model
from kinds import ROTARY, SHORT, tiny_kind

PROMPTS = [[1, *range(5, 15)], [1, 40, 41, 42]]
OUTPUTS = [tuple(range(60, 67)), tuple(range(80, 89))]
MIXTURE = "qwen2_moe"


def in_dtype(architecture, dtype, **changes):
    """Gains that are not one and biases that are not zero, so that none is left out unseen."""
    model = tiny_model(architecture, **changes)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def read(model, prompts=PROMPTS):
    return prefill(model, prompts, OUTPUTS, layers=range(1, len(decoder_layers(model)) + 1))


def same(ones, others):
    return all(
        torch.equal(one.logits, other.logits)
        and all(torch.equal(one.states[layer], other.states[layer]) for layer in one.states)
        for one, other in zip(ones, others, strict=True)
    )


def held(model):
    """Everything that a model is made of: tensors by identity, place, dtype and value; dtypes; hooks."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return (
        {name: (id(tensor), tensor.data_ptr(), tensor.dtype) for name, tensor in tensors},
        {
            (name, key): len(hooks)
            for name, module in model.named_modules()
            for key, hooks in vars(module).items()
            if "hooks" in key and hooks is not None
        },
        {name: set(vars(module)) for name, module in model.named_modules()},
        {name: vars(module)["dtype"] for name, module in model.named_modules() if "dtype" in vars(module)},
    )


def check(model, prompts=PROMPTS):
    """The forward within is that of a copy, differs from the one without, and nothing is left of it."""
    plain, before = read(model, prompts), held(model)
    assert same(read(model, prompts), plain)
    anew = {name for name, own in held(model)[0].items() if own != before[0][name]}
    before = held(model)  # tables of frequencies that depend on the text are made anew for each
    values = copy.deepcopy(model.state_dict())
    higher = HIGHER[model.dtype]
    oracle = copy.deepcopy(model).to(higher)
    if higher == torch.float64:
        oracle.set_experts_implementation("eager")
    expected = read(oracle, prompts)
    with higher_precision(model):
        found = [read(model, prompts) for _ in range(2)]
    assert same(found[0], expected)
    assert same(found[1], expected)
    assert found[0][0].logits.dtype == higher
    assert not same(plain, [type(one)(one.states, one.logits.to(model.dtype)) for one in expected])
    after = held(model)
    assert {name: own for name, own in after[0].items() if name not in anew} == {
        name: own for name, own in before[0].items() if name not in anew
    }
    assert {name: own[2] for name, own in after[0].items()} == {
        name: own[2] for name, own in before[0].items()
    }
    assert after[1:] == before[1:]
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert same(read(model, prompts), plain)


@pytest.mark.parametrize("dtype", HIGHER, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_a_copy_in_the_higher_precision_bit_for_bit(architecture, dtype):
    check(in_dtype(architecture, dtype))


INEXACT = ("git", "moshi")  # part of them goes on in the model's dtype


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=pytest.mark.xfail(strict=True)) if name in INEXACT else name
        for name in architectures()
    ],
)
def test_it_is_that_of_every_architecture(model_type):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny_architecture(model_type).to(torch.bfloat16)
        try:
            read(copy.deepcopy(model).float())
            read(model)
        except Exception as error:
            pytest.skip(f"it is not read at all: {error!r:.100}")
        check(model)


@pytest.mark.parametrize("name", [*ROTARY, "mamba"])
def test_frequencies_and_states_that_depend_on_the_text_are_those_of_the_copy(name):
    """One of the two texts is beyond the length at which frequencies change."""
    check(tiny_kind(name).to(torch.bfloat16), [[*range(5, 5 + SHORT + 10)], [*range(9, 9 + SHORT + 8)]])


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_tied_embeddings_stay_tied(architecture):
    model = in_dtype(architecture, torch.bfloat16, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("packed", [False, True], ids=["fake", "packed"])
@pytest.mark.parametrize(
    ("architecture", "recipe"),
    [("llama", "w4"), ("llama", "w8"), ("llama", "w8a8"), (MIXTURE, "w4"), (MIXTURE, "w8")],
)
def test_a_quantized_model_keeps_its_codes(architecture, recipe, packed):
    base = in_dtype(architecture, torch.float32)
    base.set_experts_implementation("eager") if architecture == MIXTURE else None
    model = bitassay.quantize(base, recipe, packed=packed).to(torch.bfloat16)
    codes = [module.quantized for module in model.modules() if hasattr(module, "quantized")]
    check(model)
    assert all(
        one is other
        for one, other in zip(
            codes, (m.quantized for m in model.modules() if hasattr(m, "quantized")), strict=True
        )
    )


def test_layers_that_are_one_module_are_restored_too():
    model = in_dtype("llama", torch.bfloat16)
    layers = decoder_layers(model)
    layers[2] = layers[0]
    check(model)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("where", ["layer", "inside a layer", "norm", "head", "beside the forward"])
def test_an_exception_leaves_the_model_as_it_was(where):
    model = in_dtype(MIXTURE, torch.bfloat16)
    plain, before = read(model), held(model)
    module = {
        "layer": model.model.layers[1],
        "inside a layer": model.model.layers[1].mlp.experts,
        "norm": model.model.norm,
        "head": model.lm_head,
    }.get(where)

    def interrupt(*_):
        raise Interrupted

    def interrupted():
        with higher_precision(model):
            if module is None:
                raise Interrupted
            with module.register_forward_hook(interrupt):
                read(model)

    with pytest.raises(Interrupted):
        interrupted()
    assert held(model) == before
    assert same(read(model), plain)


def test_after_an_exception_that_is_caught_within_it_goes_on():
    model = in_dtype("llama", torch.bfloat16)
    expected = read(copy.deepcopy(model).float())

    def interrupt(*_):
        raise Interrupted

    with higher_precision(model):
        hook = model.model.layers[1].register_forward_hook(interrupt)
        with pytest.raises(Interrupted):
            read(model)
        hook.remove()
        assert same(read(model), expected)


def test_hooks_of_others_see_what_runs_and_stay():
    model, seen = in_dtype("llama", torch.bfloat16), []
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].dtype))
    layer.mlp.register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    before = held(model)
    with higher_precision(model):
        read(model)
        layer.register_forward_hook(lambda *_: seen.append("added within"))
    assert seen == [torch.float32] * 2
    read(model)
    assert seen[2:] == [torch.bfloat16, torch.bfloat16, "added within"]
    assert len(layer._forward_hooks) == 1
    assert held(model)[0] == before[0]


def test_one_layer_at_a_time_is_converted():
    """No copy of the model exists: while a layer runs, the others hold what they held."""
    model, dtypes = in_dtype("llama", torch.bfloat16), []
    layers = list(decoder_layers(model))
    for layer in layers:
        layer.mlp.register_forward_hook(
            lambda *_: dtypes.append([one.mlp.up_proj.weight.dtype for one in layers])
        )
    with higher_precision(model):
        read(model)
    assert [row.count(torch.float32) for row in dtypes] == [1, 1, 1]
    assert [row.index(torch.float32) for row in dtypes] == [0, 1, 2]


def test_what_has_no_higher_precision_is_left_alone():
    model = in_dtype("llama", torch.float64)
    plain = read(model)
    with higher_precision(model):
        assert same(read(model), plain)
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_it_is_nearer_to_the_exact_model():
    """In fp64, the values of the same bf16 weights: fp32 is far nearer to it than bf16."""
    model = in_dtype("llama", torch.bfloat16)
    exact, plain = read(copy.deepcopy(model).double()), read(model)
    with higher_precision(model):
        higher = read(model)
    last = tap_layers(model)[-1]

    def off(prefills):
        (one, *_), (true, *_) = prefills, exact
        return ((one.states[last].double() - true.states[last]).norm() / true.states[last].norm()).item()

    assert off(higher) < 1e-5 < 1e-3 < off(plain)
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)


@pytest.mark.parametrize("kind", ["xglm", "inkling2_text"])
def test_a_model_that_does_not_compute_in_that_precision_says_so_and_stays_as_it_was(kind):
    model = tiny_architecture(kind)
    before = held(model)
    with pytest.raises(BitassayError, match=r"does not compute in float64.*float32"), higher_precision(model):
        read(model)
    assert held(model) == before
