"""One trial after the other: a sampler proposes values, the recipe is made and measured, and the sampler
hears what came of it. Several processes may do this on the same storage at once.

A trial is *complete*, or it stopped early (optuna: pruned) for a reason that is kept with it: the recipe
makes no sense, a limit is broken, the result is not finite, earlier trials are better on a few windows
(`objectives.is_hopeless`), or it failed: an error that nobody foresaw is this recipe's own, so the others go
on, and its traceback is kept in `failed/`. What the machine lacks, as disk space, stops the search. A trial
that was interrupted is proposed again, and what was finished of its quantization is still there; one that has
ended its process ATTEMPTS times, as too little memory does, has failed.
"""

import math
import os
import shutil
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from bitassay.data.corpora import check_corpus
from bitassay.data.windows import Protocol
from bitassay.errors import BitassayError, MissingError, at_least
from bitassay.models.options import AUTO, as_dtype
from bitassay.quantization.pipeline import quantize_tensors
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.record.files import write_text
from bitassay.record.progress import Progress, silent
from bitassay.search.exam import Exam, Row, Sitting, facts, known_facts
from bitassay.search.objectives import Objective, is_hopeless
from bitassay.search.space import Range, Space, Value, label

SAMPLERS = ("tpe", "nsga2", "grid")
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
NAME = "search"
FAILED = "failed: "  # how the reason begins where an error was a bug
ATTEMPTS = 3
NOT_FINITE = "the result is not finite"
STOPPED = "stopped"  # of a study: the trials that were left on purpose
PROCESS = "process"  # of a trial: who has it in hand


@dataclass(frozen=True)
class SearchPlan:
    """What is searched: `space` over `model`, for the least of each of `objectives`, where no column of
    `at_most` is larger. windows: how many of `window` tokens choose (as many are held out); short: how many
    of them come first. seed: of the sampler."""

    model: str
    space: Space
    objectives: tuple[str, ...] = ("kl_mean",)
    at_most: Mapping[str, float] = field(default_factory=dict)
    sampler: str = "tpe"
    corpus: str = "wikitext2-raw"
    window: int = 512
    windows: int = 8
    short: int = 2
    dtype: str = "float32"
    attention: str = AUTO
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise BitassayError(f"{self.sampler!r} is no sampler", f"one of {', '.join(SAMPLERS)}")
        as_dtype(self.dtype)
        at_least(1, windows=self.windows, short=self.short)
        at_least(2, window=self.window)
        at_least(0, seed=self.seed)
        if self.short > self.windows:
            raise BitassayError(
                f"{self.short} of {self.windows} windows come first", f"--short 1 to {self.windows}"
            )
        check_corpus(self.corpus)
        if not self.objectives:
            raise BitassayError("there is no objective", "--objective kl_mean")
        for text in self.objectives:
            Objective.parse(text)
        if self.sampler == "grid":
            next(self.space.grid())

    @property
    def parsed(self) -> list[Objective]:
        return [Objective.parse(text) for text in self.objectives]

    @property
    def protocol(self) -> Protocol:
        return Protocol(self.corpus, window_tokens=self.window, windows=self.windows)

    def over(self, row: Mapping[str, Any]) -> str | None:
        """The first limit that a recipe's columns, as far as they are known, break."""
        for name, most in self.at_most.items():
            if row.get(name, most) > most:
                return f"{name} is {row[name]:.6g}"
        return None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"space": self.space.model_dump(mode="json"), "at_most": dict(self.at_most)}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "SearchPlan":
        """From what `to_dict` gave."""
        known: dict[str, Any] = {name: content[name] for name in cls.__dataclass_fields__}
        known |= {"objectives": tuple(known["objectives"]), "space": Space.model_validate(known["space"])}
        return cls(**known)

    def exam(self, progress: Progress = silent, trust_remote_code: bool = False) -> Exam:
        return Exam(
            self.model,
            self.protocol,
            self.short,
            dtype=self.dtype,
            attention=self.attention,
            seed=self.seed,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )


def open_study(plan: SearchPlan, folder: Path) -> optuna.Study:
    """The study in FOLDER/trials.db, made where it is not there."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = f"sqlite:///{(folder / 'trials.db').resolve()}"
    with FileLock(folder / "trials.lock"):
        return optuna.create_study(
            study_name=NAME,
            storage=storage,
            directions=[StudyDirection.MINIMIZE for _ in plan.objectives],
            load_if_exists=True,
        )


def _sampler(plan: SearchPlan, seed: int) -> optuna.samplers.BaseSampler:
    if plan.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(population_size=20, seed=seed)
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)  # no two processes near each other


def propose_first(plan: SearchPlan, study: optuna.Study, recipes: Sequence[Recipe]) -> None:
    """Let a search that begins try these recipes first, those that its space holds; a grid has its order."""
    if study.get_trials(deepcopy=False) or plan.sampler == "grid":
        return
    for recipe in recipes:
        if (values := plan.space.values_of(recipe)) is not None:
            study.enqueue_trial({path: label(value) for path, value in values.items()})


def propose_interrupted_again(study: optuna.Study) -> int:
    """End the trials that nobody works on any more, and propose their values first; how many there were."""
    left = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    stopped = study.user_attrs.get(STOPPED, [])
    for trial in left:
        study.tell(trial.number, state=TrialState.FAIL)
        if not trial.params:
            continue
        ended = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        deaths = sum(one.params == trial.params and one.number not in stopped for one in ended)
        study.enqueue_trial(trial.params, user_attrs={"deaths": deaths})
    return len(left)


def left_on_purpose(study: optuna.Study, processes: Collection[int]) -> None:
    """Remember the trials in the hands of these processes: that they end is not those recipes' fault."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    left = [trial.number for trial in running if trial.user_attrs.get(PROCESS) in processes]
    study.set_user_attr(STOPPED, study.user_attrs.get(STOPPED, []) + left)


def run_trials(plan: SearchPlan, folder: Path, total: int, exam: Exam, progress: Progress = silent) -> None:
    """Work on trials until `total` have ended or are in somebody's hands."""
    study, lock = open_study(plan, folder), FileLock(folder / "trials.lock")
    grid = list(plan.space.grid()) if plan.sampler == "grid" else None
    total = total if grid is None else min(total, len(grid))
    while True:
        with lock:
            known = study.get_trials(deepcopy=False, states=(*ENDED, TrialState.RUNNING))
            waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            if len(known) >= total:
                return
            if grid is not None and not waiting:
                study.enqueue_trial({path: label(value) for path, value in grid[len(known)].items()})
            # Each trial has a seed of its own: processes draw different ones, and a search that goes on the
            # ones that it would have drawn.
            study.sampler = _sampler(plan, plan.seed + len(known))
            trial = study.ask()
            values = _suggested(trial, plan.space)
            trial.set_user_attr(PROCESS, os.getpid())
            deaths = trial.user_attrs.get("deaths", 0)
        ended = study.get_trials(deepcopy=False, states=ENDED)
        progress("trials", len(ended), total)
        try:
            outcome = _tried(plan, values, folder, exam, ended, deaths)
        except BaseException:
            with lock:
                left_on_purpose(study, {os.getpid()})
            raise
        for key, value in asdict(outcome).items():
            trial.set_user_attr(key, value)
        for column, value in outcome.excess(plan.at_most).items():
            trial.set_constraint(column, value)
        if outcome.stopped is None:
            study.tell(trial, outcome.objectives)
        else:
            study.tell(trial, state=TrialState.PRUNED)
        progress(_said(trial.number, outcome))


@dataclass(frozen=True)
class Outcome:
    """What came of a trial. stopped: why it is not complete; objectives and row where it is."""

    recipe: dict[str, Any] | None = None
    stopped: str | None = None
    short: list[float] | None = None
    objectives: list[float] | None = None
    row: Row | None = None

    def excess(self, at_most: Mapping[str, float]) -> dict[str, float]:
        """By how much each limit is exceeded; below zero where it is not."""
        row = self.row or {}
        return {name: row[name] - most for name, most in at_most.items() if row.get(name) is not None}


def _tried(
    plan: SearchPlan,
    values: dict[str, Value],
    folder: Path,
    exam: Exam,
    ended: Sequence[FrozenTrial],
    deaths: int,
) -> Outcome:
    try:
        recipe = plan.space.recipe_of(values)
    except BitassayError as error:
        return Outcome(stopped=f"refused: {error}")
    content = recipe.to_yaml_dict()
    for trial in ended:  # a sampler may come back to a recipe
        if trial.user_attrs["recipe"] == content:
            return Outcome(**{key: trial.user_attrs[key] for key in Outcome.__dataclass_fields__})
    work = folder / "work" / recipe.recipe_id
    try:
        if deaths >= ATTEMPTS:
            raise RuntimeError(f"its process was ended {deaths} times, most likely by a lack of memory")
        outcome = _measured(plan, recipe, work, exam, ended)
    except (MissingError, OSError):
        raise
    except BitassayError as error:
        outcome = Outcome(stopped=f"refused: {error}")
    except Exception as error:
        write_text(folder / "failed" / f"{recipe.name}.txt", traceback.format_exc())
        outcome = Outcome(stopped=f"{FAILED}{type(error).__name__}: {error}")
    shutil.rmtree(work, ignore_errors=True)
    return replace(outcome, recipe=content)


def _measured(
    plan: SearchPlan, recipe: Recipe, work: Path, exam: Exam, earlier: Sequence[FrozenTrial]
) -> Outcome:
    """What comes of a recipe beside earlier trials."""
    row = known_facts(exam.base, recipe)
    if over := plan.over(row):
        return Outcome(stopped=over, row=row)
    quantization = quantize_tensors(exam.base, recipe, exam.progress, work, exam.codes(recipe, work))
    row = facts(exam.base, quantization)
    if over := plan.over(row):
        return Outcome(stopped=over, row=row)
    first, sitting = None, Sitting(exam, quantization)
    if plan.short < plan.windows:
        measured = row | sitting.short()
        known = [one.value(measured) for one in plan.parsed if measured.keys() >= set(one.columns)]
        if not all(map(math.isfinite, known)):
            return Outcome(stopped=NOT_FINITE, row=row)
        if len(known) == len(plan.parsed):  # else it may be the best in what is not known yet
            first = known
            if is_hopeless(first, *_standard(plan, earlier)):
                return Outcome(stopped="others are better on the first windows", short=first, row=row)
    columns = [column for one in plan.parsed for column in one.columns] + list(plan.at_most)
    measured = row | sitting.measured(columns)
    objectives = [one.value(measured) for one in plan.parsed]
    limited = [measured.get(name) for name in plan.at_most]
    if not all(math.isfinite(value) for value in (*objectives, *limited) if value is not None):
        return Outcome(stopped=NOT_FINITE, short=first, row=row)
    return Outcome(short=first, objectives=objectives, row=measured)


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


def _said(number: int, outcome: Outcome) -> str:
    result = outcome.stopped or ", ".join(f"{value:.4g}" for value in outcome.objectives or [])
    return f"trial {number}: {result}"
