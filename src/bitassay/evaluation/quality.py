"""The quality of candidates compared with their base model, measured in one pass over a text.

The base model runs once per window and every candidate is compared with it at once; full logits are never
stored. A candidate keeps a few numbers per token (`divergence.py`), of which `summarise` makes every figure
with its interval. A new column of the assay about quality is a field of `Quality`, filled in `summarise`, and
a column in `report/`.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.data.windows import Protocol
from bitassay.engines.engine import TRANSFORMERS, engine_name
from bitassay.errors import BitassayError
from bitassay.evaluation import statistics
from bitassay.evaluation.divergence import TokenScores, token_scores, window_logits
from bitassay.evaluation.statistics import FEWEST, Estimate, Interval, exp_mean_of, mean_of
from bitassay.models.config import text_config
from bitassay.models.lockstep import Forward, in_step
from bitassay.models.positions import check_window, context_length, model_windows
from bitassay.quantization.recipe.recipe import BASE
from bitassay.record.progress import Progress, silent

STATES_BYTES = 2**30  # of opened models
PROBE = "Once upon a time, in 1984, they weren't naïve: x = f(y);\n\n  日本語 12345"
# By column, how its interval is made.
INTERVALS = {
    "ppl_ci": f"{statistics.LOG} of what is above 1",
    "ppl_delta_ci": statistics.LOG_DIFFERENCE,
    "kl_ci": statistics.LOG,
    "top1_ci": statistics.LOGIT,
}
PAIR_INTERVALS = {
    "ppl_ci": statistics.LOG_DIFFERENCE,
    "ppl_fraction_ci": statistics.LOG_RATIO,
    "kl_ci": statistics.LOG_DIFFERENCE,
    "kl_fraction_ci": statistics.LOG_RATIO,
}
INTERVAL = (
    "95 %, Student's t over windows, paired with the base model: of losses, KL and differences on a log "
    f"scale, of agreement on a logit scale; {statistics.NONE}"
)


@dataclass(frozen=True)
class Quality:
    """How well a model predicts a text, and how far it is from its base. Perplexities are exp of the mean
    loss in nats; KL is in nats a token; intervals are 95 %, paired with the base by window, None for fewer
    than FEWEST windows (`statistics.py`). ppl_delta_visible: the smallest true difference from the base that
    so many windows would show with a probability of 80 %."""

    ppl: float
    ppl_ci: Interval
    ppl_delta: float
    ppl_delta_ci: Interval
    ppl_delta_visible: float | None
    kl_mean: float
    kl_ci: Interval
    kl_median: float
    kl_p99: float
    top1_agreement: float
    top1_ci: Interval

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by column."""
        return asdict(self)


@dataclass(frozen=True)
class Evaluation:
    """The quality of one model under a named protocol; `base` says what it was compared with."""

    model: str
    base: str | None
    protocol: str
    corpus_source: str
    windows: int
    predicted_tokens: int
    quality: Quality

    def __str__(self) -> str:
        q, ppl = self.quality, _interval(self.quality.ppl_ci)
        lines = [f"{self.model}: perplexity {q.ppl:.4g} {ppl} on {self.protocol}, {self.windows} windows"]
        if self.base is not None:
            tail = f"median {q.kl_median:.3g}, 99 % {q.kl_p99:.3g}"
            lines += [
                f"  against {self.base}: {q.ppl_delta:+.4g} {_interval(q.ppl_delta_ci)}",
                f"  KL divergence {q.kl_mean:.4g} {_interval(q.kl_ci)} nats a token, {tail}",
                f"  top-1 agreement {q.top1_agreement:.2%} {_interval(q.top1_ci)}",
            ]
        return "\n".join(lines)


def evaluate(
    model: PreTrainedModel,
    *,
    against: PreTrainedModel | None = None,
    protocol: Protocol | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Measure the perplexity of `model`; with `against`, also its difference from that model, with paired
    intervals.

    The default protocol is `wikitext2-raw/2048[n=16]`. Raises BitassayError where the two models have
    different vocabularies.
    """
    if against is None:
        return evaluate_all(model, {}, protocol=protocol, progress=progress)[BASE]
    return evaluate_all(against, {"model": model}, protocol=protocol, progress=progress)["model"]


def evaluate_all(
    base: PreTrainedModel,
    candidates: Mapping[str, PreTrainedModel],
    *,
    protocol: Protocol | None = None,
    progress: Progress = silent,
) -> dict[str, Evaluation]:
    """Measure many candidates in one pass over the text, and the base itself, under BASE."""
    text = score_text(base, candidates, protocol or Protocol(windows=16), progress)
    return {
        name: text.evaluation(name, _name(model), None if name == BASE else _name(base))
        for name, model in {BASE: base, **candidates}.items()
    }


class ScoredText(NamedTuple):
    """The scores of a base model (under BASE) and of its candidates, window by window."""

    protocol: Protocol
    source: str
    scores: dict[str, list[TokenScores]]

    def evaluation(self, name: str, model: str, base: str | None) -> Evaluation:
        """Return the figures of the candidate `name`; `model` and `base` are the names to print."""
        scores = self.scores[name]
        return Evaluation(
            model=model,
            base=base,
            protocol=self.protocol.id,
            corpus_source=self.source,
            windows=len(scores),
            predicted_tokens=sum(len(window.nll) for window in scores),
            quality=summarise(scores, self.scores[BASE]),
        )


def score_text(
    base: PreTrainedModel,
    candidates: Mapping[str, PreTrainedModel],
    protocol: Protocol,
    progress: Progress = silent,
) -> ScoredText:
    """Score all windows of a protocol. Raises BitassayError as `score_windows` does."""
    windows, source = model_windows(base, protocol)
    for name in other_tokens(base, candidates):
        progress(f"{name}: its tokenizer gives other tokens than the base model's, which are read here")
    text = ScoredText(protocol, source, {name: [] for name in (BASE, *candidates)})
    for index, window_scores in score_windows(base, candidates, windows, progress=progress):
        for name, scores in window_scores.items():
            text.scores[name].append(scores)
        progress(f"evaluating on {protocol.id}", index + 1, len(windows))
    return text


def other_tokens(base: PreTrainedModel, candidates: Mapping[str, PreTrainedModel]) -> list[str]:
    """Return the candidates whose tokenizer gives other ids of a text than that of the base. Vocabularies of
    one size may differ, and then figures on equal ids say nothing."""
    ours = getattr(base, "tokenizer", None)
    theirs = {name: getattr(model, "tokenizer", None) for name, model in candidates.items()}
    known = {name: tokens for name, tokens in theirs.items() if tokens is not None and tokens is not ours}
    if ours is None or not known:
        return []
    expected = ours(PROBE, add_special_tokens=False).input_ids
    return [n for n, tokens in known.items() if tokens(PROBE, add_special_tokens=False).input_ids != expected]


def score_windows(
    base: PreTrainedModel,
    candidates: Mapping[str, PreTrainedModel],
    windows: Int[Tensor, "windows tokens"],
    skip: Container[int] = (),
    finite: bool = True,
    progress: Progress = silent,
) -> Iterator[tuple[int, dict[str, TokenScores]]]:
    """Yield, window by window, the scores of the base (under BASE) and of every candidate; `skip` holds the
    indices of windows that are done. Raises BitassayError for different vocabularies, for windows that a
    model cannot read, and, if `finite`, for losses that are NaN or infinite."""
    size = text_config(base).vocab_size
    for name, candidate in candidates.items():
        if (other := text_config(candidate).vocab_size) != size:
            raise BitassayError(
                f"{name} has a vocabulary of {other}, the base model of {size}",
                "compare a model with one that uses the same tokenizer",
            )
        check_window(context_length(candidate), windows.shape[1], name)
    models = {BASE: base, **candidates}
    left = [index for index in range(len(windows)) if index not in skip]
    logits = _all_logits(list(models.values()), windows[left], progress)
    for index in left:
        base_logits, targets = next(logits), windows[index, 1:]
        scores = {BASE: token_scores(base_logits, targets)}
        for name in candidates:
            scores[name] = token_scores(next(logits), targets, base_logits)
        for name, tokens in scores.items() if finite else ():
            if bad := int((~(tokens.nll.isfinite() & tokens.kl.isfinite())).sum()):
                raise BitassayError(
                    f"{name}: the losses of {bad} of {len(targets)} tokens are NaN or infinite, "
                    f"in {candidates.get(name, base).dtype}",
                    "--dtype float32, or leave it out",
                )
        yield index, scores


def state_bytes(model: PreTrainedModel, tokens: int, models: int) -> int:
    """Return the bytes that the hidden states of a window take in so many models like this one, twice."""
    return 2 * tokens * text_config(model).hidden_size * model.dtype.itemsize * models


def _all_logits(
    models: Sequence[PreTrainedModel], windows: Int[Tensor, "windows tokens"], progress: Progress
) -> Iterator[Float[Tensor, "predicted vocabulary"]]:
    """Yield the logits of each window by each model in turn. Opened models read their layers once for as many
    windows as have hidden states in STATES_BYTES."""
    state = state_bytes(models[0], windows.shape[1], len(models))
    for part in windows.split(max(1, STATES_BYTES // state)):
        yield from in_step(
            [Forward(model, partial(window_logits, model, window)) for window in part for model in models],
            progress,
        )


def summarise(scores: Sequence[TokenScores], base: Sequence[TokenScores]) -> Quality:
    """Return figures and intervals from the scores of the same windows; of the base itself, pass its scores
    twice."""
    kl, agree = _by_window(scores, "kl"), _by_window(scores, "agree")
    ppl, base_ppl = (exp_mean_of(_by_window(group, "nll").parts) for group in (scores, base))
    kl_tokens = np.concatenate([window.kl.numpy() for window in scores])
    return Quality(
        ppl=ppl.value,
        ppl_ci=_plus(statistics.log_interval(Estimate(ppl.value - 1, ppl.parts)), 1),
        ppl_delta=ppl.value - base_ppl.value,
        ppl_delta_ci=statistics.log_difference_interval(base_ppl, ppl),
        ppl_delta_visible=statistics.visible_difference(base_ppl, ppl),
        kl_mean=kl.value,
        kl_ci=statistics.log_interval(kl),
        kl_median=float(np.median(kl_tokens)),
        kl_p99=float(np.quantile(kl_tokens, 0.99)),
        top1_agreement=agree.value,
        top1_ci=statistics.logit_interval(agree),
    )


def _by_window(scores: Sequence[TokenScores], field: str) -> Estimate:
    return mean_of([getattr(window, field).double().mean().item() for window in scores])


def _plus(interval: Interval, value: float) -> Interval:
    return None if interval is None else (interval[0] + value, interval[1] + value)


@dataclass(frozen=True)
class TextDifference:
    """The second model's figures less the first's on the same windows: perplexity, and KL to their common
    base in nats a token. Fractions are of the first's figure; None for a KL of 0."""

    ppl: float
    ppl_ci: Interval
    ppl_fraction: float
    ppl_fraction_ci: Interval
    kl: float
    kl_ci: Interval
    kl_fraction: float | None
    kl_fraction_ci: Interval


def text_difference(
    first: Sequence[TokenScores], second: Sequence[TokenScores], level: float = 0.95
) -> TextDifference:
    """Compare two candidates by their scores of the same windows, with intervals at `level`, paired by
    window."""
    losses = [_by_window(scores, "nll").parts for scores in (first, second)]
    first_ppl, second_ppl = map(exp_mean_of, losses)
    first_kl, second_kl = (_by_window(scores, "kl") for scores in (first, second))
    return TextDifference(
        ppl=second_ppl.value - first_ppl.value,
        ppl_ci=statistics.log_difference_interval(first_ppl, second_ppl, level),
        ppl_fraction=exp_mean_of(losses[1] - losses[0]).value - 1,
        ppl_fraction_ci=_plus(statistics.log_ratio_interval(first_ppl, second_ppl, level), -1),
        kl=second_kl.value - first_kl.value,
        kl_ci=statistics.log_difference_interval(first_kl, second_kl, level),
        kl_fraction=second_kl.value / first_kl.value - 1 if first_kl.value else None,
        kl_fraction_ci=_plus(statistics.log_ratio_interval(first_kl, second_kl, level), -1),
    )


def _name(model: PreTrainedModel) -> str:
    known = getattr(model, "identity", None)
    if known is None:
        return type(model).__name__
    where = None if engine_name(model) == TRANSFORMERS else f"in {engine_name(model)}"
    about = ", ".join(filter(None, (known.recipe_name, where)))
    return f"{known.name} ({about})" if about else known.name


def _interval(interval: Interval) -> str:
    if interval is None:
        return f"[no interval: fewer than {FEWEST} windows, or all equal]"
    return f"[{interval[0]:.4g}, {interval[1]:.4g}]"
