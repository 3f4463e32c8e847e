"""A replay: each stretch of layers reads the states that were claimed of the layer before it."""

import pytest
import torch

from bitassay.engines.decode import prefill
from bitassay.engines.precise import higher_precision
from bitassay.models.walk import decoder_layers
from bitassay.testing.architectures import architectures, tiny_architecture
from bitassay.testing.tiny import ARCHITECTURES, tiny_model
from kinds import ROTARY, SHORT, tiny_kind

PROMPTS = [[1, *range(5, 15)], [1, 40, 41, 42]]
OUTPUTS = [tuple(range(60, 67)), tuple(range(80, 89))]


def read(model, prompts=PROMPTS, outputs=OUTPUTS, claimed=None):
    layers = range(1, len(decoder_layers(model)) + 1)
    return prefill(model, prompts, outputs, layers=layers, claimed=claimed)


def check_own(model, prompts=PROMPTS):
    """Going on from its own states a model computes what it has computed."""
    plain = read(model, prompts)
    replayed = read(model, prompts, claimed=[one.states for one in plain])
    for one, other in zip(plain, replayed, strict=True):
        assert other.states.keys() == one.states.keys()
        assert all(torch.equal(other.states[layer], one.states[layer]) for layer in one.states)
        assert torch.equal(other.logits, one.logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_from_its_own_states_it_goes_on_as_before(architecture):
    check_own(tiny_model(architecture).to(torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures())
def test_every_architecture_goes_on_as_before(name):
    if name in ("hrm_text", "xlm"):
        pytest.skip("it has no one list of decoder layers, and is refused")
    check_own(tiny_architecture(name))


@pytest.mark.parametrize("kind", ROTARY)
def test_texts_that_are_read_in_parts_go_on_as_before(kind):
    check_own(tiny_kind(kind), [[*range(5, 5 + SHORT - 3)], [*range(40, 40 + SHORT - 3)]])


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=4).to(torch.bfloat16)


def test_a_layer_reads_what_was_claimed_and_no_other_changes(model):
    plain = read(model)
    claimed = [dict(one.states) for one in plain]
    claimed[0][2] = 2 * claimed[0][2]
    replayed = read(model, claimed=claimed)
    same = {layer: torch.equal(replayed[0].states[layer], plain[0].states[layer]) for layer in (1, 2, 3, 4)}
    assert same == {1: True, 2: True, 3: False, 4: True}
    assert all(torch.equal(replayed[1].states[layer], plain[1].states[layer]) for layer in (1, 2, 3, 4))
    with torch.no_grad():
        by_hand = decoder_layers(model)[2](
            claimed[0][2][None],
            position_embeddings=model.model.rotary_emb(claimed[0][2][None], positions(17)),
        )
    by_hand = by_hand if isinstance(by_hand, torch.Tensor) else by_hand[0]
    assert torch.allclose(replayed[0].states[3].float(), by_hand[0].float(), rtol=0.05, atol=0.05)


def positions(count):
    return torch.arange(count)[None]


def test_the_head_reads_what_was_claimed_of_the_last_layer(model):
    plain = read(model)
    claimed = [{4: rows.states[4].flip(-1)} for rows in plain]
    for one, other, states in zip(plain, read(model, claimed=claimed), claimed, strict=True):
        assert torch.equal(other.states[4], one.states[4]), "what the layer itself has made"
        with torch.no_grad():
            expected = model.lm_head(model.model.norm(states[4]))[-len(one.logits) :]
        assert torch.allclose(other.logits.float(), expected.float(), rtol=0.02, atol=0.02)
        assert not torch.allclose(other.logits.float(), one.logits.float(), rtol=0.02, atol=0.02)


def test_in_the_next_higher_precision_what_was_claimed_is_not_rounded(model):
    with higher_precision(model):
        plain = read(model)
        replayed = read(model, claimed=[one.states for one in plain])
    assert all(torch.equal(a.states[4], b.states[4]) for a, b in zip(plain, replayed, strict=True))


def test_nothing_is_left_behind(model):
    before = read(model)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        read(model, claimed=[{2: one.states[2][..., :5]} for one in before])
    assert all(torch.equal(one.logits, other.logits) for one, other in zip(before, read(model), strict=True))
