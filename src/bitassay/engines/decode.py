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
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from bitassay.engines.cache import RoundedCache
from bitassay.engines.sampling import GREEDY, Draw, Sampler
from bitassay.engines.taps import joined_states, record_states
from bitassay.errors import BitassayError
from bitassay.models.cache import behind, keeps_positions, takes_cache
from bitassay.models.head import last_logits
from bitassay.models.positions import context_length, frequencies
from bitassay.quantization.inputs.kv_cache import empty_cache

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
    """Generate for all prompts, token by token with a KV cache, until each has ended or has `max_new_tokens`;
    as one batch, or as a few where the model cannot read them together.

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
    found: dict[int, Generation] = {}
    for batch in _readable_together(model, [(len(p), len(p) + max_new_tokens - 1) for p in prompts]):
        steps = _Steps(model, [prompts[index] for index in batch], cache_bits)
        chosen = [nonces[index] for index in batch]
        found |= zip(batch, _continue(steps, max_new_tokens, sampler, chosen, layers), strict=True)
    return [found[index] for index in range(len(prompts))]


def _continue(
    steps: "_Steps", max_new_tokens: int, sampler: Sampler, nonces: Sequence[str], layers: Sequence[int]
) -> list[Generation]:
    """`generate` for one batch."""
    model, prompts = steps.model, steps.prompts
    ends = torch.tensor(sorted(end_tokens(model)), device=model.device, dtype=torch.long)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    chosen: list[Int[Tensor, " batch"]] = []
    with record_states(model, layers) as recorded:
        for index in range(max_new_tokens):
            logits = steps.read(chosen[-1] if chosen else None)
            for pieces in recorded.values():
                pieces[-1] = pieces[-1][:, -(1 if chosen else steps.length) :]  # what was read again, once
            chosen.append(sampler.choose(logits, [Draw(nonce, index) for nonce in nonces]))
            ended |= torch.isin(chosen[-1], ends)
            if ended.all():
                break
    outputs = [until_end(row, ends.tolist()) for row in torch.stack(chosen, dim=1).tolist()]
    states, longest = joined_states(recorded), max(map(len, prompts))
    return [
        Generation(tuple(output), _cut(states, row, longest - len(prompt), longest + len(output) - 1))
        for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]


class _Steps:
    """A batch that is read on, a token in each row at a time."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[TokenIds], cache_bits: int | None):
        self.model, self.prompts, self.cache_bits = model, prompts, cache_bits
        self.tokens, self.mask = left_pad(prompts, model.device)
        self.read_at = frequencies(model, self.length)
        self.caches, self.padded = takes_cache(model), keeps_positions(model)
        self.head = last_logits(model, 1)
        self.cache = self._empty() if self.caches else None
        if cache_bits is not None and not self.caches:
            raise BitassayError(
                f"{type(model).__name__} has no KV cache to be rounded", "leave cache_bits out"
            )

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def read(self, chosen: Int[Tensor, " batch"] | None) -> Float[Tensor, "batch vocabulary"]:
        """The logits behind the prompts, or behind one more token in each row. Everything is read again
        where there is no cache, and where what is in it was computed at other frequencies."""
        new = self.length
        if chosen is not None:
            new = 1
            self.tokens = torch.cat([self.tokens, chosen[:, None]], dim=1)
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
            now = frequencies(self.model, self.length)
            if now != self.read_at or not self.caches:
                new, self.read_at = self.length, now
                self.cache = self._empty() if self.caches else None
        tokens, options = self.tokens[:, -new:], dict[str, Any](use_cache=False)
        if self.cache is not None:
            options = behind(self.model, self.cache, self.length - new, tokens)
        if self.padded:
            positions = (self.mask.cumsum(1) - 1).clamp(min=0)
            options |= {"attention_mask": self.mask, "position_ids": positions[:, -new:]}
        return self.model(input_ids=tokens, **options, **self.head).logits[:, -1]

    def _empty(self) -> DynamicCache:
        bits, model = self.cache_bits, self.model
        return empty_cache(model) if bits is None else RoundedCache(model.config, bits)


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    outputs: Sequence[TokenIds],
    *,
    layers: Sequence[int] = (),
) -> list[Prefill]:
    """What a host computes that reads each prompt and then its given output (all but its last token) token by
    token, in one forward for all, without a cache; in a few where the model cannot read them together.

    Raises BitassayError as `generate` does.
    """
    sequences = [[*prompt, *output[:-1]] for prompt, output in zip(prompts, outputs, strict=True)]
    check_ids(model, sequences)
    if not all(outputs):
        raise BitassayError(
            "an output without tokens: there is nothing to check", "generate at least one token"
        )
    found: dict[int, Prefill] = {}
    spans = [(len(prompt), len(tokens)) for prompt, tokens in zip(prompts, sequences, strict=True)]
    for batch in _readable_together(model, spans):
        parts: list[list[Prefill]] = []
        begin, (first, last) = 0, spans[batch[0]]
        for end in _same_frequencies(model, first, last):
            # A batch of several parts has rows of equal lengths; of a batch with one, all is wanted.
            cut = [sequences[index][:end] if end < last else sequences[index] for index in batch]
            wanted = [len(tokens) - max(begin, spans[i][0] - 1) for i, tokens in zip(batch, cut, strict=True)]
            parts.append(_read(model, cut, wanted, layers, begin))
            begin = end
        found |= zip(batch, map(_joined, *parts) if len(parts) > 1 else parts[0], strict=True)
    return [found[index] for index in range(len(prompts))]


def _read(
    model: PreTrainedModel,
    sequences: Sequence[TokenIds],
    wanted: Sequence[int],
    layers: Sequence[int],
    begin: int,
) -> list[Prefill]:
    """One forward: the states from position `begin` on, and the last `wanted` logits of each sequence."""
    tokens, mask = left_pad(sequences, model.device)
    options: dict[str, Any] = {}
    if keeps_positions(model):
        options |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    options |= last_logits(model, max(wanted))
    with record_states(model, layers) as recorded:
        logits = model(input_ids=tokens, use_cache=False, **options).logits
    states, longest = joined_states(recorded), tokens.shape[1]
    return [
        Prefill(_cut(states, row, longest - len(sequence) + begin, longest), logits[row, -count:])
        for row, (sequence, count) in enumerate(zip(sequences, wanted, strict=True))
    ]


def _joined(*parts: Prefill) -> Prefill:
    """The parts of one sequence, in order."""
    states = {layer: torch.cat([part.states[layer] for part in parts]) for layer in parts[0].states}
    return Prefill(states, torch.cat([part.logits for part in parts]))


def _same_frequencies(model: PreTrainedModel, first: int, last: int) -> list[int]:
    """The lengths at which a text that is read from `first` to `last` tokens has rotary frequencies for the
    last time, in order: `last` alone, where they do not change."""
    if frequencies(model, first) == frequencies(model, last):
        return [last]
    known = {length: frequencies(model, length) for length in range(first, last + 1)}
    return [length for length in known if length == last or known[length + 1] != known[length]]


def _readable_together(model: PreTrainedModel, spans: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Texts as batches, by what they have read at first and at last: all together, or those of equal lengths
    where padding does harm or where rotary frequencies change on the way; and apart those of other
    frequencies."""
    padded, batches = keeps_positions(model), dict[tuple, list[int]]()
    for index, (first, last) in enumerate(spans):
        begins, ends = frequencies(model, first), frequencies(model, last)
        key = (begins, ends) if padded and begins == ends else (begins, ends, first, last)
        batches.setdefault(key, []).append(index)
    return list(batches.values())


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
        configured = getattr(model.config.get_text_config(), "eos_token_id", None)
    return set() if configured is None else {configured} if isinstance(configured, int) else set(configured)


def until_end(output: list[int], ends: Sequence[int]) -> list[int]:
    """`output` up to and with its first end token."""
    stop = next((index for index, token in enumerate(output) if token in ends), len(output) - 1)
    return output[: stop + 1]


def vocabulary_size(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().num_embeddings  # type: ignore[return-value]


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
