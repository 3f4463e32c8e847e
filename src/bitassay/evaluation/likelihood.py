"""How likely a model finds continuations of contexts, without reading what they share more than once.

Items of a subject begin with the same few-shot examples, and the endings of an item with the same context.
The prefix that the contexts of many items share is read once, and its keys and values are given to all rows
behind it by indexing the cache. Behind it an item is one row: a trie of the rest of its context and its
endings (`tries.py`), where the model attends by mask. Other models (sliding windows, rounded caches) read a
row for each ending, padded on the right, where causal attention never looks. Logits are computed only at the
positions that predict a continuation.

    log p(y | x) = sum_i log softmax(z_i)[y_i],   z_i in fp32, the sum in fp64

Sequences that are too long lose tokens on the left. What is read, scored and cut is the same as in lm-eval's
own `hf` model (lm-evaluation-harness 0.4.13, `models/huggingface.py`); the sums differ by rounding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from bitassay.engines.decode import TokenIds, default_batch_tokens, token_batches
from bitassay.evaluation.tries import Trie, attends_by_mask, rows_of
from bitassay.models.cache import behind, copy_rows, reads_on
from bitassay.models.hooks import hooked
from bitassay.models.positions import frequencies
from bitassay.models.precision import exact
from bitassay.models.walk import decoder_of
from bitassay.quantization.inputs.kv_cache import empty_cache

SHARED_TOKENS = 32  # reading so many tokens less is worth a forward of its own
ROWS = 64  # rows of logits in work at a time


class Score(NamedTuple):
    """Log-likelihood of a continuation in nats, and whether greedy decoding would have written it."""

    log_likelihood: float
    greedy: bool


@dataclass
class _Sequence:
    """Tokens to read, of which the last `scored` predict something; and which requests (by index) ask for
    which continuation at the last positions."""

    tokens: tuple[int, ...]
    scored: int = 0
    requests: list[tuple[int, TokenIds]] = field(default_factory=list)

    @property
    def context(self) -> tuple[int, ...]:
        return self.tokens[: len(self.tokens) - self.scored]


class _Scored(NamedTuple):
    """Sequences that were read, the logits of their scored positions, and each sequence's rows of these."""

    sequences: Sequence[_Sequence]
    rows: Sequence[Sequence[int]]
    logits: Float[Tensor, "rows vocabulary"]


def continuation_scores(
    model: PreTrainedModel,
    pairs: Sequence[tuple[TokenIds, TokenIds]],
    *,
    max_length: int,
    batch_tokens: int | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> list[Score]:
    """Score every (context, continuation), both in token ids and neither empty, and return the scores in that
    order. At most the last `max_length` tokens are read. `done` is told how many pairs are finished."""
    sequences: dict[tuple[int, ...], _Sequence] = {}
    for index, (context, continuation) in enumerate(pairs):
        assert 0 < len(continuation) <= max_length
        assert len(context) > 0
        tokens = (*context, *continuation)[-(max_length + 1) :][:-1]
        sequence = sequences.setdefault(tokens, _Sequence(tokens))
        sequence.scored = max(sequence.scored, len(continuation))
        sequence.requests.append((index, continuation))
    budget = default_batch_tokens(model) if batch_tokens is None else batch_tokens
    scores: dict[int, Score] = {}
    for batch in _read_all(model, list(sequences.values()), budget):
        scores |= _scores(batch)
        done(len(scores))
    return [scores[index] for index in range(len(pairs))]


@torch.inference_mode()
def _scores(batch: _Scored) -> dict[int, Score]:
    """Scores by request."""
    parts = [part.float() for part in batch.logits.split(ROWS)]
    normalizer = torch.cat([part.logsumexp(1) for part in parts])
    best = torch.cat([part.amax(1) for part in parts])
    scores = {}
    for sequence, all_rows in zip(batch.sequences, batch.rows, strict=True):
        for index, continuation in sequence.requests:
            rows = torch.tensor(all_rows[-len(continuation) :], device=batch.logits.device)
            targets = torch.tensor(continuation, device=batch.logits.device)
            chosen = batch.logits[rows, targets].float()
            log_likelihood = exact(chosen - normalizer[rows]).sum().item()
            scores[index] = Score(log_likelihood, bool((chosen == best[rows]).all()))
    return scores


def _read_all(model: PreTrainedModel, sequences: Sequence[_Sequence], budget: int) -> Iterator[_Scored]:
    """Read all sequences, a few at a time."""
    by_mask = attends_by_mask(model)
    for shared, families in _by_prefix(model, sequences):
        prefix, past = Prefix.read(model, shared), len(shared)
        tries, alone = list[tuple[Trie, list[_Sequence]]](), list[_Sequence]()
        for family in families:
            trie = Trie.of([sequence.tokens[past:] for sequence in family])
            if by_mask and len(family) > 1 and len(trie.tokens) <= budget:
                tries.append((trie, family))
            else:
                alone += family
        for batch in token_batches([len(trie.tokens) for trie, _ in tries], budget, past):
            yield prefix.repeated(len(batch)).score_tries([tries[index] for index in batch])
        for batch in token_batches([len(sequence.tokens) - past for sequence in alone], budget, past):
            yield prefix.repeated(len(batch)).score([alone[index] for index in batch])


def _by_prefix(
    model: PreTrainedModel, sequences: Sequence[_Sequence]
) -> Iterator[tuple[tuple[int, ...], list[list[_Sequence]]]]:
    """Families of sequences with one context, by the prefix that their contexts share: an empty one where
    that is not worth while. Sequences that the model reads at different frequencies are apart."""
    by_frequencies: dict[tuple[int, ...], dict[tuple[int, ...], list[_Sequence]]] = {}
    for sequence in sequences:
        families = by_frequencies.setdefault(frequencies(model, len(sequence.tokens)), {})
        families.setdefault(sequence.context, []).append(sequence)
    for families in by_frequencies.values():
        contexts = sorted(families)
        by_prefix: dict[tuple[int, ...], list[list[_Sequence]]] = {}
        for start, stop, shared in common_prefixes(contexts):
            first = families[contexts[start]][0].tokens
            prefix = first[:shared] if may_share(model, shared, len(first)) else ()
            by_prefix.setdefault(prefix, []).extend(families[context] for context in contexts[start:stop])
        yield from by_prefix.items()


def may_share(model: PreTrainedModel, shared: int, tokens: int) -> bool:
    """Return whether the model may read the first `shared` tokens once for several texts of `tokens`
    tokens."""
    return reads_on(model) and frequencies(model, shared) == frequencies(model, tokens)


@dataclass
class Prefix:
    """Equal rows that a model has read, as its cache; `length` 0: nothing yet."""

    model: PreTrainedModel
    cache: DynamicCache
    length: int

    @classmethod
    @torch.inference_mode()
    def read(cls, model: PreTrainedModel, tokens: TokenIds) -> "Prefix":
        """Read one row of tokens; there may be none."""
        cache = empty_cache(model)
        if tokens:
            decoder: torch.nn.Module = decoder_of(model)
            row = torch.tensor([tokens], device=model.device)
            decoder(input_ids=row, **behind(decoder, cache, 0, row))
        return cls(model, cache, len(tokens))

    def repeated(self, rows: int) -> "Prefix":
        """Return so many copies of the row; this prefix stays as it is."""
        if not self.length:
            return Prefix(self.model, empty_cache(self.model), 0)
        return Prefix(self.model, copy_rows(self.cache, [0] * rows, self.model.device), self.length)

    def score(self, sequences: Sequence[_Sequence]) -> _Scored:
        """Read the rest of each sequence in its row. This prefix is used up."""
        rests = [sequence.tokens[self.length :] for sequence in sequences]
        longest = max(map(len, rests))
        tokens = torch.tensor([[*rest, *[0] * (longest - len(rest))] for rest in rests])
        wanted = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, (rest, sequence) in enumerate(zip(rests, sequences, strict=True)):
            wanted[row, len(rest) - sequence.scored : len(rest)] = True
        device = self.model.device
        tokens = tokens.to(device)
        options = behind(self.model, self.cache, self.length, tokens) if self.length else {"use_cache": False}
        logits = _logits_at(self.model, tokens, wanted.to(device), options)
        stops = accumulate(sequence.scored for sequence in sequences)
        rows = [range(stop - s.scored, stop) for stop, s in zip(stops, sequences, strict=True)]
        return _Scored(sequences, rows, logits)

    def score_tries(self, families: Sequence[tuple[Trie, Sequence[_Sequence]]]) -> _Scored:
        """Read the rest of each family in a row, as a trie. This prefix is used up."""
        tokens, positions, mask = rows_of([trie for trie, _ in families], self.length, self.model.dtype)
        wanted = torch.zeros(tokens.shape, dtype=torch.bool)
        scored = [
            (row, path[-sequence.scored :])
            for row, (trie, family) in enumerate(families)
            for path, sequence in zip(trie.paths, family, strict=True)
        ]
        for row, nodes in scored:
            wanted[row, nodes] = True
        row_of_logits = wanted.flatten().cumsum(0).view(wanted.shape) - 1
        device = self.model.device
        options = {
            "past_key_values": self.cache if self.length else None,
            "use_cache": self.length > 0,
            "position_ids": positions.to(device),
            "attention_mask": mask.to(device),
        }
        logits = _logits_at(self.model, tokens.to(device), wanted.to(device), options)
        rows = [row_of_logits[row, nodes].tolist() for row, nodes in scored]
        return _Scored([sequence for _, family in families for sequence in family], rows, logits)


@torch.inference_mode()
def _logits_at(
    model: PreTrainedModel,
    tokens: Int[Tensor, "batch tokens"],
    wanted: Bool[Tensor, "batch tokens"],
    options: Mapping[str, Any],
) -> Float[Tensor, "rows vocabulary"]:
    """Logits at the wanted positions alone, row by row, in the model's dtype. The output head is given those
    positions of its input in one row; what the model does to logits after it (a cap, a scale) it does to
    these. `options` go to the model; a cache among them grows."""

    def keep(_module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = arguments
        return (hidden[wanted][None], *rest)

    head = cast(torch.nn.Module, model.get_output_embeddings())
    with hooked([head.register_forward_pre_hook(keep)]):
        return model(input_ids=tokens, **options).logits[0]


def common_prefixes(ordered: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, int, int]]:
    """Yield runs of sequences, given in lexicographic order, that share a long prefix: (first, one past the
    last, shared length, 0 where sharing is not worth while). Every sequence is in one run."""
    start, shared = 0, -1  # -1: a run of one, which shares whatever it has
    for index in range(1, len(ordered) + 1):
        common = shared_length(ordered[index - 1], ordered[index]) if index < len(ordered) else 0
        # A short common prefix ends a run rather than cutting what the run shares to less than half.
        if common >= SHARED_TOKENS and 2 * common >= shared:
            shared = common if shared < 0 else min(shared, common)
            continue
        yield start, index, max(shared, 0)
        start, shared = index, -1


def shared_length(first: TokenIds, second: TokenIds) -> int:
    """Return how many tokens two sequences have in common from the start."""
    equal = (a == b for a, b in zip(first, second, strict=False))
    return next((index for index, same in enumerate(equal) if not same), min(len(first), len(second)))
