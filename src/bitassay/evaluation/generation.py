"""How far a model's texts are from its base's: greedy continuations of the same prompts, compared in pairs.
These figures say how much a text *changed*, never how good it is.

    prefix       the number of leading tokens that are equal
    divergence   the first token that differs, counted from 1: prefix + 1, for equal texts too
    BLEU         of the whole corpus, by sacrebleu, with its signature (1804.08771)
    ROUGE-1/2/L  F-measure of each text, averaged, by rouge-score without stemming (Lin 2004)

Greedy texts part for good at the first close call, so the prefix is the sharper figure: BLEU and ROUGE of two
texts that parted early say little more than that both have the same topic. Two texts without a word score 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from bitassay.engines.decode import TokenIds
from bitassay.engines.engine import engine_of
from bitassay.errors import MissingError
from bitassay.evaluation import statistics
from bitassay.evaluation.likelihood import shared_length
from bitassay.evaluation.statistics import LOGIT, MEDIAN, NONE, WILSON, Interval, logit_interval, mean_of
from bitassay.models.identity import tokenizer
from bitassay.record.progress import Progress, silent

INTERVALS = {
    "prefix_tokens_ci": f"{LOGIT} between 0 and the longest text of the base model",
    "divergence_ci": MEDIAN,
    "identical_ci": WILSON,
    "bleu_ci": f"{LOGIT}, jackknife",
    **dict.fromkeys(("rouge1_ci", "rouge2_ci", "rougeL_ci"), LOGIT),
}
INTERVAL = (
    "95 % over prompts: Student's t on a logit scale (of BLEU by the jackknife), Wilson's of identical "
    f"texts, order statistics of the median (from 6 prompts on); {NONE}"
)
BATCH = 8


@dataclass(frozen=True)
class Text:
    """What a model wrote: token ids, with the end token if it wrote one, and the text without it."""

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
        """Return the figures by column."""
        return asdict(self)


def check_scorers() -> None:
    """Raise MissingError where the packages that score texts are not installed."""
    scorers = {"sacrebleu": "sacrebleu", "rouge-score": "rouge_score"}
    missing = [name for name, module in scorers.items() if find_spec(module) is None]
    if missing:
        raise MissingError(
            f"comparing texts needs {' and '.join(missing)}", "pip install 'bitassay[generation]'"
        )


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
    """Return the greedy continuation of each prompt but the first `done`.

    keep: gets each batch once it is finished. Arithmetic in 16 bits depends on the rest of a batch, so models
    that are compared must get the same prompts in the same order and batches. Raises BitassayError as
    `generate` does.
    """
    texts = list[Text]()
    for start in range(done, len(prompts), batch):
        progress("writing", start, len(prompts))
        generations = engine_of(model).generate(prompts[start : start + batch], max_new_tokens=max_new_tokens)
        written = [Text(item.output_ids, decoded(model, item.output_ids)) for item in generations]
        keep(written)
        texts += written
    progress("writing", len(prompts), len(prompts))
    return texts


def decoded(model: PreTrainedModel, ids: TokenIds) -> str:
    """Return the text of token ids, without special tokens."""
    return str(tokenizer(model).decode(list(ids), skip_special_tokens=True))


def prefix_lengths(texts: Sequence[Text], base: Sequence[Text]) -> list[int]:
    """Return the number of leading tokens that each text shares with the base model's."""
    return [shared_length(x.ids, y.ids) for x, y in zip(texts, base, strict=True)]


def compare_texts(texts: Sequence[Text], base: Sequence[Text]) -> TextQuality:
    """Return all figures, texts paired with the base model's in their order. Raises MissingError without the
    `generation` extra."""
    check_scorers()
    prefixes = np.array(prefix_lengths(texts, base))
    identical = sum(x.ids == y.ids for x, y in zip(texts, base, strict=True))
    written, reference = [text.text for text in texts], [text.text for text in base]
    prefix = mean_of(prefixes)
    bleu, without, signature = _bleu(written, reference)
    return TextQuality(
        prompts=len(texts),
        prefix_tokens=prefix.value,
        prefix_tokens_ci=logit_interval(prefix, 0, max(len(text.ids) for text in base)),
        divergence=float(np.quantile(prefixes + 1, 0.5, method="inverted_cdf")),
        divergence_ci=statistics.median_interval(prefixes + 1),
        identical_fraction=identical / len(texts),
        identical_ci=statistics.wilson_interval(identical, len(texts)),
        bleu=bleu,
        bleu_ci=logit_interval(statistics.jackknife_of(bleu, without), 0, 100),
        bleu_signature=signature,
        **_rouge(written, reference),
    )


def _rouge(texts: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """The mean F-measure of each ROUGE, and its interval."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names)
    scores = [scorer.score(target=b, prediction=a) for a, b in zip(texts, references, strict=True)]
    means = {name: mean_of([score[name].fmeasure for score in scores]) for name in names}
    intervals = {f"{name}_ci": logit_interval(mean) for name, mean in means.items()}
    return {name: mean.value for name, mean in means.items()} | intervals


def _bleu(texts: Sequence[str], references: Sequence[str]) -> tuple[float, list[float], str]:
    """BLEU of the corpus, BLEU without each text in turn, and sacrebleu's signature. Counts of n-grams add up
    over texts, so leaving one out is a subtraction."""
    from sacrebleu.metrics.bleu import BLEU

    metric, single = BLEU(), BLEU(effective_order=True)
    bleu = metric.corpus_score(texts, [references])  # the signature knows the references only afterwards
    scores = [single.sentence_score(a, [b]) for a, b in zip(texts, references, strict=True)]
    counts = np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores])
    orders = len(scores[0].counts)
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
