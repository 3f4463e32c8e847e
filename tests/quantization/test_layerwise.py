"""Layers called one after the other, against the model's own forward."""

import pytest
import torch
from torch import nn

import bitassay.quantization.solvers.layerwise as module
from bitassay.errors import BitassayError
from bitassay.models.walk import decoder_layers
from bitassay.quantization.pipeline import quantize
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.solvers.layerwise import (
    BATCH_SAMPLES,
    first_inputs,
    run_layer,
    solve_groups,
)
from bitassay.testing.tiny import ARCHITECTURES, tiny_model
from kinds import KINDS, hook_count, tiny_kind

TOKENS = torch.randint(3, 500, (BATCH_SAMPLES + 3, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def own_outputs(model, tokens):
    """What each layer puts out in the model's own forward."""
    found = []

    def keep(_module, _given, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in decoder_layers(model)]
    model.get_decoder()(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def walked(model, stream):
    hidden = stream.hidden
    for layer, arguments in zip(decoder_layers(model), stream.arguments, strict=True):
        hidden = run_layer(layer, hidden, arguments)
        yield hidden.movedim(0, arguments.axis)


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", [*ARCHITECTURES, *KINDS])
def test_layers_one_by_one_give_what_the_model_gives(name):
    model = tiny_kind(name) if name in KINDS else tiny_model(name, initializer_range=0.1)
    stream = first_inputs(model, TOKENS)
    assert len(stream.hidden) == len(TOKENS)
    for found, wanted in zip(walked(model, stream), own_outputs(model, TOKENS), strict=True):
        assert (found - wanted).norm() < 1e-5 * wanted.norm()
    assert hook_count(model) == hook_count(tiny_kind(name) if name in KINDS else tiny_model(name))


@pytest.mark.parametrize("name", ["gemma4", "gemma4 that shares keys", "gemma3n"])
@torch.no_grad()
def test_any_samples_get_their_own(name):
    """As learning draws them."""
    model, chosen = tiny_kind(name), torch.tensor([7, 2, 9])
    stream, hidden = first_inputs(model, TOKENS), None
    for layer, arguments in zip(decoder_layers(model), stream.arguments, strict=True):
        hidden = arguments.call(layer, stream.hidden[chosen] if hidden is None else hidden, chosen)
    wanted = own_outputs(model, TOKENS[chosen])[-1].movedim(stream.arguments[0].axis, 0)
    assert torch.allclose(hidden, wanted, rtol=1e-4, atol=1e-5)


def test_two_streams_hand_on_what_is_their_own():
    model, other = tiny_kind("gemma4 that shares keys"), tiny_kind("gemma4 that shares keys")
    for parameter in decoder_layers(other)[0].parameters():
        parameter.data.mul_(1.2)
    stream = first_inputs(model, TOKENS)
    beside = stream.second()
    hidden, reference = stream.hidden, beside.hidden
    for index, (layer, changed) in enumerate(zip(decoder_layers(model), decoder_layers(other), strict=True)):
        reference = run_layer(layer, reference, beside.arguments[index])
        hidden = run_layer(changed, hidden, stream.arguments[index])
    assert torch.allclose(reference, own_outputs(model, TOKENS)[-1], rtol=1e-4, atol=1e-5)
    assert torch.allclose(hidden, own_outputs(other, TOKENS)[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["gemma4", "gemma4 that shares keys", "gemma3n", "longrope"])
def test_calibrated_recipes_of_such_models(name, tmp_path):
    (tmp_path / "text.txt").write_text("Once upon a time there was a cat who ran far away. " * 150)
    text = {"corpus": str(tmp_path / "text.txt"), "samples": 10, "tokens": 32}
    how = {"weights": {"format": "int8", "granularity": "g16"}, "calibration": text}
    model = tiny_kind(name)
    recipes = [how | {"gptq": {}}, how | {"gptq": {}, "learned": {"steps": 2}}]
    for recipe in recipes:
        quantized = quantize(model, Recipe.model_validate({"name": "x"} | recipe))
        logits = [one(TOKENS[:1]).logits for one in (model, quantized)]
        assert 0 < (logits[0] - logits[1]).norm() / logits[0].norm() < 0.1
    assert hook_count(model) == hook_count(tiny_kind(name))


def test_layers_that_are_more_than_one_after_the_other_are_refused():
    model = tiny_model("llama", initializer_range=0.1)
    layers = decoder_layers(model)
    plain = layers[1].forward
    calls = []

    def remembers(hidden, *given, **named):
        """In the model's own forward, the layer's input comes twice as large."""
        calls.append(1)
        return plain(hidden * (2 if len(calls) <= 2 else 1), *given, **named)

    layers[1].forward = remembers
    with pytest.raises(BitassayError, match="one after the other"):
        first_inputs(model, TOKENS)


class Broken(Exception):
    pass


def test_nothing_stays_behind_when_a_layer_raises():
    for name in ("llama", "gemma4"):
        model = tiny_kind("gemma4") if name == "gemma4" else tiny_model(name)
        before, last = hook_count(model), decoder_layers(model)[-1]

        def broken(*_given, **_named):
            raise Broken

        last.forward = broken
        with pytest.raises(Broken):
            first_inputs(model, TOKENS)
        del last.forward
        assert hook_count(model) == before
        stream = first_inputs(model, TOKENS)
        layer = decoder_layers(model)[0]
        linears = {name: one for name, one in layer.named_modules() if isinstance(one, nn.Linear)}
        groups = module.input_groups(layer, stream.hidden, stream.arguments[0], linears)

        def solve(*_):
            raise Broken

        with pytest.raises(Broken):
            solve_groups(layer, stream.hidden, stream.arguments[0], linears, groups, solve)
        assert hook_count(model) == before
