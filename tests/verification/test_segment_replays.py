"""Segments of layers and the output head, each judged from what the host claims was before it."""

import copy
from dataclasses import replace
from statistics import fmean

import pytest
import torch

from bitassay.models.walk import decoder_layers
from bitassay.verification.detectors.registry import DETECTORS, HEAD, ROTARY, SEGMENTS, STATES
from bitassay.verification.observe import compare, observe
from bitassay.verification.prove import prove_many
from bitassay.verification.structure import Request
from bitassay.verification.trace import Trace
from bitassay.verification.verify import verify


def observed(trace, model, names=(STATES, SEGMENTS, HEAD)):
    return observe([trace], model, [Request()], names)[0]


def means(traces, model):
    """By detector: of each run [runs, layers] the mean over generated positions."""
    runs = observe(traces, model, [Request()] * len(traces), (STATES, SEGMENTS))
    return {
        name: torch.tensor([[fmean(series.values) for series in run.series[name]] for run in runs])
        for name in (STATES, SEGMENTS)
    }


@pytest.fixture(scope="module")
def fair(honest, model):
    return means(honest[:10], model)


def spoilt(model, layer, error=0.05):
    """A copy with another matrix in one decoder layer, counted from 1."""
    other = copy.deepcopy(model)
    weight = decoder_layers(other)[layer - 1].mlp.down_proj.weight
    generator = torch.Generator().manual_seed(layer)
    weight.data += error * weight.std() * torch.randn(weight.shape, generator=generator).to(weight.dtype)
    return other


@pytest.mark.parametrize(("layer", "segment"), [(3, 0), (12, 1), (17, 2)])
def test_one_changed_layer_shows_in_its_segment_alone(honest, model, fair, layer, segment):
    prompts = [trace.header.prompt_ids for trace in honest[:10]]
    traces = prove_many(spoilt(model, layer), prompts, max_new_tokens=12, claim=model.identity)
    seen = means(traces, model)
    excess = seen[SEGMENTS].mean(0) - fair[SEGMENTS].mean(0)
    assert excess[segment] > 0.3
    assert all(abs(excess[other]) < 0.1 for other in range(3) if other != segment)
    if segment == 2:  # and it stands out more than from the noise of all layers before it
        power = {name: (seen[name].mean(0) - fair[name].mean(0))[2] / fair[name].std(0)[2] for name in seen}
        assert power[SEGMENTS] > 1.5 * power[STATES] > 0


def test_honest_tokens_follow_from_honest_states(honest, model):
    runs = observe(honest[:20], model, [Request()] * 20, (HEAD,))
    assert max(max(run.series[HEAD][0].values) for run in runs) < 1


def test_a_token_that_the_states_do_not_choose_is_seen_by_itself(honest, model):
    trace = honest[0]
    comparison = compare(trace, model)
    logits = comparison.replayed[0].logits
    second = logits[-1].topk(2).indices[1]  # the last token, which no later state depends on
    output = (*trace.header.output_ids[:-1], int(second))
    forged = replace(trace, header=trace.header.model_copy(update={"output_ids": output}))
    values = observed(forged, model).series[HEAD][0].values
    assert values[-1] > 1
    assert max(values[:-1]) < 1


def test_states_that_are_moved_to_fit_a_token_are_seen_by_their_segment(honest, model):
    """A host that wants another token shifts its last state until the head agrees."""
    trace = honest[0]
    layer = trace.header.layers[-1]
    head = model.lm_head.weight.float() * model.model.norm.weight.float()
    best, second = compare(trace, model).replayed[0].logits[-1].topk(2).indices
    states = {key: rows.clone() for key, rows in trace.states.items()}
    direction = head[second] - head[best]
    last = states[layer][-1].float()
    for _ in range(200):
        last += 0.02 * last.norm() * direction / direction.norm()
        if head[second] @ last > head[best] @ last:
            break
    states[layer][-1] = 1.01 * last.to(states[layer].dtype)
    output = (*trace.header.output_ids[:-1], int(second))
    forged = Trace(trace.header.model_copy(update={"output_ids": output}), states)
    before, after = (observed(each, model) for each in (trace, forged))
    assert after.series[SEGMENTS][-1].values[-1] > before.series[SEGMENTS][-1].values[-1] + 1


def test_a_part_of_a_run_has_neither(honest, model, profile):
    whole = [name for name in (STATES, SEGMENTS, ROTARY, HEAD) if DETECTORS[name].whole]
    assert whole == [SEGMENTS, ROTARY, HEAD]
    run = observed(honest[0], model, list(profile.fits))
    part = replace(run, series={name: s for name, s in run.series.items() if not DETECTORS[name].whole})
    assert profile.score(part).value <= profile.score(run).value


def test_states_that_are_not_finite_are_not_gone_on_from(honest, model, profile):
    states = {layer: rows.clone() for layer, rows in honest[0].states.items()}
    states[8][3, 5] = float("nan")
    forged = Trace(honest[0].header, states)
    assert SEGMENTS not in observed(forged, model).series
    verdict = verify(forged, model, profile=profile)
    assert (verdict.status, {reason.code for reason in verdict.reasons}) == ("FAIL", {"not-finite"})
