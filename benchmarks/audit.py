"""How often does an audit refuse honest servers, and how many tokens does it need? Our own server,
honest and with changed models.

Every text is asked of every server once, for the log-probabilities of given tokens. Honest servers are
bfloat16 with two kinds of attention, and float32; their answers to the first texts are the profile (of each
text the largest statistic), their answers to the others measure false accusations. The changed models answer
some of the others. All rows of the tables come from these answers: levels of evidence, the first 4, 8, ...
positions of each, and audits that pool several of them, drawn from those that there are.

Tables: single requests (`caught`, and the power of a normal distribution with their mean and standard
deviation; so few answers cannot show 99 % themselves); tokens to 99 %: of one request where its power is that
high, else of audits of several requests, of which 1000 are drawn without replacement; honest audits: single
requests, disjoint audits of 4 requests, and one ledger of all. Answers are kept in --out, 25 at a time; the
same command goes on, and stops after --minutes. Run:

    python benchmarks/audit.py [MODEL] [--profile 100] [--held-out 300] [--each 40] [--tokens 64]
"""

import argparse
import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from scipy.stats import norm

import bitassay
from bitassay.audit.answering import Served, default_context
from bitassay.audit.asking import Asking, body_of, texts
from bitassay.audit.client import Endpoint
from bitassay.audit.distance import as_said, distances, statistic
from bitassay.audit.judge import Reference
from bitassay.audit.server import make_app
from bitassay.audit.store import Store
from bitassay.audit.wire import Position, Vocabulary, read_answer
from bitassay.engines.decode import vocabulary_size
from bitassay.evaluation.statistics import clopper_pearson_interval
from bitassay.models.identity import identity, tokenizer
from bitassay.record.files import write_json
from bitassay.testing.local_server import running
from bitassay.verification.pooled import pooled_p_value
from bitassay.verification.receipts.keys import private_key
from bitassay.verification.scores import p_value, threshold
from bitassay.verification.sequential import SequentialEvidence, log_wealth

HONEST = {"bf16": ("bfloat16", "sdpa"), "bf16-eager": ("bfloat16", "eager"), "fp32": ("float32", "sdpa")}
CHANGED = ("fp8", "w8", "w8-g64", "w4")
CHUNK = 25
DRAWS = 1000
LEVELS = ("prompt-logprobs", "prompt-chosen")
W8_G64 = {"name": "w8-g64", "weights": {"format": "int8", "granularity": "g64"}}


@contextmanager
def serving(model, claim, folder):
    """Serve a model that claims to be another; yield the URL."""
    store = Store(folder, private_key(folder / "key.pem"))
    app = make_app(Served(model, store, "audited", default_context(model), claim=claim))
    try:
        with running(app) as url:
            yield f"{url}/v1"
    finally:
        app.server.scheduler.stop()


def model_of(name, kind):
    """The model that a server of this kind runs."""
    if kind in HONEST:
        dtype, attention = HONEST[kind]
        return bitassay.load(name, dtype=dtype, attention=attention)
    recipe = {"w8-g64": bitassay.Recipe(**W8_G64)}.get(kind, kind)
    return bitassay.quantize(bitassay.load(name, dtype="bfloat16"), recipe=recipe)


def answers(url, asking, asked, vocabulary):
    """What a server says of each text: positions as JSON values."""
    endpoint, said = Endpoint(url), []
    for text in asked:
        path, body = body_of(asking, "audited", text)
        answered = read_answer(endpoint.post(path, body), vocabulary, text.ids)
        said.append([[each.token, each.logprob, each.top] for each in answered.prompt])
    endpoint.close()
    return said


def measured_one(reference, text, number, said, k):
    """Distances of one text by server and level, at each position; of the control too."""
    truth = reference.rows(reference.exact, text.ids, 1)
    own = reference.rows(reference.control, text.ids, 1)
    found = {kind: {} for kind in ("control", *(kind for kind in said if number in said[kind]))}
    for level in LEVELS:
        for kind in found:
            if kind == "control":
                positions = as_said(level, text.ids[1:], own, k)
            else:
                positions = [
                    Position(token, value, tuple(map(tuple, top))) for token, value, top in said[kind][number]
                ]
            found[kind][level] = distances(level, positions, truth, k).tolist()
    return found


def power(scores, limit):
    spread = float(np.std(scores, ddof=1))
    return float(norm.sf((limit - np.mean(scores)) / spread)) if spread else float(np.mean(scores) > limit)


def collect(options):
    """Ask what has not been asked yet; return the distances by server, level, text and position."""
    until = time.monotonic() + 60 * options.minutes
    name, folder = options.model, options.out
    exact = bitassay.load(name)
    reference = Reference(exact, bitassay.load(name, dtype="bfloat16"))
    asking = Asking("prompt-logprobs", "ids", "prompt_logprobs", 20, options.tokens + 1, 1, True)
    count = options.profile + options.held_out
    asked = texts(tokenizer(exact), "c4-train-new", (2026, 11), count, options.tokens + 1)
    vocabulary = Vocabulary(tokenizer(exact), vocabulary_size(exact))
    changed = range(options.profile, options.profile + options.each)

    def chunks(kind):
        """Texts that are asked of a server, by chunk."""
        numbers = range(count) if kind in HONEST else changed
        return [[n for n in numbers if n // CHUNK == c] for c in range(-(-count // CHUNK))]

    for kind in (*HONEST, *options.changes):
        missing = [c for c, some in enumerate(chunks(kind)) if some and not path_of(folder, kind, c).exists()]
        if not missing:
            continue
        with serving(model_of(name, kind), identity(exact), folder / f"server-{kind}") as url:
            for c in missing:
                theirs = [asked[n] for n in chunks(kind)[c]]
                write_json(path_of(folder, kind, c), answers(url, asking, theirs, vocabulary))
                print(f"{kind}: texts {c * CHUNK} to {c * CHUNK + len(theirs)}", flush=True)
                if time.monotonic() > until:
                    sys.exit("time is up; the same command goes on")
    kept = {kind: {level: [] for level in LEVELS} for kind in ("control", *HONEST, *options.changes)}
    for c in range(-(-count // CHUNK)):
        path = path_of(folder, "distances", c)
        numbers = range(c * CHUNK, min((c + 1) * CHUNK, count))
        if not path.exists():
            said = {}
            for kind in (*HONEST, *options.changes):
                own = chunks(kind)[c]
                theirs = json.loads(path_of(folder, kind, c).read_text()) if own else []
                said[kind] = dict(zip(own, theirs, strict=True))
            write_json(path, [measured_one(reference, asked[n], n, said, asking.k) for n in numbers])
            print(f"judged: texts {numbers.start} to {numbers.stop}", flush=True)
            if time.monotonic() > until:
                sys.exit("time is up; the same command goes on")
        for found in json.loads(path.read_text()):
            for kind, by_level in found.items():
                for level, values in by_level.items():
                    kept[kind][level].append(values)
    return kept


def path_of(folder, kind, chunk):
    return folder / f"{kind}-{chunk:02d}.json"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--profile", type=int, default=100)
    parser.add_argument("--held-out", type=int, default=300)
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
        if np.mean([pooled_p_value(some.tolist(), len(profile)) <= options.alpha for some in drawn]) >= 0.99:
            return r * options.tokens, r
    return "-", "-"


def honest_table(level, kept, options):
    """Print how many honest requests and audits are refused, and what one ledger of all proves."""
    profile = known(level, options.tokens, kept, options)
    for kind in HONEST:
        mine = scored(level, kind, options.tokens, kept, options)[options.profile :]
        p_values = [p_value(each, profile.tolist()) for each in mine]
        single = sum(p <= options.alpha for p in p_values)
        audits = [p_values[at : at + 4] for at in range(0, len(p_values) - 3, 4)]
        pooled = sum(pooled_p_value(some, len(profile)) <= options.alpha for some in audits)
        ledger = SequentialEvidence.of(log_wealth(mine, profile), options.alpha)
        row = share(single, len(mine)), share(pooled, len(audits)), f"{ledger.p_value:.2g}"
        print(f"| {level} | {kind} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
