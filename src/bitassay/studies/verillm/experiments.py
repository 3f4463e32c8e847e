"""The five experiments of the VeriLLM replication (exp1 ... exp5): what share of hidden-state cells does a
verifier accept, by fixed thresholds, and what do these thresholds catch?

    study   prover -> verifier   hardware                  expected accept rate   bar
    exp1    FP16 -> FP16         the same                  > 95 %                 95 %
    exp2    FP16 -> FP16         other, both directions    90-95 %                90 %
    exp3    INT4 -> FP16         the same                  80-85 %                80 %
    exp4    INT4 -> FP16         other, both directions    70-80 %                70 %
    exp5    FP16 -> INT4         the same                  80-85 %                80 %

Source: the VeriLLM experiments (docs/sources.md; arXiv 2509.24257). What they expect stands beside what is
measured. An accept rate alone decides nothing: a bar that INT4 passes is a bar that a cheat passes. So each
experiment also gives the share of FP16, INT8 and INT4 provers that its bar refuses.

1. Provers generate, a process for each precision and machine; traces and their seconds go to files.
2. Verifiers, each a process with numerics of its own, read them and write the statistics of every cell.
3. `trials_of` and `summary` reduce those to the experiments' files, data/raw/expN/..._trialK.json and
   ..._summary.json.

A trial passes where most of its verifiers find an accept rate above the bar. Generated positions of all
sampled layers count; those of the prompt are reported beside them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bitassay.errors import BitassayError, MissingError, suggestion
from bitassay.evaluation.statistics import logit_interval, mean_of
from bitassay.record.environment import environment
from bitassay.record.files import write_json
from bitassay.record.progress import Progress, silent
from bitassay.record.result import new_run
from bitassay.studies.verillm.parties import Machine, Party
from bitassay.studies.verillm.trial import Trial, try_machine
from bitassay.studies.verillm.work import SCHEMA, Plan, Work, check_plan
from bitassay.studies.verillm.worker import Cells
from bitassay.verification.detectors import verillm
from bitassay.verification.detectors.verillm import RULE_SETS, Rules, accept_rate
from bitassay.verification.power import share


@dataclass(frozen=True)
class Experiment:
    """prover and verifier: "full" for the dense model, "quantized" for the other one. expected: the
    documents' accept rates, as a range."""

    name: str
    about: str
    prover: str
    verifier: str
    other_hardware: bool
    expected: tuple[float, float]
    bar: float


EXPERIMENTS = {
    one.name: one
    for one in (
        Experiment(
            "exp1", "full precision on both sides, same hardware", "full", "full", False, (0.95, 1.0), 0.95
        ),
        Experiment(
            "exp2", "full precision on both sides, other hardware", "full", "full", True, (0.90, 0.95), 0.90
        ),
        Experiment("exp3", "quantized prover, same hardware", "quantized", "full", False, (0.80, 0.85), 0.80),
        Experiment("exp4", "quantized prover, other hardware", "quantized", "full", True, (0.70, 0.80), 0.70),
        Experiment(
            "exp5", "quantized verifier, same hardware", "full", "quantized", False, (0.80, 0.85), 0.80
        ),
    )
}


@dataclass(frozen=True)
class Direction:
    """One experiment from one machine to another."""

    experiment: Experiment
    prover: Party
    verifiers: tuple[Party, ...]
    attackers: tuple[Party, ...]
    target: Machine

    @property
    def parties(self) -> tuple[Party, ...]:
        return (self.prover, *self.verifiers, *self.attackers)

    @property
    def machines(self) -> tuple[Machine, Machine]:
        """The prover's, and the one that the verifiers are kinds of."""
        return self.prover.machine, self.target

    @property
    def label(self) -> str:
        """As the experiments name their files: precisions are named where they differ."""
        names = {"full": "fp", "quantized": "quantized"}
        one, two = self.experiment, self.target.label
        if one.prover == one.verifier:
            return f"{self.prover.machine.label}_to_{two}"
        return f"{names[one.prover]}_{self.prover.machine.label}_to_{names[one.verifier]}_{two}"


def directions(name: str, plan: Plan) -> list[Direction]:
    """Where the experiment is run: on one machine, or on two in both directions."""
    one = EXPERIMENTS[name] if plan.bar is None else replace(EXPERIMENTS[name], bar=plan.bar)
    first, second = plan.machines
    pairs = [(first, second), (second, first)] if one.other_hardware else [(first, first)]
    return [
        Direction(
            one,
            plan.party(one.prover, source),
            tuple(plan.party(one.verifier, machine) for machine in plan.verifiers_on(target)),
            tuple(plan.party(side, source) for side in dict.fromkeys((plan.precision, *plan.attacks))),
            target,
        )
        for source, target in pairs
    ]


def check_names(names: Sequence[str]) -> None:
    """Raises BitassayError for an unknown experiment."""
    for name in names:
        if name not in EXPERIMENTS:
            raise BitassayError(f"no experiment is called {name!r}; {suggestion(name, EXPERIMENTS)}")


def run_experiments(
    names: Sequence[str],
    plan: Plan,
    *,
    out: Path = Path("data"),
    trial: Trial = try_machine,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run what of the experiments this computer can, and write trials and summaries under `out`/raw.

    Returns {"rows": ...}, a row for each direction whose cells are all there, and what is `missing` for the
    others. Interrupted, the same call goes on; more trials, verifiers or experiments keep what there is.
    Numerics that cannot be computed here are `left_out`, and with them the directions that need them. Raises
    BitassayError for bad input, MissingError where no direction is left.
    """
    plan, wanted, impossible = planned(names, plan, trial, progress)
    work = Work(plan, out, progress)
    if plan.role != "verify":
        work.prove(dict.fromkeys(p for one in wanted for p in (one.prover, *one.attackers)))
    if plan.role != "prove":
        work.verify(
            [
                (p, v)
                for one in wanted
                for p in dict.fromkeys((one.prover, *one.attackers))
                for v in one.verifiers
            ]
        )
    rows, missing = [], list(impossible)
    for one in wanted:
        provers = (one.prover, *one.attackers)
        if lacking := next(filter(None, (work.lacking(prover, one.verifiers) for prover in provers)), ""):
            missing.append({"study": one.experiment.name, "direction": one.label, "missing": lacking})
        else:
            rows.append(report(work, one))
    return new_run(
        "experiments",
        model={"name": plan.model},
        settings={"folder": str(work.folder.path)},
        environment=environment(plan.machines[0].device),
        rows=rows,
        missing=missing,
        left_out=[asdict(one) for one in plan.left_out],
    )


def planned(
    names: Sequence[str], plan: Plan, trial: Trial = try_machine, progress: Progress = silent
) -> tuple[Plan, list[Direction], list[dict[str, Any]]]:
    """The plan without numerics that cannot be computed here, the directions that can be run by it, and of
    the others what is missing. Raises as `run_experiments` does."""
    check_names(names)
    check_plan(plan)
    machines = {m for name in names for one in directions(name, plan) for m in one.machines}
    plan = plan.tried(sorted(machines, key=plan.machines.index), trial)
    for one in plan.left_out:
        progress(str(one))
    wanted = [direction for name in names for direction in directions(name, plan)]
    problems = {one.numerics: one.problem for one in plan.left_out if one.instead is None}
    impossible = [
        {
            "study": one.experiment.name,
            "direction": one.label,
            "impossible": True,
            "missing": f"{lost[0]}, which cannot run here: {problems[lost[0]]}",
        }
        for one in wanted
        if (lost := [party.machine.name for party in one.parties if party.machine.name in problems])
    ]
    lost = {(one["study"], one["direction"]) for one in impossible}
    left = [one for one in wanted if (one.experiment.name, one.label) not in lost]
    if not left:
        raise MissingError(
            f"{impossible[0]['study']} needs {impossible[0]['missing']}",
            "other --devices, such as cpu+eager, or another --precision",
        )
    return plan, left, impossible


def report(work: Work, one: Direction) -> dict[str, Any]:
    """Write the experiments' files of a direction; its row."""
    trials = trials_of(work, one, one.prover)
    tried = {party.precision: trials_of(work, one, party) for party in one.attackers}
    place = work.out / "raw" / one.experiment.name
    for index, trial in enumerate(trials, 1):
        write_json(place / f"{work.name}_{one.label}_trial{index}.json", trial)
    found = summary(one, trials, tried, work.plan)
    write_json(place / f"{work.name}_{one.label}_summary.json", found)
    return row_of(found)


def trials_of(work: Work, one: Direction, prover: Party) -> list[dict[str, Any]]:
    """For each trace of `prover`, what all verifiers found in it."""
    plan, found = work.plan, []
    for index, cells in enumerate(work.cells(prover, one.verifiers)):
        spent = work.spent(prover, index)
        verdicts = [
            judged(verifier, seen, spent.seconds, plan.rules)
            for verifier, seen in zip(one.verifiers, cells, strict=True)
        ]
        accepting = sum(verdict["accept_rate"] > one.experiment.bar for verdict in verdicts)
        found.append(
            {
                "schema": SCHEMA,
                "experiment": one.experiment.name,
                "trial": index + 1,
                "model": plan.model,
                "prover": {"precision": prover.precision, "machine": prover.machine.name},
                "prompt_tokens": plan.prompt_tokens,
                "output_tokens": spent.output_tokens,
                "generation_seconds": spent.seconds,
                "rules": rules_of(plan.rules),
                "verifiers": verdicts,
                "accept_rate": float(np.mean([verdict["accept_rate"] for verdict in verdicts])),
                "overhead_percentage": float(
                    np.mean([verdict["overhead_percentage"] for verdict in verdicts])
                ),
                "passed": 2 * accepting > len(verdicts),
            }
        )
    return found


def judged(verifier: Party, cells: Cells, generation_seconds: float, rules: Rules) -> dict[str, Any]:
    """What one verifier says of one trace: means over the generated cells, and by layer."""
    by_layer = cells.log_distances.exp().tolist()
    return {
        "machine": verifier.machine.name,
        "precision": verifier.precision,
        "numerics": cells.verifier,
        **verillm.summary(cells.generated, rules),
        "accept_rates": {
            name: accept_rate(cells.generated, one) for name, one in {**RULE_SETS, rules.name: rules}.items()
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
    one: Direction,
    trials: Sequence[Mapping[str, Any]],
    tried: Mapping[str, Sequence[Mapping[str, Any]]],
    plan: Plan,
) -> dict[str, Any]:
    """The documents' `aggregate`, with intervals, what they expected, and what the same bar does to other
    provers."""
    rates = [trial["accept_rate"] for trial in trials]
    low, high = one.experiment.expected
    distances = [[v["relative_distance"] for v in trial["verifiers"]] for trial in trials]
    aggregate = {
        "avg_accept_rate": float(np.mean(rates)),
        "accept_rate_ci": logit_interval(mean_of(rates)),
        "avg_overhead_percentage": float(np.mean([trial["overhead_percentage"] for trial in trials])),
        "pass_rate": float(np.mean([trial["passed"] for trial in trials])),
        "pass_rate_ci": list(share(sum(trial["passed"] for trial in trials), len(trials))[1:]),
        "trials": len(trials),
        "verifiers": len(one.verifiers),
        "different_verifiers": len(set(zip(*distances, strict=True))),  # others agree to the last bit, as one
        "avg_relative_distance": float(
            np.mean([verdict["relative_distance"] for trial in trials for verdict in trial["verifiers"]])
        ),
    }
    return {
        "schema": SCHEMA,
        "experiment": one.experiment.name,
        "about": one.experiment.about,
        "model": plan.model,
        "prover": {"precision": one.prover.precision, "machine": one.prover.machine.name},
        "verifier": {"precision": one.verifiers[0].precision, "machine": one.verifiers[0].machine.name},
        "hardware": hardware(one),
        "tokens": plan.tokens,
        "rules": rules_of(plan.rules),
        "bar": one.experiment.bar,
        "summary": {
            "avg_accept_rate": aggregate["avg_accept_rate"],
            "expected_accept_rate": [low, high],
            "as_expected": low <= aggregate["avg_accept_rate"] <= high,
            "passed": 2 * sum(trial["passed"] for trial in trials) > len(trials),
        },
        "aggregate": aggregate,
        "detection": {
            precision: {
                "refused": sum(not trial["passed"] for trial in found),
                "n": len(found),
                "refused_ci": list(share(sum(not trial["passed"] for trial in found), len(found))[1:]),
                "avg_accept_rate": float(np.mean([trial["accept_rate"] for trial in found])),
                "relative_distances": [
                    verdict["relative_distance"] for trial in found for verdict in trial["verifiers"]
                ],
            }
            for precision, found in tried.items()
        },
        "environment": environment(plan.machines[0].device),
    }


def hardware(one: Direction) -> str:
    """What stands for the other hardware, said plainly."""
    source, target = one.prover.machine, one.verifiers[0].machine
    if not one.experiment.other_hardware:
        return "the same machine; the verifiers differ in numerics"
    if source.device == target.device:
        return "one machine: other vector instructions or numerics stand in for other hardware"
    return "other hardware"


def rules_of(rules: Rules) -> dict[str, Any]:
    return {
        "name": rules.name,
        "Pe": rules.max_Pe,
        "Pm": rules.min_Pm,
        "Pw": rules.min_Pw,
        "mean_epsilon": rules.max_mean,
        "e_m": rules.e_m,
        "e_w": rules.e_w,
    }


def row_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """A summary as one row of a table."""
    return {
        "study": found["experiment"],
        "prover": f"{found['prover']['precision']} on {found['prover']['machine']}",
        "verifier": f"{found['verifier']['precision']} on {found['verifier']['machine']}",
        "expected": found["summary"]["expected_accept_rate"],
        **found["aggregate"],
        "as_expected": found["summary"]["as_expected"],
        "bar": found["bar"],
        "refused": {name: f"{one['refused']}/{one['n']}" for name, one in found["detection"].items()},
        "detection": found["detection"],
        "hardware": found["hardware"],
        "rules": found["rules"]["name"],
    }
