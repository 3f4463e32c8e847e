"""What hosts can do who know how an audit judges, what it costs them, and what catches it.

The honest server computes in bfloat16 with eager attention; its answers to the first texts are the profile,
and the reference reads all texts (log-probabilities of given tokens, top 20). Each adversary is a function of
what the honest and the cheap model say of the other texts:

    cheap            the cheap model, nothing hidden
    routes           the cheap model answers one request in ten
    noisy            Gaussian noise on every log-probability
    rounded          every log-probability rounded to a step; also where the honest server rounds as well
    cached           honest values of another text under this one's tokens
    recognises       the honest model for what it takes for audits, the cheap one for all else
    honest readings  the cheap model's greedy tokens, with log-probabilities that the honest model gives them

Printed: the share of single requests and of audits of 4, 16 and 64 requests (500, drawn) that are refused at
--alpha, and the median number of requests until a ledger's alarm, of 20 orders of at most 400. Run:

    python benchmarks/adversaries.py [MODEL] [--profile 100] [--texts 100] [--tokens 32]
"""

import argparse
from dataclasses import replace

import numpy as np

import bitassay
from bitassay.audit.answering import prompt_entries
from bitassay.audit.asking import Text, texts
from bitassay.audit.distance import as_said, distances, statistic
from bitassay.audit.judge import Reference
from bitassay.audit.wire import Position
from bitassay.engines.decode import generate
from bitassay.models.identity import tokenizer
from bitassay.verification.pooled import fail_count, pooled_p_value
from bitassay.verification.scores import p_value
from bitassay.verification.sequential import alarm_at, log_wealth

TOP, PROMPT = 20, 32
LEVEL = "prompt-logprobs"
ORDERS, LONGEST, AUDITS = 20, 400, 500


def said_of(model, asked):
    """What a model says of each text."""
    return [
        [Position(each.token, each.logprob, each.top) for each in prompt_entries(model, text.ids, TOP)]
        for text in asked
    ]


def changed(said, change):
    """Every log-probability of an answer, changed."""
    return [
        replace(
            each,
            logprob=change(each.logprob),
            top=tuple((token, change(value)) for token, value in each.top),
        )
        for each in said
    ]


def noisy(said, sigma, draw):
    return changed(said, lambda value: min(value + sigma * draw.normal(), 0.0))


def rounded(said, step):
    return changed(said, lambda value: round(value / step) * step)


def cached(said, other):
    """Values of another text, under this one's tokens."""
    return [
        replace(mine, logprob=theirs.logprob, top=theirs.top)
        for mine, theirs in zip(said, other, strict=True)
    ]


def scores(answers, rows):
    """The statistic of each answer. rows: of each text those of the reference and of its control."""
    found = []
    for said, (truth, control) in zip(answers, rows, strict=True):
        own = as_said(LEVEL, [each.token for each in said], control, TOP)
        means = [float(distances(LEVEL, each, truth, TOP).mean()) for each in (said, own)]
        found.append(statistic(LEVEL, *means))
    return np.array(found)


def refused(p_values, n, alpha):
    """Whether an audit of several answers is refused, as `judge.decide` decides it."""
    tests = pooled_p_value(p_values, n), fail_count(p_values, n, alpha)
    return min(tests) <= alpha / 2


def row(name, mine, honest, alpha):
    """One line: how often requests and audits with these statistics are refused. mine: the statistics of
    requests that are equally likely."""
    p_values = np.array([p_value(each, honest.tolist()) for each in mine])
    shares = [f"{np.mean(p_values <= alpha):.0%}"]
    draw = np.random.default_rng(0)
    for size in (4, 16, 64):
        drawn = (draw.choice(p_values, size, replace=size > len(p_values)).tolist() for _ in range(AUDITS))
        shares.append(f"{np.mean([refused(some, len(honest), alpha) for some in drawn]):.1%}")
    alarms = []
    for _ in range(ORDERS):
        looks = np.unique(np.geomspace(1, LONGEST, 40).astype(np.int64))
        wealth = log_wealth(draw.choice(mine, LONGEST), honest, looks)
        at = alarm_at(wealth, alpha / 2)
        alarms.append(np.inf if at is None else looks[at - 1])
    median = np.median(alarms)
    said = f"over {LONGEST}" if np.isinf(median) else f"{median:.0f}"
    print(f"| {name} | {' | '.join(shares)} | {said} |", flush=True)


def greedy_scores(reference, host, models, asked, tokens):
    """Of each model its greedy answers as statistics: by the tokens, and by the log-probabilities that the
    honest host gives them."""
    found = {name: {"tokens": [], "logprobs": []} for name in models}
    prompts = [text.ids[:PROMPT] for text in asked]
    for name, model in models.items():
        for prompt in prompts:
            (made,) = generate(model, [prompt], max_new_tokens=tokens)
            output = list(made.output_ids)
            ids = [*prompt, *output]
            truth = reference.rows(reference.exact, ids, len(prompt))
            control = reference.rows(reference.control, ids, len(prompt))
            (read,) = said_of(host, [Text("", tuple(ids))])
            said = {"tokens": [Position(token) for token in output], "logprobs": read[len(prompt) - 1 :]}
            for level, positions in said.items():
                own = as_said(level, output, control, TOP)
                means = [float(distances(level, each, truth, TOP).mean()) for each in (positions, own)]
                found[name][level].append(statistic(level, *means))
    return {name: {level: np.array(each) for level, each in by.items()} for name, by in found.items()}


def honest_readings(reference, host, cheap, asked, options):
    """Print the table of hosts that answer by the cheap model and report the honest one's values."""
    print("\nGreedy tokens, whose log-probabilities the honest model gives:\n")
    heading = "requests | audits of 4 | audits of 16 | of 64 | requests until the ledger's alarm"
    print(f"| tokens by, evidence | {heading} |")
    print("|---|---:|---:|---:|---:|---:|")
    n, length = options.profile, 2 * options.tokens
    known = greedy_scores(reference, host, {"honest": host}, asked[:n], length)["honest"]
    found = greedy_scores(reference, host, {"honest": host} | cheap, asked[n:], length)
    for kind, by_level in found.items():
        for level, mine in by_level.items():
            row(f"{kind}, {level}", mine, known[level], options.alpha)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="stories260k")
    parser.add_argument("--profile", type=int, default=100)
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--alpha", type=float, default=0.01)
    parser.add_argument("--only-readings", action="store_true", help="the second table alone")
    options = parser.parse_args()
    name, n, draw = options.model, options.profile, np.random.default_rng(1)
    exact = bitassay.load(name)
    reference = Reference(exact, bitassay.load(name, dtype="bfloat16"))
    host = bitassay.load(name, dtype="bfloat16", attention="eager")
    cheap = {
        kind: bitassay.quantize(bitassay.load(name, dtype="bfloat16"), recipe=kind) for kind in ("w8", "w4")
    }
    if options.only_readings:
        longer = texts(tokenizer(exact), "c4-train-new", (2026, 13), n + options.texts, PROMPT + 1)
        return honest_readings(reference, host, cheap, longer, options)
    asked = texts(tokenizer(exact), "c4-train-new", (2026, 12), n + options.texts, options.tokens + 1)
    rows = [[reference.rows(model, text.ids, 1) for model in (exact, reference.control)] for text in asked]
    honest = said_of(host, asked)
    known = scores(honest[:n], rows[:n])
    mine = {"honest": honest[n:]} | {kind: said_of(model, asked[n:]) for kind, model in cheap.items()}
    rest = rows[n:]
    print("| host | requests | audits of 4 | audits of 16 | of 64 | requests until the ledger's alarm |")
    print("|---|---:|---:|---:|---:|---:|")
    by_kind = {kind: scores(said, rest) for kind, said in mine.items()}
    for kind, found in by_kind.items():
        row(kind, found, known, options.alpha)
    for kind in cheap:
        mixed = np.concatenate([by_kind[kind], np.repeat(by_kind["honest"], 9)])
        row(f"{kind} for 10 % of the requests", mixed, known, options.alpha)
    for sigma in (0.02, 0.1):
        for kind, said in mine.items():
            found = scores([noisy(each, sigma, draw) for each in said], rest)
            row(f"{kind}, noise of {sigma} nats", found, known, options.alpha)
    for step in (1 / 16, 0.5, 2.0):
        profile = scores([rounded(each, step) for each in honest[:n]], rows[:n])
        for kind, said in mine.items():
            found = scores([rounded(each, step) for each in said], rest)
            row(f"{kind}, rounded to {step:g}", found, known, options.alpha)
            row(f"{kind}, rounded to {step:g} as honest servers are", found, profile, options.alpha)
    turned = [cached(each, mine["honest"][at - 1]) for at, each in enumerate(mine["w4"])]
    row("honest values of other texts", scores(turned, rest), known, options.alpha)
    longer = texts(tokenizer(exact), "c4-train-new", (2026, 13), n + options.texts, PROMPT + 1)
    honest_readings(reference, host, cheap, longer, options)


if __name__ == "__main__":
    main()
