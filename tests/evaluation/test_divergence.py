import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitassay.evaluation.divergence import ROWS, token_scores


def brute_force(logits, targets, base):
    """The definitions, in fp64, one token at a time."""
    nll, kl, agree = [], [], []
    for q_row, p_row, target in zip(
        logits.double().tolist(), base.double().tolist(), targets.tolist(), strict=True
    ):
        log_z_q = math.log(sum(math.exp(v) for v in q_row))
        log_z_p = math.log(sum(math.exp(v) for v in p_row))
        nll.append(log_z_q - q_row[target])
        kl.append(
            sum(
                math.exp(p - log_z_p) * ((p - log_z_p) - (q - log_z_q))
                for p, q in zip(p_row, q_row, strict=True)
            )
        )
        agree.append(
            max(range(len(p_row)), key=p_row.__getitem__) == max(range(len(q_row)), key=q_row.__getitem__)
        )
    return nll, kl, agree


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 2 * ROWS + 3), st.floats(0.1, 8.0))
def test_scores_equal_their_definitions(seed, rows, spread):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, 17, generator=generator) * spread
    logits = base + torch.randn(rows, 17, generator=generator)
    targets = torch.randint(0, 17, (rows,), generator=generator)
    nll, kl, agree = brute_force(logits, targets, base)
    found = token_scores(logits, targets, base)
    torch.testing.assert_close(
        found.nll.double(), torch.tensor(nll, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(found.kl.double(), torch.tensor(kl, dtype=torch.float64), rtol=1e-4, atol=2e-6)
    assert found.agree.tolist() == agree


def test_bf16_logits_are_scored_in_fp32():
    logits = (torch.randn(5, 300) * 4).bfloat16()
    targets = torch.arange(5)
    torch.testing.assert_close(
        token_scores(logits, targets).nll, token_scores(logits.float(), targets).nll, rtol=0, atol=0
    )


def test_a_model_does_not_diverge_from_itself():
    logits, targets = torch.randn(40, 64), torch.randint(0, 64, (40,))
    found = token_scores(logits, targets, logits)
    assert found.kl.max() < 1e-6
    assert found.agree.all()
