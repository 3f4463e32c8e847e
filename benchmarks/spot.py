"""What a spot check of a few segments of layers finds, from the runs of a finished `bitassay attack`.

RUN is the folder of such a run: its parts hold the series of all detectors, so nothing is computed anew. Each
run is judged as in the study, cross-fitted over requests and at the run's alpha, by the honest scores of full
checks: once in full, and once for every choice of 1, 2, ... segments with the tokens by the host's last
states (`verification/spot.py`). Printed are the runs that a full check refuses, and the mean over choices of
those that a spot check refuses: what a verifier finds who draws the segments.

Run: python benchmarks/spot.py RUN [--tokens 32]
"""

import argparse
import json
from itertools import combinations
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from bitassay.evaluation.statistics import clopper_pearson_interval
from bitassay.studies.attacks.evaluation import FOLDS, CrossFit
from bitassay.studies.attacks.study import VARIANTS
from bitassay.verification.attacks.registry import ATTACKS
from bitassay.verification.detectors.registry import DECIDING, HEAD, SEGMENTS
from bitassay.verification.observe import Observation
from bitassay.verification.scores import score, statistics

RUNS = TypeAdapter(list[Observation])
FULL = "full"


def read(folder: Path, name: str) -> list[Observation]:
    return RUNS.validate_python(json.loads((folder / "parts" / f"{name}.json").read_text()))


def refused(pool: CrossFit, runs: list[Observation], n: int, alone: tuple[int, ...] | None) -> np.ndarray:
    """Which runs are refused after n tokens: by all that decides, or by some segments and the head."""
    if alone is None:
        return pool.decide(FULL, n, runs)[1]
    found = []
    for request, run in enumerate(runs):
        fits, limit = pool._folds(FULL, n)[request % FOLDS]
        computed = statistics(run, (SEGMENTS, HEAD), n, n) or []
        seen = [each for each in computed if each.detector == HEAD or each.series in alone]
        found.append(bool(run.defects) or score(seen, fits, n) > limit)
    return np.array(found)


def main(folder: Path, tokens: int) -> list[dict]:
    variants = [name for name in VARIANTS if (folder / "parts" / f"honest-{name}.json").exists()]
    honest = {name: read(folder, f"honest-{name}") for name in variants if not VARIANTS[name].sampled}
    pool = CrossFit(
        honest, json.loads((folder / "plan.json").read_text())["alpha"], {FULL: ("structure", *DECIDING)}
    )
    kinds = {"honest": [run for runs in honest.values() for run in runs]}
    for name in ATTACKS:
        if (folder / "parts" / f"attack-{name}.json").exists() and not ATTACKS[name].sampled:
            kinds[name] = read(folder, f"attack-{name}")
    layers = next(run.layers for run in kinds["honest"] if run.layers)
    rows = []
    for name, runs in kinds.items():
        parts = list(honest.values()) if name == "honest" else [runs]
        row = {
            "runs": name,
            "n": len(runs),
            "full": int(sum(refused(pool, part, tokens, None).sum() for part in parts)),
        }
        for count in range(1, len(layers) + 1):
            choices = list(combinations(range(len(layers)), count))
            by_choice = [
                sum(refused(pool, part, tokens, choice).sum() for part in parts) for choice in choices
            ]
            row[f"of {count}"] = float(np.mean(by_choice))
            row[f"of {count}, by choice"] = [int(each) for each in by_choice]
        rows.append(row)
        shown = ", ".join(f"{count}: {row[f'of {count}']:.1f}" for count in range(1, len(layers) + 1))
        print(f"| {name} | {row['full']} | {shown} | {row['of 1, by choice']} |", flush=True)
    low, high = clopper_pearson_interval(max(rows[0]["of 1, by choice"]), rows[0]["n"])
    print(f"honest, worst single segment: {100 * low:.1f} to {100 * high:.1f} %")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    main(arguments.run, arguments.tokens)
