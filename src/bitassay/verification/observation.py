"""What a trace shows: `observe` reduces it and one prefill of the verifier to a few numbers a position.

Proofs and projections are made from the full states here, by a fixed seed. A host would send them alone, with
a seed that the verifier draws after it has committed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.engines.decode import Prefill
from bitassay.record.progress import Progress, silent
from bitassay.verification.detectors import difr, toploc
from bitassay.verification.detectors.verillm import FORMAT_OF_DTYPE, RULE_SETS, accepted, cell_statistics
from bitassay.verification.distance import distance_floor, mean_log_distance, relative_distances
from bitassay.verification.evidence import own_prefills, token_margins
from bitassay.verification.exchange import Handed, Shown, codes, examine
from bitassay.verification.structure import Request
from bitassay.verification.trace import Trace

GRID = (1, 2, 4, 8, 16, 32, 64, 96, 128)  # token counts at which detectors are compared
PROJECTION_SEED = 0


@dataclass(frozen=True)
class Observation:
    """What one trace shows. Lists run over generated positions; lists of lists over layers first.

    log_distances, prompt_log_distances (means by layer); refused_cells by rule set: share of layers at a
    position that the rules do not accept; projected: log distance of projections; toploc: (statistic,
    accepted by the published limits) after n tokens, by n of GRID; margins by output token; defects: codes of
    structural defects. A trace whose shape is wrong has defects only.
    """

    tokens: int
    defects: tuple[str, ...]
    margins: tuple[float, ...] = ()
    log_distances: tuple[tuple[float, ...], ...] = ()
    prompt_log_distances: tuple[float, ...] = ()
    refused_cells: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    projected: tuple[float, ...] = ()
    toploc: Mapping[int, tuple[float, bool]] = field(default_factory=dict)


def observe(
    handed: Sequence[Handed],
    model: PreTrainedModel,
    requests: Sequence[Request],
    *,
    progress: Progress = silent,
) -> list[Observation]:
    """What each trace or answer shows to a verifier that holds `model` and knows what was asked."""
    examined = [examine(one, model, request) for one, request in zip(handed, requests, strict=True)]
    found = {
        index: Observation(one.tokens, codes(one.defects))
        for index, one in enumerate(examined)
        if one.shown is None
    }
    compared = [(index, one.shown) for index, one in enumerate(examined) if one.shown]
    for place, own in own_prefills([Trace(shown.header, {}) for _, shown in compared], model):
        progress("verifying", len(found), len(handed))
        index, shown = compared[place]
        found[index] = reduced(shown, own, model.dtype, codes(examined[index].defects))
    progress("verifying", len(handed), len(handed))
    return [found[index] for index in range(len(handed))]


@dataclass(frozen=True)
class Pair:
    """The states of one layer, x the prover's and y the verifier's, at the same positions; the first
    `n_prompt` of them in the prompt."""

    x: Float[Tensor, "positions hidden"]
    y: Float[Tensor, "positions hidden"]
    n_prompt: int

    @property
    def generated(self) -> tuple[Float[Tensor, "generated hidden"], Float[Tensor, "generated hidden"]]:
        return self.x[self.n_prompt :], self.y[self.n_prompt :]


def pairs(shown: Shown, own: Prefill) -> list[Pair]:
    """Of the sampled layers, in the header's order."""
    header, at = shown.header, list(shown.positions)
    n_prompt = sum(position < len(header.prompt_ids) for position in at)
    return [Pair(shown.states[layer], own.states[layer][at], n_prompt) for layer in header.layers]


def reduced(shown: Shown, own: Prefill, dtype: torch.dtype, defects: tuple[str, ...] = ()) -> Observation:
    """What was shown, and the verifier's prefill of it, in numbers."""
    layers, tokens = pairs(shown, own), len(shown.header.output_ids)
    x, y = layers[-1].generated
    generated, prompt = log_distances(layers, dtype)
    return Observation(
        tokens=tokens,
        defects=defects,
        margins=token_margins(shown.header, own),
        log_distances=generated,
        prompt_log_distances=prompt,
        refused_cells={name: refused_cells(layers, name, dtype) for name in RULE_SETS},
        projected=projected(difr.project(x, PROJECTION_SEED), y, dtype),
        toploc={n: chunk_score(toploc.prove_chunks(x[:n]), y[:n]) for n in GRID if n <= tokens and len(x)},
    )


def log_distances(
    layers: Sequence[Pair], dtype: torch.dtype
) -> tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]:
    """By layer: log distance of each generated position, and the mean over the prompt's."""
    floor, generated, prompt = distance_floor(dtype), [], []
    for one in layers:
        distances = relative_distances(one.x, one.y)
        generated.append(tuple(distances[one.n_prompt :].clamp(min=floor).log().tolist()))
        prompt.append(mean_log_distance(distances[: one.n_prompt], floor))
    return tuple(generated), tuple(prompt)


def refused_cells(layers: Sequence[Pair], rules: str, dtype: torch.dtype) -> tuple[float, ...]:
    """At each generated position, the share of layers that the VeriLLM rules do not accept."""
    wanted, format = RULE_SETS[rules], FORMAT_OF_DTYPE[str(dtype).removeprefix("torch.")]
    refused = [~accepted(cell_statistics(*one.generated, wanted, format), wanted) for one in layers]
    return tuple((sum(cells.double() / len(layers) for cells in refused)).tolist())  # type: ignore[union-attr]


def projected(
    claimed: Float[Tensor, "generated k"], y: Float[Tensor, "generated hidden"], dtype: torch.dtype
) -> tuple[float, ...]:
    """Log distance of each position's projections, relative to the verifier's."""
    distances = difr.projection_distances(claimed, y, PROJECTION_SEED)
    return tuple(distances.clamp(min=distance_floor(dtype)).log().tolist())


def chunk_score(proofs: Sequence[bytes], y: Float[Tensor, "tokens hidden"]) -> tuple[float, bool]:
    """The score of the chunks, and whether all are within the published limits."""
    chunks = toploc.check_chunks(proofs, y)
    return toploc.score(chunks), all(toploc.accepted(chunk) for chunk in chunks)
