"""Honest runs of texts that calibration has not seen: how many are refused?

Prompts are of the bundled domains and of those of `benchmarks/domains/` (languages with other scripts, code,
long documents, arithmetic, one-word answers). Each domain is left out once: the honest runs of all others are
calibrated, and its runs are judged by them (`verification/left_out.py`). First by runs of the verifier's own
numerics, then by those of all numerics together: what other numerics are refused by the first is what a host
risks that does not say what it computes with. Dishonest runs of the same prompts show what power is left.

Printed is, for each kind of run, how many are refused, of how many, with Clopper-Pearson intervals over runs.
Runs are kept in RESULTS as they are finished; the same command goes on where it was interrupted. Run:

    python benchmarks/domains.py [MODEL] [--calibration 10] [--each 3] [--unseen N] [--more DOMAIN=N]
        [--attacks ...] [--minutes M]

--more: so many prompts of a domain, such as one whose answers are mostly too short to be judged. --minutes:
stop after so many, with exit status 3, behind a part that is finished.
"""

import argparse
import json
import sys
import time
from itertools import zip_longest
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

import bitassay
from bitassay.data.corpora import prompts_by_domain, prompts_from
from bitassay.engines.prompts import encode_prompt
from bitassay.engines.sampling import GREEDY
from bitassay.evaluation.statistics import clopper_pearson_interval
from bitassay.models.positions import context_length
from bitassay.record.files import write_json
from bitassay.record.hashing import digest_json
from bitassay.studies.attacks.study import VARIANTS, AttackPlan, RequestSet
from bitassay.verification.attacks.attack import Setting
from bitassay.verification.attacks.registry import ATTACKS
from bitassay.verification.calibrate import MIN_POSITIONS
from bitassay.verification.decision import SEQUENCE
from bitassay.verification.detectors.registry import DECIDING
from bitassay.verification.left_out import by_others
from bitassay.verification.observe import Observation, observe
from bitassay.verification.sequential import log_wealth
from bitassay.verification.structure import Request

FOLDER = Path(__file__).parent / "domains"
RESULTS = Path(__file__).parent / "results" / "domains"
RUNS = TypeAdapter(list[tuple[str, Observation]])
OWN = "same"  # the verifier's own numerics
CHUNK = 64
ENOUGH, HOSTS, REQUESTS = 40, 200, 200  # runs of a domain whose ledgers are simulated, how many, how long
Runs = dict[str, list[Observation]]


def prompts_of(each: int, unseen: int, more: dict[str, int]) -> list[tuple[str, str]]:
    """The first prompts of each domain, by turns: `each` of the bundled ones, `unseen` of the others, but
    `more` of some of these."""
    domains = {name: texts[:each] for name, texts in prompts_by_domain().items()}
    for path in sorted(FOLDER.glob("*.jsonl.gz")):
        name = path.name.partition(".")[0]
        domains[f"{name} (not bundled)"] = prompts_from(path)[: more.get(name, unseen)]
    rounds = zip_longest(*([(name, text) for text in texts] for name, texts in domains.items()))
    return [prompt for several in rounds for prompt in several if prompt is not None]


def runs_of(
    kind: str, name: str, model, asked_for: list[tuple[str, str]], tokens: int, folder: Path, until: float
) -> Runs:
    """Runs of one numerics or attack, by domain; finished parts are read. until: when to stop."""
    limit, plan = context_length(model), AttackPlan(sequences=CHUNK, tokens=tokens, batch=16)
    prompts = [(domain, encode_prompt(model, text)) for domain, text in asked_for]
    prompts = [(domain, ids) for domain, ids in prompts if limit is None or len(ids) + tokens - 1 <= limit]
    runs: Runs = {}
    for start in range(0, len(prompts), CHUNK):
        chunk = prompts[start : start + CHUNK]
        path = folder / f"{kind}-{start:04d}-{digest_json([tokens, chunk])[:12]}.json"
        if not path.exists():
            if time.monotonic() >= until:
                sys.exit(3)
            asked = RequestSet(name, model, [ids for _, ids in chunk], GREEDY, plan)
            if kind in VARIANTS:
                submitted = VARIANTS[kind].run(asked)
            else:
                submitted = ATTACKS[kind].run(Setting(model, asked.traces, plan.batch))
            observed = observe(submitted, model, [Request()] * len(submitted), DECIDING)
            domains = [domain for domain, _ in chunk]
            write_json(path, RUNS.dump_python(list(zip(domains, observed, strict=True)), mode="json"))
            print(path.name, flush=True)
        for domain, run in RUNS.validate_python(json.loads(path.read_text())):
            if run.positions >= MIN_POSITIONS:
                runs.setdefault(domain, []).append(run)
    return runs


def judged(honest: Runs, runs: Runs, alpha: float) -> dict:
    """How many runs are refused, in all and by domain; and the ledgers of domains with enough runs."""
    answers = by_others(honest, runs, list(DECIDING), shortest=MIN_POSITIONS, alpha=alpha)
    counts = {domain: answer.refused(alpha) for domain, answer in answers.items()}
    n = sum(len(runs[domain]) for domain in counts)
    rows = {domain: [count, len(runs[domain])] for domain, count in counts.items() if count}
    return {
        "refused": sum(counts.values()),
        "n": n,
        "domains": len(counts),
        "where": rows,
        "alarms": {
            domain: alarms(np.array(answer.scores), np.array(answer.honest), alpha)
            for domain, answer in answers.items()
            if len(answer.scores) >= ENOUGH
        },
    }


def alarms(scores: np.ndarray, honest: np.ndarray, alpha: float) -> int:
    """Of HOSTS hosts whose REQUESTS scores are drawn from these, how many a ledger accuses by its last look.
    The capital is looked at often enough to miss few alarms."""
    rng, looks = np.random.default_rng(0), np.array([12, 25, 50, 75, 100, 150, REQUESTS])
    level = -np.log(SEQUENCE * alpha / 2)  # the first game of a ledger has half of its share
    return sum(
        bool((log_wealth(rng.choice(scores, REQUESTS), honest, looks) >= level).any()) for _ in range(HOSTS)
    )


def main(name: str, arguments: argparse.Namespace) -> dict:
    folder = RESULTS / Path(name).name
    model = bitassay.load(name, dtype="bfloat16")
    until = time.monotonic() + 60 * arguments.minutes
    more = {domain: int(count) for domain, _, count in (each.partition("=") for each in arguments.more)}
    kinds = {
        kind: runs_of(
            kind,
            name,
            model,
            prompts_of(
                arguments.calibration if kind == OWN else arguments.each,
                arguments.unseen or (arguments.calibration if kind == OWN else arguments.each),
                more,
            ),
            arguments.tokens,
            folder,
            until,
        )
        for kind in (OWN, *arguments.numerics, *arguments.attacks)
    }
    honest: Runs = {}
    for kind in (OWN, *arguments.numerics):
        for domain, runs in kinds[kind].items():
            honest.setdefault(domain, []).extend(runs)
    table: dict[str, dict[str, dict]] = {}
    for by, calibration in (("own numerics", kinds[OWN]), ("all numerics", honest)):
        for kind, runs in (kinds | {"honest, pooled": honest}).items():
            row = table.setdefault(by, {})[kind] = judged(calibration, runs, arguments.alpha)
            if row["n"]:
                low, high = clopper_pearson_interval(row["refused"], row["n"])
                print(f"by {by}: {kind:12} {row} {100 * low:.2f} to {100 * high:.2f} %", flush=True)
        counts = {domain: (row["where"].get(domain, [0])[0], len(runs)) for domain, runs in honest.items()}
        most = sorted(counts.items(), key=lambda item: -item[1][0] / item[1][1])
        shown = dict(most[:5]) | {name: count for name, count in most if "not bundled" in name}
        print(f"by {by}, by domain:", *(f"{name} {a} of {b};" for name, (a, b) in shown.items()))
    write_json(folder / "table.json", table)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--calibration", type=int, default=10, help="prompts of each domain, own numerics")
    parser.add_argument("--each", type=int, default=3, help="prompts of each domain, all other runs")
    parser.add_argument("--unseen", type=int, help="prompts of each domain that is not bundled, all runs")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--alpha", type=float, default=0.01)
    parser.add_argument("--numerics", nargs="*", default=["eager", "thread-1", "batch-1", "isa"])
    parser.add_argument("--attacks", nargs="*", default=[])
    parser.add_argument("--more", nargs="*", default=[], metavar="DOMAIN=N")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    arguments = parser.parse_args()
    main(arguments.model, arguments)
