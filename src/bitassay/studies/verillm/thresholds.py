"""Thresholds for the VeriLLM rules, fitted on honest runs alone and scored on attacks.

The VeriLLM experiments tune thresholds on all runs, the quantized ones included, so that these pass. Here
every number comes from honest trials (the dense model on both ends, or the study's verifier with the dense
prover), and what the same numbers do to attacks is reported too.

    Pe_max, mean_error_max   the 95th percentile over honest cells of Pe and |mean_epsilon|
    Pm_min, Pw_min           the 5th percentile over honest cells
    accept_rate_min          a trial passes above it; just below the floor(alpha (n + 1))-th smallest of the
                             honest trials' accept rates under these rules (conformal)

The cells' thresholds are fitted on one third of the honest trials, accept_rate_min on the others, so that one
more honest trial is refused with a probability of at most alpha. The rate of false accusations is measured by
leaving out each honest trial in turn and fitting all again. The same is done with the relative distance
alone, for comparison.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bitassay.errors import BitassayError, suggestion
from bitassay.record.environment import environment
from bitassay.record.files import read_yaml, write_json, write_text
from bitassay.record.progress import Progress, silent
from bitassay.record.result import new_run
from bitassay.studies.machines import Probe, probe_machine
from bitassay.studies.verillm.experiments import Direction, check_names, planned, rules_of
from bitassay.studies.verillm.verifier import TraceStatistics
from bitassay.studies.verillm.work import ExperimentPlan, Work, check_plan
from bitassay.verification.detectors import verillm
from bitassay.verification.detectors.verillm import DOCUMENTS, RULE_SETS, Rules
from bitassay.verification.power import share
from bitassay.verification.scores import runs_needed, threshold

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
FIT_SHARE = 3  # one in so many honest trials fits the cells' thresholds
BINS = 40
Trial = Sequence[TraceStatistics]  # what each verifier measured on one trace


def optimise_thresholds(
    names: Sequence[str],
    plan: ExperimentPlan,
    *,
    alpha: float = 0.05,
    percentile: float = 95,
    out: Path = Path("data"),
    probe: Probe = probe_machine,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Return a run with a row a direction: recommended thresholds, false-positive and detection rates.

    Writes `out`/threshold_optimization/..._thresholds.yaml, which `bitassay study run --rules` reads, and all
    distributions as JSON beside it. Raises BitassayError where the trials are too few for alpha, MissingError
    where no direction can run here.
    """
    check_names(names)
    check_plan(plan)
    if plan.trials < (needed := trials_needed(alpha)):
        raise BitassayError(
            f"{plan.trials} trials are too few for a false-positive rate of {alpha:g}, which needs {needed}",
            f"--trials {needed}, or a larger --alpha",
        )
    plan, wanted, impossible = planned(names, plan, probe, progress)
    work = Work(plan, out, progress)
    work.do(
        (party, verifier)
        for direction in wanted
        for party in direction.attackers
        for verifier in direction.verifiers
    )
    rows = []
    for direction in wanted:
        attacks = {
            party.precision: list(work.statistics(party, direction.verifiers))
            for party in direction.attackers
        }
        result = optimised(direction, attacks.pop(plan.precision), attacks, alpha, percentile)
        stem = out / "threshold_optimization" / f"{direction.experiment.name}_{work.name}_{direction.label}"
        result = {"model": plan.model, **result}
        write_json(stem.with_name(f"{stem.name}_analysis.json"), result)
        file = stem.with_name(f"{stem.name}_thresholds.yaml")
        write_text(file, as_yaml(result))
        rows.append({**result, "file": str(file)})
    return new_run(
        "thresholds",
        model={"name": plan.model},
        settings={"tokens": plan.tokens, "trials": plan.trials, "alpha": alpha, "percentile": percentile},
        environment=environment(plan.machines[0].device),
        rows=rows,
        missing=impossible,
        left_out=[asdict(omission) for omission in plan.left_out],
    )


def trials_needed(alpha: float) -> int:
    """Return the number of honest trials of which all but one, those that fit thresholds left out, give a
    p-value of `alpha`."""
    others = runs_needed(alpha)
    while others - math.ceil(others / FIT_SHARE) < runs_needed(alpha):
        others += 1
    return others + 1


def optimised(
    direction: Direction,
    honest: Sequence[Trial],
    attacked: Mapping[str, Sequence[Trial]],
    alpha: float,
    percentile: float,
) -> dict[str, Any]:
    """Return everything about one direction, from its cells."""
    rules, accept_rate_min = recommend(honest, alpha, percentile)
    without = [[*honest[:index], *honest[index + 1 :]] for index in range(len(honest))]
    left_out = [recommend(others, alpha, percentile) for others in without]
    refused = [
        accept_rate(trial, fitted[0]) <= fitted[1] for trial, fitted in zip(honest, left_out, strict=True)
    ]
    distance_max = threshold(distances(honest), alpha)
    too_far = [
        distances([trial])[0] > threshold(distances(others), alpha)
        for trial, others in zip(honest, without, strict=True)
    ]
    everything = {direction.attackers[0].precision: honest, **attacked}
    return {
        "study": direction.experiment.name,
        "direction": direction.label,
        "verifier": direction.verifiers[0].name,
        "fitted_on": f"{len(honest)} honest trials of {direction.attackers[0].name}",
        "thresholds": {**rules_of(rules), "accept_rate_min": accept_rate_min},
        "alpha": alpha,
        "false_positive_rate": float(np.mean(refused)),
        "false_positive_ci": list(share(sum(refused), len(refused))[1:]),
        "distance_max": math.exp(distance_max),
        "distance_false_positive_rate": float(np.mean(too_far)),
        "attacks": {
            name: {
                "n": len(trials),
                "caught": (
                    detected := share(
                        sum(accept_rate(t, rules) <= accept_rate_min for t in trials), len(trials)
                    )
                ).value,
                "caught_ci": list(detected[1:]),
                "caught_by_documents": float(
                    np.mean(
                        [accept_rate(t, DOCUMENTS) <= direction.experiment.accept_rate_min for t in trials]
                    )
                ),
                "caught_by_distance": float(np.mean(distances(trials) > distance_max)),
            }
            for name, trials in attacked.items()
        },
        "distributions": {
            name: {
                **{statistic: described(values) for statistic, values in cell_values(trials).items()},
                "accept_rate": described(np.array([accept_rate(t, rules) for t in trials])),
                "accept_rate_documents": described(np.array([accept_rate(t, DOCUMENTS) for t in trials])),
            }
            for name, trials in everything.items()
        },
    }


def recommend(honest: Sequence[Trial], alpha: float, percentile: float) -> tuple[Rules, float]:
    """Return rules by every third honest trial, and by the others the accept rate above which a trial passes;
    minus infinite where these are too few for alpha."""
    fit, counted = honest[::FIT_SHARE], [trial for i, trial in enumerate(honest) if i % FIT_SHARE]
    values = cell_values(fit)
    rules = replace(
        DOCUMENTS,
        name="optimised",
        max_Pe=_above(np.percentile(values["Pe"], percentile)),
        min_Pm=_below(np.percentile(values["Pm"], 100 - percentile)) if len(values["Pm"]) else 0.0,
        min_Pw=_below(np.percentile(values["Pw"], 100 - percentile)),
        max_mean=_above(np.percentile(values["mean_error"], percentile)),
    )
    rates = np.array([accept_rate(trial, rules) for trial in counted], np.float64)
    return rules, _below(-threshold(-rates, alpha))


def _above(value: float) -> float:
    """The rules compare strictly: a threshold must lie above the value that it is to let pass."""
    return float(np.nextafter(value, np.inf))


def _below(value: float) -> float:
    return float(np.nextafter(value, -np.inf))


def cell_values(trials: Sequence[Trial]) -> dict[str, np.ndarray]:
    """Return each statistic over all generated cells without those that are not defined (Pm where no exponent
    differs)."""
    names = {"Pe": "Pe", "Pm": "Pm", "Pw": "Pw", "mean_error": "mean_epsilon"}
    by_statistic = {
        name: np.concatenate([getattr(c.generated, field).numpy().ravel() for trial in trials for c in trial])
        for name, field in names.items()
    }
    by_statistic["mean_error"] = np.abs(by_statistic["mean_error"])
    return {name: values[~np.isnan(values)] for name, values in by_statistic.items()}


def accept_rate(trial: Trial, rules: Rules) -> float:
    """Return the mean over verifiers of the share of generated cells that hold to `rules`."""
    return float(np.mean([verillm.accept_rate(cells.generated, rules) for cells in trial]))


def distances(trials: Sequence[Trial]) -> np.ndarray:
    """Return for each trial the mean log relative distance over verifiers, layers and generated cells."""
    return np.array([np.mean([float(c.log_distances.mean()) for c in trial]) for trial in trials], np.float64)


def described(values: np.ndarray) -> dict[str, Any]:
    """Return mean, standard deviation, percentiles and a histogram."""
    if not len(values):
        return {"n": 0}
    counts, edges = np.histogram(values, bins=BINS)
    return {
        "n": len(values),
        "mean": float(values.mean()),
        "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
        "percentiles": {str(p): float(np.percentile(values, p)) for p in PERCENTILES},
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
    }


def as_yaml(result: Mapping[str, Any]) -> str:
    """Return YAML as the experiments' configuration has it; `read_thresholds` reads it."""
    thresholds = dict(result["thresholds"])
    thresholds.pop("name")
    text = yaml.safe_dump(
        {
            "experiment": {
                "thresholds": {
                    name: thresholds[name] for name in ("Pe", "Pm", "Pw", "mean_epsilon", "e_m", "e_w")
                },
                "accept_rate_min": thresholds["accept_rate_min"],
            }
        },
        sort_keys=False,
    )
    return (
        f"# {result['study']}, {result['model']}, {result['direction']}: fitted on {result['fitted_on']},\n"
        f"# for a false-positive rate of {result['alpha']:g}; bitassay study run --rules takes this file.\n"
    ) + text


def read_thresholds(path: Path) -> tuple[Rules, float]:
    """Read the rules and the smallest accept rate from a file of thresholds. Raises BitassayError that names
    the file and the field."""
    content = read_yaml(path)
    try:
        experiment = content["experiment"]
        numbers = {name: float(value) for name, value in experiment["thresholds"].items()}
        rules = Rules(
            path.stem,
            numbers.pop("Pe"),
            numbers.pop("Pm"),
            numbers.pop("Pw"),
            numbers.pop("mean_epsilon"),
            **numbers,
        )
        accept_rate_min = float(experiment["accept_rate_min"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BitassayError(
            f"{path}: not a file of thresholds ({error})",
            "experiment: {thresholds: {Pe, Pm, Pw, mean_epsilon}, accept_rate_min}",
        ) from error
    if not all(
        map(math.isfinite, (*numbers.values(), rules.max_Pe, rules.min_Pm, rules.min_Pw, accept_rate_min))
    ):
        raise BitassayError(f"{path}: a threshold is not finite")
    return rules, accept_rate_min


def find_rules(name: str) -> dict[str, Any]:
    """Return the fields `rules` and `accept_rate_min` of a plan, from a named rule set or a YAML file.

    Raises BitassayError that names the nearest rule set.
    """
    if name in RULE_SETS:
        return {"rules": RULE_SETS[name]}
    if Path(name).suffix not in (".yaml", ".yml"):
        raise BitassayError(
            f"no rules are called {name!r}; {suggestion(name, RULE_SETS)}",
            "or give a .yaml file that `bitassay calibrate MODEL --study exp1` wrote",
        )
    return dict(zip(("rules", "accept_rate_min"), read_thresholds(Path(name)), strict=True))
