import pytest
import torch

from bitassay.engines.decode import prefill
from bitassay.engines.sampling import GREEDY
from bitassay.verification.evidence import gather
from bitassay.verification.trace import Trace


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
    (found,) = gather([Trace(trace.header, states)], model)
    floor = torch.tensor(torch.finfo(torch.bfloat16).eps / 8).log()
    for layer in found.layers:
        sizes = {"prompt": trace.n_prompt, "generated": trace.n_tokens - 1}
        for part, size in sizes.items():
            here = part in moved
            expected = floor + (torch.tensor(0.5).log() - floor) / size * here
            assert getattr(layer, part) == pytest.approx(expected.item(), abs=0.01)
            assert layer.verillm[part]["paper"]["cells"] == size
            assert layer.verillm[part]["paper"]["accept_rate"] == pytest.approx(1 - here / size)


def test_margins_are_those_of_the_claimed_tokens(trace, model):
    (own,) = prefill(model, [trace.header.prompt_ids], [trace.header.output_ids], layers=trace.header.layers)
    claimed = torch.tensor(trace.header.output_ids)
    expected = (own.logits.double().amax(-1) - own.logits.double()[range(len(claimed)), claimed]).tolist()
    (found,) = gather([trace], model, verillm=False)
    assert found.margins == pytest.approx(expected)
    assert found.mean_margin == pytest.approx(sum(expected) / trace.n_tokens)
    assert found.n_generated == trace.n_tokens - 1
    assert len(GREEDY.margins(own.logits, claimed, [])) == trace.n_tokens


def test_the_order_of_the_traces_is_kept_though_batches_are_by_length(honest, model):
    found = gather(honest, model, verillm=False)
    assert [len(one.margins) for one in found] == [trace.n_tokens for trace in honest]
