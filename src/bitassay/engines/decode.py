"""Run a model on batches of token ids: `generate` as a host does, `prefill` as a verifier does.

Both pad on the left, with an attention mask and explicit position ids, so that a sequence's positions count
from its own first token.

Which positions have states: a prompt of P tokens is read in one forward (positions 0 .. P-1), and every
generated token but the last is fed back, one a step (positions P .. P+n-2 for n output tokens). The last
token is never an input, so there are P+n-1 positions on both sides. The logits at position P-1+i choose
output token i.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.engines.sampling import GREEDY, Draw, Sampler
from bitassay.engines.segments import needless, passing_by
from bitassay.engines.taps import joined_states, record_states, replay_states
from bitassay.errors import BitassayError
from bitassay.models.cache import behind, keeps_positions, last_logits, takes_cache
from bitassay.models.positions import context_length, frequencies
from bitassay.quantization.inputs.kv_cache import empty_cache

TokenIds = Sequence[int]
States = Mapping[int, Float[Tensor, "_ hidden"]]  # by layer, of all positions
# Tokens in one forward, padding included. On a CPU more is slower (attention over padding), not faster.
CPU_TOKENS, DEVICE_TOKENS = 512, 16_384
CACHED_ROWS = 16  # a batch's keys and values may span so many times its tokens


@dataclass(frozen=True)
class Generation:
    """The output of one prompt, with its end-of-text token, and hidden states by layer in the model's
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
) -> list[Generation]:
    """Generate for all prompts, token by token with a KV cache, until each has ended or has `max_new_tokens`;
    as one batch, or as several where the model cannot read the prompts together.

    nonces: one a prompt, part of the key of the sampling noise (default: "0", "1", ...). layers: those whose
    states are recorded. Raises BitassayError for an empty prompt, ids outside the vocabulary, or more tokens
    than the model has positions.
    """
    nonces = check_generation(model, prompts, nonces, max_new_tokens)
    generations: dict[int, Generation] = {}
    for batch in _readable_together(model, [(len(p), len(p) + max_new_tokens - 1) for p in prompts]):
        steps = Steps(model, [prompts[index] for index in batch])
        batch_nonces = [nonces[index] for index in batch]
        outputs = _generate_batch(steps, max_new_tokens, sampler, batch_nonces, layers)
        generations |= zip(batch, outputs, strict=True)
    return [generations[index] for index in range(len(prompts))]


def _generate_batch(
    steps: "Steps", max_new_tokens: int, sampler: Sampler, nonces: Sequence[str], layers: Sequence[int]
) -> list[Generation]:
    model, prompts = steps.model, steps.prompts
    ends = torch.tensor(sorted(end_tokens(model)), device=model.device, dtype=torch.long)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    chosen: list[Int[Tensor, " batch"]] = []
    with record_states(model, layers) as recorded:
        for index in range(max_new_tokens):
            logits = steps.read(chosen[-1] if chosen else None)
            for pieces in recorded.values():
                pieces[-1] = pieces[-1][:, -(1 if chosen else steps.length) :]  # not what was read before
            chosen.append(sampler.choose(logits, [Draw(nonce, index) for nonce in nonces]))
            ended |= torch.isin(chosen[-1], ends)
            if ended.all():
                break
    outputs = [until_end(row, ends.tolist()) for row in torch.stack(chosen, dim=1).tolist()]
    states, longest = joined_states(recorded), max(map(len, prompts))
    return [
        Generation(
            tuple(output),
            _cut(
                {layer: batch[row] for layer, batch in states.items()},
                longest - len(prompt),
                longest + len(output) - 1,
            ),
        )
        for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]


class Steps:
    """Read a batch of texts that grow by one token each at a time."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[TokenIds]):
        self.model, self.prompts = model, prompts
        self.tokens, self.mask = left_pad(prompts, model.device)
        self.read_at = frequencies(model, self.length)
        self.padded, self.head = keeps_positions(model), last_logits(model, 1)
        self.cache = empty_cache(model) if takes_cache(model) else None

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def read(self, chosen: Int[Tensor, " batch"] | None) -> Float[Tensor, "batch vocabulary"]:
        """Return the logits behind the prompts, or behind one more token in each row. All tokens are read
        again where there is no cache, and where its content was computed at other frequencies."""
        new = self.length
        if chosen is not None:
            self.tokens = torch.cat([self.tokens, chosen[:, None]], dim=1)
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
            before, self.read_at = self.read_at, frequencies(self.model, self.length)
            new = self.length if self.cache is None or self.read_at != before else 1
            if self.cache is not None and new > 1:
                self.cache = empty_cache(self.model)
        tokens, options = self.tokens[:, -new:], dict[str, Any](use_cache=False)
        if self.cache is not None:
            options = behind(self.model, self.cache, self.length - new, tokens)
        if self.padded:
            options |= _padding(self.mask, new)
        return self.model(input_ids=tokens, **options, **self.head).logits[:, -1]


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    outputs: Sequence[TokenIds],
    *,
    layers: Sequence[int] = (),
    claimed: Sequence[States] | None = None,
    alone: bool = False,
    choices: bool = True,
) -> list[Prefill]:
    """Compute what a host computes that reads each prompt and then its output (all but the last token) token
    by token, in one forward for all, without a cache; in several where the model cannot read them together.

    claimed: states of each text at all its positions, by layer, for a replay: what the model makes of them,
    each stretch of layers on its own. States of a layer, and the logits, are then what comes of the claimed
    ones of the layer before it in `claimed`. alone: stretches that do not end at one of `layers`, which are
    then among those claimed, are left out where the model can do without (`segments.py`). choices: whether
    all logits that choose a token are wanted, not the last alone. Raises BitassayError as `generate` does.
    """
    sequences = [[*prompt, *output[:-1]] for prompt, output in zip(prompts, outputs, strict=True)]
    check_ids(model, sequences)
    if not all(outputs):
        raise BitassayError(
            "an output without tokens: there is nothing to check", "generate at least one token"
        )
    prefills: dict[int, Prefill] = {}
    spans = [(len(prompt), len(tokens)) for prompt, tokens in zip(prompts, sequences, strict=True)]
    for batch in _readable_together(model, spans):
        parts: list[list[Prefill]] = []
        begin, (first, last) = 0, spans[batch[0]]
        stops = _same_frequencies(model, first, last)
        places = sorted(claimed[0]) if alone and claimed and len(stops) == 1 else ()
        passed = needless(model, places, layers)
        for end in stops:
            # A batch of several parts has rows of equal lengths; of a batch with one, all is wanted.
            cut = [sequences[index][:end] if end < last else sequences[index] for index in batch]
            wanted = [len(tokens) - max(begin, spans[i][0] - 1) for i, tokens in zip(batch, cut, strict=True)]
            wanted = wanted if choices else [1] * len(batch)
            shown = [
                _cut(claimed[i], begin, len(tokens)) for i, tokens in zip(batch, cut, strict=True) if claimed
            ]
            with passing_by(model, passed):
                parts.append(_prefill_batch(model, cut, wanted, layers, begin, shown))
            begin = end
        prefills |= zip(batch, map(_joined, *parts) if len(parts) > 1 else parts[0], strict=True)
    return [prefills[index] for index in range(len(prompts))]


def _prefill_batch(
    model: PreTrainedModel,
    sequences: Sequence[TokenIds],
    wanted: Sequence[int],
    layers: Sequence[int],
    begin: int,
    claimed: Sequence[States],
) -> list[Prefill]:
    """One forward: the states from position `begin` on, and the last `wanted` logits of each sequence."""
    tokens, mask = left_pad(sequences, model.device)
    options = _padding(mask, tokens.shape[1]) if keeps_positions(model) else {}
    starts = [tokens.shape[1] - len(sequence) + begin for sequence in sequences]
    with record_states(model, layers) as recorded, replay_states(model, _aligned(claimed, starts, tokens)):
        logits = model(input_ids=tokens, use_cache=False, **options, **last_logits(model, max(wanted))).logits
    states, longest = joined_states(recorded), tokens.shape[1]
    return [
        Prefill(
            _cut({layer: batch[row] for layer, batch in states.items()}, start, longest),
            logits[row, -count:],
        )
        for row, (start, count) in enumerate(zip(starts, wanted, strict=True))
    ]


def _aligned(
    claimed: Sequence[States], starts: Sequence[int], tokens: Int[Tensor, "batch tokens"]
) -> dict[int, tuple[Float[Tensor, "batch tokens hidden"], Bool[Tensor, "batch tokens"]]]:
    """Return the claimed states of a padded batch by layer, and where they are: in each row from where it
    starts. Of texts that are read in several parts those of the last positions are this part's."""
    aligned = {}
    for layer in claimed[0] if claimed else ():
        rows = [of_row[layer] for of_row in claimed]
        states = rows[0].new_zeros(*tokens.shape, rows[0].shape[-1])
        where = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, (values, start) in enumerate(zip(rows, starts, strict=True)):
            where[row, start:] = True
            states[row, start:] = values
        aligned[layer] = states.to(tokens.device), where.to(tokens.device)
    return aligned


def _padding(mask: Int[Tensor, "batch tokens"], new: int) -> dict[str, Tensor]:
    """The options of a forward that reads the last `new` tokens of padded rows."""
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]}


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
    """Sort texts into batches, by the lengths (first, last) that they are read at: all together, or those of
    equal lengths where padding does harm or rotary frequencies change on the way; those of other frequencies
    apart."""
    padded, batches = keeps_positions(model), dict[tuple, list[int]]()
    for index, (first, last) in enumerate(spans):
        begins, ends = frequencies(model, first), frequencies(model, last)
        key = (begins, ends) if padded and begins == ends else (begins, ends, first, last)
        batches.setdefault(key, []).append(index)
    return list(batches.values())


def left_pad(
    sequences: Sequence[TokenIds], device: torch.device
) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
    """Return token ids padded on the left with 0, and the mask that is 1 at real tokens."""
    longest = max(map(len, sequences))
    ids = [[0] * (longest - len(sequence)) + list(sequence) for sequence in sequences]
    mask = [[0] * (longest - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def default_batch_tokens(model: PreTrainedModel) -> int:
    """Return how many tokens, padding included, one forward reads."""
    return CPU_TOKENS if model.device.type == "cpu" else DEVICE_TOKENS


def token_batches(lengths: Sequence[int], budget: int, past: int = 0) -> Iterator[list[int]]:
    """Yield the indices of rows in batches, short rows first: at most `budget` tokens with padding,
    CACHED_ROWS times as many with the `past` of each row, and little padding once a quarter is full."""
    batch: list[int] = []
    held = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
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
    """Return the ids at which generation stops, by the model's generation configuration."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    if configured is None:
        configured = getattr(model.config.get_text_config(), "eos_token_id", None)
    return set() if configured is None else {configured} if isinstance(configured, int) else set(configured)


def until_end(output: list[int], ends: Sequence[int]) -> list[int]:
    """Return `output` up to and with its first end token."""
    stop = next((index for index, token in enumerate(output) if token in ends), len(output) - 1)
    return output[: stop + 1]


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of token ids that the model has an embedding for."""
    return model.get_input_embeddings().num_embeddings  # type: ignore[return-value]


def check_generation(
    model: PreTrainedModel, prompts: Sequence[TokenIds], nonces: Sequence[str] | None, max_new_tokens: int
) -> list[str]:
    """Return the nonces, one a prompt. Raises BitassayError as `generate` does."""
    if max_new_tokens < 1:
        raise BitassayError(f"max_new_tokens is {max_new_tokens}", "ask for at least 1")
    check_ids(model, prompts, max_new_tokens - 1)
    words = [str(index) for index in range(len(prompts))] if nonces is None else list(nonces)
    assert len(words) == len(prompts)
    return words


def check_ids(model: PreTrainedModel, sequences: Sequence[TokenIds], more: int = 0) -> None:
    """Raise BitassayError for what the model cannot read: no tokens, ids outside the vocabulary, `more`
    tokens beyond its positions."""
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


def _cut(states: States, start: int, stop: int) -> dict[int, Tensor]:
    return {layer: rows[start:stop].clone() for layer, rows in states.items()}
