"""Trials of a search: a sampler proposes values, a worker measures the recipe, the sampler is told.
One process alone asks and tells; with several jobs, workers (`record/jobs.py`) do the trials.

A trial is *complete*, or it stopped early (optuna: pruned) for a reason that is kept with it: the recipe
makes no sense, a limit is broken, the result is not finite, earlier trials are better on a few windows
(`objectives.is_hopeless`), or it failed: an error that nobody foresaw is this recipe's own, so the others go
on, and its traceback is kept in `failed/`. What the machine lacks, as disk space, stops the search. A trial
that was interrupted is proposed again, and what was finished of its quantization is still there; one that has
ended its process ATTEMPTS times, as too little memory does, has failed.
"""

import math
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from bitassay.errors import BitassayError, MissingError
from bitassay.quantization.pipeline import quantize_tensors
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.record.files import write_text
from bitassay.record.jobs import ATTEMPTS, Job, Start, WorkerLost, local_workers, run_jobs
from bitassay.record.progress import Progress
from bitassay.search.evaluator import Measurement, Row, TrialEvaluator, facts, known_facts
from bitassay.search.objectives import SearchPlan, is_hopeless
from bitassay.search.space import Range, Space, Value, label

ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
NAME = "search"
FAILED = "failed: "  # how the reason begins where an error was a bug
NOT_FINITE = "the result is not finite"
STOPPED = "stopped"  # of a study: the trials that were left on purpose


def open_study(plan: SearchPlan, folder: Path) -> optuna.Study:
    """Open the study in FOLDER/trials.db, or make it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = f"sqlite:///{(folder / 'trials.db').resolve()}"
    directions = [StudyDirection.MINIMIZE for _ in plan.objectives]
    return optuna.create_study(study_name=NAME, storage=storage, directions=directions, load_if_exists=True)


def _sampler(plan: SearchPlan, seed: int) -> optuna.samplers.BaseSampler:
    if plan.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(population_size=20, seed=seed)
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)  # no two trials at once near each other


def propose_first(plan: SearchPlan, study: optuna.Study, recipes: Sequence[Recipe]) -> None:
    """Let a search that begins try these recipes first, those that its space holds; a grid has its order."""
    if study.get_trials(deepcopy=False) or plan.sampler == "grid":
        return
    for recipe in recipes:
        if (values := plan.space.values_of(recipe)) is not None:
            study.enqueue_trial({path: label(value) for path, value in values.items()})


def propose_interrupted_again(plan: SearchPlan, study: optuna.Study) -> int:
    """End the trials of a search that was killed, and propose their values first; return how many there
    were. One that was killed while it drew its values is drawn anew."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    stopped = study.user_attrs.get(STOPPED, [])
    for trial in running:
        study.tell(trial.number, state=TrialState.FAIL)
        if (values := _proposed(trial)).keys() != plan.space.parameters.keys():
            continue
        ended = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        deaths = sum(_proposed(same) == values and same.number not in stopped for same in ended)
        study.enqueue_trial(values, user_attrs={"deaths": deaths})
    return len(running)


def _proposed(trial: FrozenTrial) -> dict[str, Any]:
    """Return the values that a trial was to try, which it has drawn or (optuna: fixed) was told."""
    return trial.system_attrs.get("fixed_params", trial.params)


def run_trials(
    study: optuna.Study, folder: Path, total: int, evaluator: TrialEvaluator, jobs: int = 1
) -> None:
    """Do trials until `total` have ended, in this process or, with several `jobs`, in as many others."""
    plan, progress = evaluator.plan, evaluator.progress
    setup = {"plan": plan.to_dict(), "trust_remote_code": evaluator.trust_remote_code}
    start = Start("bitassay.search.trials:start", setup, folder)
    grid = list(plan.space.grid()) if plan.sampler == "grid" else None
    total = total if grid is None else min(total, len(grid))
    running: dict[str, optuna.Trial] = {}

    def asked() -> Iterator[Job]:
        """Ask for a trial where one is wanted. Those that need no work end here."""
        while True:
            known = study.get_trials(deepcopy=False, states=(*ENDED, TrialState.RUNNING))
            if len(known) >= total:
                return
            waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            if grid is not None and not waiting:
                study.enqueue_trial({path: label(value) for path, value in grid[len(known)].items()})
            # Each trial has a seed of its own: a search that goes on draws what it would have drawn.
            study.sampler = _sampler(plan, plan.seed + len(known))
            trial = study.ask()
            values = _suggested(trial, plan.space)
            ended = study.get_trials(deepcopy=False, states=ENDED)
            progress("trials", len(ended), total)
            name = f"trial {trial.number}"
            running[name] = trial
            prepared = _prepared(plan, values, ended, trial.user_attrs.get("deaths", 0), folder)
            if isinstance(prepared, Outcome):
                tell(name, prepared)
            else:
                yield Job(name, start, [prepared.to_yaml_dict(), *_standard(plan, ended)])

    def tell(name: str, outcome: Outcome) -> None:
        trial = running.pop(name)
        for key, value in asdict(outcome).items():
            trial.set_user_attr(key, value)
        for column, value in outcome.excess(plan.at_most).items():
            trial.set_constraint(column, value)
        if outcome.stopped is None:
            study.tell(trial, outcome.objectives)
        else:
            study.tell(trial, state=TrialState.PRUNED)
        result = outcome.stopped or ", ".join(f"{value:.4g}" for value in outcome.objectives or [])
        progress(f"{name}: {result}")

    def given_up(job: Job, error: WorkerLost) -> None:
        tell(job.name, Outcome(job.content[0], f"{FAILED}{error.problem}"))

    try:
        if jobs == 1:
            for job in asked():
                tell(job.name, _tried(job.content, folder, evaluator))
        else:
            run_jobs(
                asked(),
                local_workers(min(jobs, total), folder / "workers"),
                keep=lambda job, answer: tell(job.name, Outcome(**answer)),
                give_up=given_up,
                progress=progress,
            )
    except BaseException:  # that these trials end is not their recipes' fault
        stopped = [trial.number for trial in running.values()]
        study.set_user_attr(STOPPED, study.user_attrs.get(STOPPED, []) + stopped)
        raise


def start(setup: Any, folder: Path, progress: Progress) -> Callable[[Any], dict[str, Any]]:
    """Return the function of a worker's jobs, trials."""
    plan = SearchPlan.of(setup["plan"])
    evaluator = TrialEvaluator(plan, progress, setup["trust_remote_code"])
    return lambda content: asdict(_tried(content, folder, evaluator))


@dataclass(frozen=True)
class Outcome:
    """What came of a trial. stopped: why it is not complete; objectives and row where it is."""

    recipe: dict[str, Any] | None = None
    stopped: str | None = None
    short: list[float] | None = None
    objectives: list[float] | None = None
    row: Row | None = None

    def excess(self, at_most: Mapping[str, float]) -> dict[str, float]:
        """Return by how much each measured column exceeds its limit; below zero where it is within."""
        row = self.row or {}
        return {name: row[name] - most for name, most in at_most.items() if row.get(name) is not None}


def _prepared(
    plan: SearchPlan, values: dict[str, Value], ended: Sequence[FrozenTrial], deaths: int, folder: Path
) -> Recipe | Outcome:
    """Return the recipe to try, or the outcome where that is known."""
    try:
        recipe = plan.space.recipe_of(values)
    except BitassayError as error:
        return Outcome(stopped=f"refused: {error}")
    content = recipe.to_yaml_dict()
    for trial in ended:  # a sampler may come back to a recipe
        if trial.user_attrs["recipe"] == content:
            return Outcome(**{key: trial.user_attrs[key] for key in Outcome.__dataclass_fields__})
    if deaths < ATTEMPTS:
        return recipe
    shutil.rmtree(folder / "work" / recipe.recipe_id, ignore_errors=True)
    why = f"its process was ended {deaths} times, most likely by a lack of memory"
    return Outcome(content, f"{FAILED}{why}")


def _tried(content: Any, folder: Path, evaluator: TrialEvaluator) -> Outcome:
    """Return the outcome of a trial that is worked on. content: of its job."""
    fields, *standard = content
    recipe = Recipe.model_validate(fields)
    work = folder / "work" / recipe.recipe_id
    try:
        outcome = _measured(recipe, work, evaluator, *standard)
    except (MissingError, OSError):
        raise
    except BitassayError as error:
        outcome = Outcome(stopped=f"refused: {error}")
    except Exception as error:
        write_text(folder / "failed" / f"{recipe.name}.txt", traceback.format_exc())
        outcome = Outcome(stopped=f"{FAILED}{type(error).__name__}: {error}")
    shutil.rmtree(work, ignore_errors=True)
    return replace(outcome, recipe=fields)


def _measured(
    recipe: Recipe, work: Path, evaluator: TrialEvaluator, better: Sequence[Sequence[float]], earlier: int
) -> Outcome:
    """Measure a recipe. better, earlier: of `is_hopeless`."""
    plan = evaluator.plan
    row = known_facts(evaluator.base, recipe)
    if over := plan.over(row):
        return Outcome(stopped=over, row=row)
    codes = evaluator.codes(recipe, work)
    quantization = quantize_tensors(evaluator.base, recipe, evaluator.progress, work, codes)
    row = facts(evaluator.base, quantization)
    if over := plan.over(row):
        return Outcome(stopped=over, row=row)
    short, measurement = None, Measurement(evaluator, quantization)
    if plan.short < plan.windows:
        measured = row | measurement.short()
        values = [o.value(measured) for o in plan.parsed if measured.keys() >= set(o.columns)]
        if not all(map(math.isfinite, values)):
            return Outcome(stopped=NOT_FINITE, row=row)
        if len(values) == len(plan.parsed):  # else it may be the best in what is not known yet
            short = values
            if is_hopeless(short, better, earlier):
                return Outcome(stopped="others are better on the first windows", short=short, row=row)
    columns = [column for objective in plan.parsed for column in objective.columns]
    measured = row | measurement.all_windows([*columns, *plan.at_most])
    objectives = [objective.value(measured) for objective in plan.parsed]
    limited = [measured.get(name) for name in plan.at_most]
    if not all(math.isfinite(value) for value in (*objectives, *limited) if value is not None):
        return Outcome(stopped=NOT_FINITE, short=short, row=row)
    return Outcome(short=short, objectives=objectives, row=measured)


def _standard(plan: SearchPlan, earlier: Sequence[FrozenTrial]) -> tuple[list[list[float]], int]:
    """What earlier trials within the limits had on the first windows, and how many may be within."""
    judged = [trial for trial in earlier if trial.user_attrs.get("short")]
    over = [plan.over(trial.user_attrs["row"]) for trial in judged]
    within = [
        trial.user_attrs["short"]
        for trial, reason in zip(judged, over, strict=True)
        if reason is None and trial.state == TrialState.COMPLETE
    ]
    if not plan.at_most:  # then all are
        within = [trial.user_attrs["short"] for trial in judged]
    return within, over.count(None)


def _suggested(trial: optuna.Trial, space: Space) -> dict[str, Value]:
    """A value for each parameter."""
    values: dict[str, Value] = {}
    for path, choices in space.parameters.items():
        if isinstance(choices, Range):
            if choices.is_whole:
                low, high = int(choices.low), int(choices.high)
                values[path] = trial.suggest_int(
                    path, low, high, step=int(choices.step or 1), log=choices.log
                )
            else:
                values[path] = trial.suggest_float(
                    path, choices.low, choices.high, step=choices.step, log=choices.log
                )
        else:
            by_label = {label(choice): choice for choice in choices}
            values[path] = by_label[trial.suggest_categorical(path, list(by_label))]
    return values
