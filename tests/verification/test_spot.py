"""Spot checks: what they say of the segments that they draw is what a full check says of these."""

from dataclasses import replace

import pytest
import torch

from bitassay.errors import BitassayError
from bitassay.models.walk import decoder_layers
from bitassay.verification import spot
from bitassay.verification.detectors.registry import HEAD, SEGMENTS
from bitassay.verification.observe import observe
from bitassay.verification.prove import prove_many
from bitassay.verification.spot import drawn, spot_score, verify_segments
from bitassay.verification.structure import Request
from bitassay.verification.trace import Trace
from verification.test_segment_replays import spoilt

LAYERS = (8, 16, 17)


def draw(*ends):
    return lambda _layers, _count: ends


@pytest.fixture(scope="module")
def full(honest, model, profile):
    return observe(honest[:8], model, [Request()] * 8, list(profile.fits))


def test_draws_are_of_the_sampled_layers_and_all_come():
    seen = [drawn(LAYERS, 2) for _ in range(200)]
    assert {end for ends in seen for end in ends} == set(LAYERS)
    assert all(len(ends) == 2 and list(ends) == sorted(set(ends)) for ends in seen)
    assert drawn(LAYERS, 9) == LAYERS


@pytest.mark.parametrize("ends", [(8,), (16,), (17,), (8, 17), LAYERS])
def test_a_spot_check_has_the_numbers_of_a_full_check(honest, model, profile, full, ends):
    verdicts = verify_segments(honest[:8], model, 1, profile=profile, draw=draw(*ends))
    for verdict, observation in zip(verdicts, full, strict=True):
        there = [
            series
            for layer, series in zip(LAYERS, observation.series[SEGMENTS], strict=True)
            if layer in ends
        ]
        assert list(verdict.observation.series[SEGMENTS]) == there
        assert verdict.observation.series[HEAD] == observation.series[HEAD]
        assert verdict.segments == ends
        assert verdict.score.value <= profile.score(observation).value


def test_nothing_is_refused_that_a_full_check_does_not_refuse(honest, model, profile, full):
    """The score is the largest of fewer numbers, for every draw."""
    for observation in full:
        for end in LAYERS:
            part = replace(
                observation,
                layers=(end,),
                series={
                    SEGMENTS: (observation.series[SEGMENTS][LAYERS.index(end)],),
                    HEAD: observation.series[HEAD],
                },
            )
            assert spot_score(part, profile).value <= profile.score(observation).value


def test_honest_traces_pass(honest, model, profile):
    verdicts = verify_segments(honest[:6], model, 1, profile=profile)
    assert sum(verdict.status == "PASS" for verdict in verdicts) >= 4
    passed = next(verdict for verdict in verdicts if verdict.status == "PASS")
    assert f"that end at {passed.segments[0]}," in passed.reasons[0].sentence
    assert "nothing else was looked at" in passed.reasons[0].sentence
    assert passed.unlike is None
    assert passed.mean_margin is None
    assert passed.to_dict()["segments"] == list(passed.segments)
    assert str(passed).startswith("PASS")


def test_a_changed_layer_is_found_in_its_segment_alone(honest, model, profile):
    prompts = [trace.header.prompt_ids for trace in honest[:6]]
    traces = prove_many(spoilt(model, 12), prompts, max_new_tokens=12, claim=model.identity)
    found = {
        end: [v.status for v in verify_segments(traces, model, 1, profile=profile, draw=draw(end))]
        for end in LAYERS
    }
    assert found[16].count("FAIL") >= 5
    assert found[8].count("FAIL") <= 1


def test_other_tokens_are_found_in_every_draw(honest, model, profile):
    header = honest[0].header
    output = (*header.output_ids[:-1], (header.output_ids[-1] + 1) % 512)
    forged = Trace(header.model_copy(update={"output_ids": output}), honest[0].states)
    for end in LAYERS:
        (verdict,) = verify_segments([forged], model, 1, profile=profile, draw=draw(end))
        assert (verdict.status, verdict.reasons[0].code) == ("FAIL", "tokens-unlikely")


def test_exact_checks_are_all_made(honest, model, profile):
    states = {layer: rows.clone() for layer, rows in honest[0].states.items()}
    states[8][3, 5] = float("nan")
    other = Request(nonce="another")
    verdicts = verify_segments(
        [Trace(honest[0].header, states), honest[1], honest[2]],
        model,
        1,
        profile=profile,
        requests=[Request(), other, Request()],
    )
    assert [verdict.status for verdict in verdicts[:2]] == ["FAIL", "FAIL"]
    assert [verdict.reasons[0].code for verdict in verdicts[:2]] == ["not-finite", "other-nonce"]
    assert verdicts[2].segments is not None


def test_without_a_profile_there_is_no_decision(honest, model):
    (verdict,) = verify_segments(honest[:1], model, 1)
    assert (verdict.status, verdict.reasons[0].code) == ("INCONCLUSIVE", "no-profile")


def test_a_model_that_hands_on_more_than_states_is_refused(honest, model, profile, monkeypatch):
    monkeypatch.setattr(spot, "needless", lambda *_: ())
    with pytest.raises(BitassayError, match="no segment of its layers runs alone"):
        verify_segments(honest[:1], model, 1, profile=profile)
    (verdict,) = verify_segments(honest[:1], model, 9, profile=profile)  # all run
    assert verdict.segments == LAYERS


def test_fewer_layers_run(honest, model, profile):
    ran = []
    handles = [
        layer.mlp.register_forward_hook(lambda *_, n=n: ran.append(n))
        for n, layer in enumerate(decoder_layers(model), 1)
    ]
    verify_segments(honest[:1], model, 1, profile=profile, draw=draw(16))  # tried before
    ran.clear()
    verify_segments(honest[:1], model, 1, profile=profile, draw=draw(16))
    for handle in handles:
        handle.remove()
    assert ran == [*range(9, 17)] * 2
    assert torch.is_grad_enabled()
