"""Observations: each submission, reduced by one prefill of the verifier to the series of some detectors.

Everything that judges runs starts here: verdicts, calibration, attribution, `bitassay attack` and the VeriLLM
experiments. A run whose shape is wrong has defects and no series.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from bitassay.engines.decode import Prefill, States, default_batch_tokens, token_batches
from bitassay.engines.engine import TRANSFORMERS, engine_name, engine_of
from bitassay.engines.precise import higher_precision
from bitassay.engines.rotary import rotary_base_times, rotary_frequencies
from bitassay.errors import BitassayError
from bitassay.record.progress import Progress, silent
from bitassay.verification.detectors.detector import Comparison, Pair, Replay, Series
from bitassay.verification.detectors.registry import DETECTORS
from bitassay.verification.detectors.rotary_base import FACTOR
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

    @classmethod
    def of(
        cls, comparison: Comparison, series: Mapping[str, tuple[Series, ...]], defects: tuple[str, ...] = ()
    ) -> "Observation":
        """Return these series of a comparison."""
        positions = len(comparison.positions) - comparison.n_prompt
        return cls(len(comparison.header.output_ids), defects, positions, comparison.header.layers, series)


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
    series = {
        name: DETECTORS[name].measure(comparison)
        for name in detectors
        if comparison.replay is not None or not DETECTORS[name].whole
    }
    return Observation.of(comparison, series, defects)


def compared(
    opened: Mapping[int, OpenedStates], model: PreTrainedModel, progress: Progress = silent
) -> Iterator[tuple[int, Comparison]]:
    """Yield each of `opened` beside the verifier's prefills of it, by its key; the prefills go in batches of
    similar length."""
    check_verifier(model)
    keys, done = list(opened), 0
    for batch in batches([opened[key].header for key in keys], model):
        progress("verifying", done, len(keys))
        runs = [opened[keys[index]] for index in batch]
        pairs = precise_prefills([run.header for run in runs], model)
        whole = [(run, pair) for run, pair in zip(runs, pairs, strict=True) if run.is_whole]
        replayed = iter(
            replays(
                [run.header for run, _ in whole],
                model,
                [run.states for run, _ in whole],
                [pair for _, pair in whole],
            )
        )
        for index, run, (own, precise) in zip(batch, runs, pairs, strict=True):
            replay = next(replayed) if run.is_whole else None
            yield (
                keys[index],
                Comparison(run.header, run.positions, run.states, own, model.dtype, precise, replay),
            )
        done += len(batch)
    progress("verifying", len(keys), len(keys))


def check_verifier(model: PreTrainedModel) -> None:
    """Raise BitassayError for a model that another engine runs: a verifier goes on from claimed states and
    computes in a higher precision, and only transformers does both."""
    if (name := engine_name(model)) != TRANSFORMERS:
        raise BitassayError(
            f"{name} runs this model, and a verifier computes with transformers",
            "bitassay.load(...) without engine=, of the same file",
        )


def compare(trace: Trace, model: PreTrainedModel, precise: bool = True) -> Comparison:
    """Return one trace, whose shape is known to be right, beside the verifier's prefill of it. precise: also
    in the next higher precision, and replayed, which some detectors need."""
    check_verifier(model)
    header = trace.header
    if precise:
        ((_, comparison),) = compared({0: OpenedStates(header, header.positions, trace.states)}, model)
        return comparison
    (own,) = prefills([header], model)
    return Comparison(header, header.positions, trace.states, own, model.dtype)


def precise_prefills(headers: Sequence[Header], model: PreTrainedModel) -> list[Pair]:
    """Return the prefill of each claimed run, and what it is in the next higher precision."""
    own = prefills(headers, model)
    with higher_precision(model):
        return list(zip(own, prefills(headers, model), strict=True))


def replays(
    headers: Sequence[Header], model: PreTrainedModel, claimed: Sequence[States], plain: Sequence[Pair]
) -> list[Replay]:
    """Return the replay of each claimed run (`engines/decode.py`). claimed: states of each. plain: its
    prefills, which end the first segment of layers as a replay does: both begin with the embeddings."""
    if not headers:
        return []
    own, precise = replayed_pairs(headers, model, claimed, headers[0].layers[1:])
    turned = precise
    if rotary_frequencies(model):
        with higher_precision(model), rotary_base_times(model, FACTOR):
            turned = prefills(headers, model, claimed, choices=False)
    pairs = [
        [
            Prefill({**before.states, **after.states}, after.logits)
            for before, after in zip(*each, strict=True)
        ]
        for each in zip(plain, zip(own, precise, strict=True), strict=True)
    ]
    if turned is precise:
        return [(y, r, r) for y, r in pairs]
    return [(y, r, other) for (y, r), other in zip(pairs, turned, strict=True)]


def replayed_pairs(
    headers: Sequence[Header], model: PreTrainedModel, claimed: Sequence[States], ends: Sequence[int]
) -> tuple[list[Prefill], list[Prefill]]:
    """Return the segments of layers that end at `ends`, and the logits, of a replay of each claimed run: in
    the verifier's dtype, and in the next higher precision."""
    own = prefills(headers, model, claimed, layers=ends, alone=True)
    with higher_precision(model):
        return own, prefills(headers, model, claimed, layers=ends, alone=True)


def prefills(
    headers: Sequence[Header],
    model: PreTrainedModel,
    claimed: Sequence[States] | None = None,
    *,
    layers: Sequence[int] | None = None,
    **options: bool,
) -> list[Prefill]:
    """Return the model's states (default: of the sampled layers) and logits for each claimed run, which are
    read together. options: those of `decode.prefill`."""
    if not headers:
        return []
    prompts = [header.prompt_ids for header in headers]
    outputs = [header.output_ids for header in headers]
    layers = headers[0].layers if layers is None else layers
    return engine_of(model).prefill(prompts, outputs, layers=layers, claimed=claimed, **options)


def batches(headers: Sequence[Header], model: PreTrainedModel) -> Iterator[list[int]]:
    """Yield indices of runs of similar length."""
    lengths = [len(header.prompt_ids) + len(header.output_ids) - 1 for header in headers]
    return token_batches(lengths, default_batch_tokens(model))
