"""Which precisions can be told apart? Every precision as prover against every precision as verifier.

A verifier at precision V takes provers at V for honest and all others for cheats. The statistic of a trace
is the mean log relative distance over its generated cells; a prover is refused above the conformal threshold
of the honest traces (`power.py`), so at most a share alpha of honest traces is. The matrix gives the
share of each other precision that is refused. All run on one machine with the same numerics: what is measured
is precision alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bitassay.errors import BitassayError, MissingError
from bitassay.record.environment import environment
from bitassay.record.files import write_json
from bitassay.record.progress import Progress, silent
from bitassay.record.result import new_run
from bitassay.studies.machines import Probe, probe_machine
from bitassay.studies.parties import DTYPES
from bitassay.studies.verillm.experiments import OTHER_DEVICES
from bitassay.studies.verillm.work import ExperimentPlan, Work, check_plan
from bitassay.verification.power import auc, tpr_at_fpr
from bitassay.verification.scores import runs_needed

BATCH = 25  # prompts that a prover answers at a time: nothing is timed
PRECISIONS = ("fp32", "fp16", "bf16", "w8", "fp8", "w4", "w3", "w2")


def run_separability(
    plan: ExperimentPlan,
    *,
    precisions: Sequence[str] = PRECISIONS,
    alpha: float = 0.01,
    out: Path = Path("data"),
    probe: Probe = probe_machine,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Return a run with a row for each (prover, verifier); written to `out`/raw/separability too.

    Raises BitassayError where the trials are too few for alpha, or for an unknown precision.
    """
    check_plan(plan, precisions)
    if plan.trials < runs_needed(alpha):
        raise BitassayError(
            f"{plan.trials} trials are too few for a false-positive rate of {alpha:g}, "
            f"which needs {runs_needed(alpha)}",
            f"--trials {runs_needed(alpha)}, or a larger --alpha",
        )
    machine = plan.machines[0]
    if plan.is_here(machine) and (problem := probe(machine, DTYPES[plan.precision])):
        raise MissingError(f"{machine.name} cannot run here: {problem}", OTHER_DEVICES)
    work = Work(replace(plan, batch=BATCH), out, progress)
    parties = [plan.party(precision, machine) for precision in precisions]
    work.do((prover, verifier) for verifier in parties for prover in parties)
    rows, missing = [], []
    for verifier in parties:
        if problem := next(filter(None, (work.lacking(prover, [verifier]) for prover in parties)), ""):
            missing.append({"study": "separability", "verifier": verifier.name, "missing": problem})
            continue
        scores = {
            prover.precision: np.array(
                [float(cells.log_distances.mean()) for [cells] in work.statistics(prover, [verifier])],
                np.float64,
            )
            for prover in parties
        }
        honest = scores[verifier.precision]
        for prover, log_distances in scores.items():
            same = prover == verifier.precision
            refused, ranked = tpr_at_fpr(honest, log_distances, alpha), auc(honest, log_distances)
            rows.append(
                {
                    "prover": prover,
                    "verifier": verifier.precision,
                    "honest": same,
                    "tpr_at_fpr": None if same else refused.value,
                    "tpr_ci": None if same else [refused.low, refused.high],
                    "auc": None if same else ranked.value,
                    "auc_ci": None if same else [ranked.low, ranked.high],
                    "relative_distance": float(np.exp(log_distances.mean())),
                    "range": [float(np.exp(log_distances.min())), float(np.exp(log_distances.max()))],
                    "n": len(log_distances),
                }
            )
    run = new_run(
        "separability",
        model={"name": plan.model},
        settings={
            "machine": machine.name,
            "tokens": plan.tokens,
            "prompt_tokens": plan.prompt_tokens,
            "trials": plan.trials,
            "alpha": alpha,
        },
        environment=environment(machine.device),
        rows=rows,
        missing=missing,
    )
    if rows:
        write_json(out / "raw" / "separability" / f"{work.name}_{machine.label}_summary.json", run)
    return run
