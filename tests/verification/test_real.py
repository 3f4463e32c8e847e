"""The verdict on a real model, SmolLM2-135M in bf16, with honest, 4-bit and 2-bit provers."""

import numpy as np
import pytest
import torch
from scipy import stats

from bitassay.data.corpora import bundled_prompts
from bitassay.engines.load import load
from bitassay.models.identity import identity
from bitassay.verification.calibrate import calibrate
from bitassay.verification.pooled import pooled_verdict
from bitassay.verification.prove import prove_many
from bitassay.verification.verify import verify_many


@pytest.mark.slow
@pytest.mark.real
def test_smollm_passes_and_its_quantized_copies_fail(round_weights):
    short = sorted(bundled_prompts(), key=len)[:200]  # prefills are most of the work
    prompts = [short[index] for index in np.random.default_rng(0).permutation(200)[:66]]
    model = load("smollm2-135m", dtype=torch.bfloat16)
    profile = calibrate(model, model, prompts[:38], max_new_tokens=24, alpha=0.05, guarantee="average")
    assert stats.binom.sf(profile.held_out.rejected - 1, profile.held_out.n, profile.alpha) > 0.001

    def verdicts(prover, asked):
        found = verify_many(
            prove_many(prover, asked, max_new_tokens=24, claim=identity(model)), model, profile=profile
        )
        return [verdict for verdict in found if verdict.p_value is not None]

    honest = verdicts(model, prompts[38:54])
    failed = sum(verdict.status == "FAIL" for verdict in honest)
    assert stats.binom.sf(failed - 1, len(honest), profile.alpha) > 0.001
    assert pooled_verdict(honest, 0.01).status == "PASS"
    for bits in (4, 2):
        cheap = verdicts(round_weights(model, bits, group=64), prompts[54:])
        assert len(cheap) >= 8
        assert {verdict.status for verdict in cheap} == {"FAIL"}
        assert pooled_verdict(cheap, 0.01).status == "FAIL"
