"""What a recipe costs, in the columns of an assay, of which only those that are asked for are computed.

The text is cut into windows that lie evenly over it. Every other one is for choosing, and the rest is held
out: it says afterwards what the chosen recipes are worth.
"""

import shutil
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.bench.timing import throughput
from bitassay.data.windows import Protocol
from bitassay.errors import BitassayError
from bitassay.evaluation.divergence import TokenScores, token_scores, window_logits
from bitassay.evaluation.quality import TextDifference, score_windows, summarise, text_difference
from bitassay.models.positions import model_windows
from bitassay.quantization.export.plan import plan_export
from bitassay.quantization.pipeline import quantize_tensors
from bitassay.quantization.recipe.recipe import BASE, Recipe
from bitassay.quantization.runtime.model import Quantization, check_recipe, with_tensors
from bitassay.record.progress import Progress, silent
from bitassay.search.objectives import FACTS, QUALITY, SPEED, VERIFICATION, SearchPlan
from bitassay.studies.assay import facts_of
from bitassay.studies.verdicts import Verification, chosen_prompts, honest_profile, verdict_columns
from bitassay.verification.profile import Profile

Row = dict[str, Any]
PROMPT_TOKENS, REPEATS = 128, 3  # of the columns of speed
KEPT_BYTES = 2 << 30  # of the base model's logits


class TrialEvaluator:
    """A base model and the text on which recipes of it are measured."""

    def __init__(self, plan: SearchPlan, progress: Progress = silent, trust_remote_code: bool = False):
        """Raises BitassayError where the text is too short."""

        loading: dict[str, Any] = {"progress": progress, "trust_remote_code": trust_remote_code}
        self.plan, self.progress, self.trust_remote_code = plan, progress, trust_remote_code
        self.base = plan.loaded(plan.model, **loading)
        twice = Protocol(plan.corpus, window_tokens=plan.window, windows=2 * plan.windows)
        every, self.corpus_source = model_windows(self.base, twice)
        self.windows, self.held_out = every[0::2], every[1::2]
        self.first = [index * plan.windows // plan.short for index in range(plan.short)]

        self._half = cache(lambda: plan.loaded(plan.model, dtype="bfloat16", **loading))  # as in an assay
        self._profile: Profile | None = None
        self._kept: dict[int, tuple[Tensor, TokenScores]] = {}
        self._codes: tuple[str, Quantization] | None = None

    def base_scores(self, index: int) -> tuple[Float[Tensor, "predicted vocabulary"], TokenScores]:
        """Return the base model's logits and scores on one search window; both are kept where they fit."""
        if index in self._kept:
            return self._kept[index]
        window = self.windows[index]
        logits = window_logits(self.base, window)
        result = logits, token_scores(logits, window[1:])
        if (len(self._kept) + 1) * logits.nbytes <= KEPT_BYTES:
            self._kept[index] = result
        return result

    def codes(self, recipe: Recipe, work: Path) -> Quantization | None:
        """Return the codes of a calibrated recipe where other trials may share them, else None; made once
        for consecutive trials that do. work: they are made beside this folder."""
        same = recipe.without_postprocessing
        if not same.is_calibrated or same.recipe_id == recipe.recipe_id:
            return None
        if self._codes is None or self._codes[0] != same.recipe_id:
            made = quantize_tensors(self.base, same, self.progress, work.with_name(same.recipe_id))
            shutil.rmtree(work.with_name(same.recipe_id), ignore_errors=True)
            self._codes = same.recipe_id, made
        return self._codes[1]

    def judged(self, quantizations: dict[str, Quantization]) -> tuple[list[Row], list[list[TextDifference]]]:
        """Return facts and quality of the base model and of each recipe on the windows held out, and the
        differences between the recipes: entry [i][j] is of recipe i less recipe j."""
        candidates = {name: with_tensors(self.base, made) for name, made in quantizations.items()}
        scores: dict[str, list[TokenScores]] = {BASE: [], **{name: [] for name in candidates}}
        for index, by_name in score_windows(self.base, candidates, self.held_out, finite=False):
            for name, of_window in by_name.items():
                scores[name].append(of_window)
            self.progress("scoring what is held out", index + 1, len(self.held_out))
        rows = [facts_of(self.base) | summarise(scores[BASE], scores[BASE]).to_dict()]
        rows += [
            facts(self.base, made) | summarise(scores[name], scores[BASE]).to_dict()
            for name, made in quantizations.items()
        ]
        every = [scores[name] for name in quantizations]
        return rows, [[text_difference(second, first) for second in every] for first in every]

    def speed(self, quantization: Quantization) -> Row:
        """Return the columns of speed, measured with packed weights."""
        packed = with_tensors(self._half(), quantization, packed=True)
        prompt = self.windows[0, :PROMPT_TOKENS]
        models = {"candidate": lambda: packed}
        return throughput(models, prompt, repeats=REPEATS, progress=self.progress)["candidate"]

    def verdict(self, quantization: Quantization) -> Row:
        """Return the columns of verification."""
        plan, base = Verification(), self._half()
        prompts = chosen_prompts(base, plan.prompts + plan.calibration_prompts, self.plan.seed)
        proved, calibration = prompts[: plan.prompts], prompts[plan.prompts :]
        if self._profile is None:
            self._profile = honest_profile(plan, base, calibration, self.progress)
        return verdict_columns(plan, base, quantization, proved, self._profile, self.progress)


class Measurement:
    """Measures one recipe. What was scored on the first windows is not scored again."""

    def __init__(self, evaluator: TrialEvaluator, quantization: Quantization):
        self.evaluator, self.quantization = evaluator, quantization
        self._model = cache(lambda: with_tensors(evaluator.base, quantization))
        self._scores: dict[int, TokenScores] = {}

    def short(self) -> Row:
        """Return columns of quality on a few windows."""
        return self._quality(self.evaluator.first)

    def all_windows(self, columns: Collection[str]) -> Row:
        """Return the columns that are asked for and take a run, on all windows that choose."""
        row: Row = {}
        if set(columns) & set(QUALITY):
            row |= self._quality(range(len(self.evaluator.windows)))
        if set(columns) & set(SPEED):
            row |= self.evaluator.speed(self.quantization)
        if set(columns) & set(VERIFICATION):
            row |= self.evaluator.verdict(self.quantization)
        return row

    def _quality(self, indices: Sequence[int]) -> Row:
        base = []
        for done, index in enumerate(indices):
            logits, scores = self.evaluator.base_scores(index)
            base.append(scores)
            if index not in self._scores:
                window = self.evaluator.windows[index]
                self._scores[index] = token_scores(window_logits(self._model(), window), window[1:], logits)
            self.evaluator.progress("scoring", done + 1, len(indices))
        return summarise([self._scores[index] for index in indices], base).to_dict()


def facts(base: PreTrainedModel, quantization: Quantization) -> Row:
    """Return the columns that need no run of the model."""
    return facts_of(with_tensors(base, quantization, packed=True))


def known_facts(base: PreTrainedModel, recipe: Recipe) -> Row:
    """Return the same columns from shapes alone, before anything is quantized; none where they depend on
    measurements (mixed bits, copies of chosen layers). Raises BitassayError where the recipe does not fit
    the model."""
    weights, parts = check_recipe(base, recipe), recipe.parts.values()
    if any(part.measures_bits for part in parts) or not any(map(recipe.scheme_for, weights)):
        return {}
    plan = plan_export(base, recipe)
    return {
        "bits_per_weight": plan.bits_per_weight,
        "checkpoint_bits_per_weight": plan.checkpoint_bits_per_weight,
        "size_bytes": plan.size_bytes,
    }


def limits(base: PreTrainedModel, at_most: Mapping[str, float | Recipe]) -> dict[str, float]:
    """Return each limit as a number: a recipe stands for its own value of that column. Raises BitassayError
    where this is unknown before the recipe is run."""
    numbers = {}
    for column, most in at_most.items():
        if isinstance(most, Recipe):
            known = known_facts(base, most)
            if column not in known:
                raise BitassayError(
                    f"{column} of {most.name} is not known before it is measured",
                    f"give a number, or limit one of {', '.join(FACTS)}",
                )
            most = known[column]
        numbers[column] = float(most)
    return numbers
