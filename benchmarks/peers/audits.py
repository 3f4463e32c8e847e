"""Audits by the answers' tokens alone: ours beside token-DiFR, RUT and MMD, at equal tokens, on the same
answers (those that `benchmarks/servers.py` keeps; run that first).

    ours        levels `tokens` and `sampled` of `bitassay audit`
    token-DiFR  share of greedy tokens that are the reference's own choice, and the mean margin, as token-difr
                0.1.2 computes them (arXiv 2511.20621); it names no threshold
    RUT         rank of a sampled answer's mean log-rank among answers of the reference to the same prompt,
                Cramer-von Mises test of uniformity (2506.06975)
    MMD         Hamming kernel, one answer a prompt against the reference's (2410.20247), permutation test

All are given the threshold that they would like to have: an audit is refused where its statistic is larger
than that of 99 % of honest audits of as many requests, of which 2000 are drawn from all honest answers. So
nobody's own p-values are used, and each has a false-positive rate of 1 % on these answers. With --split the
threshold is learnt from the first 128 honest answers, and the others are audited. Power: of 1000 audits that
are drawn from the changed server's answers.

    python benchmarks/peers/audits.py sample --out OUT [--samples 12] [--only 0-64 128-192]
    python benchmarks/peers/audits.py table --out OUT --honest NAME,HELD-OUT --changed NAME ...
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

import bitassay
from bitassay.audit.judge import Reference
from bitassay.audit.surprise import ASKED
from bitassay.engines.decode import generate
from bitassay.engines.sampling import Sampler
from bitassay.record.files import read_json, write_json

sys.path.append(str(Path(__file__).parents[1]))
from servers import ANSWER, peers_statistics

SIZES = (1, 2, 4, 8, 16, 32)
HONEST_DRAWS, DRAWS = 2000, 1000
KNOWN = 128  # answers of the honest server that calibrate


def sample(options):
    """Let the reference answer every prompt that was asked for samples; keep tokens and log-ranks."""
    exact = bitassay.load(options.model)
    host = bitassay.load(options.model, dtype="bfloat16")
    reference, until = Reference(exact, host), time.monotonic() + 60 * options.minutes
    prompts = {path.stem: path for path in sorted(options.out.glob("*/parts/sampled-*.json"))}
    wanted = {
        n for begin, end in (map(int, each.split("-")) for each in options.only) for n in range(begin, end)
    }
    prompts = {name: path for name, path in prompts.items() if int(name.split("-")[1]) in wanted}
    for question, path in prompts.items():
        kept = options.out / "samples" / f"{question}.json"
        if kept.exists():
            continue
        prompt = read_json(path)["prompt_ids"]
        sampler = Sampler(ASKED.temperature, ASKED.top_p, 27)
        nonces = [f"{question}-{n}" for n in range(options.samples)]
        many = [prompt] * options.samples
        made = generate(host, many, max_new_tokens=ANSWER, sampler=sampler, nonces=nonces)
        found = []
        for each in made:
            ids = list(each.output_ids)
            rows = reference.rows(exact, [*prompt, *ids], len(prompt))
            found.append({"ids": ids, "log_rank": peers_statistics(rows, ids)["log_rank"]})
        write_json(kept, found)
        if time.monotonic() > until:
            sys.exit("time is up; the same command goes on")


def alike(one, other):
    """Hamming kernel of two answers: the share of positions with the same token."""
    return sum(a == b for a, b in zip(one, other, strict=False)) / ANSWER


def statistics(out, name, wanted):
    """Of each answer of a server, a number for each method; larger is farther from the reference."""
    found = {}
    for path in sorted((out / "scores").glob(f"{name}-greedy-*.json")):
        score = json.loads(path.read_text())
        if "tokens" in score and wanted(int(path.stem.rsplit("-", 1)[1])):
            row = score["tokens"]["score"], 1 - score["matches"], score["margin"]
            found.setdefault("greedy", {})[path.stem] = row
    for path in sorted((out / "scores").glob(f"{name}-sampled-*.json")):
        score, question = json.loads(path.read_text()), path.stem.removeprefix(f"{name}-")
        kept = out / "samples" / f"{question}.json"
        if "sampled" not in score or not kept.exists() or not wanted(int(question.split("-")[1])):
            continue
        own = json.loads(kept.read_text())
        ranks = np.array([each["log_rank"] for each in own])
        rank = ((ranks < score["log_rank"]).sum() + 0.5 * (ranks == score["log_rank"]).sum() + 0.5) / (
            len(own) + 1
        )
        cross = np.mean([alike(score["ids"], each["ids"]) for each in own])
        inner = [alike(a["ids"], b["ids"]) for n, a in enumerate(own) for b in own[:n]]
        found.setdefault("sampled", {})[path.stem] = (
            score["sampled"]["score"],
            rank,
            np.mean(inner) - 2 * cross,
        )
    return {kind: np.array(list(rows.values())) for kind, rows in found.items()}


def cramer_von_mises(ranks):
    """The statistic of Cramer and von Mises against the uniform distribution, of each row."""
    n = ranks.shape[1]
    expected = (2 * np.arange(1, n + 1) - 1) / (2 * n)
    return 1 / (12 * n) + ((np.sort(ranks, 1) - expected) ** 2).sum(1)


METHODS = {
    "greedy": {"ours, tokens": 0, "token-DiFR, match rate": 1, "token-DiFR, margin": 2},
    "sampled": {"ours, sampled": 0, "RUT": 1, "MMD": 2},
}


def audits(rows, method, size, draw, draws):
    """Statistics of audits of `size` requests that are drawn from the answers."""
    picked = rows[draw.integers(len(rows), size=(draws, size))]
    if method == "RUT":
        return cramer_von_mises(picked)
    return np.abs(picked.mean(1)) if method == "ours, sampled" else picked.mean(1)


def table(options):
    known, held = options.honest.split(",")
    draw = np.random.default_rng(0)
    honest = statistics(options.out, known, lambda number: number < KNOWN or not options.split)
    print("| method | served | " + " | ".join(f"{n * ANSWER}" for n in SIZES) + " |")
    print("|---|---|" + "---:|" * len(SIZES))
    for kind, methods in METHODS.items():
        for name in (held,) if options.split else options.changed:
            mine = statistics(options.out, name, lambda number: number >= KNOWN).get(kind)
            if mine is None or kind not in honest:
                continue
            for method, column in methods.items():
                shares = []
                for size in SIZES:
                    calibrated = audits(honest[kind][:, column], method, size, draw, HONEST_DRAWS)
                    limit = np.quantile(calibrated, 1 - options.alpha, method="higher")
                    found = audits(mine[:, column], method, size, draw, DRAWS)
                    shares.append(f"{np.mean(found > limit):.0%}")
                print(f"| {method} | {name} ({len(mine)}) | {' | '.join(shares)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["sample", "table"])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-servers"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--only", nargs="+", default=["0-2000"], help="questions, such as 0-64 128-192")
    parser.add_argument("--honest")
    parser.add_argument("--split", action="store_true")
    parser.add_argument("--changed", nargs="*", default=[])
    parser.add_argument("--alpha", type=float, default=0.01)
    options = parser.parse_args()
    {"sample": sample, "table": table}[options.what](options)


if __name__ == "__main__":
    main()
