"""The base model's own text: its prompts, its distribution, its states."""

import pytest
import torch

from bitassay.quantization.solvers.distillation import (
    PROMPT_TOKENS,
    TEMPERATURE,
    continued,
    head_weight,
    in_bf16,
    last_states,
    prompts,
)
from bitassay.testing.tiny import stories260k


@pytest.fixture(scope="module")
def base():
    return stories260k()


def test_prompts_are_different_pieces_of_the_text():
    tokens = torch.arange(4 * 50).view(4, 50)
    found = prompts(tokens, 9)
    assert found[:, 0].tolist() == [0, 50, 100, 150, 16, 66, 116, 166, 32]
    assert found.shape == (9, PROMPT_TOKENS)
    assert prompts(tokens, 13)[12].equal(found[0])  # three pieces of each of four samples
    assert prompts(tokens[:, :7], 5).shape == (5, 7)


def test_the_states_are_those_of_the_text_that_was_written(base):
    start = torch.arange(3, 3 + 5 * PROMPT_TOKENS).view(5, -1)
    tokens, states = continued(base, head_weight(base), start, 40, torch.Generator().manual_seed(1))
    assert tokens.shape == (5, 40)
    assert torch.equal(tokens[:, :PROMPT_TOKENS], start)
    wanted = last_states(base, tokens).float()
    assert (states.float() - wanted).norm() < 0.03 * wanted.norm()
    again, _ = continued(base, head_weight(base), start, 40, torch.Generator().manual_seed(1))
    other, _ = continued(base, head_weight(base), start, 40, torch.Generator().manual_seed(2))
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, other)


def test_rotary_frequencies_are_not_rounded_for_writing(base):
    made = in_bf16(base)
    assert {value.dtype for value in made.model.parameters()} == {torch.bfloat16}
    assert torch.equal(made.model.rotary_emb.inv_freq, base.model.rotary_emb.inv_freq)
    assert {value.dtype for value in base.parameters()} == {torch.float32}


def test_tokens_are_drawn_from_the_models_distribution(base):
    start = torch.arange(3, 3 + PROMPT_TOKENS).expand(4000, -1)
    tokens, states = continued(base, head_weight(base), start, PROMPT_TOKENS + 1, torch.Generator())
    logits = states[0, PROMPT_TOKENS - 1].float() @ head_weight(base).T.float()
    p = (logits / TEMPERATURE).softmax(-1)
    counts = torch.bincount(tokens[:, -1], minlength=len(p))
    often = p > 0.01
    error = (counts[often] - 4000 * p[often]).abs() / (4000 * p[often] * (1 - p[often])).sqrt()
    assert error.max() < 5
    assert often.sum() >= 5
