"""Hosts that steer tokens or change one thing do what they say, and leave the model as it was."""

import pytest
import torch

from bitassay.engines.sampling import Draw, Sampler
from bitassay.models.walk import matrices
from bitassay.testing.tiny import tiny_model
from bitassay.verification.attacks import steering
from bitassay.verification.attacks.attack import Setting
from bitassay.verification.attacks.registry import ATTACKS
from bitassay.verification.attacks.steering import DELTA, Steered, Watermarked

LOGITS = torch.tensor([[0.0, 2.0, 1.8, -1.0], [0.0, 2.0, 1.0, -1.0]])
DRAWS = [Draw("a", 0), Draw("b", 0)]


def test_the_second_best_is_taken_at_near_ties_alone_and_so_many_times():
    steered = Steered(within=0.3, times=2)
    chosen = [steered.choose(LOGITS, [Draw(draw.nonce, index) for draw in DRAWS]) for index in range(4)]
    assert [rows.tolist() for rows in chosen] == [[2, 1], [2, 1], [1, 1], [1, 1]]
    assert Sampler().choose(LOGITS, DRAWS).tolist() == [1, 1]


def test_a_watermark_moves_half_of_the_vocabulary_by_delta():
    level = torch.zeros(1, 1000)
    level[0, 7] = DELTA + 0.01
    assert {int(Watermarked().choose(level, [Draw("a", index)])) for index in range(20)} == {7}
    level[0, 7] = DELTA / 2
    chosen = [int(Watermarked().choose(level, [Draw("a", index)])) for index in range(40)]
    assert 10 < sum(token == 7 for token in chosen) < 30, "it wins where it is in the half that is moved"


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.mark.parametrize(("name", "layer"), [("int8-last-layer", 16), ("int8-middle-layer", 8)])
def test_one_layer_alone_is_rounded(name, layer, model, honest, monkeypatch):
    recipes = []
    monkeypatch.setattr(steering, "quantized_weights", lambda _, recipe: recipes.append(recipe) or [])
    ATTACKS[name].run(Setting(model, honest[:1]))
    (recipe,) = recipes
    changed = {matrix for matrix in matrices(model) if recipe.scheme_for(matrix)}
    assert changed == {matrix for matrix in matrices(model) if f".layers.{layer}." in matrix}
    assert len(changed) == 7


def test_states_are_moved_until_they_choose_the_tokens(model, honest):
    setting = Setting(model, honest[:6])
    steered, moved = (ATTACKS[name].run(setting) for name in ("near-ties", "near-ties-moved"))
    assert [a.header.output_ids for a in moved] == [a.header.output_ids for a in steered]
    changed = disagreements(steered, model)
    assert changed > 0
    assert disagreements(moved, model) < 0.2 * changed
    for a, b in zip(moved, steered, strict=True):
        *layers, last = a.header.layers
        assert all(torch.equal(a.states[layer], b.states[layer]) for layer in layers)
        away = (a.states[last] - b.states[last]).float().norm(dim=-1) / b.states[last].float().norm(dim=-1)
        assert away.max() < 0.5, "no further than a near tie needs"


def disagreements(traces, model):
    """How many tokens are not those that the last states choose."""
    return sum(
        int(logits.argmax()) != token
        for trace, replay in zip(traces, steering.replays_of(traces, model), strict=True)
        for logits, token in zip(replay.logits, trace.header.output_ids, strict=True)
    )
