"""A search on a tiny model: samplers, limits, resuming, several processes, and what comes out."""

import itertools
import json
import math
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.trial import Trial, TrialState

import bitassay
from bitassay.errors import BitassayError, MissingError
from bitassay.evaluation.quality import score_windows, summarise
from bitassay.quantization.recipe.recipe import Recipe, find_recipe, read_recipe
from bitassay.record.progress import silent
from bitassay.search import evaluator as evaluator_module
from bitassay.search import trials as trials_module
from bitassay.search.evaluator import Measurement, TrialEvaluator, facts, known_facts
from bitassay.search.objectives import FACTS, SearchPlan
from bitassay.search.search import search
from bitassay.search.space import Space
from bitassay.search.trials import ATTEMPTS

SPACE = Space.model_validate(
    {
        "name": "tiny",
        "recipe": {"weights": {"format": "int3", "scale": "absmax"}},
        "parameters": {
            "weights.granularity": ["channel", "g32", "g64"],
            "weights.offset": {"low": 0.0, "high": 0.5, "step": 0.5},
        },
    }
)

FREE = Space.model_validate(
    {
        "name": "free",
        "recipe": {"weights": {"format": "int3"}},
        "parameters": {"weights.scale_factor": {"low": 0.8, "high": 1.2}},
    }
)


def run(out, trials=7, space=SPACE, **options):
    settings = {"window": 64, "windows": 3, "short": 1} | options
    return search("stories260k", space, trials=trials, out=out, **settings)[0]


@pytest.mark.slow
def test_the_best_of_a_grid_is_the_best_of_its_trials(tmp_path):
    found = run(tmp_path / "run", trials=100, sampler="grid", short=3, against=["w3"])
    assert len(found["trials"]) == 6  # all there are
    assert {trial["state"] for trial in found["trials"]} == {"complete"}
    values = [trial["values"] for trial in found["trials"]]
    assert len({json.dumps(value, sort_keys=True) for value in values}) == 6
    best = min(found["trials"], key=lambda trial: trial["objectives"])
    assert found["best"] == [f"tiny-{best['number']:03d}"]
    assert [row["recipe"] for row in found["rows"]] == ["base", *found["best"], "w3"]
    assert [row["chosen"] for row in found["rows"]] == [False, True, False]
    assert set(found["rows"][1]["against"]) == {"w3"}
    assert sum(found["importance"]["kl_mean"].values()) == pytest.approx(1)

    # The row is what an evaluation of the recipe's file says on the windows held out, not on those that chose.
    recipe = read_recipe(tmp_path / "run/best" / f"{found['best'][0]}.yaml")
    evaluator = TrialEvaluator(SearchPlan("stories260k", SPACE, window=64, windows=3, short=1))
    model = bitassay.quantize(evaluator.base, recipe)
    rows, _ = evaluator.judged({recipe.name: model.quantization})
    assert rows[1]["kl_mean"] == found["rows"][1]["kl_mean"]
    assert rows[1]["kl_mean"] != best["row"]["kl_mean"]


def test_an_interrupted_search_goes_on_and_repeats_no_finished_trial(tmp_path, monkeypatch):
    real, seen, grid = Measurement.all_windows, [], {"sampler": "grid", "short": 3}

    def stops(measurement, columns):
        seen.append(measurement.quantization.recipe.name)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return real(measurement, columns)

    monkeypatch.setattr(Measurement, "all_windows", stops)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", trials=5, **grid)
    finished, interrupted = set(seen[:3]), seen[3]

    def counts(measurement, columns):
        seen.append(measurement.quantization.recipe.name)
        return real(measurement, columns)

    del seen[:]
    monkeypatch.setattr(Measurement, "all_windows", counts)
    found = run(tmp_path / "run", trials=5, **grid)
    assert seen[0] == interrupted
    assert not finished & set(seen)
    assert len(found["trials"]) == len({str(trial["values"]) for trial in found["trials"]}) == 5
    more = run(tmp_path / "run", trials=6, **grid)
    assert len(more["trials"]) == 6
    assert more["trials"][:5] == found["trials"]


def test_a_limit_on_size_is_kept_and_costs_no_work(tmp_path, monkeypatch):
    made = []
    real = trials_module.quantize_tensors

    def noted(base, recipe, *rest):
        made.append(recipe.name)
        return real(base, recipe, *rest)

    monkeypatch.setattr(trials_module, "quantize_tensors", noted)
    found = run(tmp_path / "run", trials=6, sampler="grid", at_most={"bits_per_weight": 3.3})
    over = [trial for trial in found["trials"] if (trial["row"] or {}).get("bits_per_weight", 0) > 3.3]
    assert over
    assert all(trial["state"] == "pruned" and "bits_per_weight is" in trial["stopped"] for trial in over)
    assert len(made) == 6 - len(over)
    assert found["rows"][1]["bits_per_weight"] <= 3.3


def test_a_recipe_is_a_limit_and_the_first_trial(tmp_path, stories):
    hand = Recipe.model_validate(
        {"name": "hand", "weights": {"format": "int3", "scale": "absmax", "granularity": "g64"}}
    )
    outside = Recipe.model_validate({"name": "outside", "weights": {"format": "int4"}})
    limited = {"against": [outside, hand], "at_most": {"bits_per_weight": hand}}
    found = run(tmp_path / "run", trials=4, **limited)
    assert found["settings"]["at_most"] == {"bits_per_weight": known_facts(stories, hand)["bits_per_weight"]}
    first = found["trials"][0]
    assert first["values"] == {"weights.granularity": "g64", "weights.offset": 0.0}
    assert first["state"] == "complete"  # at the limit, not over it
    more = run(tmp_path / "run", trials=6, **limited)
    assert more["trials"][:4] == found["trials"]  # a search that goes on does not begin again


def test_a_limit_that_is_not_known(tmp_path):
    with pytest.raises(BitassayError, match="kl_mean of w3 is not known before it is measured"):
        run(tmp_path / "run", trials=1, at_most={"kl_mean": find_recipe("w3")})


RESIDUAL = {"how": "parallel", "of": "linear", "differ": "residual"}


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"rotation": {}},
        {"weights": {"format": "int4", "granularity": "g24", "symmetric": False, "zero_point": "free"}},
        {"overrides": [{"match": "*.v_proj", "weights": None}]},
        {"replication": RESIDUAL},
        {"replication": {"how": "parallel", "differ": "rotation", "layers": [1, 3]}},
    ],
)
def test_what_is_stored_is_known_before_anything_is_quantized(stories, parts):
    weights = {"format": "ternary", "granularity": "g32"}
    recipe = Recipe.model_validate({"name": "r", "weights": weights, **parts})
    found = facts(stories, bitassay.quantize(stories, recipe).quantization)
    planned = known_facts(stories, recipe)
    assert set(planned) == set(FACTS)
    assert planned == {name: found[name] for name in FACTS}


@pytest.mark.parametrize(
    "parts",
    [
        {"mixed": {"bits": 2.5}, "weights": {"format": "int2"}},
        {"weights": None, "activations": {}},
        {"replication": RESIDUAL | {"layers": {"by": "error"}}},
    ],
)
def test_what_measuring_decides_is_not_known_before(stories, parts):
    recipe = Recipe.model_validate({"name": "r", "weights": {"format": "int3"}, **parts})
    assert known_facts(stories, recipe) == {}


def test_a_bug_in_one_trial_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    real, tried, said = trials_module.quantize_tensors, [], []

    def breaks(base, recipe, *rest):
        tried.append(recipe.recipe_id)
        if recipe.weights.offset == 0 and recipe.weights.granularity == "g32":
            raise ZeroDivisionError("no such thing")
        return real(base, recipe, *rest)

    monkeypatch.setattr(trials_module, "quantize_tensors", breaks)
    grid = {"sampler": "grid", "short": 3, "progress": lambda what, *_: said.append(what)}
    found = run(tmp_path / "run", trials=4, **grid)
    failed = [trial for trial in found["trials"] if (trial["stopped"] or "").startswith("failed: ")]
    assert [trial["stopped"] for trial in failed] == ["failed: ZeroDivisionError: no such thing"]
    assert any("failed by a bug: 1" in what for what in said)
    [kept] = (tmp_path / "run/failed").iterdir()
    assert "in breaks" in kept.read_text()
    assert not list((tmp_path / "run/work").glob("*"))
    before = len(tried)
    assert len(run(tmp_path / "run", trials=6, **grid)["trials"]) == 6
    assert len(tried) == len(set(tried)) == before + 2  # it is not tried again


def test_what_the_machine_lacks_stops_the_search_and_is_no_fault_of_the_recipe(tmp_path, monkeypatch):
    def full(*_):
        raise MissingError("no space left on the disk")

    monkeypatch.setattr(trials_module, "quantize_tensors", full)
    with pytest.raises(MissingError):
        run(tmp_path / "run", trials=2)
    monkeypatch.undo()
    found = run(tmp_path / "run", trials=1)
    assert found["trials"][0]["state"] == "complete"


@pytest.mark.sample(1)
@pytest.mark.parametrize("kept_bytes", [0, 10**9])
def test_what_a_window_says_does_not_depend_on_what_was_kept(monkeypatch, kept_bytes):
    monkeypatch.setattr(evaluator_module, "KEPT_BYTES", kept_bytes)
    evaluator = TrialEvaluator(SearchPlan("stories260k", SPACE, window=64, windows=3, short=2))
    model = bitassay.quantize(evaluator.base, "w3")
    measurement = Measurement(evaluator, model.quantization)
    measurement.short()
    row = measurement.all_windows(["kl_mean"])
    pairs = [scores for _, scores in score_windows(evaluator.base, {"w3": model}, evaluator.windows)]
    expected = summarise([pair["w3"] for pair in pairs], [pair["base"] for pair in pairs])
    assert row == expected.to_dict()


@pytest.mark.slow
def test_a_limit_on_what_takes_a_run_is_kept_too(tmp_path):
    small = {"sampler": "grid", "objectives": ("bits_per_weight",), "short": 3}
    free = run(tmp_path / "free", trials=6, at_most={"kl_mean": 100}, **small)
    best = min(free["trials"], key=lambda trial: trial["row"]["kl_mean"])
    assert free["best"] != [f"tiny-{best['number']:03d}"]
    tight = run(tmp_path / "tight", trials=6, at_most={"kl_mean": best["row"]["kl_mean"]}, **small)
    assert tight["best"] == [f"tiny-{best['number']:03d}"]


@pytest.mark.sample(1)
@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_several_objectives_give_a_front(tmp_path, sampler):
    found = run(tmp_path / "run", trials=8, objectives=("kl_mean", "bits_per_weight"), sampler=sampler)
    points = {f"tiny-{t['number']:03d}": t["objectives"] for t in found["trials"] if t["objectives"]}
    front = [points[name] for name in found["best"]]
    assert front == sorted(front)
    assert [bits for _, bits in front] == sorted({bits for _, bits in front}, reverse=True)


def test_what_the_recipe_refuses_counts_as_a_trial_with_its_reason(tmp_path):
    space = SPACE.model_copy(
        update={"parameters": {"weights.format": ["int3", "fp8_e4m3", "binary"], "weights.scale": ["absmax"]}}
    )
    found = run(tmp_path / "run", trials=3, space=space, sampler="grid", short=3)
    stopped = [trial["stopped"] for trial in found["trials"]]
    assert (
        sum(
            one is not None and "refused: " in one and "binary has no code for zero" in one for one in stopped
        )
        == 1
    )
    alone = SPACE.model_copy(
        update={"parameters": {"weights.format": ["binary"], "weights.scale": ["absmax"]}}
    )
    with pytest.raises(BitassayError, match=r"none of 1 trials was completed.*binary has no code"):
        run(tmp_path / "none", trials=1, space=alone)


def factors(found):
    return [trial["values"]["weights.scale_factor"] for trial in found["trials"]]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_search_that_goes_on_tries_what_it_would_have_tried(tmp_path, sampler):
    run(tmp_path / "a", trials=3, space=FREE, sampler=sampler)
    in_parts = run(tmp_path / "a", trials=12, space=FREE, sampler=sampler)
    at_once = run(tmp_path / "b", trials=12, space=FREE, sampler=sampler)
    assert factors(in_parts) == factors(at_once)
    assert len(set(factors(at_once))) == 12


@pytest.mark.slow
def test_two_processes_share_the_trials_and_try_different_recipes(tmp_path):
    found = run(tmp_path / "run", trials=8, space=FREE, jobs=2)
    assert len(set(factors(found))) == len(found["trials"]) == 8
    assert (tmp_path / "run/workers/01.log").exists()


def test_deaths_are_counted_unless_the_user_stopped_the_trial(tmp_path):
    plan = SearchPlan("stories260k", FREE)
    study = trials_module.open_study(plan, tmp_path)
    for _ in range(2):
        study.ask().suggest_float("weights.scale_factor", 0.8, 1.2)
    study.set_user_attr(trials_module.STOPPED, [1])
    assert trials_module.propose_interrupted_again(plan, study) == 2
    waiting = study.get_trials(states=(TrialState.WAITING,))
    assert [trial.user_attrs["deaths"] for trial in waiting] == [1, 0]


@pytest.mark.parametrize("sampler", ["grid", "tpe"])
@pytest.mark.parametrize("drawn", [0, 1, 2, 3])
def test_a_search_interrupted_while_it_draws_values_tries_what_it_would_have_tried(
    sampler, drawn, tmp_path, monkeypatch
):
    plan = replace(SearchPlan("stories260k", SPACE), sampler=sampler)
    evaluator = TrialEvaluator(plan, silent, False)
    outcome = trials_module.Outcome(stopped="not measured")
    monkeypatch.setattr(trials_module, "_tried", lambda content, *_: replace(outcome, recipe=content[0]))

    def tried(study, folder):
        trials_module.propose_interrupted_again(plan, study)
        trials_module.run_trials(study, folder, 4, evaluator)
        return [trial.params for trial in study.get_trials(states=trials_module.ENDED)]

    draws = itertools.count()

    def interrupted(*values):
        if next(draws) == drawn:
            raise KeyboardInterrupt
        return draw(*values)

    draw = Trial._suggest
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    study = trials_module.open_study(plan, tmp_path / "a")
    with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
        patched.setattr(Trial, "_suggest", interrupted)
        tried(study, tmp_path / "a")
    assert tried(study, tmp_path / "a") == tried(
        trials_module.open_study(plan, tmp_path / "b"), tmp_path / "b"
    )


DYING = """
import os, signal, sys
from pathlib import Path
from test_search import SPACE, run
from bitassay.search.evaluator import Measurement
real = Measurement.all_windows
def all_windows(measurement, columns):
    if measurement.quantization.recipe.weights.offset:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(measurement, columns)
Measurement.all_windows = all_windows
run(Path(sys.argv[1]), trials=2, sampler="grid", short=3)
"""


@pytest.mark.slow
def test_a_trial_that_ends_its_process_each_time_is_given_up(tmp_path):
    command = [sys.executable, "-c", DYING, str(tmp_path / "run")]
    statuses = [subprocess.run(command, cwd=Path(__file__).parent).returncode for _ in range(ATTEMPTS + 1)]
    assert statuses == [-9] * ATTEMPTS + [0]
    found = run(tmp_path / "run", trials=3, sampler="grid", short=3)["trials"]
    [given_up] = [trial for trial in found if trial["stopped"]]
    assert given_up["values"]["weights.offset"] == 0.5
    assert "ended 3 times" in given_up["stopped"]


@pytest.mark.slow
def test_a_trial_that_the_user_stops_is_never_given_up(tmp_path, monkeypatch):
    def stops(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Measurement, "all_windows", stops)
        for _ in range(ATTEMPTS + 1):
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "run", trials=1, sampler="grid", short=3)
    [trial] = run(tmp_path / "run", trials=1, sampler="grid", short=3)["trials"]
    assert trial["state"] == "complete"


@pytest.mark.slow
def test_speed_and_distance_are_columns_too(tmp_path):
    found = run(tmp_path / "run", trials=1, objectives=("-1*decode_tok_s", "hidden_distance"))
    speed, distance = found["trials"][0]["objectives"]
    assert speed < 0
    assert distance > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"trials": 0}, "0 trials or jobs"),
        ({"jobs": 0}, "0 trials or jobs"),
        ({"sampler": "best"}, "'best' is no sampler"),
        ({"objectives": ()}, "no objective"),
        ({"objectives": ("speed",)}, "no column"),
        ({"short": 4}, "4 of 3 windows come first"),
        ({"against": ["w3", "w3"]}, "two rows would be called 'w3'"),
        ({"windows": 100_000}, "were asked for"),
    ],
)
def test_bad_input(tmp_path, options, said):
    with pytest.raises(BitassayError, match=said):
        run(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_another_plan_does_not_share_the_folder(tmp_path):
    run(tmp_path / "run", trials=1)
    with pytest.raises(BitassayError, match="holds a run of another plan"):
        run(tmp_path / "run", trials=1, seed=1)


@pytest.mark.sample(1)
@pytest.mark.parametrize("short", [1, 3])
def test_what_breaks_a_limit_stops_nobody(tmp_path, short):
    """Two and three bits are smaller than eight, and none of them is good enough."""
    parameters = {
        "weights.format": ["int2", "int3", "int8"],
        "weights.granularity": ["g32", "g64"],
        "weights.offset": [0.0, 0.5],
    }
    found = run(
        tmp_path / "run",
        trials=12,
        space=SPACE.model_copy(update={"parameters": parameters}),
        sampler="grid",
        objectives=("bits_per_weight",),
        at_most={"kl_mean": 0.05},
        short=short,
    )
    [best] = found["best"]
    trial = found["trials"][int(best.rpartition("-")[2])]
    assert trial["values"]["weights.format"] == "int8"
    assert trial["row"]["kl_mean"] <= 0.05


def test_nothing_is_hopeless_before_every_objective_is_known(tmp_path, monkeypatch):
    """The model of most divergence is the fastest, so it is on the front."""
    monkeypatch.setattr(
        TrialEvaluator,
        "speed",
        lambda _, made: {"decode_tok_s": 100 / made.recipe.weights.number_format.bits},
    )
    parameters = {"weights.format": ["int8", "int3", "int2"], "weights.scale_factor": [0.96, 0.98, 1.0]}
    found = run(
        tmp_path / "run",
        trials=9,
        space=SPACE.model_copy(update={"parameters": parameters}),
        sampler="grid",
        objectives=("kl_mean", "-1*decode_tok_s"),
    )
    assert {trial["state"] for trial in found["trials"]} == {"complete"}
    front = {
        found["trials"][int(name.rpartition("-")[2])]["values"]["weights.format"] for name in found["best"]
    }
    assert front == {"int2", "int3", "int8"}


@pytest.mark.sample(1)
@pytest.mark.parametrize("short", [1, 3])
def test_a_ruined_model_is_a_trial_as_any(tmp_path, monkeypatch, short):
    real = Measurement._quality

    def ruined(measurement, indices):
        wrong = {"kl_mean": math.nan} if measurement.quantization.recipe.weights.offset else {"ppl": math.inf}
        return real(measurement, indices) | wrong

    monkeypatch.setattr(Measurement, "_quality", ruined)
    found = run(tmp_path / "run", trials=6, sampler="grid", short=short)
    stopped = [trial for trial in found["trials"] if trial["stopped"] == "the result is not finite"]
    assert [trial["values"]["weights.offset"] for trial in stopped] == [0.5] * 3
    assert any(trial["row"]["ppl"] is None for trial in found["trials"] if trial["objectives"])
    assert json.loads((tmp_path / "run/run.json").read_text())["trials"] == found["trials"]


@pytest.mark.slow
def test_trials_of_one_model_in_different_loops_have_its_codes_made_once(tmp_path, monkeypatch):
    space = Space.model_validate(
        {
            "name": "again",
            "recipe": {
                "weights": {"format": "int3"},
                "gptq": {},
                "calibration": {"samples": 4, "tokens": 48},
            },
            "parameters": {
                "replication.layers.start": [0.2, 0.4],
                "replication.layers.end": [0.6],
                "replication.coefficients": [[1, 0.1], [1, 0.3]],
            },
        }
    )
    solved, real = [], evaluator_module.quantize_tensors

    def noted(base, recipe, *rest):
        solved.append(recipe.replication)
        return real(base, recipe, *rest)

    monkeypatch.setattr(evaluator_module, "quantize_tensors", noted)
    found = run(tmp_path / "run", trials=4, space=space, sampler="grid", short=3)
    assert solved == [None]
    assert len({trial["row"]["kl_mean"] for trial in found["trials"]}) == 4
    assert not [path for path in (tmp_path / "run/work").iterdir() if path.is_dir()]
    recipe = read_recipe(tmp_path / "run/best" / f"{found['best'][0]}.yaml")
    evaluator = TrialEvaluator(SearchPlan("stories260k", space, window=64, windows=3, short=1))
    rows, _ = evaluator.judged({"alone": bitassay.quantize(evaluator.base, recipe).quantization})
    assert rows[1]["kl_mean"] == found["rows"][1]["kl_mean"]


def test_a_recipe_by_hand_has_a_name_of_its_own(tmp_path):
    hand = find_recipe("w3").model_copy(update={"name": "tiny-003"})
    with pytest.raises(BitassayError, match="tiny-003: a recipe that this search finds"):
        run(tmp_path / "run", against=[hand])
