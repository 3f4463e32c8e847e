"""What one prefill of the verifier says about a trace, before anything is decided.

Hidden states alone are forgeable: decode with a cheap model, then run one honest prefill over its tokens. So
the evidence has two halves, the distances of the states and the margins of the tokens: by how much the
verifier's own logits (with the sampling noise rebuilt) prefer another token to the claimed one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.engines.decode import Prefill, default_batch_tokens, token_batches
from bitassay.engines.engine import engine_of
from bitassay.engines.sampling import Draw
from bitassay.record.progress import Progress, silent
from bitassay.verification.detectors.verillm import FORMAT_OF_DTYPE, RULE_SETS, cell_statistics, summary
from bitassay.verification.distance import distance_floor, mean_log_distance, relative_distances
from bitassay.verification.trace import Header, Trace


@dataclass(frozen=True)
class LayerEvidence:
    """Mean log distances over prompt and over generated positions (None where there are none), and the
    VeriLLM statistics of both: `verillm[part][rules]` with part "prompt" or "generated". by_position: the log
    distances whose mean `generated` is."""

    layer: int
    prompt: float
    generated: float | None
    verillm: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    by_position: tuple[float, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """margins: nats by which each claimed token loses. format: the one that the VeriLLM statistics
    declare."""

    layers: tuple[LayerEvidence, ...]
    margins: tuple[float, ...]
    format: str

    @property
    def mean_margin(self) -> float:
        return sum(self.margins) / len(self.margins)

    @property
    def n_generated(self) -> int:
        """Generated positions that carry states: one less than there are output tokens."""
        return len(self.margins) - 1

    def prefix(self, n: int) -> "Evidence":
        """What it would be of the same run with at most `n` generated positions, so n + 1 output tokens;
        without the VeriLLM statistics."""
        layers = tuple(
            LayerEvidence(one.layer, one.prompt, sum(cut) / len(cut) if cut else None, by_position=cut)
            for one in self.layers
            for cut in [one.by_position[:n]]
        )
        return replace(self, layers=layers, margins=self.margins[: n + 1])


def gather(
    traces: Sequence[Trace], model: PreTrainedModel, *, verillm: bool = True, progress: Progress = silent
) -> list[Evidence]:
    """The evidence of each trace, by prefills in batches. The traces must have passed
    `structure.shape_defects`."""
    found: dict[int, Evidence] = {}
    for index, own in own_prefills(traces, model):
        progress("verifying", len(found), len(traces))
        found[index] = _evidence(traces[index], own, model.dtype, verillm)
    progress("verifying", len(traces), len(traces))
    return [found[index] for index in range(len(traces))]


def own_prefills(traces: Sequence[Trace], model: PreTrainedModel) -> Iterator[tuple[int, Prefill]]:
    """The verifier's own states and logits for each trace, by its index, in batches of similar length."""
    lengths = [len(trace.header.positions) for trace in traces]
    for batch in token_batches(lengths, default_batch_tokens(model)):
        headers = [traces[index].header for index in batch]
        done = engine_of(model).prefill(
            [h.prompt_ids for h in headers], [h.output_ids for h in headers], layers=headers[0].layers
        )
        yield from zip(batch, done, strict=True)


def _evidence(trace: Trace, own: Prefill, dtype: torch.dtype, verillm: bool) -> Evidence:
    layers = tuple(
        layer_evidence(layer, trace.states[layer], own.states[layer], trace.n_prompt, dtype, verillm)
        for layer in trace.header.layers
    )
    format = FORMAT_OF_DTYPE[str(dtype).removeprefix("torch.")]
    return Evidence(layers, token_margins(trace.header, own), format)


def layer_evidence(
    layer: int,
    x: Float[Tensor, "positions hidden"],
    y: Float[Tensor, "positions hidden"],
    n_prompt: int,
    dtype: torch.dtype,
    verillm: bool = True,
) -> LayerEvidence:
    """Of the prover's states x and the verifier's y at the same positions, the first `n_prompt` of them in
    the prompt. dtype: the verifier's."""
    floor, format = distance_floor(dtype), FORMAT_OF_DTYPE[str(dtype).removeprefix("torch.")]
    distances = relative_distances(x, y)
    parts = {"prompt": slice(0, n_prompt), "generated": slice(n_prompt, None)}
    statistics = {
        part: {
            name: summary(cell_statistics(x[cells], y[cells], rules, format), rules)
            for name, rules in RULE_SETS.items()
        }
        for part, cells in (parts.items() if verillm else ())
    }
    by_position = tuple(distances[n_prompt:].clamp(min=floor).log().tolist())
    generated = mean_log_distance(distances[n_prompt:], floor) if by_position else None
    prompt = mean_log_distance(distances[:n_prompt], floor)
    return LayerEvidence(layer, prompt, generated, statistics, by_position)


def token_margins(header: Header, own: Prefill) -> tuple[float, ...]:
    """By how many nats each claimed token loses to the verifier's own choice."""
    draws = [Draw(header.nonce, index) for index in range(len(header.output_ids))]
    sampler = header.sampling.to_sampler()
    return tuple(sampler.margins(own.logits, torch.tensor(header.output_ids), draws).tolist())
