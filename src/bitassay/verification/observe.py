"""Observations: each submission, reduced by one prefill of the verifier to the series of some detectors.

Everything that judges runs starts here: verdicts, calibration, attribution, `bitassay attack` and the VeriLLM
experiments. A run whose shape is wrong has defects and no series.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from bitassay.engines.decode import Prefill, default_batch_tokens, token_batches
from bitassay.engines.engine import engine_of
from bitassay.engines.precise import higher_precision
from bitassay.record.progress import Progress, silent
from bitassay.verification.detectors.detector import Comparison, Series
from bitassay.verification.detectors.registry import DETECTORS
from bitassay.verification.structure import Request
from bitassay.verification.submissions import OpenedStates, Submission, check_submission
from bitassay.verification.trace import Header, Trace


@dataclass(frozen=True)
class Observation:
    """tokens: of the claimed output. defects: codes of what exact checks found. positions: generated
    positions that carry states (of a whole trace, one less than there are tokens). layers: those sampled.
    series: by detector."""

    tokens: int
    defects: tuple[str, ...] = ()
    positions: int = 0
    layers: tuple[int, ...] = ()
    series: Mapping[str, tuple[Series, ...]] = field(default_factory=dict)


def observe(
    submissions: Sequence[Submission],
    model: PreTrainedModel,
    requests: Sequence[Request],
    detectors: Sequence[str] | None = None,
    progress: Progress = silent,
) -> list[Observation]:
    """Return the observation of each submission, by a verifier that holds `model` and knows what was asked.
    detectors: names (default: all that there are)."""
    names = list(DETECTORS) if detectors is None else detectors
    checked = [
        check_submission(submission, model, request)
        for submission, request in zip(submissions, requests, strict=True)
    ]
    defects = [tuple(reason.code for reason in result.defects) for result in checked]
    observations = [Observation(result.tokens, codes) for result, codes in zip(checked, defects, strict=True)]
    opened = {index: result.opened for index, result in enumerate(checked) if result.opened}
    for index, comparison in compared(opened, model, progress):
        observations[index] = reduced(comparison, names, defects[index])
    return observations


def reduced(comparison: Comparison, detectors: Sequence[str], defects: tuple[str, ...] = ()) -> Observation:
    """Return the observation of one comparison."""
    return Observation(
        tokens=len(comparison.header.output_ids),
        defects=defects,
        positions=len(comparison.positions) - comparison.n_prompt,
        layers=comparison.header.layers,
        series={name: DETECTORS[name].measure(comparison) for name in detectors},
    )


def compared(
    opened: Mapping[int, OpenedStates], model: PreTrainedModel, progress: Progress = silent
) -> Iterator[tuple[int, Comparison]]:
    """Yield each of `opened` beside the verifier's prefill of it, by its key; the prefills go in batches of
    similar length."""
    keys = list(opened)
    headers = [opened[key].header for key in keys]
    for done, (index, own, precise) in enumerate(precise_prefills(headers, model)):
        progress("verifying", done, len(keys))
        claimed = opened[keys[index]]
        yield (
            keys[index],
            Comparison(claimed.header, claimed.positions, claimed.states, own, model.dtype, precise),
        )
    progress("verifying", len(keys), len(keys))


def compare(trace: Trace, model: PreTrainedModel, precise: bool = True) -> Comparison:
    """Return one trace, whose shape is known to be right, beside the verifier's prefill of it. precise: also
    in the next higher precision, which some detectors need."""
    if precise:
        ((_, own, higher),) = precise_prefills([trace.header], model)
    else:
        ((_, own),), higher = prefills([trace.header], model), None
    return Comparison(trace.header, trace.header.positions, trace.states, own, model.dtype, higher)


def prefills(headers: Sequence[Header], model: PreTrainedModel) -> Iterator[tuple[int, Prefill]]:
    """Yield the model's states and logits for each claimed run, by its index, in batches of similar
    length."""
    for batch, of_batch in _batches(headers, model):
        yield from zip(batch, _prefill(of_batch, model), strict=True)


def precise_prefills(
    headers: Sequence[Header], model: PreTrainedModel
) -> Iterator[tuple[int, Prefill, Prefill]]:
    """Yield the same as `prefills`, each with what it is in the next higher precision."""
    for batch, of_batch in _batches(headers, model):
        own = _prefill(of_batch, model)
        with higher_precision(model):
            precise = _prefill(of_batch, model)
        yield from zip(batch, own, precise, strict=True)


def _batches(headers: Sequence[Header], model: PreTrainedModel) -> Iterator[tuple[list[int], list[Header]]]:
    """Yield indices and headers of runs of similar length."""
    lengths = [len(header.prompt_ids) + len(header.output_ids) - 1 for header in headers]
    for batch in token_batches(lengths, default_batch_tokens(model)):
        yield batch, [headers[index] for index in batch]


def _prefill(headers: Sequence[Header], model: PreTrainedModel) -> list[Prefill]:
    prompts = [header.prompt_ids for header in headers]
    outputs = [header.output_ids for header in headers]
    return engine_of(model).prefill(prompts, outputs, layers=headers[0].layers)
