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

from bitassay.errors import MissingError
from bitassay.evaluate.likelihood import shared_length
from bitassay.evaluate.statistics import bootstrap_means, percentile_interval
from bitassay.generate.decode import TokenIds, generate
from bitassay.models.load import tokenizer
from bitassay.record.progress import Progress, silent

Interval = tuple[float, float] | None
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
        found = generate(model, prompts[start : start + batch], max_new_tokens=max_new_tokens)
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


def compare_texts(texts: Sequence[Text], base: Sequence[Text], seed: int = 0) -> TextQuality:
    """All figures, texts paired with the base model's in their order. Raises MissingError without the
    `generation` extra."""
    check_scorers()
    count = len(texts)
    shares = bootstrap_means(np.eye(count), seed)  # of each text in each resample
    prefix = np.array(prefix_lengths(texts, base))
    identical = np.array([x.ids == y.ids for x, y in zip(texts, base, strict=True)])
    rouge = rouge_scores([x.text for x in texts], [y.text for y in base])

    def interval(values: np.ndarray) -> Interval:
        return percentile_interval(values.astype(np.float64) @ shares, count)

    bleu, resampled_bleu, signature = _bleu([x.text for x in texts], [y.text for y in base], shares)
    middle = _medians(prefix + 1, np.full((count, 1), 1 / count))[0]
    return TextQuality(
        prompts=count,
        prefix_tokens=float(prefix.mean()),
        prefix_tokens_ci=interval(prefix),
        divergence=float(middle),
        divergence_ci=percentile_interval(_medians(prefix + 1, shares), count),
        identical_fraction=float(identical.mean()),
        identical_ci=interval(identical),
        bleu=bleu,
        bleu_ci=percentile_interval(resampled_bleu, count),
        bleu_signature=signature,
        rouge1=float(rouge["rouge1"].mean()),
        rouge1_ci=interval(rouge["rouge1"]),
        rouge2=float(rouge["rouge2"].mean()),
        rouge2_ci=interval(rouge["rouge2"]),
        rougeL=float(rouge["rougeL"].mean()),
        rougeL_ci=interval(rouge["rougeL"]),
    )


def rouge_scores(texts: Sequence[str], references: Sequence[str]) -> dict[str, Float[np.ndarray, " texts"]]:
    """F-measures by the measure's name."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE)
    found = [scorer.score(target=b, prediction=a) for a, b in zip(texts, references, strict=True)]
    return {name: np.array([one[name].fmeasure for one in found]) for name in ROUGE}


def _bleu(
    texts: Sequence[str], references: Sequence[str], shares: Float[np.ndarray, "texts resamples"]
) -> tuple[float, Float[np.ndarray, " resamples"], str]:
    """BLEU of the corpus, of its resamples, and sacrebleu's signature. Counts of n-grams add up over texts,
    so a resample needs only their weighted sums."""
    from sacrebleu.metrics.bleu import BLEU

    metric, single = BLEU(), BLEU(effective_order=True)
    bleu = metric.corpus_score(texts, [references])  # the signature knows the references only afterwards
    found = [single.sentence_score(a, [b]) for a, b in zip(texts, references, strict=True)]
    counts = np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in found], dtype=np.float64)
    sums = np.rint(counts.T @ shares * len(texts)).astype(int)  # a text is drawn a whole number of times
    orders = len(found[0].counts)
    resampled = [
        BLEU.compute_bleu(
            column[:orders],
            column[orders:-2],
            *column[-2:],
            smooth_method=metric.smooth_method,
            smooth_value=metric.smooth_value,
        ).score
        for column in sums.T.tolist()
    ]
    return bleu.score, np.array(resampled), str(metric.get_signature())


def _medians(
    values: np.ndarray, shares: Float[np.ndarray, "texts resamples"]
) -> Float[np.ndarray, " resamples"]:
    """The lower median of each resample: the smallest value that half of it does not exceed."""
    order = np.argsort(values, kind="stable")
    reached = shares[order].cumsum(0) >= 0.5 - 1e-9
    return values[order][reached.argmax(0)].astype(np.float64)
