"""Traces that llama.cpp makes, judged by transformers: how far are honest ones, and are files told apart?

Every file proves the same prompts in llama.cpp, and transformers in float32, with the weights of the same
file, prefills what was generated: `distances` are relative, the geometric mean over generated positions and
prompts, by layer. Then a host that should run the first file runs each of them and claims the first: a
profile of `calibrate` (other prompts, alpha 0.05 on average) judges its runs; `refused` counts. Generation is
greedy, so that a host that cheats makes the same tokens and states, and only the claim differs. The profile
and each file's row are kept in the work folder: the same command goes on where it was stopped.

Run: python benchmarks/engine_traces.py FIRST.gguf [OTHER.gguf ...] [--prompts 40] [--tokens 24]
[--calibration 96] [--work DIR] [--format json]
"""

import argparse
import json
from dataclasses import replace
from math import exp, log
from pathlib import Path
from statistics import fmean

import bitassay
from bitassay.data.corpora import bundled_prompts
from bitassay.models.identity import identity
from bitassay.record.environment import environment
from bitassay.verification.calibrate import calibrate
from bitassay.verification.profile import Profile, read_profile, write_profile
from bitassay.verification.prove import prove_many
from bitassay.verification.trace import ModelClaim, Trace
from bitassay.verification.verify import verify_many

ENGINE, ALPHA = "llama.cpp", 0.05


def distances(verdicts) -> dict[str, float]:
    """By layer, over the runs that have generated positions."""
    found = {}
    for layer in verdicts[0].observation.layers:
        values = [v.distance(layer) for v in verdicts]
        found[str(layer)] = exp(fmean(log(value) for value in values if value))
    return found


def claiming(trace: Trace, claim: ModelClaim) -> Trace:
    """The same run, said to be of another file."""
    return replace(trace, header=trace.header.model_copy(update={"model": claim}))


def row_of(path: str, first: str, prompts: list[str], tokens: int, profile: Profile) -> dict:
    """One host: its honest traces, and the same ones claiming the first file."""
    traces = prove_many(bitassay.load(path, engine=ENGINE), prompts, max_new_tokens=tokens)
    honest = verify_many(traces, bitassay.load(path))
    verifier = bitassay.load(first)
    claim = ModelClaim.of(identity(verifier))
    verdicts = verify_many([claiming(trace, claim) for trace in traces], verifier, profile=profile)
    judged = [verdict for verdict in verdicts if verdict.status != "INCONCLUSIVE"]
    return {
        "host runs": Path(path).stem,
        "distances": distances(honest),
        "mean margin": fmean(verdict.mean_margin or 0 for verdict in honest),
        "distances from the first file": distances(verdicts),
        "refused": sum(verdict.status == "FAIL" for verdict in judged),
        "judged": len(judged),
    }


def main(arguments: argparse.Namespace) -> dict:
    every = bundled_prompts()
    chosen = [every[i * len(every) // arguments.calibration] for i in range(arguments.calibration)]
    rest = [text for text in every if text not in set(chosen)]
    prompts = [rest[i * len(rest) // arguments.prompts] for i in range(arguments.prompts)]
    first, tokens, work = arguments.files[0], arguments.tokens, arguments.work
    work.mkdir(parents=True, exist_ok=True)
    if not (kept := work / "profile.json").exists():
        profile = calibrate(
            bitassay.load(first, engine=ENGINE),
            bitassay.load(first),
            chosen,
            max_new_tokens=tokens,
            alpha=ALPHA,
            guarantee="average",
        )
        write_profile(profile, kept)
    profile, rows = read_profile(kept), []
    for path in arguments.files:
        if not (row := work / f"{Path(path).stem}.json").exists():
            row.write_text(json.dumps(row_of(path, first, prompts, tokens, profile)))
        rows.append(json.loads(row.read_text()))
    return {"first": Path(first).stem, "tokens": tokens, "rows": rows, "environment": environment()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--calibration", type=int, default=96)
    parser.add_argument("--work", type=Path, default=Path("runs/engine-traces"))
    parser.add_argument("--format", choices=["table", "json"], default="table")
    given = parser.parse_args()
    result = main(given)
    print(json.dumps(result, indent=2) if given.format == "json" else "\n".join(map(str, result["rows"])))
