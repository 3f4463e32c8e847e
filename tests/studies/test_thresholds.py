"""Thresholds that are fitted on honest trials, on cells with known statistics and on the tiny model."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bitassay.errors import BitassayError
from bitassay.studies.machines import Machine
from bitassay.studies.verillm.experiments import directions
from bitassay.studies.verillm.thresholds import (
    accept_rate,
    as_yaml,
    cell_values,
    distances,
    optimise_thresholds,
    optimised,
    read_thresholds,
    recommend,
)
from bitassay.studies.verillm.verifier import TraceStatistics
from bitassay.studies.verillm.work import ExperimentPlan
from bitassay.verification.detectors.verillm import DOCUMENTS, CellStatistics
from bitassay.verification.power import threshold

PLAN = ExperimentPlan(
    "stories260k", (Machine("cpu"), Machine("cpu+avx2")), tokens=4, prompt_tokens=8, verifiers=1
)
DIRECTION = directions("exp1", PLAN)[0]


def made(generator, Pe=0.06, Pw=0.8, distance=0.015, n_prompt=5, positions=45):
    """Cells around the given means; the prompt's are far off, and must not count."""

    def around(mean, spread):
        values = mean * (1 + spread * torch.randn(2, positions, generator=generator, dtype=torch.float64))
        return torch.cat([torch.full((2, n_prompt), 9.0, dtype=torch.float64), values], 1)

    return TraceStatistics(
        layers=(8, 16),
        n_prompt=n_prompt,
        seconds=1.0,
        verifier={},
        statistics=CellStatistics(
            Pe=around(Pe, 0.2),
            Pm=around(0.5, 0.1),
            Pw=around(Pw, 0.05),
            mean_epsilon=around(1e-3, 1.0),
            mean_absolute=around(1e-2, 0.1),
            compared=torch.full((2, n_prompt + positions), 64),
            sign_mismatches=torch.zeros(2, n_prompt + positions, dtype=torch.int64),
            refused=torch.zeros(2, n_prompt + positions, dtype=torch.bool),
        ),
        distance=around(distance, 0.1),
        margins=torch.zeros(positions + 1),
    )


def trials(count, seed=0, **means):
    generator = torch.Generator().manual_seed(seed)
    return [[made(generator, **means) for _ in range(2)] for _ in range(count)]


def test_thresholds_are_percentiles_of_the_fit_trials_generated_cells():
    honest = trials(31)
    rules, bar = recommend(honest, 0.05, 95)
    fit = np.concatenate([cells.generated.Pe.numpy().ravel() for trial in honest[::3] for cells in trial])
    assert rules.max_Pe == pytest.approx(np.percentile(fit, 95), rel=1e-6)
    assert (fit < rules.max_Pe).mean() == pytest.approx(0.95, abs=0.002)
    assert cell_values(honest)["Pe"].max() < 1
    rates = sorted(accept_rate(trial, rules) for i, trial in enumerate(honest) if i % 3)
    assert len(rates) == 20
    assert rates[0] > bar >= rates[0] - 1e-6


def test_too_few_trials_for_alpha_refuse_nothing():
    assert recommend(trials(9), 0.05, 95)[1] == -math.inf
    assert threshold(distances(trials(9)), 0.05) == math.inf


def test_honest_trials_pass_and_others_do_not():
    found = optimised(DIRECTION, trials(31), {"w8": trials(20, 1, Pe=0.17, Pw=0.45, distance=0.05)}, 0.05, 95)
    assert found["false_positive_rate"] <= 0.15
    attack = found["attacks"]["w8"]
    assert (attack["caught"], attack["caught_by_distance"]) == (1.0, 1.0)
    assert attack["caught_ci"][0] > 0.8


def test_an_attack_like_the_honest_runs_is_not_seen():
    """The fit must not know the attacks: what looks honest passes, however it is called."""
    found = optimised(DIRECTION, trials(31), {"w8": trials(200, 1)}, 0.05, 95)
    assert found["attacks"]["w8"]["caught"] < 0.2


def test_false_accusations_are_counted_on_trials_that_took_no_part():
    """One honest trial unlike all others is accused."""
    honest = [*trials(30), *trials(1, 1, Pe=0.5, Pw=0.1, distance=0.5)]
    found = optimised(DIRECTION, honest, {}, 0.05, 95)
    assert found["false_positive_rate"] >= 1 / 31
    assert found["distance_false_positive_rate"] >= 1 / 31


def test_the_rate_of_false_accusations_holds():
    """Over many fits, new honest trials are refused at alpha or less."""
    refused = []
    for seed in range(60):
        *honest, new = trials(32, seed)
        rules, bar = recommend(honest, 0.1, 95)
        refused.append(accept_rate(new, rules) <= bar)
    assert np.mean(refused) < 0.1 + 3 * (0.1 * 0.9 / 60) ** 0.5


def test_a_file_of_thresholds_comes_back(tmp_path):
    found = {"model": "m", **optimised(DIRECTION, trials(31), {}, 0.05, 95)}
    path = tmp_path / "x.yaml"
    path.write_text(as_yaml(found))
    rules, bar = read_thresholds(path)
    said = found["thresholds"]
    assert (rules.name, bar) == ("x", said["accept_rate_min"])
    assert (rules.max_Pe, rules.min_Pm, rules.min_Pw) == (said["Pe"], said["Pm"], said["Pw"])
    assert (rules.max_mean, rules.e_m, rules.e_w) == (said["mean_epsilon"], DOCUMENTS.e_m, DOCUMENTS.e_w)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- 1",
        "experiment: 3",
        "experiment: {thresholds: {Pe: 1}}",
        "experiment: {thresholds: {Pe: a, Pm: 1, Pw: 1, mean_epsilon: 1}, accept_rate_min: 1}",
        "experiment: {thresholds: {Pe: .inf, Pm: 1, Pw: 1, mean_epsilon: 1}, accept_rate_min: 1}",
        "experiment: {thresholds: {Pe: 1, Pm: 1, Pw: 1, mean_epsilon: 1, more: 1}, accept_rate_min: 1}",
        "a: [",
        "!!python/object/apply:os.system [ls]",
    ],
)
def test_what_is_no_file_of_thresholds(text, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(BitassayError, match=r"bad\.yaml"):
        read_thresholds(path)


def test_on_a_model(tmp_path, started):
    plan = replace(PLAN, trials=7, precision="bf16", attacks=("w2",))
    run = optimise_thresholds(["exp1"], plan, alpha=0.25, out=tmp_path)
    [row] = run["rows"]
    assert row["fitted_on"] == "7 honest trials of bf16 on cpu"
    assert row["attacks"]["w2"]["caught_by_distance"] == 1
    assert {path.name for path in (tmp_path / "threshold_optimization").iterdir()} == {
        "exp1_stories260k_cpu_to_cpu_analysis.json",
        "exp1_stories260k_cpu_to_cpu_thresholds.yaml",
    }
    read_thresholds(next((tmp_path / "threshold_optimization").glob("*.yaml")))


def test_too_few_trials_are_refused_before_anything_runs(tmp_path, started):
    with pytest.raises(BitassayError, match=r"--trials 30"):
        optimise_thresholds(["exp1"], replace(PLAN, trials=29), alpha=0.05, out=tmp_path)
    assert started == []
