"""The five experiments of the VeriLLM replication (exp1 ... exp5): what share of hidden-state cells does a
verifier accept, by fixed thresholds, and what do these thresholds catch?

    study   prover -> verifier   hardware                  expected accept rate   threshold of the accept rate
    exp1    FP16 -> FP16         the same                  > 95 %                 95 %
    exp2    FP16 -> FP16         other, both directions    90-95 %                90 %
    exp3    INT4 -> FP16         the same                  80-85 %                80 %
    exp4    INT4 -> FP16         other, both directions    70-80 %                70 %
    exp5    FP16 -> INT4         the same                  80-85 %                80 %

Source: the VeriLLM experiments (docs/sources.md; arXiv 2509.24257). What they expect is compared with what is
measured. An accept rate alone decides nothing: a threshold that INT4 passes is one that a cheat passes. So
each experiment also gives the share of FP16, INT8 and INT4 provers that its threshold refuses.

`Work` makes traces and the statistics of their cells; `trials_of` and `summary` reduce those to the
files of the VeriLLM experiments, data/raw/expN/..._trialK.json and ..._summary.json. A trial passes where
most of its verifiers find an accept rate above the threshold. Generated positions of all sampled layers
count; those of the prompt are reported too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bitassay.errors import MissingError, find
from bitassay.evaluation.statistics import logit_interval, mean_of
from bitassay.record.environment import environment
from bitassay.record.files import write_json
from bitassay.record.progress import Progress, silent
from bitassay.record.result import new_run
from bitassay.studies.machines import Machine, Probe, probe_machine
from bitassay.studies.parties import Party
from bitassay.studies.verillm.verifier import TraceStatistics
from bitassay.studies.verillm.work import SCHEMA, ExperimentPlan, Work, check_plan
from bitassay.verification.detectors import verillm
from bitassay.verification.detectors.verillm import RULE_SETS, Rules, accept_rate
from bitassay.verification.power import share

FULL, QUANTIZED = "full", "quantized"  # sides
OTHER_DEVICES = "other --devices, such as cpu+eager, or another --precision"


@dataclass(frozen=True)
class Experiment:
    """One experiment of the VeriLLM documents. prover and verifier: sides. expected: the range of accept
    rates. accept_rate_min: a verifier accepts above it."""

    name: str
    about: str
    prover: str
    verifier: str
    other_hardware: bool
    expected: tuple[float, float]
    accept_rate_min: float


_ROWS = (
    ("exp1", "full precision on both sides, same hardware", FULL, FULL, False, (0.95, 1.0), 0.95),
    ("exp2", "full precision on both sides, other hardware", FULL, FULL, True, (0.90, 0.95), 0.90),
    ("exp3", "quantized prover, same hardware", QUANTIZED, FULL, False, (0.80, 0.85), 0.80),
    ("exp4", "quantized prover, other hardware", QUANTIZED, FULL, True, (0.70, 0.80), 0.70),
    ("exp5", "quantized verifier, same hardware", FULL, QUANTIZED, False, (0.80, 0.85), 0.80),
)
EXPERIMENTS = {row[0]: Experiment(*row) for row in _ROWS}


@dataclass(frozen=True)
class Direction:
    """One experiment from one machine to another. attackers: further provers. target: the machine that the
    verifiers are kinds of."""

    experiment: Experiment
    prover: Party
    verifiers: tuple[Party, ...]
    attackers: tuple[Party, ...]
    target: Machine

    @property
    def provers(self) -> tuple[Party, ...]:
        return tuple(dict.fromkeys((self.prover, *self.attackers)))

    @property
    def label(self) -> str:
        """As the experiments name their files: precisions are named where they differ."""
        names = {FULL: "fp", QUANTIZED: "quantized"}
        source, target = self.prover.machine.label, self.target.label
        if self.experiment.prover == self.experiment.verifier:
            return f"{source}_to_{target}"
        return f"{names[self.experiment.prover]}_{source}_to_{names[self.experiment.verifier]}_{target}"

    @property
    def hardware(self) -> str:
        """What stands for the other hardware, said plainly."""
        if not self.experiment.other_hardware:
            return "the same machine; the verifiers differ in numerics"
        if self.prover.machine.device == self.target.device:
            return "one machine: other vector instructions or numerics stand in for other hardware"
        return "other hardware"


def directions(name: str, plan: ExperimentPlan) -> list[Direction]:
    """Return where the experiment is run: on one machine, or on two in both directions."""
    experiment = EXPERIMENTS[name]
    if plan.accept_rate_min is not None:
        experiment = replace(experiment, accept_rate_min=plan.accept_rate_min)
    first, second = plan.machines
    pairs = [(first, second), (second, first)] if experiment.other_hardware else [(first, first)]
    return [
        Direction(
            experiment,
            plan.party(experiment.prover, source),
            tuple(plan.party(experiment.verifier, machine) for machine in plan.verifiers_on(target)),
            tuple(plan.party(side, source) for side in dict.fromkeys((plan.precision, *plan.attacks))),
            target,
        )
        for source, target in pairs
    ]


def check_names(names: Sequence[str]) -> None:
    """Raise BitassayError for an unknown experiment."""
    for name in names:
        find(EXPERIMENTS, name, "experiment")


def run_experiments(
    names: Sequence[str],
    plan: ExperimentPlan,
    *,
    out: Path = Path("data"),
    probe: Probe = probe_machine,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run what of the experiments this computer can, and write trials and summaries under `out`/raw.

    Returns {"rows": ...}, a row for each direction that is complete, and what is `missing` for the others.
    Interrupted, the same call goes on; more trials, verifiers or experiments keep what there is. Numerics
    that cannot be computed here are `left_out`, and with them the directions that need them. Raises
    BitassayError for bad input, MissingError where no direction is left.
    """
    plan, wanted, impossible = planned(names, plan, probe, progress)
    work = Work(plan, out, progress)
    work.do(
        (prover, verifier)
        for direction in wanted
        for prover in direction.provers
        for verifier in direction.verifiers
    )
    rows, missing = [], list(impossible)
    for direction in wanted:
        if problem := next(
            filter(None, (work.lacking(prover, direction.verifiers) for prover in direction.provers)), ""
        ):
            missing.append(
                {"study": direction.experiment.name, "direction": direction.label, "missing": problem}
            )
        else:
            rows.append(report(work, direction))
    return new_run(
        "experiments",
        model={"name": plan.model},
        settings={"folder": str(work.folder.path)},
        environment=environment(plan.machines[0].device),
        rows=rows,
        missing=missing,
        left_out=[asdict(omission) for omission in plan.left_out],
    )


def planned(
    names: Sequence[str], plan: ExperimentPlan, probe: Probe = probe_machine, progress: Progress = silent
) -> tuple[ExperimentPlan, list[Direction], list[dict[str, Any]]]:
    """Return the plan without numerics that cannot be computed here, the directions that it can run, and what
    is missing for the others. Raises as `run_experiments` does."""
    check_names(names)
    check_plan(plan)
    ways = [direction for name in names for direction in directions(name, plan)]
    machines = {machine for direction in ways for machine in (direction.prover.machine, direction.target)}
    plan = plan.probed(sorted(machines, key=plan.machines.index), probe)
    for omission in plan.left_out:
        progress(str(omission))
    problems = {omission.numerics: omission.problem for omission in plan.left_out if omission.instead is None}
    possible, impossible = list[Direction](), list[dict[str, Any]]()
    for direction in [direction for name in names for direction in directions(name, plan)]:
        numerics = [party.machine.name for party in (*direction.provers, *direction.verifiers)]
        if unavailable := next((name for name in numerics if name in problems), None):
            missing = f"{unavailable}, which cannot run here: {problems[unavailable]}"
            row = {"study": direction.experiment.name, "direction": direction.label, "impossible": True}
            impossible.append(row | {"missing": missing})
        else:
            possible.append(direction)
    if not possible:
        raise MissingError(f"{impossible[0]['study']} needs {impossible[0]['missing']}", OTHER_DEVICES)
    return plan, possible, impossible


def report(work: Work, direction: Direction) -> dict[str, Any]:
    """Write the experiments' files of a direction; return its row."""
    trials = {prover: trials_of(work, direction, prover) for prover in direction.provers}
    stem = work.out / "raw" / direction.experiment.name / f"{work.name}_{direction.label}"
    for index, trial in enumerate(trials[direction.prover], 1):
        write_json(stem.with_name(f"{stem.name}_trial{index}.json"), trial)
    attacks = {party.precision: trials[party] for party in direction.attackers}
    content = summary(direction, trials[direction.prover], attacks, work.plan)
    write_json(stem.with_name(f"{stem.name}_summary.json"), content)
    return row_of(content)


def trials_of(work: Work, direction: Direction, prover: Party) -> list[dict[str, Any]]:
    """Return for each trace of `prover` what all verifiers found in it."""
    plan, trials = work.plan, []
    for index, statistics in enumerate(work.statistics(prover, direction.verifiers)):
        timing = work.timing(prover, index)
        verdicts = [
            judged(verifier, of_trace, timing.seconds, plan.rules)
            for verifier, of_trace in zip(direction.verifiers, statistics, strict=True)
        ]
        accepting = sum(verdict["accept_rate"] > direction.experiment.accept_rate_min for verdict in verdicts)
        trials.append(
            {
                "schema": SCHEMA,
                "experiment": direction.experiment.name,
                "trial": index + 1,
                "model": plan.model,
                "prover": {"precision": prover.precision, "machine": prover.machine.name},
                "prompt_tokens": plan.prompt_tokens,
                "output_tokens": timing.output_tokens,
                "generation_seconds": timing.seconds,
                "rules": rules_of(plan.rules),
                "verifiers": verdicts,
                "accept_rate": _mean(verdict["accept_rate"] for verdict in verdicts),
                "overhead_percentage": _mean(verdict["overhead_percentage"] for verdict in verdicts),
                "passed": 2 * accepting > len(verdicts),
            }
        )
    return trials


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def judged(
    verifier: Party, cells: TraceStatistics, generation_seconds: float, rules: Rules
) -> dict[str, Any]:
    """Return what one verifier says of one trace: means over the generated cells, and by layer."""
    by_layer = cells.log_distances.exp().tolist()
    return {
        "machine": verifier.machine.name,
        "precision": verifier.precision,
        "numerics": cells.verifier,
        **verillm.summary(cells.generated, rules),
        "accept_rates": {
            name: accept_rate(cells.generated, rule_set)
            for name, rule_set in {**RULE_SETS, rules.name: rules}.items()
        },
        "prompt_accept_rate": accept_rate(cells.prompt, rules),
        "relative_distance": by_layer[-1],
        "mean_margin": float(cells.margins.mean()),
        "verification_seconds": cells.seconds,
        "overhead_percentage": 100 * cells.seconds / generation_seconds,
        "layers": [
            {
                "layer": layer,
                **verillm.summary(cells.generated[index], rules),
                "relative_distance": by_layer[index],
            }
            for index, layer in enumerate(cells.layers)
        ],
    }


def summary(
    direction: Direction,
    trials: Sequence[Mapping[str, Any]],
    attacks: Mapping[str, Sequence[Mapping[str, Any]]],
    plan: ExperimentPlan,
) -> dict[str, Any]:
    """Return the `aggregate`, with intervals, what they expected, and what the same threshold does
    to other provers. attacks: their trials, by precision."""
    low, high = direction.experiment.expected
    rates = [trial["accept_rate"] for trial in trials]
    passed = sum(trial["passed"] for trial in trials)
    distances = _distances(trials)
    verifiers = np.reshape(distances, (len(trials), -1)).T  # equal columns agree to the last bit
    aggregate = {
        "avg_accept_rate": _mean(rates),
        "accept_rate_ci": logit_interval(mean_of(rates)),
        "avg_overhead_percentage": _mean(trial["overhead_percentage"] for trial in trials),
        "pass_rate": passed / len(trials),
        "pass_rate_ci": list(share(passed, len(trials))[1:]),
        "trials": len(trials),
        "verifiers": len(direction.verifiers),
        "different_verifiers": len(np.unique(verifiers, axis=0)),
        "avg_relative_distance": _mean(distances),
    }
    prover, verifier = direction.prover, direction.verifiers[0]
    return {
        "schema": SCHEMA,
        "experiment": direction.experiment.name,
        "about": direction.experiment.about,
        "model": plan.model,
        "prover": {"precision": prover.precision, "machine": prover.machine.name},
        "verifier": {"precision": verifier.precision, "machine": verifier.machine.name},
        "hardware": direction.hardware,
        "tokens": plan.tokens,
        "rules": rules_of(plan.rules),
        "bar": direction.experiment.accept_rate_min,
        "summary": {
            "avg_accept_rate": aggregate["avg_accept_rate"],
            "expected_accept_rate": [low, high],
            "as_expected": low <= aggregate["avg_accept_rate"] <= high,
            "passed": 2 * passed > len(trials),
        },
        "aggregate": aggregate,
        "detection": {precision: _detection(tried) for precision, tried in attacks.items()},
        "environment": environment(plan.machines[0].device),
    }


def _detection(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    refused = sum(not trial["passed"] for trial in trials)
    return {
        "refused": refused,
        "n": len(trials),
        "refused_ci": list(share(refused, len(trials))[1:]),
        "avg_accept_rate": _mean(trial["accept_rate"] for trial in trials),
        "relative_distances": _distances(trials),
    }


def _distances(trials: Sequence[Mapping[str, Any]]) -> list[float]:
    return [verdict["relative_distance"] for trial in trials for verdict in trial["verifiers"]]


def rules_of(rules: Rules) -> dict[str, Any]:
    """Return rules under the experiments' names."""
    return {
        "name": rules.name,
        "Pe": rules.max_Pe,
        "Pm": rules.min_Pm,
        "Pw": rules.min_Pw,
        "mean_epsilon": rules.max_mean,
        "e_m": rules.e_m,
        "e_w": rules.e_w,
    }


def row_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a summary as one row of a table."""
    return {
        "study": content["experiment"],
        "prover": f"{content['prover']['precision']} on {content['prover']['machine']}",
        "verifier": f"{content['verifier']['precision']} on {content['verifier']['machine']}",
        "expected": content["summary"]["expected_accept_rate"],
        **content["aggregate"],
        "as_expected": content["summary"]["as_expected"],
        "bar": content["bar"],
        "refused": {name: f"{tried['refused']}/{tried['n']}" for name, tried in content["detection"].items()},
        "detection": content["detection"],
        "hardware": content["hardware"],
        "rules": content["rules"]["name"],
    }
