"""Segments that nobody asked for do not run, and those that were are the same to the last bit."""

import pytest
import torch

from bitassay.engines import segments
from bitassay.engines.decode import prefill
from bitassay.engines.precise import higher_precision
from bitassay.engines.segments import needless, passing_by
from bitassay.models.hooks import hooked
from bitassay.models.walk import decoder_layers
from bitassay.testing.architectures import architectures, tiny_architecture
from bitassay.testing.tiny import ARCHITECTURES, tiny_model
from kinds import ROTARY, SHORT, tiny_kind

PROMPTS = [[1, *range(5, 15)], [1, 40, 41, 42]]
OUTPUTS = [tuple(range(60, 67)), tuple(range(80, 89))]


def read(model, layers, claimed, **options):
    return prefill(model, PROMPTS, OUTPUTS, layers=layers, claimed=claimed, **options)


def claimed_of(model, layers):
    plain = prefill(model, PROMPTS, OUTPUTS, layers=layers)
    return [{layer: rows.flip(0) for layer, rows in one.states.items()} for one in plain]


def check_alone(model):
    count = len(decoder_layers(model))
    layers = tuple(sorted({max(count // 2, 1), count}))
    claimed = claimed_of(model, layers)
    full = read(model, layers, claimed)
    for end in layers:
        for one, other in zip(read(model, (end,), claimed, alone=True), full, strict=True):
            assert one.states.keys() == {end}
            assert torch.equal(one.states[end], other.states[end])
            assert torch.equal(one.logits, other.logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_segment_alone_is_as_in_a_whole_replay(architecture):
    model = tiny_model(architecture, num_hidden_layers=4).to(torch.bfloat16)
    check_alone(model)
    assert needless(model, (2, 4), (4,)) == (1, 2), "these architectures hand on states alone"


# Layers that return tuples, share keys or modules, keep several streams or a state of their own.
UNLIKE = ("albert", "bloom", "falcon", "gpt2", "jamba", "longcat_flash", "mamba", "mpt", "qwen4_exp_text", "rwkv", "zamba")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in architectures() if name.startswith(("gemma3n", "gemma4")) or name in UNLIKE]
)
def test_a_segment_alone_is_as_in_a_whole_replay_of_other_architectures(name):
    check_alone(tiny_architecture(name))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=4).to(torch.bfloat16)


@pytest.mark.parametrize("precise", [False, True])
def test_layers_that_are_passed_by_do_not_run(model, precise):
    claimed, ran = claimed_of(model, (1, 3, 4)), set()
    needless(model, (1, 3, 4), (3,))  # the trial is not counted
    parts = enumerate(decoder_layers(model), 1)
    with hooked(layer.mlp.register_forward_hook(lambda *_, n=n: ran.add(n)) for n, layer in parts):
        if precise:
            with higher_precision(model):
                read(model, (3,), claimed, alone=True)
        else:
            read(model, (3,), claimed, alone=True)
    assert ran == {2, 3}
    assert all("forward" not in vars(layer) for layer in decoder_layers(model))


def test_the_last_logits_alone(model):
    claimed = claimed_of(model, (2, 4))
    full, last = read(model, (2, 4), claimed), read(model, (2, 4), claimed, choices=False)
    for one, other in zip(last, full, strict=True):
        assert torch.equal(one.logits, other.logits[-1:])
        assert all(torch.equal(one.states[layer], other.states[layer]) for layer in (2, 4))


@pytest.mark.parametrize("kind", ROTARY)
def test_texts_that_are_read_in_parts_run_in_whole(kind):
    """Positions before a part are read anew at other frequencies, and nobody claims states of them there."""
    model = tiny_kind(kind)
    prompts = [[*range(5, 5 + SHORT - 3)]]
    plain = prefill(model, prompts, OUTPUTS[:1], layers=(1, 2))
    claimed = [one.states for one in plain]
    (alone,) = prefill(model, prompts, OUTPUTS[:1], layers=(2,), claimed=claimed, alone=True)
    assert torch.equal(alone.states[2], plain[0].states[2])


def test_a_model_whose_layers_hand_on_more_runs_in_whole():
    """The second layer adds what the first has seen, behind the states' back."""
    model = tiny_model("llama", num_hidden_layers=4).to(torch.bfloat16)
    first, second = decoder_layers(model)[:2]
    seen = []
    first.mlp.register_forward_hook(lambda _module, _arguments, output: seen.append(output))
    second.register_forward_hook(lambda _module, _arguments, output: output + seen[-1])
    assert needless(model, (1, 4), (4,)) == ()
    claimed = claimed_of(model, (1, 4))
    alone, full = read(model, (4,), claimed, alone=True), read(model, (1, 4), claimed)
    assert torch.equal(alone[0].states[4], full[0].states[4])


def test_a_model_that_is_not_in_memory_is_not_tried(model, monkeypatch):
    with torch.device("meta"):
        there = tiny_model("llama", num_hidden_layers=4)
    monkeypatch.setattr(segments, "record_states", None)  # a trial would fail
    assert needless(there, (2, 4), (4,)) == ()


def test_passing_by_ends_whatever_happens(model):
    with pytest.raises(ZeroDivisionError), passing_by(model, (1, 2)):
        1 / 0  # noqa: B018
    assert all("forward" not in vars(layer) for layer in decoder_layers(model))
