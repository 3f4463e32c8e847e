"""Run a model on batches of token ids: `generate` as a host does, `prefill` as a verifier does.

Both pad on the left, with an attention mask and explicit position ids, so that a sequence's positions count
from its own first token.

Which positions have states: a prompt of P tokens is read in one forward (positions 0 .. P-1), and every
generated token but the last is fed back, one a step (positions P .. P+n-2 for n output tokens). The last
token is never an input, so there are P+n-1 positions on both sides. The logits at position P-1+i choose
output token i.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.generate.cache import RoundedCache
from bitassay.generate.sampling import GREEDY, Draw, Sampler
from bitassay.generate.taps import joined_states, record_states
from bitassay.models.head import last_positions
from bitassay.quantize.kv_cache import empty_cache

TokenIds = Sequence[int]
# Tokens in one forward, padding included. On a CPU more is slower (attention over padding), not faster.
CPU_TOKENS, DEVICE_TOKENS = 512, 16_384
CACHED_ROWS = 16  # a batch's keys and values may span so many times its tokens


@dataclass(frozen=True)
class Generation:
    """What one prompt gave. The end-of-text token is part of the output; states by layer, in the model's
    dtype."""

    output_ids: tuple[int, ...]
    states: dict[int, Float[Tensor, "positions hidden"]]


@dataclass(frozen=True)
class Prefill:
    """One forward over prompt and output: states by layer, and the logits that would choose each output
    token."""

    states: dict[int, Float[Tensor, "positions hidden"]]
    logits: Float[Tensor, "outputs vocabulary"]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    *,
    max_new_tokens: int,
    sampler: Sampler = GREEDY,
    nonces: Sequence[str] | None = None,
    layers: Sequence[int] = (),
    cache_bits: int | None = None,
) -> list[Generation]:
    """Generate for all prompts as one batch, token by token with a KV cache, until each has ended or has
    `max_new_tokens`.

    nonces: one a prompt, part of the key of the sampling noise (default: "0", "1", ...). cache_bits: round
    keys and values to so many bits (see `RoundedCache`; default: as the model computes them). Raises
    BitassayError for an empty prompt, ids outside the vocabulary, or more tokens than the model has
    positions.
    """
    nonces = [str(index) for index in range(len(prompts))] if nonces is None else list(nonces)
    assert len(nonces) == len(prompts)
    if max_new_tokens < 1:
        raise BitassayError(f"max_new_tokens is {max_new_tokens}", "ask for at least 1")
    check_ids(model, prompts, max_new_tokens - 1)
    tokens, mask = left_pad(prompts, model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ends = torch.tensor(sorted(end_tokens(model)), device=model.device, dtype=torch.long)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    chosen: list[Int[Tensor, " batch"]] = []
    last = last_positions(1, model.device)
    cache = empty_cache(model) if cache_bits is None else RoundedCache(model.config, cache_bits)
    with record_states(model, layers) as recorded:
        for index in range(max_new_tokens):
            forward = model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=last,
            )
            chosen.append(sampler.choose(forward.logits[:, -1], [Draw(nonce, index) for nonce in nonces]))
            ended |= torch.isin(chosen[-1], ends)
            if ended.all():
                break
            tokens, positions = chosen[-1][:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    outputs = [until_end(row, ends.tolist()) for row in torch.stack(chosen, dim=1).tolist()]
    states, longest = joined_states(recorded), max(map(len, prompts))
    return [
        Generation(tuple(output), _cut(states, row, longest - len(prompt), longest + len(output) - 1))
        for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    outputs: Sequence[TokenIds],
    *,
    layers: Sequence[int] = (),
) -> list[Prefill]:
    """One forward over each prompt and its given output (all but its last token), as one batch without a
    cache.

    Raises BitassayError as `generate` does.
    """
    sequences = [[*prompt, *output[:-1]] for prompt, output in zip(prompts, outputs, strict=True)]
    check_ids(model, sequences)
    if not all(outputs):
        raise BitassayError(
            "an output without tokens: there is nothing to check", "generate at least one token"
        )
    tokens, mask = left_pad(sequences, model.device)
    with record_states(model, layers) as recorded:
        forward = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=last_positions(max(map(len, outputs)), model.device),
        )
    states, longest = joined_states(recorded), tokens.shape[1]
    return [
        Prefill(_cut(states, row, longest - len(sequence), longest), forward.logits[row, -len(output) :])
        for row, (sequence, output) in enumerate(zip(sequences, outputs, strict=True))
    ]


def left_pad(
    sequences: Sequence[TokenIds], device: torch.device
) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
    """Token ids padded on the left with 0, and the mask that is 1 at real tokens."""
    longest = max(map(len, sequences))
    ids = [[0] * (longest - len(sequence)) + list(sequence) for sequence in sequences]
    mask = [[0] * (longest - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def default_batch_tokens(model: PreTrainedModel) -> int:
    return CPU_TOKENS if model.device.type == "cpu" else DEVICE_TOKENS


def token_batches(lengths: Sequence[int], budget: int, past: int = 0) -> Iterator[list[int]]:
    """Indices of rows in batches, short ones first: at most `budget` tokens with padding, CACHED_ROWS times
    as many with the `past` of each row, and little padding once a batch is a quarter full."""
    batch: list[int] = []
    held = 0
    for index in sorted(range(len(lengths)), key=lambda place: (lengths[place], place)):
        size = (len(batch) + 1) * lengths[index]
        too_big = size > budget or size + (len(batch) + 1) * past > CACHED_ROWS * budget
        too_ragged = held > budget / 4 and size > 1.2 * (held + lengths[index])
        if batch and (too_big or too_ragged):
            yield batch
            batch, held = [], 0
        batch.append(index)
        held += lengths[index]
    if batch:
        yield batch


def end_tokens(model: PreTrainedModel) -> set[int]:
    """The ids at which generation stops, by the model's generation configuration."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    if configured is None:
        configured = model.config.get_text_config().eos_token_id
    return set() if configured is None else {configured} if isinstance(configured, int) else set(configured)


def until_end(output: list[int], ends: Sequence[int]) -> list[int]:
    """`output` up to and with its first end token."""
    stop = next((index for index, token in enumerate(output) if token in ends), len(output) - 1)
    return output[: stop + 1]


def vocabulary_size(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().num_embeddings  # type: ignore[return-value]


def context_length(model: PreTrainedModel) -> int | None:
    """The positions that the model was made for; None where its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_ids(model: PreTrainedModel, sequences: Sequence[TokenIds], more: int = 0) -> None:
    """Refuse what the model cannot read: no tokens, ids outside the vocabulary, `more` tokens beyond its
    positions."""
    if not sequences or not all(sequences):
        raise BitassayError("a prompt without tokens", "give at least one token")
    size, limit = vocabulary_size(model), context_length(model)
    for sequence in sequences:
        if not 0 <= min(sequence) <= max(sequence) < size:
            raise BitassayError(
                f"token id {min(min(sequence), 0) or max(sequence)} is not in the vocabulary of {size}"
            )
        if limit is not None and len(sequence) + more > limit:
            raise BitassayError(
                f"{len(sequence)} tokens and {more} more do not fit the model's {limit} positions",
                "shorten the prompt or ask for fewer tokens",
            )


def _cut(states: dict[int, Tensor], row: int, start: int, stop: int) -> dict[int, Tensor]:
    return {layer: rows[row, start:stop].clone() for layer, rows in states.items()}
