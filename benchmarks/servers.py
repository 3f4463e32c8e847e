"""Audits of real servers: how often are honest ones refused, and how many tokens tell each change?

Three kinds of questions are put to servers on 127.0.0.1, and every answer is kept, so that each is asked and
each is read by the reference only once:

    given    log-probabilities (top 20) of a text of 33 tokens (servers with `prompt_logprobs`)
    greedy   16 tokens at temperature 0 after a message in the model's chat template, with log-probabilities;
             after 24 tokens of text where it has no template
    sampled  16 tokens at temperature 1 and top-p 0.9 after the same

Levels of evidence are views of the answers: top 20, the chosen token's own, the tokens, the text, sampled
tokens. `ask` also stands between client and server as a host that changes requests (--alter), which is how a
host with another system prompt or sampler answers. Run, for each server:

    python benchmarks/servers.py ask NAME URL --kind greedy --begin 0 --count 128
    python benchmarks/servers.py judge
    python benchmarks/server_tables.py --honest ... --changed ...
"""

import argparse
import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import bitassay
from bitassay.audit.answering import Served, default_context
from bitassay.audit.asking import Asking, texts
from bitassay.audit.client import AnswerError, Endpoint, Target
from bitassay.audit.judge import Reference, measure
from bitassay.audit.server import Limits, make_app
from bitassay.audit.session import ask_all, positions_of, retokenized
from bitassay.audit.store import Store
from bitassay.audit.wire import Position, words_of
from bitassay.data.corpora import corpus
from bitassay.models.identity import tokenizer
from bitassay.models.walk import decoder_layers
from bitassay.quantization.inputs.kv_cache import KvCache, round_cache
from bitassay.record.files import read_json, write_json
from bitassay.record.run import RunFolder
from bitassay.testing.local_server import running
from bitassay.verification.attacks.hosts import low_rank_update, skip

GIVEN, MESSAGE, PLAIN, ANSWER, TOP, POOL = 33, 12, 24, 16, 20, 2000
CORPUS, SEED = "c4-train-new", 27
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
LEVELS = {
    "given": ("prompt-logprobs", "prompt-chosen"),
    "greedy": ("logprobs", "chosen", "tokens", "text"),
    "sampled": ("sampled",),
}


def asking_of(kind, llamacpp):
    level, through = LEVELS[kind][0], "prompt_logprobs" if kind == "given" else "generation"
    tokens = (GIVEN, 1) if kind == "given" else (0, ANSWER)
    return Asking(level, "ids", through, TOP, *tokens, extras=not llamacpp, llamacpp=llamacpp)


def questions(words, kind):
    """The pool of questions of a kind, the same for every server."""
    if kind == "given":
        return texts(words, CORPUS, (SEED, 0), POOL, GIVEN)
    if not words.chat_template:
        return texts(words, CORPUS, (SEED, 1), POOL, PLAIN)
    found = texts(words, CORPUS, (SEED, 1), POOL, MESSAGE)
    return [replace(each, ids=chat(words, each.text)) for each in found]


def chat(words, text, system=None):
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": text})
    return tuple(words.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


class Host(Endpoint):
    """A server behind a host that changes what it is asked. alter: a function of a request's body. twice:
    asks for one token first, so that a prefix cache has the whole prompt."""

    def __init__(self, url, alter, twice):
        super().__init__(url)
        self.alter, self.twice = alter, twice

    def post(self, path, body):
        body = self.alter(dict(body))
        if self.twice:
            super().post(path, body | {"max_tokens": 1})
        return super().post(path, body)


def alterations(words):
    """What hosts do to a request, by name."""

    def prompt(change):
        return lambda body: body | {"prompt": list(change(words.decode(body["prompt"]), body["prompt"]))}

    def message(text):
        return text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]

    def encoded(text):
        return words(text, add_special_tokens=False).input_ids

    concise = "You are a helpful assistant. Answer briefly and truthfully."
    return {
        "none": lambda body: body,
        "system": prompt(lambda text, _: chat(words, message(text), concise)),
        "no-system": prompt(lambda text, _: encoded(text[text.index("<|im_start|>user") :])),
        "template": prompt(lambda text, _: encoded(f"{SYSTEM}\n\nUser: {message(text)}\nAssistant:")),
        "template-newline": prompt(lambda text, _: encoded(text.removesuffix("\n"))),
        "truncated": prompt(lambda _, ids: ids[-16:]),
        "one-token-less": prompt(lambda _, ids: ids[1:]),
        "temperature-0.8": lambda body: body | {"temperature": 0.8},
        "top-p-ignored": lambda body: body | {"top_p": 1.0},
    }


def ask(options):
    """Ask one server its questions; the same command goes on."""
    known, _ = words_of(options.model)
    words = known.tokenizer
    change = alterations(words)[options.alter]
    if options.cache:
        inner = change
        change = lambda body: inner(body) | {"cache_prompt": True}  # noqa: E731
    target = Target(Host(options.url, change, options.twice), options.served_as)
    settings = vars(options) | {"out": str(options.out), "seed": SEED, "work": None}
    plan = {key: settings[key] for key in ("model", "alter", "cache", "twice", "llamacpp", "seed")}
    run = RunFolder(options.out / options.name, plan)
    for kind in options.kind:
        asked = questions(words, kind)[options.begin : options.begin + options.count]
        named = {f"{kind}-{options.begin + n:05d}": text for n, text in enumerate(asked)}
        begun, asking = time.monotonic(), asking_of(kind, options.llamacpp)
        ask_all(run, target, asking, named, known, options.concurrency, lambda *_: None)
        print(f"{options.name}: {kind} {len(named)} in {time.monotonic() - begun:.0f} s", flush=True)


def ours(options):
    """Ask `bitassay serve`, in this process, of the model and of changed ones."""
    for change in options.change:
        options.name, honest = f"ours-{change}", change == "none"
        model = bitassay.load(options.model, dtype=options.dtype, attention=options.attention)
        with ExitStack() as stack, TemporaryDirectory() as folder:
            model = changed(model, options.model, change, stack)
            if honest:
                options.name = f"ours-{options.label}"
            store = Store(Path(folder), Ed25519PrivateKey.generate())
            app = make_app(Served(model, store, "m", default_context(model)), Limits())
            stack.callback(app.server.scheduler.stop)
            options.url = stack.enter_context(running(app)) + "/v1"
            ask(options)


def changed(model, name, change, stack):
    """The model that a host serves instead. stack: ends what is changed in place."""
    match change:
        case "none":
            return model
        case "half-depth":
            stack.enter_context(skip(model, len(decoder_layers(model)) // 2))
        case "low-rank-0.01":
            stack.enter_context(low_rank_update(model, 0.01))
        case "fine-tuned":
            fine_tune(model, name)
        case "kv-int8" | "kv-int4":
            round_cache(model, KvCache(format=change.removeprefix("kv-"), scale_dtype="float32"))
        case "w8-g64" | "int4-absmax":
            form = {"w8-g64": "int8", "int4-absmax": "int4"}[change]
            weights = {"format": form, "granularity": "g64"}
            return bitassay.quantize(model, recipe=bitassay.Recipe(name=change, weights=weights))
        case _:
            return bitassay.quantize(model, recipe=change)
    return model


def fine_tune(model, name, steps=24, batch=4, length=64, rate=1e-5):
    """Take a few steps of AdamW on WikiText-2, in float32, as any fine-tune begins."""
    trained = bitassay.load(name, dtype="float32").requires_grad_(True)
    text = corpus("wikitext2-raw").text[: 8 * steps * batch * length]
    ids = torch.tensor(tokenizer(trained)(text, verbose=False).input_ids)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=rate)
    for step in range(steps):
        piece = ids[step * batch * length :][: batch * length].reshape(batch, length)
        trained(input_ids=piece, labels=piece).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for mine, new in zip(model.parameters(), trained.parameters(), strict=True):
            mine.copy_(new)


def judge(options):
    """Read every answer that has not been read yet: of each question those of all servers together."""
    exact = bitassay.load(options.model)
    reference = Memory(exact, bitassay.load(options.model, dtype="bfloat16"))
    until = time.monotonic() + 60 * options.minutes
    waiting = defaultdict(list)
    for path in sorted(options.out.glob("*/parts/*-*.json")):
        name, question = path.parts[-3], path.stem
        if name != "scores" and not (options.out / "scores" / f"{name}-{question}.json").exists():
            waiting[question].append((name, path))
    for done, (question, found) in enumerate(sorted(waiting.items())):
        reference.known.clear()
        for name, path in found:
            scored = scores(reference, question.split("-")[0], read_json(path))
            write_json(options.out / "scores" / f"{name}-{question}.json", scored)
        if time.monotonic() > until:
            sys.exit(f"{len(waiting) - done - 1} questions are left; the same command goes on")


class Memory(Reference):
    """A reference that reads the same tokens once."""

    known: ClassVar[dict] = {}

    def rows(self, model, ids, start):
        key = (model is self.exact, tuple(ids), start)
        if key not in self.known:
            self.known[key] = super().rows(model, ids, start)
        return self.known[key]


def scores(reference, kind, answer):
    """The statistic of an answer at each level; of one that has none, why."""
    if "error" in answer:
        return {"error": answer["error"]}
    asking, found = asking_of(kind, False), {"problems": {}}
    output = positions_of(answer, asking)
    views = {
        "tokens": [Position(each.token) for each in output],
        "text": retokenized(tokenizer(reference.exact), answer["prompt_ids"], answer["text"]),
    }
    views["sampled"] = views["tokens"]
    found["ids"] = [each.token for each in output]
    if kind != "given" and output:
        ids, start = asking.read_as(answer["prompt_ids"], found["ids"])
        found |= peers_statistics(reference.rows(reference.exact, ids, start), found["ids"])
    for level in LEVELS[kind]:
        viewed = replace(asking, level=level, k=1 if level.endswith("chosen") else TOP)
        try:
            found[level] = asdict(
                measure(reference, viewed, answer["prompt_ids"], views.get(level, output)[: asking.positions])
            )
        except AnswerError as error:
            found["problems"][level] = error.code
    return found


def peers_statistics(rows, ids):
    """What token-DiFR (share of the reference's own choices, mean margin) and RUT (mean logarithm of the
    ranks) reduce an answer to."""
    chosen = rows[np.arange(len(ids)), ids]
    ranks = (rows > chosen[:, None]).sum(1)
    return {
        "matches": float((ranks == 0).mean()),
        "margin": float((rows.max(1) - chosen).mean()),
        "log_rank": float(np.log1p(ranks).mean()),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-servers"))
    parser.add_argument("--model", default="smollm2-135m")
    verbs = parser.add_subparsers(required=True)
    asks = verbs.add_parser("ask")
    asks.add_argument("name")
    asks.add_argument("url")
    asks.add_argument("--served-as", default="m")
    asks.add_argument("--kind", nargs="+", choices=LEVELS, default=["greedy"])
    asks.add_argument("--begin", type=int, default=0)
    asks.add_argument("--count", type=int, default=128)
    asks.add_argument("--concurrency", type=int, default=4)
    asks.add_argument("--alter", default="none")
    asks.add_argument("--cache", action="store_true", help="llama.cpp: with its prompt cache")
    asks.add_argument("--twice", action="store_true", help="ask each prompt twice, keep the second answer")
    asks.add_argument("--llamacpp", action="store_true")
    asks.set_defaults(work=ask)
    mine = verbs.add_parser("ours")
    mine.add_argument("change", nargs="+")
    mine.add_argument("--label", default="honest")
    mine.add_argument("--dtype", default="bfloat16")
    mine.add_argument("--attention", default="eager", help="sdpa is what the control computes")
    mine.add_argument("--kind", nargs="+", choices=LEVELS, default=["greedy", "given"])
    mine.add_argument("--begin", type=int, default=0)
    mine.add_argument("--count", type=int, default=40)
    mine.add_argument("--concurrency", type=int, default=4)
    mine.set_defaults(work=ours, alter="none", cache=False, twice=False, llamacpp=False, served_as="m")
    judges = verbs.add_parser("judge")
    judges.add_argument("--minutes", type=float, default=12)
    judges.set_defaults(work=judge)
    options = parser.parse_args()
    options.work(options)


if __name__ == "__main__":
    main()
