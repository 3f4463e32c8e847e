"""Every attack is one: it claims what was asked, differs from the honest run, and leaves the model as it was."""

import pytest
import torch

from bitassay.engines.sampling import Sampler
from bitassay.models.walk import decoder_layers
from bitassay.verification.attacks.attack import Setting
from bitassay.verification.attacks.hosts import low_rank_update, skip
from bitassay.verification.attacks.registry import ATTACKS
from bitassay.verification.observe import observe
from bitassay.verification.prove import prove_many
from bitassay.verification.structure import Request

TOKENS, COUNT = 12, 3
SAMPLED = Sampler(temperature=0.9, top_p=0.9, seed=4)


@pytest.fixture(scope="module", params=["greedy"])
def setting(request, model, prompts):
    sampler = SAMPLED if request.param == "sampled" else Sampler()
    chosen = sorted(prompts, key=len)[-COUNT:]
    nonces = [f"a{index}" for index in range(COUNT)]
    return Setting(model, prove_many(model, chosen, max_new_tokens=TOKENS, sampler=sampler, nonces=nonces))


def requests(setting):
    return [
        Request(prompt, nonce, setting.sampler, setting.max_new_tokens)
        for prompt, nonce in zip(setting.prompts, setting.nonces, strict=True)
    ]


@pytest.mark.parametrize(
    ("setting", "name"),
    [("sampled" if ATTACKS[name].sampled else "greedy", name) for name in sorted(ATTACKS)],
    indirect=["setting"],
)
def test_an_attack_changes_something_and_structure_sees_what_it_must(name, setting):
    attack = ATTACKS[name]
    before = [weight.clone() for weight in setting.model.parameters()]
    traces = attack.run(setting)
    assert len(traces) == COUNT
    assert all(torch.equal(*pair) for pair in zip(before, setting.model.parameters(), strict=True))
    seen = observe(traces, setting.model, requests(setting))
    assert all(bool(one.defects) == attack.structural for one in seen), [one.defects for one in seen]
    honest = observe(setting.honest, setting.model, requests(setting))
    assert any(one != other for one, other in zip(seen, honest, strict=True))


def test_a_skipped_layer_is_left_out(setting):
    layers = len(decoder_layers(setting.model))
    with skip(setting.model, layers):
        states = prove_many(setting.model, setting.prompts[:1], max_new_tokens=2)[0].states
    embedded = setting.model.get_input_embeddings()(torch.tensor(setting.prompts[0]))
    for rows in states.values():
        assert torch.equal(rows[: len(embedded)], embedded)


def test_an_update_has_the_norm_and_rank_that_it_says(setting):
    weight = next(
        module.weight
        for module in decoder_layers(setting.model)[0].modules()
        if isinstance(module, torch.nn.Linear)
    )
    before = weight.detach().float().clone()
    with low_rank_update(setting.model, 0.3, rank=2):
        change = weight.detach().float() - before
    assert change.norm() / before.norm() == pytest.approx(0.3, rel=0.02)
    values = torch.linalg.svdvals(change)
    assert values[1] > 20 * values[2]  # what is left is bf16 rounding
    assert torch.equal(weight.detach().float(), before)
