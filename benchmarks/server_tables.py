"""Tables of what `servers.py` asked and judged: false accusations, and requests until a change is found.

Profile: the first 128 answers of one honest server of a group (engine and precision). Held out: its other
answers, and those of servers of the same group that were asked otherwise (one at a time, with a prefix
cache). Audits are disjoint: each answer is in one audit of a level. A ledger has the held-out answers of a
group in their order, and is looked at as often as `audit` looks at one. With --ledgers N others are drawn:
profile and up to 1000 requests, without replacement, from all kept statistics of a group. Run:

    python benchmarks/server_tables.py --honest GROUP,CALIBRATED,HELD-OUT,... --changed NAME,GROUP ...
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from servers import ANSWER, GIVEN, LEVELS

from bitassay.evaluation.statistics import clopper_pearson_interval
from bitassay.verification.pooled import fail_count, pooled_p_value
from bitassay.verification.scores import p_value
from bitassay.verification.sequential import SequentialEvidence, wealth_by_limit


def table(out):
    """Statistics by server, level and question."""
    found = defaultdict(lambda: defaultdict(dict))
    for path in sorted((out / "scores").glob("*.json")):
        name, kind, number = path.stem.rsplit("-", 2)
        value = json.loads(path.read_text())
        for level in LEVELS[kind]:
            found[name][level][int(number)] = value[level]["score"] if level in value else None
    return found


def refused(scores, profile, level, alpha):
    """Whether an audit of answers with these statistics is refused, as `judge.decide` decides it."""
    sides = (1, -1) if level == "sampled" else (1,)
    for sign in sides:
        honest = [sign * each for each in profile]
        p_values = [p_value(sign * each, honest) for each in scores]
        if len(scores) == 1:
            tests = p_values
        else:
            counted = fail_count(p_values, len(honest), alpha)
            tests = [2 * pooled_p_value(p_values, len(honest)), 2 * counted]
        if len(sides) * min(tests) <= alpha:
            return True
    return False


def share(count, items):
    low, high = clopper_pearson_interval(count, items)
    return f"{count} of {items} ({low:.1%} to {high:.1%})"


def audits_of(scored, size):
    """Statistics of the answers, in disjoint audits of `size`; answers that cannot be judged are left out."""
    values = [each for each in scored if each is not None]
    return [values[at : at + size] for at in range(0, len(values) - size + 1, size)]


def known_of(found, server, level):
    """The profile: the first 128 answers of a server."""
    return [each for n, each in found[server][level].items() if n < 128 and each is not None]


def honest_tables(found, groups, options):
    print("| evidence | honest server | requests refused | audits refused |")
    print("|---|---|---:|---:|")
    totals = defaultdict(lambda: np.zeros(4, dtype=int))
    for level in (each for some in LEVELS.values() for each in some):
        for known, held in groups.values():
            profile = known_of(found, known, level)
            for name in held:
                mine = [each for n, each in sorted(found[name][level].items()) if n >= 128]
                if not mine or not profile:
                    continue
                singles, audits = audits_of(mine, 1), audits_of(mine, options.size)
                fails = [
                    sum(refused(each, profile, level, options.alpha) for each in some)
                    for some in (singles, audits)
                ]
                counts = [fails[0], len(singles), fails[1], len(audits)]
                totals[level] += counts
                row = share(*counts[:2]), share(*counts[2:])
                print(f"| {level} | {name} | {' | '.join(row)} |", flush=True)
        if level in totals:
            counts = totals[level]
            print(f"| {level} | all | {share(*counts[:2])} | {share(*counts[2:])} |", flush=True)


def ledger(scores, profile, alpha):
    """What a ledger of these answers proves, looked at as `audit` does."""
    known = np.array(profile, dtype=np.float64)
    wealth = wealth_by_limit(np.array(scores, dtype=np.float64), [0] * len(scores), lambda _: known)
    return SequentialEvidence.of(wealth, alpha)


def ledger_tables(found, groups, options):
    print("\n| evidence | group | in order: requests | p-value | drawn: requests | with an alarm | least p |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for level in (each for some in LEVELS.values() for each in some if each != "sampled"):
        for group, (known, held) in groups.items():
            profile = known_of(found, known, level)
            answers = [found[name][level].items() for name in held]
            mine = [value for some in answers for n, value in sorted(some) if n >= 128 and value is not None]
            if not mine or not profile:
                continue
            order = ledger(mine, profile, options.alpha)
            draw, every = np.random.default_rng(0), np.array([*profile, *mine])
            length, ps = min(1000, len(mine)), []
            for _ in range(options.ledgers):
                some = draw.choice(every, len(profile) + length, replace=False)
                ps.append(ledger(some[len(profile) :], some[: len(profile)], options.alpha).p_value)
            alarms = share(sum(p <= options.alpha for p in ps), len(ps)) if ps else ""
            least = f"{min(ps):.2g}" if ps else ""
            row = f"{order.n_requests} | {order.p_value:.2g} | {length} | {alarms} | {least}"
            print(f"| {level} | {group} | {row} |", flush=True)


def power_tables(found, groups, options):
    print(
        "\n| evidence | served | of the profile of | median | requests refused | tokens (requests) to 99 % |"
    )
    print("|---|---|---|---:|---:|---:|")
    draw = np.random.default_rng(0)
    for level in (each for some in LEVELS.values() for each in some):
        for name, known in (each.split(",") for each in options.changed):
            profile = known_of(found, groups[known][0], level)
            mine = [each for each in found[name][level].values() if each is not None]
            if not mine or not profile:
                continue
            caught = sum(refused([each], profile, level, options.alpha) for each in mine)
            needs = requests_to(np.array(mine), profile, level, options.alpha, draw)
            positions = GIVEN - 1 if level.startswith("prompt") else ANSWER
            says = f"{needs * positions} ({needs})" if needs else f"over {len(mine) * positions}"
            print(
                f"| {level} | {name} | {known} | {np.median(mine):.2f} | {caught} of {len(mine)} | {says} |",
                flush=True,
            )


def requests_to(scores, profile, level, alpha, draw, draws=300):
    """Requests until 99 % of audits are refused, of answers that are drawn with replacement; at most as many
    as there are. None beyond."""
    for size in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128):
        if size > len(scores):
            return None
        some = [[each] for each in scores] if size == 1 else draw.choice(scores, (draws, size)).tolist()
        if np.mean([refused(each, profile, level, alpha) for each in some]) >= 0.99:
            return size
    return None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-servers"))
    parser.add_argument("--honest", nargs="+", required=True, help="GROUP,CALIBRATED,HELD-OUT[,HELD-OUT...]")
    parser.add_argument("--changed", nargs="*", default=[], help="NAME,GROUP")
    parser.add_argument("--size", type=int, default=4)
    parser.add_argument("--alpha", type=float, default=0.01)
    parser.add_argument("--ledgers", type=int, default=0)
    options = parser.parse_args()
    found = table(options.out)
    groups = {name: (known, held) for name, known, *held in (each.split(",") for each in options.honest)}
    honest_tables(found, groups, options)
    ledger_tables(found, groups, options)
    power_tables(found, groups, options)


if __name__ == "__main__":
    main()
