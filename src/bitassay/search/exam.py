"""What a recipe costs, in the columns of an assay, of which only those that are asked for are computed.

The text is cut into windows that lie evenly over it. Every other one is for choosing, and the rest is held
out: it says afterwards what the chosen recipes are worth.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.bench.throughput import throughput
from bitassay.data.windows import Protocol, token_windows
from bitassay.errors import BitassayError
from bitassay.evaluate.compare import score_windows, summarise
from bitassay.evaluate.divergence import TokenScores
from bitassay.evaluate.statistics import bootstrap_means, percentile_interval
from bitassay.models.load import load, tokenizer
from bitassay.quantize.model import Quantization, with_tensors
from bitassay.quantize.recipe import BASE
from bitassay.record.progress import Progress, silent
from bitassay.search.objectives import QUALITY, SPEED, VERIFICATION
from bitassay.studies.assay import (
    Verification,
    chosen_prompts,
    facts_of,
    honest_profile,
    verdict_columns,
)
from bitassay.verify.profile import Profile

Row = dict[str, Any]
PROMPT_TOKENS, REPEATS = 128, 3  # of the columns of speed


@dataclass(frozen=True)
class Difference:
    """Mean KL of one recipe less another's, paired by window, in nats a token."""

    kl: float
    interval: tuple[float, float] | None


class Exam:
    """A base model and the text on which recipes of it are judged."""

    def __init__(
        self,
        model: str,
        protocol: Protocol,
        short: int,
        *,
        dtype: str = "float32",
        seed: int = 0,
        trust_remote_code: bool = False,
        progress: Progress = silent,
    ):
        """`protocol` says how many windows choose; as many are held out. short: how many of them come first.
        Raises BitassayError where the text is too short."""
        self.base = load(model, dtype=dtype, progress=progress, trust_remote_code=trust_remote_code)
        self.seed, self.progress = seed, progress
        count = protocol.windows or 0
        twice = Protocol(protocol.corpus, window_tokens=protocol.window_tokens, windows=2 * count)
        every, self.corpus_source = token_windows(tokenizer(self.base), twice)
        if not 0 < short <= count:
            raise BitassayError(f"{short} of {count} windows come first", f"--short 1 to {count}")
        self.windows, self.held_out = every[0::2], every[1::2]
        self.first = [index * count // short for index in range(short)]

        def half() -> PreTrainedModel:
            return load(model, dtype="bfloat16", progress=progress, trust_remote_code=trust_remote_code)

        self._half = cache(half)  # timed and verified, as in an assay
        self._profile: Profile | None = None

    def short(self, quantization: Quantization) -> Row:
        """Columns of quality on a few windows."""
        return self._quality(quantization, self.windows[self.first])

    def measured(self, quantization: Quantization, columns: Collection[str]) -> Row:
        """The columns that are asked for and take a run, on all windows that choose."""
        row: Row = {}
        if set(columns) & set(QUALITY):
            row |= self._quality(quantization, self.windows)
        if set(columns) & set(SPEED):
            row |= self._speed(quantization)
        if set(columns) & set(VERIFICATION):
            row |= self._verdict(quantization)
        return row

    def judged(self, quantizations: dict[str, Quantization]) -> tuple[list[Row], list[list[Difference]]]:
        """Facts and quality of the base model and of each recipe on the windows held out, and the differences
        between the recipes: entry [i][j] is of recipe i less recipe j."""
        scores = self._scores(quantizations, self.held_out)
        rows = [facts_of(self.base) | summarise(scores[BASE], scores[BASE], self.seed).to_dict()]
        rows += [
            facts(self.base, one) | summarise(scores[name], scores[BASE], self.seed).to_dict()
            for name, one in quantizations.items()
        ]
        kl = {name: window_means(scores[name]) for name in quantizations}
        return rows, [[difference(one, other, self.seed) for other in kl.values()] for one in kl.values()]

    def _scores(
        self, quantizations: dict[str, Quantization], windows: Int[Tensor, "windows tokens"]
    ) -> dict[str, list[TokenScores]]:
        candidates = {name: with_tensors(self.base, one) for name, one in quantizations.items()}
        found: dict[str, list[TokenScores]] = {BASE: [], **{name: [] for name in candidates}}
        for index, scores in score_windows(self.base, candidates, windows):
            for name, one in scores.items():
                found[name].append(one)
            self.progress("scoring", index + 1, len(windows))
        return found

    def _quality(self, quantization: Quantization, windows: Int[Tensor, "windows tokens"]) -> Row:
        scores = self._scores({"candidate": quantization}, windows)
        return summarise(scores["candidate"], scores[BASE], self.seed).to_dict()

    def _speed(self, quantization: Quantization) -> Row:
        packed = with_tensors(self._half(), quantization, packed=True)
        prompt = self.windows[0, :PROMPT_TOKENS]
        found = throughput({"candidate": lambda: packed}, prompt, repeats=REPEATS, progress=self.progress)
        return found["candidate"].to_dict()

    def _verdict(self, quantization: Quantization) -> Row:
        plan, base = Verification(), self._half()
        prompts = chosen_prompts(base, plan.prompts + plan.calibration_prompts, self.seed)
        proved, calibration = prompts[: plan.prompts], prompts[plan.prompts :]
        if self._profile is None:
            self._profile = honest_profile(plan, base, calibration, self.progress)
        return verdict_columns(plan, base, quantization, proved, self._profile, self.progress)


def facts(base: PreTrainedModel, quantization: Quantization) -> Row:
    """The columns that need no run."""
    return facts_of(with_tensors(base, quantization, packed=True))


def window_means(scores: Sequence[TokenScores]) -> Float[np.ndarray, " windows"]:
    return np.array([window.kl.double().mean().item() for window in scores])


def difference(
    one: Float[np.ndarray, " windows"], other: Float[np.ndarray, " windows"], seed: int
) -> Difference:
    apart = one - other
    return Difference(float(apart.mean()), percentile_interval(bootstrap_means(apart, seed), len(apart)))
