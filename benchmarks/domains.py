"""Honest runs of texts that calibration has not seen: how many does a profile refuse?

The profile is calibrated on the bundled prompts. Runs answer the prompts of `benchmarks/domains/` (languages
with other scripts, code, long documents, arithmetic, one-word answers), honestly, under several numerics, and
the one profile judges all of them: numerics that it was not calibrated for are a harder case than a user's,
who has a profile for each. Dishonest runs of the same prompts show what power is left in each domain.

Printed is a table of domain and numerics: refused, inconclusive, runs; with Clopper-Pearson intervals over
runs, which take those of one prompt as independent. Each cell is kept in RESULTS as it is finished, and the
same command goes on where it was interrupted. Run:

    python benchmarks/domains.py [MODEL] [--requests 100] [--tokens 64] [--calibration 640] [--numerics ...]
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import TypeAdapter

import bitassay
from bitassay.data.corpora import calibration_prompts, prompts_from
from bitassay.engines.sampling import GREEDY
from bitassay.evaluation.statistics import clopper_pearson_interval
from bitassay.record.files import write_json
from bitassay.studies.attacks.study import VARIANTS, AttackPlan, RequestSet
from bitassay.verification.attacks.attack import Setting
from bitassay.verification.attacks.registry import ATTACKS
from bitassay.verification.calibrate import calibrate, fitting
from bitassay.verification.detectors.excess_distance import ROUNDING
from bitassay.verification.observe import Observation, observe
from bitassay.verification.profile import UNLIKE, Profile, read_profile, write_profile
from bitassay.verification.structure import Request
from bitassay.verification.verdict import FAR

DOMAINS = Path(__file__).parent / "domains"
RESULTS = Path(__file__).parent / "results" / "domains"
OBSERVATIONS = TypeAdapter(list[Observation])
CHUNK = 64


def outcomes(profile: Profile, runs: list[Observation], alpha: float) -> dict[str, int]:
    """How many runs the profile refuses, and of how many it cannot tell, as `verify` decides."""
    low, high = profile.generated_positions
    counts = {"refused": 0, "inconclusive": 0, "n": len(runs)}
    for run in runs:
        if run.positions < low or run.tokens - 1 > high:
            counts["inconclusive"] += 1
            continue
        score = profile.score(run).value
        if profile.unlike_p_value(run, high) <= UNLIKE and score < FAR:
            counts["inconclusive"] += 1
        elif profile.refusal(score, high) <= alpha:
            counts["refused"] += 1
    return counts


def cells(name: str, arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str, Path]]:
    """Yield domain, numerics or attack, and the file of the observations of each cell, once it is there."""
    model = bitassay.load(name, dtype="bfloat16")
    names = [*profile_of(model, arguments, folder).fits, ROUNDING.name]
    plan = AttackPlan(sequences=arguments.requests, tokens=arguments.tokens, batch=16)
    for path in sorted(DOMAINS.glob("*.jsonl.gz")):
        domain = path.name.partition(".")[0]
        prompts = fitting(prompts_from(path), model, arguments.tokens)[: arguments.requests]
        if not prompts:
            print(f"{domain}: no prompt fits the model's context")
            continue
        for kind in (*arguments.numerics, *arguments.attacks):
            file = folder / f"{domain}-{kind}.json"
            if not file.exists():
                runs: list[Observation] = []
                for start in range(0, len(prompts), CHUNK):
                    asked = RequestSet(name, model, prompts[start : start + CHUNK], GREEDY, plan)
                    if kind in VARIANTS:
                        submitted = VARIANTS[kind].run(asked)
                    else:
                        submitted = ATTACKS[kind].run(Setting(model, asked.traces, plan.batch))
                    runs += observe(submitted, model, [Request()] * len(submitted), names)
                write_json(file, OBSERVATIONS.dump_python(runs, mode="json"))
            yield domain, kind, file


def profile_of(model, arguments: argparse.Namespace, folder: Path) -> Profile:
    """The profile of the folder; it is calibrated where there is none yet."""
    path = folder / "profile.json"
    if not path.exists():
        prompts = calibration_prompts(arguments.calibration)
        profile = calibrate(model, model, prompts, max_new_tokens=arguments.tokens, alpha=arguments.alpha)
        write_profile(profile, path)
    return read_profile(path)


def main(name: str, arguments: argparse.Namespace) -> dict:
    folder = RESULTS / Path(name).name
    table: dict[str, dict[str, dict[str, int]]] = {}
    for domain, kind, file in cells(name, arguments, folder):
        runs = OBSERVATIONS.validate_python(json.loads(file.read_text()))
        counts = outcomes(read_profile(folder / "profile.json"), runs, arguments.alpha)
        table.setdefault(kind, {})[domain] = counts
        low, high = clopper_pearson_interval(counts["refused"], counts["n"])
        print(f"{kind:10} {domain:12} {counts} refused {100 * low:.1f} to {100 * high:.1f} %", flush=True)
    for kind, by_domain in table.items():
        refused, n = (sum(counts[key] for counts in by_domain.values()) for key in ("refused", "n"))
        low, high = clopper_pearson_interval(refused, n)
        print(f"{kind:10} pooled: {refused} of {n} refused, {100 * low:.2f} to {100 * high:.2f} %")
    write_json(folder / "table.json", table)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--calibration", type=int, default=640)
    parser.add_argument("--alpha", type=float, default=0.01)
    parser.add_argument("--numerics", nargs="*", default=["same", "eager", "thread-1", "batch-1", "isa"])
    parser.add_argument("--attacks", nargs="*", default=[])
    arguments = parser.parse_args()
    main(arguments.model, arguments)
