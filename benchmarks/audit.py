"""How often does an audit refuse honest servers, and how many tokens does it need?

Every text is read once by every server, for the log-probabilities of given tokens: by the functions that
`bitassay serve` answers with, in this process. Honest are bfloat16 (exactly what the control computes), with
eager attention, and float32 (exactly what the reference computes). Their answers to the first texts are the
profile (of each text the largest statistic), their answers to the others measure false accusations. The
changed models answer some of the others. All rows of the tables come from these answers: levels of evidence,
the first 4, 8, ... positions of each, and audits that pool several of them, drawn from those that there are.

Tables: single requests (`caught`, and the power of a normal distribution with their mean and standard
deviation; so few answers cannot show 99 % themselves); tokens to 99 %: of one request where its power is that
high, else of audits of several requests, of which 1000 are drawn without replacement; honest audits: single
requests, disjoint audits of 4 requests, and one ledger of all. Distances are kept in --out, BATCH texts at a
time; the same command goes on, and stops after --minutes. Run:

    python benchmarks/audit.py [MODEL] [--profile 100] [--held-out 200] [--each 40] [--tokens 64]
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from scipy.stats import norm

import bitassay
from bitassay.audit.answering import prompt_entries
from bitassay.audit.asking import texts
from bitassay.audit.distance import as_said, distances, statistic
from bitassay.audit.judge import Reference
from bitassay.audit.wire import Position
from bitassay.evaluation.statistics import clopper_pearson_interval
from bitassay.models.identity import tokenizer
from bitassay.record.files import write_json
from bitassay.verification.pooled import fail_count, pooled_p_value
from bitassay.verification.scores import p_value, threshold
from bitassay.verification.sequential import SequentialEvidence, log_wealth

HONEST = ("bf16", "bf16-eager", "fp32")
CHANGED = ("fp8", "w8", "w8-g64", "w4")
BATCH, TOP = 10, 20
DRAWS = 1000
LEVELS = ("prompt-logprobs", "prompt-chosen")
W8_G64 = {"name": "w8-g64", "weights": {"format": "int8", "granularity": "g64"}}


def model_of(name, kind):
    """The model that a server of this kind runs."""
    if kind in HONEST:
        attention = "eager" if kind == "bf16-eager" else "sdpa"
        return bitassay.load(name, dtype="bfloat16", attention=attention)
    recipe = {"w8-g64": bitassay.Recipe(**W8_G64)}.get(kind, kind)
    return bitassay.quantize(bitassay.load(name, dtype="bfloat16"), recipe=recipe)


def measured(reference, models, asked, kinds):
    """Distances of each text by server and level, at each position; of the control too. kinds: that read each
    text."""
    entries = {}
    for kind, model in models.items():
        numbers = [n for n, names in enumerate(kinds) if kind in names]
        entries[kind] = {n: prompt_entries(model, asked[n].ids, TOP) for n in numbers}
    found = []
    for n, text in enumerate(asked):
        truth = reference.rows(reference.exact, text.ids, 1)
        control = reference.rows(reference.control, text.ids, 1)
        of_text = {"control": {}} | {kind: {} for kind in kinds[n]}
        for level in LEVELS:
            for kind, by_level in of_text.items():
                if kind in ("control", "bf16", "fp32"):
                    rows = truth if kind == "fp32" else control
                    positions = as_said(level, text.ids[1:], rows, TOP)
                else:
                    positions = [Position(each.token, each.logprob, each.top) for each in entries[kind][n]]
                by_level[level] = [round(d, 7) for d in distances(level, positions, truth, TOP).tolist()]
        found.append(of_text)
    return found


def power(scores, limit):
    spread = float(np.std(scores, ddof=1))
    return float(norm.sf((limit - np.mean(scores)) / spread)) if spread else float(np.mean(scores) > limit)


def collect(options):
    """Read what has not been read yet; return the distances by server, level, text and position."""
    until, name = time.monotonic() + 60 * options.minutes, options.model
    count = options.profile + options.held_out
    kinds = [
        (*HONEST, *(options.changes if 0 <= number - options.profile < options.each else ()))
        for number in range(count)
    ]
    paths = [options.out / f"distances-{start:04d}.json" for start in range(0, count, BATCH)]
    reference, models, asked = None, {}, []
    for number, path in enumerate(paths):
        if path.exists():
            continue
        if reference is None:
            exact = bitassay.load(name)
            reference = Reference(exact, bitassay.load(name, dtype="bfloat16"))
            asked = texts(tokenizer(exact), "c4-train-new", (2026, 11), count, options.tokens + 1)
        here = slice(number * BATCH, (number + 1) * BATCH)
        for kind in sorted({kind for some in kinds[here] for kind in some} - {"bf16", "fp32", *models}):
            models[kind] = model_of(name, kind)
        used = {kind: models[kind] for some in kinds[here] for kind in some if kind in models}
        write_json(path, measured(reference, used, asked[here], kinds[here]))
        print(f"read: texts {here.start} to {here.stop}", flush=True)
        if time.monotonic() > until:
            sys.exit("time is up; the same command goes on")
    kept = {kind: {level: [] for level in LEVELS} for kind in ("control", *HONEST, *options.changes)}
    for found in (each for path in paths for each in json.loads(path.read_text())):
        for kind, by_level in found.items():
            for level, values in by_level.items():
                kept[kind][level].append(values)
    return kept


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--profile", type=int, default=100)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--each", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--alpha", type=float, default=0.01)
    parser.add_argument("--changes", nargs="*", default=CHANGED)
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-audit"))
    options = parser.parse_args()
    kept = collect(options)
    lengths = sorted({4, 8, 16, 32, 64, options.tokens} & set(range(options.tokens + 1)))
    print("\n| evidence | served | positions | median | sd | caught | power |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for level in LEVELS:
        for n in lengths:
            table(level, n, kept, options)
    print("\n| evidence | served | tokens to 99 % | requests |\n|---|---|---:|---:|")
    for level in LEVELS:
        for kind in options.changes:
            tokens, requests = to_power(level, kind, lengths, kept, options)
            print(f"| {level} | {kind} | {tokens} | {requests} |")
    print("\n| evidence | honest | requests refused | audits of 4 refused | p of one ledger of all |")
    print("|---|---|---:|---:|---:|")
    for level in LEVELS:
        honest_table(level, kept, options)


def scored(level, kind, n, kept, options):
    """Statistics of a server's answers by their first n positions; of changed ones those texts are after the
    profile's."""
    begin = 0 if kind in HONEST else options.profile
    pairs = zip(kept[kind][level], kept["control"][level][begin:], strict=False)
    return np.array([statistic(level, np.mean(mine[:n]), np.mean(own[:n])) for mine, own in pairs])


def known(level, n, kept, options):
    """The profile: of each text the largest statistic of the honest servers."""
    honest = [scored(level, kind, n, kept, options)[: options.profile] for kind in HONEST]
    return np.max(honest, axis=0)


def table(level, n, kept, options):
    """Print the rows of one level and number of positions."""
    profile = known(level, n, kept, options)
    limit = threshold(profile, options.alpha)
    for kind in (*HONEST, *options.changes):
        mine = scored(level, kind, n, kept, options)[options.profile if kind in HONEST else 0 :]
        caught = int(sum(p_value(each, profile.tolist()) <= options.alpha for each in mine))
        shown = "" if kind in HONEST else f"{power(mine, limit):.3f}"
        of = share(caught, len(mine)) if kind in HONEST else f"{caught} of {len(mine)}"
        print(f"| {level} | {kind} | {n} | {np.median(mine):.2f} | {np.std(mine):.2f} | {of} | {shown} |")


def share(count, items):
    low, high = clopper_pearson_interval(count, items)
    return f"{count} of {items} [{low:.1%}, {high:.1%}]"


def to_power(level, kind, lengths, kept, options):
    """Tokens and requests until 99 % of audits of a changed server are refused; ('-', '-') beyond a quarter
    of its answers."""
    for n in lengths:
        limit = threshold(known(level, n, kept, options), options.alpha)
        if power(scored(level, kind, n, kept, options), limit) >= 0.99:
            return n, 1
    profile = known(level, options.tokens, kept, options).tolist()
    p_values = [p_value(each, profile) for each in scored(level, kind, options.tokens, kept, options)]
    draw = np.random.default_rng(0)
    for r in range(2, options.each // 4 + 1):
        drawn = (draw.choice(p_values, r, replace=False) for _ in range(DRAWS))
        if np.mean([refused(some.tolist(), len(profile), options.alpha) for some in drawn]) >= 0.99:
            return r * options.tokens, r
    return "-", "-"


def refused(p_values, n, alpha):
    """Whether an audit of several answers is refused, as `judge.decide` decides it."""
    tests = pooled_p_value(p_values, n), fail_count(p_values, n, alpha)
    return min(tests) <= alpha / 2


def honest_table(level, kept, options):
    """Print how many honest requests and audits are refused, and what one ledger of all proves."""
    profile = known(level, options.tokens, kept, options)
    for kind in HONEST:
        mine = scored(level, kind, options.tokens, kept, options)[options.profile :]
        p_values = [p_value(each, profile.tolist()) for each in mine]
        single = sum(p <= options.alpha for p in p_values)
        audits = [p_values[at : at + 4] for at in range(0, len(p_values) - 3, 4)]
        pooled = sum(refused(some, len(profile), options.alpha) for some in audits)
        ledger = SequentialEvidence.of(log_wealth(mine, profile), options.alpha)
        row = share(single, len(mine)), share(pooled, len(audits)), f"{ledger.p_value:.2g}"
        print(f"| {level} | {kind} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
