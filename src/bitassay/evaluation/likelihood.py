"""How likely a model finds continuations of contexts, without reading what they share more than once.

A multiple-choice item asks for the log-likelihood of a few endings of one context, and all items of a subject
begin with the same few-shot examples. A plain run reads every context with every ending from the start. Here
the sequences to read make a tree with at most three levels:

    trunk   what the contexts of many items have in common: one row, read once
    head    the rest of an item's context: read once, behind the trunk
    leaf    the scored part: the context's last token and the continuation but for its last

The keys and values of a trunk are computed once and given to all rows behind it by indexing the cache, so
every cache that transformers or `quantize.kv_cache` has will do. Behind it an item is one row, a trie of head
and leaves (`tries.py`), where the model attends by mask.

Elsewhere no row needs a mask or explicit positions, whatever the architecture: rows that others build on have
equal lengths, and the last rows are padded on the right, where causal attention never looks. So heads of
several items are read together as far as the shortest of them goes, and what the others have beyond that is
read with each leaf; items are sorted by length, so that is little. Logits are computed for leaves alone.

    log p(y | x) = sum_i log softmax(z_i)[y_i],   z_i in fp32, the sum in fp64

Sequences that are too long lose tokens on the left. What is read, scored and cut is what lm-eval's own `hf`
model reads, scores and cuts (EleutherAI, lm-evaluation-harness 0.4.13, `models/huggingface.py`): the sums
differ from its by rounding.
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
    """One row to read: its last `scored` positions predict something. `asked`: which requests want the
    predictions of which tokens, at the last positions."""

    tokens: tuple[int, ...]
    scored: int = 0
    asked: list[tuple[int, TokenIds]] = field(default_factory=list)

    @property
    def head(self) -> tuple[int, ...]:
        return self.tokens[: len(self.tokens) - self.scored]


def continuation_scores(
    model: PreTrainedModel,
    pairs: Sequence[tuple[TokenIds, TokenIds]],
    *,
    max_length: int,
    batch_tokens: int | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> list[Score]:
    """Score every (context, continuation), both in token ids and neither empty; `max_length` tokens are read
    at most, the last ones. `done` hears how many pairs are finished. In the order given."""
    sequences: dict[tuple[int, ...], _Sequence] = {}
    for index, (context, continuation) in enumerate(pairs):
        assert 0 < len(continuation) <= max_length
        assert len(context) > 0
        tokens = (*context, *continuation)[-(max_length + 1) :][:-1]
        sequence = sequences.setdefault(tokens, _Sequence(tokens))
        sequence.scored = max(sequence.scored, len(continuation))
        sequence.asked.append((index, continuation))
    budget = default_batch_tokens(model) if batch_tokens is None else batch_tokens
    found: dict[int, Score] = {}
    for leaves in _leaf_logits(model, list(sequences.values()), budget):
        found |= _scores(leaves)
        done(len(found))
    return [found[index] for index in range(len(pairs))]


class _Leaves(NamedTuple):
    """Sequences that were read, the logits of their scored positions, and which rows are whose, in order."""

    sequences: Sequence[_Sequence]
    rows: Sequence[Sequence[int]]
    logits: Float[Tensor, "rows vocabulary"]


@torch.inference_mode()
def _scores(leaves: _Leaves) -> dict[int, Score]:
    """Scores by request."""
    parts = [part.float() for part in leaves.logits.split(ROWS)]
    normalizer = torch.cat([part.logsumexp(1) for part in parts])
    best = torch.cat([part.amax(1) for part in parts])
    found = {}
    for sequence, rows in zip(leaves.sequences, leaves.rows, strict=True):
        for index, continuation in sequence.asked:
            own = torch.tensor(rows[-len(continuation) :], device=leaves.logits.device)
            targets = torch.tensor(continuation, device=leaves.logits.device)
            chosen = leaves.logits[own, targets].float()
            log_likelihood = (chosen - normalizer[own]).double().sum().item()
            found[index] = Score(log_likelihood, bool((chosen == best[own]).all()))
    return found


def _leaf_logits(model: PreTrainedModel, sequences: Sequence[_Sequence], budget: int) -> Iterator[_Leaves]:
    """Logits of the scored positions, for all sequences, a few at a time."""
    by_mask = attends_by_mask(model)
    for shared, families in _by_trunk(model, sequences):
        trunk, past = Prefix.read(model, shared), len(shared)
        tries, others = list[tuple[Trie, list[_Sequence]]](), []
        for family in families:
            trie = Trie.of([one.tokens[past:] for one in family]) if by_mask and len(family) > 1 else None
            if trie is not None and len(trie.tokens) <= budget:
                tries.append((trie, family))
            else:
                others.append(family)
        for batch in token_batches([len(trie.tokens) for trie, _ in tries], budget, past):
            yield trunk.spread([0] * len(batch)).score_tries([tries[index] for index in batch])
        alone, several = _worth_a_head(model, others, past)
        for batch in token_batches([len(one.tokens) - past for one in alone], budget, past):
            group = [alone[index] for index in batch]
            yield trunk.spread([0] * len(group)).score(group)
        for batch in token_batches([len(one[0].head) - past for one in several], budget, past):
            chosen = [several[index] for index in batch]
            length = min(len(family[0].head) for family in chosen)
            heads = trunk.spread([0] * len(batch)).extend([one[0].head[past:length] for one in chosen])
            leaves = [(row, one) for row, family in enumerate(chosen) for one in family]
            for part in token_batches([len(one.tokens) - length for _, one in leaves], budget, length):
                rows, group = zip(*(leaves[index] for index in part), strict=True)
                yield heads.spread(rows).score(group)


def _by_trunk(
    model: PreTrainedModel, sequences: Sequence[_Sequence]
) -> Iterator[tuple[tuple[int, ...], list[list[_Sequence]]]]:
    """Sequences of one head together, and those families by what their heads have in common from the start:
    nothing, where that is not worth while. Those that the model reads at other frequencies are apart."""
    alike: dict[tuple[int, ...], dict[tuple[int, ...], list[_Sequence]]] = {}
    for sequence in sequences:
        families = alike.setdefault(frequencies(model, len(sequence.tokens)), {})
        families.setdefault(sequence.head, []).append(sequence)
    for families in alike.values():
        heads = sorted(families)
        found: dict[tuple[int, ...], list[list[_Sequence]]] = {}
        for start, stop, shared in common_prefixes(heads):
            first = families[heads[start]][0].tokens
            trunk = found.setdefault(first[:shared] if may_share(model, shared, len(first)) else (), [])
            trunk += [families[head] for head in heads[start:stop]]
        yield from found.items()


def may_share(model: PreTrainedModel, shared: int, tokens: int) -> bool:
    """Whether the model may read the first `shared` tokens once for several texts of `tokens` tokens."""
    return reads_on(model) and frequencies(model, shared) == frequencies(model, tokens)


def _worth_a_head(
    model: PreTrainedModel, families: Sequence[list[_Sequence]], shared: int
) -> tuple[list[_Sequence], list[list[_Sequence]]]:
    """Sequences that are read alone, and families whose head beyond `shared` is long enough to be read
    once."""
    alone, several = [], []
    for family in families:
        head, tokens = len(family[0].head), len(family[0].tokens)
        if (len(family) - 1) * (head - shared) >= SHARED_TOKENS and may_share(model, head, tokens):
            several.append(family)
        else:
            alone += family
    return alone, several


@dataclass
class Prefix:
    """Rows of equal length that a model has read, as its cache; `length` 0: nothing yet, and one row."""

    model: PreTrainedModel
    cache: DynamicCache
    length: int

    @classmethod
    def read(cls, model: PreTrainedModel, tokens: TokenIds) -> "Prefix":
        """One row that holds `tokens`; there may be none."""
        nothing = cls(model, empty_cache(model), 0)
        return nothing.extend([tokens]) if tokens else nothing

    def spread(self, rows: Sequence[int]) -> "Prefix":
        """A prefix whose rows are these rows of this one, which stays as it is."""
        if not self.length:
            return Prefix.read(self.model, ())
        return Prefix(self.model, copy_rows(self.cache, rows, self.model.device), self.length)

    @torch.inference_mode()
    def extend(self, rows: Sequence[TokenIds]) -> "Prefix":
        """Read equally many more tokens in every row. This prefix is used up."""
        tokens = torch.tensor(rows, device=self.model.device)
        decoder: torch.nn.Module = decoder_of(self.model)
        decoder(input_ids=tokens, **behind(decoder, self.cache, self.length, tokens))
        return Prefix(self.model, self.cache, self.length + tokens.shape[1])

    def score(self, group: Sequence[_Sequence]) -> _Leaves:
        """Read the rest of each sequence in its row. This prefix is used up."""
        rests = [sequence.tokens[self.length :] for sequence in group]
        tokens = right_pad(rests, self.model.device)
        wanted = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, (rest, sequence) in enumerate(zip(rests, group, strict=True)):
            wanted[row, len(rest) - sequence.scored : len(rest)] = True
        options = behind(self.model, self.cache, self.length, tokens) if self.length else {"use_cache": False}
        logits = logits_at(self.model, tokens, wanted.to(tokens.device), options)
        stops = accumulate(sequence.scored for sequence in group)
        rows = [range(stop - one.scored, stop) for stop, one in zip(stops, group, strict=True)]
        return _Leaves(group, rows, logits)

    def score_tries(self, families: Sequence[tuple[Trie, Sequence[_Sequence]]]) -> _Leaves:
        """Read the rest of each family in a row, as the trie that it is. This prefix is used up."""
        tokens, positions, mask = rows_of([trie for trie, _ in families], self.length, self.model.dtype)
        wanted = torch.zeros(tokens.shape, dtype=torch.bool)
        scored = [
            (row, path[-one.scored :])
            for row, (trie, family) in enumerate(families)
            for path, one in zip(trie.paths, family, strict=True)
        ]
        for row, nodes in scored:
            wanted[row, nodes] = True
        places = wanted.flatten().cumsum(0).view(wanted.shape) - 1
        device = self.model.device
        options = {
            "past_key_values": self.cache if self.length else None,
            "use_cache": self.length > 0,
            "position_ids": positions.to(device),
            "attention_mask": mask.to(device),
        }
        logits = logits_at(self.model, tokens.to(device), wanted.to(device), options)
        rows = [places[row, nodes].tolist() for row, nodes in scored]
        return _Leaves([one for _, family in families for one in family], rows, logits)


@torch.inference_mode()
def logits_at(
    model: PreTrainedModel,
    tokens: Int[Tensor, "batch tokens"],
    wanted: Bool[Tensor, "batch tokens"],
    options: Mapping[str, Any],
) -> Float[Tensor, "rows vocabulary"]:
    """Logits at the wanted positions alone, row by row, in the model's dtype. `options` go to the model; a
    cache among them grows.

    The output head is given those positions of its input in one row; what the model does to logits after it
    (a cap, a scale) it does to these.
    """

    def keep(_module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = arguments
        return (hidden[wanted][None], *rest)

    head = cast(torch.nn.Module, model.get_output_embeddings())
    with hooked([head.register_forward_pre_hook(keep)]):
        return model(input_ids=tokens, **options).logits[0]


def right_pad(rows: Sequence[TokenIds], device: torch.device) -> Int[Tensor, "batch tokens"]:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def common_prefixes(ordered: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, int, int]]:
    """Runs of sequences, which come in lexicographic order, that share a long beginning: (first, one past the
    last, shared length, 0 where it is not worth while). Every sequence is in one run."""
    start, shared = 0, -1  # -1: a run of one, which shares whatever it has
    for index in range(1, len(ordered) + 1):
        common = shared_length(ordered[index - 1], ordered[index]) if index < len(ordered) else 0
        # A short common beginning ends a run rather than cutting what the run shares to less than half.
        if common >= SHARED_TOKENS and 2 * common >= shared:
            shared = common if shared < 0 else min(shared, common)
            continue
        yield start, index, max(shared, 0)
        start, shared = index, -1


def shared_length(one: TokenIds, other: TokenIds) -> int:
    """How many tokens two sequences have in common from the start."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
