"""How many tokens does an audit need? Our own server on 127.0.0.1, honest and with changed models.

Every text is asked of every server once, for the log-probabilities of given tokens. Honest servers are
bfloat16 with two kinds of attention, and float32; their answers to the first texts are the profile (of each
text the largest statistic), their answers to the others measure false accusations. The changed models answer
some of the others. All rows of the table come from these answers: levels of evidence, and the first 4, 8, ...
positions.

Power is what a normal distribution with mean and standard deviation of the changed answers has above the
threshold at --alpha (conformal: above all but so many of the profile); so few answers cannot show 99 %
themselves, and `caught` says how many were. Answers are kept in --out as they are finished; the same command
goes on. Run:

    python benchmarks/audit.py [MODEL] [--profile 100] [--held-out 20] [--each 12] [--tokens 128]
"""

import argparse
import json
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
from bitassay.verification.receipts.keys import private_key
from bitassay.verification.scores import p_value, threshold

HONEST = {"bf16": ("bfloat16", "sdpa"), "bf16-eager": ("bfloat16", "eager"), "fp32": ("float32", "sdpa")}
CHANGED = ("fp8", "w8", "w8-g64", "w4")
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


def measured(reference, asked, said, start, k):
    """Distances by server, level, text and position; of the control too. said, start: answers of each server,
    and at which text they begin."""
    found = {kind: {level: [] for level in LEVELS} for kind in ("control", *said)}
    for number, text in enumerate(asked):
        truth = reference.rows(reference.exact, text.ids, 1)
        own = reference.rows(reference.control, text.ids, 1)
        for level in LEVELS:
            mine = as_said(level, text.ids[1:], own, k)
            found["control"][level].append(distances(level, mine, truth, k).tolist())
            for kind, theirs in said.items():
                if 0 <= (at := number - start[kind]) < len(theirs):
                    positions = [
                        Position(token, value, tuple(map(tuple, top))) for token, value, top in theirs[at]
                    ]
                    found[kind][level].append(distances(level, positions, truth, k).tolist())
    return found


def power(scores, limit):
    spread = float(np.std(scores, ddof=1))
    return float(norm.sf((limit - np.mean(scores)) / spread)) if spread else float(np.mean(scores) > limit)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--profile", type=int, default=100)
    parser.add_argument("--held-out", type=int, default=20)
    parser.add_argument("--each", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--alpha", type=float, default=0.01)
    parser.add_argument("--changes", nargs="*", default=CHANGED)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-audit"))
    options = parser.parse_args()
    exact = bitassay.load(options.model)
    control = bitassay.load(options.model, dtype="bfloat16")
    reference = Reference(exact, control)
    asking = Asking("prompt-logprobs", "ids", "prompt_logprobs", 20, options.tokens + 1, 1, True)
    count = options.profile + options.held_out
    asked = texts(tokenizer(exact), "c4-train-new", (2026, 11), count, options.tokens + 1)
    vocabulary = Vocabulary(tokenizer(exact), vocabulary_size(exact))
    start = {kind: 0 if kind in HONEST else options.profile for kind in (*HONEST, *options.changes)}
    said = {}
    for kind, begin in start.items():
        path = options.out / f"{kind}.json"
        if not path.exists():
            theirs = asked if kind in HONEST else asked[begin:][: options.each]
            with serving(
                model_of(options.model, kind), identity(exact), options.out / f"server-{kind}"
            ) as url:
                write_json(path, answers(url, asking, theirs, vocabulary))
            print(f"{kind}: {len(theirs)} answers", flush=True)
        said[kind] = json.loads(path.read_text())
    path = options.out / "distances.json"
    if not path.exists():
        write_json(path, measured(reference, asked, said, start, asking.k))
    kept = json.loads(path.read_text())
    print("\n| evidence | served | positions | median | sd | caught | power |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for level in LEVELS:
        for n in sorted({4, 8, 16, 32, 64, options.tokens}):
            table(level, n, kept, options)


def table(level, n, kept, options):
    """Print the rows of one level and number of positions."""

    def scores(kind, begin=0):
        pairs = zip(kept[kind][level], kept["control"][level][begin:], strict=False)
        return np.array([statistic(level, np.mean(mine[:n]), np.mean(own[:n])) for mine, own in pairs])

    honest = {kind: scores(kind) for kind in HONEST}
    known = np.max([each[: options.profile] for each in honest.values()], axis=0)
    limit = threshold(known, options.alpha)
    for kind in (*HONEST, *options.changes):
        mine = honest[kind][options.profile :] if kind in HONEST else scores(kind, options.profile)
        caught = int(sum(p_value(each, known.tolist()) <= options.alpha for each in mine))
        of = f"{caught} of {len(mine)}"
        if kind in HONEST:
            low, high = clopper_pearson_interval(caught, len(mine))
            of += f" [{low:.1%}, {high:.1%}]"
        shown = "" if kind in HONEST else f"{power(mine, limit):.3f}"
        print(f"| {level} | {kind} | {n} | {np.median(mine):.2f} | {np.std(mine):.2f} | {of} | {shown} |")


if __name__ == "__main__":
    main()
