"""How far a model's own words are from its base's: greedy continuations of the same prompts, side by side.

Both models write at most so many tokens, greedily and with a KV cache; the base model's text is the
reference, so these figures say how much a text *changed*, never how good it is.

    prefix       the leading tokens that are equal
    divergence   the first token that is not, counted from 1: prefix + 1, also for texts that never part (they
                 part after their end)
    BLEU         of the whole corpus, by sacrebleu, whose signature stands beside it
    ROUGE-1/2/L  F-measure of each text, averaged, by rouge-score without stemming

Greedy texts part for good at the first close call, so the prefix is the sharper figure: BLEU and ROUGE of two
texts that parted early say little more than that both are about the same thing. Intervals are 95 %, over
prompts (`statistics.py`). Two texts without a word score 0 in BLEU and ROUGE, whether they are equal or not.

Sources: Papineni et al. 2002 (BLEU), Post 2018 (1804.08771, sacrebleu), Lin 2004 (ROUGE).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel

from bitassay.engines.decode import TokenIds
from bitassay.engines.engine import engine_of
from bitassay.errors import MissingError
from bitassay.evaluation.likelihood import shared_length
from bitassay.evaluation.statistics import (
    LOGIT,
    MEDIAN,
    NONE,
    WILSON,
    Interval,
    jackknife_of,
    logit_interval,
    mean_of,
    median_interval,
    wilson_interval,
)
from bitassay.models.identity import tokenizer
from bitassay.record.progress import Progress, silent

INTERVALS = {
    "prefix_tokens_ci": f"{LOGIT} between 0 and the longest text of the base model",
    "divergence_ci": MEDIAN,
    "identical_ci": WILSON,
    "bleu_ci": f"{LOGIT}, jackknife",
    "rouge1_ci": LOGIT,
    "rouge2_ci": LOGIT,
    "rougeL_ci": LOGIT,
}
INTERVAL = (
    "95 % over prompts: Student's t on a logit scale (of BLEU by the jackknife), Wilson's of identical "
    f"texts, order statistics of the median (from 6 prompts on); {NONE}"
)
ROUGE = ("rouge1", "rouge2", "rougeL")
BATCH = 8


@dataclass(frozen=True)
class Text:
    """What a model wrote: token ids with the end token where it came to one, and the text without it."""

    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class TextQuality:
    """How far a model's texts are from the base's. BLEU from 0 to 100, ROUGE and fractions from 0 to 1,
    prefix (mean) and divergence (median) in tokens."""

    prompts: int
    prefix_tokens: float
    prefix_tokens_ci: Interval
    divergence: float
    divergence_ci: Interval
    identical_fraction: float
    identical_ci: Interval
    bleu: float
    bleu_ci: Interval
    bleu_signature: str
    rouge1: float
    rouge1_ci: Interval
    rouge2: float
    rouge2_ci: Interval
    rougeL: float
    rougeL_ci: Interval

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_scorers() -> None:
    """Raises MissingError where the packages that score texts are not here."""
    missing = [name for name, module in _SCORERS.items() if find_spec(module) is None]
    if missing:
        raise MissingError(
            f"comparing texts needs {' and '.join(missing)}", "pip install 'bitassay[generation]'"
        )


_SCORERS = {"sacrebleu": "sacrebleu", "rouge-score": "rouge_score"}


def continuations(
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    *,
    max_new_tokens: int,
    batch: int = BATCH,
    done: int = 0,
    keep: Callable[[list[Text]], None] = lambda texts: None,
    progress: Progress = silent,
) -> list[Text]:
    """The greedy continuation of each prompt; the first `done` are left out.

    keep: gets each batch as it is finished. Arithmetic in 16 bits depends on what shares a batch, so models
    that are compared must get the same prompts in the same order and batches. Raises BitassayError as
    `generate` does.
    """
    texts = list[Text]()
    for start in range(done, len(prompts), batch):
        progress("writing", start, len(prompts))
        found = engine_of(model).generate(prompts[start : start + batch], max_new_tokens=max_new_tokens)
        fresh = [Text(one.output_ids, decoded(model, one.output_ids)) for one in found]
        keep(fresh)
        texts += fresh
    progress("writing", len(prompts), len(prompts))
    return texts


def decoded(model: PreTrainedModel, ids: TokenIds) -> str:
    """The text of token ids, without special tokens."""
    return str(tokenizer(model).decode(list(ids), skip_special_tokens=True))


def prefix_lengths(texts: Sequence[Text], base: Sequence[Text]) -> list[int]:
    """The number of leading tokens that each text shares with the base model's."""
    return [shared_length(x.ids, y.ids) for x, y in zip(texts, base, strict=True)]


def compare_texts(texts: Sequence[Text], base: Sequence[Text]) -> TextQuality:
    """All figures, texts paired with the base model's in their order. Raises MissingError without the
    `generation` extra."""
    check_scorers()
    prefixes = np.array(prefix_lengths(texts, base))
    longest = max(len(one.ids) for one in base)
    identical = sum(x.ids == y.ids for x, y in zip(texts, base, strict=True))
    written, reference = [one.text for one in texts], [one.text for one in base]
    rouge = {name: mean_of(found) for name, found in rouge_scores(written, reference).items()}
    prefix = mean_of(prefixes)
    bleu, without, signature = _bleu(written, reference)
    return TextQuality(
        prompts=len(texts),
        prefix_tokens=prefix.value,
        prefix_tokens_ci=logit_interval(prefix, 0, longest),
        divergence=float(np.quantile(prefixes + 1, 0.5, method="inverted_cdf")),
        divergence_ci=median_interval(prefixes + 1),
        identical_fraction=identical / len(texts),
        identical_ci=wilson_interval(identical, len(texts)),
        bleu=bleu,
        bleu_ci=logit_interval(jackknife_of(bleu, without), 0, 100),
        bleu_signature=signature,
        rouge1=rouge["rouge1"].value,
        rouge1_ci=logit_interval(rouge["rouge1"]),
        rouge2=rouge["rouge2"].value,
        rouge2_ci=logit_interval(rouge["rouge2"]),
        rougeL=rouge["rougeL"].value,
        rougeL_ci=logit_interval(rouge["rougeL"]),
    )


def rouge_scores(texts: Sequence[str], references: Sequence[str]) -> dict[str, Float[np.ndarray, " texts"]]:
    """F-measures by the measure's name."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE)
    found = [scorer.score(target=b, prediction=a) for a, b in zip(texts, references, strict=True)]
    return {name: np.array([one[name].fmeasure for one in found]) for name in ROUGE}


def _bleu(texts: Sequence[str], references: Sequence[str]) -> tuple[float, list[float], str]:
    """BLEU of the corpus, what it is without each text in turn, and sacrebleu's signature. Counts of n-grams
    add up over texts, so leaving one out is a subtraction."""
    from sacrebleu.metrics.bleu import BLEU

    metric, single = BLEU(), BLEU(effective_order=True)
    bleu = metric.corpus_score(texts, [references])  # the signature knows the references only afterwards
    found = [single.sentence_score(a, [b]) for a, b in zip(texts, references, strict=True)]
    counts = np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in found])
    orders = len(found[0].counts)
    without = [
        BLEU.compute_bleu(
            left[:orders],
            left[orders:-2],
            *left[-2:],
            smooth_method=metric.smooth_method,
            smooth_value=metric.smooth_value,
        ).score
        for left in (counts.sum(0) - counts).tolist()
    ]
    return bleu.score, without, str(metric.get_signature())
