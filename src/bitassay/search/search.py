"""A search from start to end.
Trials until there are as many as asked for, then a judgement of the best on text that chose nothing.

    OUT/trials.db   optuna's storage: every trial, its values, what came of it
    OUT/work/       what is finished of a recipe that is being made
    OUT/failed/     tracebacks of trials that failed by a bug
    OUT/best/       the best recipes as YAML
    OUT/run.json    the result

`trials` is the total of a folder: the same command goes on after the last finished trial, a larger number
adds to what there is. The best are the one recipe of the least objective or, of several objectives, the
Pareto front. `against` names recipes written by hand, which are judged beside them; those that the space
holds are the first trials, so that the search begins where people had come to.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
import yaml
from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, TrialState

from bitassay.errors import BitassayError
from bitassay.evaluation.quality import INTERVAL, INTERVALS, PAIR_INTERVALS
from bitassay.models.identity import identity
from bitassay.quantization.export.fits import check_fit
from bitassay.quantization.pipeline import quantize_tensors_cached
from bitassay.quantization.recipe.recipe import BASE, Recipe, find_recipe, row_names
from bitassay.record.environment import environment
from bitassay.record.files import check_folder, write_text
from bitassay.record.progress import Progress, silent
from bitassay.record.result import write_run
from bitassay.record.run import RunFolder, open_run_folder, run_plan
from bitassay.search.evaluator import TrialEvaluator, limits
from bitassay.search.objectives import SearchPlan, pareto
from bitassay.search.space import Space, find_space
from bitassay.search.trials import (
    ENDED,
    FAILED,
    open_study,
    propose_first,
    propose_interrupted_again,
    run_trials,
)

MOST_BEST = 8  # recipes of a front that are judged


def search(
    model: str,
    space: str | Path | Space,
    *,
    trials: int,
    against: Sequence[str | Path | Recipe] = (),
    at_most: Mapping[str, float | Recipe] | None = None,
    jobs: int = 1,
    out: Path | None = None,
    progress: Progress = silent,
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[dict[str, Any], Path]:
    """Search `space` for the best recipes of MODEL, with `jobs` processes; `options` are fields of
    SearchPlan; of a limit, a recipe stands for what it stores. Returns the run (the content of run.json) and
    its folder.

    Raises BitassayError for bad input, where no trial was completed, and where another search works on the
    folder.
    """
    plan = SearchPlan(model, find_space(space), **options)
    written = tuple(find_recipe(recipe) for recipe in against)
    row_names(written)
    pattern = rf"{re.escape(plan.space.name)}-\d+"
    if taken := [recipe.name for recipe in written if re.fullmatch(pattern, recipe.name)]:
        raise BitassayError(f"{taken[0]}: a recipe that this search finds may be called so", "rename it")
    if trials < 1 or jobs < 1:
        raise BitassayError(f"{min(trials, jobs)} trials or jobs", "at least 1")
    check_folder(out)
    check_fit(model, written, trust_remote_code=trust_remote_code, progress=progress)
    evaluator = TrialEvaluator(plan, progress, trust_remote_code)
    plan = evaluator.plan = replace(plan, at_most=limits(evaluator.base, at_most or {}))
    model_identity = identity(evaluator.base)
    work = {
        **plan.to_dict(),
        "weights_digest": model_identity.weights_digest,
        "config_digest": model_identity.config_digest,
        "corpus_source": evaluator.corpus_source,
    }
    described = run_plan("search", work, ("optuna", "torch", "transformers"))
    folder = open_run_folder(f"search-{plan.space.name}", described, out, progress)
    with _alone(folder.path):
        study = open_study(plan, folder.path)
        propose_first(plan, study, written)
        if again := propose_interrupted_again(plan, study):
            progress(f"{again} interrupted trials are proposed again")
        run_trials(study, folder.path, trials, evaluator, jobs)
        if failed := _failed(study):
            progress(f"trials that failed by a bug: {failed}; {folder.path / 'failed'} has the tracebacks")
        run = _result(plan, study, evaluator, written, folder, progress)
    return run, folder.path


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / "search.lock")
    try:
        with lock.acquire(timeout=0):
            yield
    except Timeout:
        raise BitassayError(f"{folder}: another search works on it", "wait for it, or --out") from None


def _result(
    plan: SearchPlan,
    study: optuna.Study,
    evaluator: TrialEvaluator,
    against: Sequence[Recipe],
    folder: RunFolder,
    progress: Progress,
) -> dict[str, Any]:
    trials = study.get_trials(deepcopy=False, states=ENDED)
    best = [named_recipe(trial, plan) for trial in best_trials(plan, trials)]
    if not best:
        raise BitassayError(
            f"{plan.space.name}: none of {len(trials)} trials was completed within the limits: "
            f"{_reasons(trials)}",
            "more --trials, another space, or wider --at-most",
        )
    for recipe in best:
        content = recipe.to_yaml_dict()
        write_text(folder.path / "best" / f"{recipe.name}.yaml", yaml.safe_dump(content, sort_keys=False))
    recipes = {recipe.name: recipe for recipe in (*best[:MOST_BEST], *against)}
    quantizations = {
        name: quantize_tensors_cached(evaluator.base, recipe, progress) for name, recipe in recipes.items()
    }
    rows, differences = evaluator.judged(quantizations)
    hand = [recipe.name for recipe in against]
    for row, by_recipe in zip(rows[1:], differences, strict=True):
        row["against"] = {
            other: asdict(apart) for other, apart in zip(recipes, by_recipe, strict=True) if other in hand
        }
    model_identity = identity(evaluator.base)
    return write_run(
        folder,
        environment=environment(evaluator.base.device),
        model={"name": model_identity.name, "weights_digest": model_identity.weights_digest},
        settings=plan.to_dict(),
        interval=f"{INTERVAL}; over the windows held out",
        intervals={"rows": INTERVALS, "against": PAIR_INTERVALS},
        rows=[
            {"chosen": name not in (BASE, *hand)} | _finite(row)
            for name, row in zip((BASE, *recipes), rows, strict=True)
        ],
        best=[recipe.name for recipe in best],
        trials=[_described(trial) for trial in trials],
        importance=_importance(plan, study),
    )


def best_trials(plan: SearchPlan, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the Pareto front of the complete trials within the limits, by the first objective."""
    within = [
        trial
        for trial in trials
        if trial.state == TrialState.COMPLETE
        and all(trial.user_attrs["row"][name] <= most for name, most in plan.at_most.items())
    ]
    front = [within[index] for index in pareto([trial.values for trial in within])]
    return sorted(front, key=lambda trial: trial.values)


def named_recipe(trial: FrozenTrial, plan: SearchPlan) -> Recipe:
    """Return the recipe of a trial, named after it."""
    recipe = Recipe.model_validate(trial.user_attrs["recipe"])
    return recipe.model_copy(
        update={
            "name": f"{plan.space.name}-{trial.number:03d}",
            "description": f"Found by a search of {plan.space.name} for {', '.join(plan.objectives)}.",
        }
    )


def _failed(study: optuna.Study) -> int:
    stopped = [trial.user_attrs["stopped"] for trial in study.get_trials(deepcopy=False, states=ENDED)]
    return sum((why or "").startswith(FAILED) for why in stopped)


def _described(trial: FrozenTrial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "values": trial.params,
        "seconds": trial.duration.total_seconds() if trial.duration is not None else None,
        **{key: _finite(trial.user_attrs.get(key)) for key in ("stopped", "short", "objectives", "row")},
    }


def _finite(value: Any) -> Any:
    """With nothing in the place of numbers that are none, as perplexities of ruined models are."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _importance(plan: SearchPlan, study: optuna.Study) -> dict[str, dict[str, float]]:
    """Of each parameter for each objective (PED-ANOVA); empty where there are too few trials to say."""
    importance = {}
    for index, text in enumerate(plan.objectives):
        try:
            with warnings.catch_warnings():  # that small is good, which it is
                warnings.simplefilter("ignore")
                importance[text] = optuna.importance.get_param_importances(
                    study, target=lambda trial, index=index: trial.values[index]
                )
        except (ValueError, RuntimeError):
            importance[text] = {}
    return importance


def _reasons(trials: Sequence[FrozenTrial]) -> str:
    reasons = [trial.user_attrs.get("stopped") for trial in trials]
    return "; ".join(sorted({str(reason) for reason in reasons if reason})[:3]) or "nothing was tried"
