import math

import pytest
import torch

from bitassay.engines.decode import prefill
from bitassay.engines.sampling import GREEDY
from bitassay.verification.observe import observe
from bitassay.verification.structure import Request
from bitassay.verification.trace import Trace
from bitassay.verification.verify import verify


@pytest.mark.parametrize(
    "moved", ["last prompt position", "first generated position", "last generated position"]
)
def test_every_position_counts_in_its_own_part(trace, model, moved):
    """The prover's states are the verifier's own but for one position, which is half as long again."""
    at = {"last prompt position": trace.n_prompt - 1, "first generated position": trace.n_prompt}.get(
        moved, -1
    )
    (own,) = prefill(model, [trace.header.prompt_ids], [trace.header.output_ids], layers=trace.header.layers)
    states = {layer: rows.clone() for layer, rows in own.states.items()}
    for rows in states.values():
        rows[at] *= 1.5
    verdict = verify(Trace(trace.header, states), model)
    floor = torch.tensor(torch.finfo(torch.bfloat16).eps / 8).log()
    for layer in verdict.to_dict()["layers"]:
        sizes = {"prompt": trace.n_prompt, "generated": trace.n_tokens - 1}
        for part, size in sizes.items():
            here = part in moved
            expected = floor + (torch.tensor(0.5).log() - floor) / size * here
            assert math.log(layer[f"{part}_distance"]) == pytest.approx(expected.item(), abs=0.01)
            assert layer["verillm"][part]["paper"]["cells"] == size
            assert layer["verillm"][part]["paper"]["accept_rate"] == pytest.approx(1 - here / size)


def test_margins_are_those_of_the_claimed_tokens(trace, model):
    (own,) = prefill(model, [trace.header.prompt_ids], [trace.header.output_ids], layers=trace.header.layers)
    claimed = torch.tensor(trace.header.output_ids)
    expected = (own.logits.double().amax(-1) - own.logits.double()[range(len(claimed)), claimed]).tolist()
    verdict = verify(trace, model)
    assert verdict.margins == pytest.approx(expected)
    assert verdict.mean_margin == pytest.approx(sum(expected) / trace.n_tokens)
    assert verdict.observation.positions == trace.n_tokens - 1
    assert len(GREEDY.margins(own.logits, claimed, [])) == trace.n_tokens


def test_the_order_of_the_traces_is_kept_though_batches_are_by_length(honest, model):
    found = observe(honest, model, [Request()] * len(honest), ["token-difr"])
    assert [len(one.series["token-difr"][0].values) for one in found] == [trace.n_tokens for trace in honest]
