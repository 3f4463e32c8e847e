"""The attack study on the tiny model: its rows, its rates, and that it goes on where it was stopped."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from bitassay.cli import run as command
from bitassay.engines.load import load
from bitassay.engines.sampling import GREEDY
from bitassay.errors import BitassayError
from bitassay.evaluation.statistics import clopper_pearson_interval
from bitassay.report.pages import page_of, write_report
from bitassay.studies.attacks import study
from bitassay.studies.attacks.evaluation import CrossFit, evaluated
from bitassay.studies.attacks.study import VARIANTS, AttackPlan, RequestSet, attack, check_plan
from bitassay.verification.detectors import registry
from bitassay.verification.detectors.detector import Series
from bitassay.verification.observe import Observation

DETECTORS = evaluated()
PLAN = AttackPlan(
    sequences=35,
    tokens=16,
    alpha=0.05,
    attacks=("int2", "decode-int4", "replayed", "root-forged", "verifier-copies", "seed"),
    variants=("same", "batch-8", "sampled"),
)
KEYS = [
    "attack",
    "detector",
    "auc",
    "tpr_at_1pct_fpr",
    "tpr_ci",
    "tokens_to_99",
    "bytes_per_token",
    "seconds_per_token",
    "prefill_seconds_per_token",
    "prover_seconds_per_token",
    "n_honest",
    "n_attacked",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return attack("stories260k", PLAN, out=tmp_path_factory.mktemp("runs") / "attack")


def cell(run, attack, detector):
    return next(row for row in run["rows"] if (row["attack"], row["detector"]) == (attack, detector))


def test_one_row_for_each_attack_and_detector(finished):
    run, folder = finished
    assert {(row["attack"], row["detector"]) for row in run["rows"]} == {
        (name, detector) for name in PLAN.attacks for detector in DETECTORS
    }
    for row in run["rows"]:
        assert all(key in row for key in KEYS)
        assert row["n_honest"] == (35 if row["attack"] == "seed" else 70)
        assert row["tpr_ci"][0] <= row["tpr_at_1pct_fpr"] <= row["tpr_ci"][1]
    assert json.loads((folder / "run.json").read_text())["rows"] == json.loads(json.dumps(run["rows"]))


def test_who_sees_what(finished):
    run, _ = finished
    assert cell(run, "int2", "distance")["tokens_to_99"] <= 2
    for hidden_states in ("distance", "toploc", "activation-difr"):
        assert cell(run, "decode-int4", hidden_states)["sees"] == "nothing"
        assert cell(run, "seed", hidden_states)["sees"] == "nothing"
    assert cell(run, "decode-int4", "combined")["tpr_at_1pct_fpr"] > 0.8
    assert cell(run, "seed", "token-difr")["tpr_at_1pct_fpr"] == 1
    assert cell(run, "replayed", "structure")["tpr_at_1pct_fpr"] == 1
    assert cell(run, "replayed", "combined")["tokens_to_99"] == 1
    assert cell(run, "int2", "structure")["sees"] == "nothing"


def test_exact_checks_catch_what_no_state_shows(finished):
    run, _ = finished
    for name in ("root-forged", "verifier-copies"):
        for detector in ("structure", "combined"):
            assert cell(run, name, detector)["tpr_at_1pct_fpr"] == 1
            assert cell(run, name, detector)["tokens_to_99"] == 1
        for detector in ("distance", "toploc", "token-difr"):
            assert cell(run, name, detector)["sees"] == "nothing"


def test_what_each_detector_costs_was_measured(finished):
    run, _ = finished
    found = {(row["sampler"], row["detector"]): row for row in run["costs"]}
    assert set(found) == {(sampler, name) for sampler in ("greedy", "sampled") for name in DETECTORS}
    for (_, name), row in found.items():
        works = any(registry.DETECTORS[each].prove for each in evaluated()[name])
        assert (row["prover_seconds_per_token"] > 0) == works
        assert row["seconds_per_token"] > 0 < row["prefill_seconds_per_token"]
    assert len({row["seconds_per_token"] for row in run["costs"]}) == len(found)
    both = {sampler: found[sampler, "token-difr"]["seconds_per_token"] for sampler in ("greedy", "sampled")}
    assert cell(run, "seed", "token-difr")["seconds_per_token"] == both["sampled"]
    assert cell(run, "int2", "token-difr")["seconds_per_token"] == both["greedy"]


def test_honest_runs_are_accused_no_more_often_than_allowed(finished):
    """Of as many rows one in twenty is off by chance at 95 %; none is at 99.9 %."""
    for row in finished[0]["honest"]:
        low, _ = clopper_pearson_interval(row["refused"], row["n"], 0.999)
        assert low <= PLAN.alpha


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the run's folder."""
    return shutil.copytree(finished[1], tmp_path / "copy")


def test_it_goes_on_where_it_was_stopped(finished, copied, monkeypatch):
    run, _ = finished
    (copied / "parts" / "attack-replayed.json").unlink()
    calls = []
    real = study.observe
    monkeypatch.setattr(study, "observe", lambda *a, **k: calls.append(1) or real(*a, **k))
    again, _ = attack("stories260k", replace(PLAN, attacks=("replayed",)), out=copied)
    assert len(calls) == 1
    assert again["rows"] == [row for row in run["rows"] if row["attack"] == "replayed"]


def test_the_page(finished, tmp_path):
    run, _ = finished
    write_report(run, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "blind" in page
    assert all(name in page for name in DETECTORS)
    assert "://" not in page
    assert [row["attack"] for row in page_of(run).sections[0].rows] == list(PLAN.attacks)


def test_refusals():
    for plan, words in [
        (replace(PLAN, attacks=("int22",)), "int2"),
        (replace(PLAN, variants=("sam",)), "same"),
        (replace(PLAN, alpha=0.001), "honest scores"),
        (replace(PLAN, sequences=32), "17 honest scores; alpha 0.05 needs 19"),  # else nothing is ever caught
        (replace(PLAN, tokens=1), "2 tokens"),
        (replace(PLAN, variants=("same",)), "sampled"),
    ]:
        with pytest.raises(BitassayError, match=words):
            check_plan(plan)


def test_command_line(copied, capsys, monkeypatch):
    """The words are those of the plan: what is there is not done again."""
    monkeypatch.setattr(study, "observe", lambda *_, **__: 1 / 0)
    few = ["--attacks", "int2", "--numerics", "same", "--out", str(copied)]
    few += ["--sequences", "35", "--tokens", "16", "--alpha", "0.05"]
    assert command(["attack", "stories260k", *few, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["detector"] for row in found["rows"]} == set(DETECTORS)
    assert (copied / "report.html").exists()
    assert command(["attack", "stories260k", *few]) == 0
    shown = capsys.readouterr().out
    assert "100 % @" in shown
    assert "host's seconds" in shown
    assert command(["attack", "stories260k", "--attacks", "int22"]) == 2
    assert "int2" in capsys.readouterr().err


def observed(value):
    return Observation(2, (), 1, (8,), {"distance": (Series((value,), (value,)),)})


def test_a_run_is_not_judged_by_its_own_request():
    """Runs of one fold are far off, honest or not; the judges of that fold have not seen them."""
    honest = [observed(5.0 if index % 5 == 0 else index / 1000) for index in range(100)]
    _, caught = CrossFit({"same": honest}, 1 / 61).decide("distance", 1, honest)
    assert caught[::5].all()
    assert caught.sum() == 20


def test_another_process_answers_in_the_same_batches(started):
    """Run in this process it has our numerics, so its traces are those of the request set to the last bit."""
    prompts = [tuple(range(10, 10 + length)) for length in (9, 3, 6, 3, 12)]
    asked = RequestSet(
        "stories260k", load("stories260k", dtype="bfloat16"), prompts, GREEDY, replace(PLAN, batch=2)
    )
    theirs = VARIANTS["isa"].run(asked)
    assert len(started) == 1
    for ours, other in zip(asked.traces, theirs, strict=True):
        assert ours.header == other.header
        assert all(ours.states[layer].equal(other.states[layer]) for layer in ours.header.layers)


@pytest.mark.parametrize("count", [1000, pytest.param(4000, marks=pytest.mark.slow)])
def test_rates_are_those_of_exchangeable_scores(count):
    random = np.random.default_rng(1)
    honest = [observed(float(value)) for value in random.normal(size=count)]
    for alpha in (0.01, 0.05, 0.5):
        _, caught = CrossFit({"same": honest}, alpha).decide("distance", 1, honest)
        assert caught.mean() == pytest.approx(alpha, abs=4 * (alpha * (1 - alpha) / count) ** 0.5)
