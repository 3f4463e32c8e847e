"""Does `serve` survive its clients, and `audit` its servers? Four checks on 127.0.0.1, of a tiny model.

    requests    500 by the official `openai` client, 8 at a time: streamed or not, greedy and seeded. Each
                answer must be what the engine alone makes of that prompt and seed, each receipt on the disk,
                signed, and of these tokens.
    kills       a server is killed (SIGKILL) amid the answers of 8 clients, after some have come, again and
                again: every answer that a client received must have its receipt on the disk.
    serve       --minutes of changed requests: bodies, headers, paths, and connections that break. The server
                must answer what is HTTP with a status below 500 (or 507), go on, and not grow.
    client      --minutes of changed answers to audits: JSON whose nodes are changed, bytes that are flipped,
                statuses, types, redirects, endless and slow answers. Only errors with a name may come, the
                trap to which redirects and links point must never be asked, and memory must stay bounded.

Run: python benchmarks/endpoints.py requests|kills|serve|client [--minutes 10] [--seed 0]
"""

import argparse
import copy
import json
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import numpy as np
import openai
import psutil
from fuzz import ODD, dump, edited, flip

from bitassay.audit.asking import Asking, Text, body_of
from bitassay.audit.client import AnswerError, Endpoint, Target
from bitassay.audit.judge import Reference, measure
from bitassay.audit.session import ask_once, positions_of
from bitassay.audit.wire import Vocabulary
from bitassay.engines.decode import generate, vocabulary_size
from bitassay.engines.sampling import Sampler
from bitassay.testing.tiny import stories260k
from bitassay.verification.receipts.receipt import read_receipt

TEXT = "Once upon a time there was a little girl who lived near the sea"
MEGABYTES, SECONDS = 200, 20
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


@contextmanager
def serving(folder, *words):
    """`bitassay serve` in a process of its own; yield its address and the process."""
    command = [sys.executable, "-m", "bitassay.cli", "serve", "stories260k", "--port", "0", "--store", folder]
    process = subprocess.Popen([*map(str, command), *words], stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if found := re.search(r"at (http://\S+)/v1", line):
                threading.Thread(target=process.stderr.read, daemon=True).start()
                yield found[1], process
                return
        raise SystemExit("the server did not start")
    finally:
        process.kill()
        process.wait()


# --- 500 requests ---


def requests(options):
    """Ask by the openai client and compare with the engine."""
    model = stories260k("bfloat16")
    words = model.tokenizer
    draw = random.Random(options.seed)
    letters = "abcdefghijklmnopqrstuvwxyz "
    asked = []
    for number in range(options.count):
        prompt = "".join(draw.choice(letters) for _ in range(draw.randrange(5, 60))) + str(number)
        seed = None if draw.random() < 0.5 else draw.randrange(2**31)
        asked.append((prompt, seed, draw.random() < 0.5, draw.randrange(1, 12)))
    with tempfile.TemporaryDirectory() as folder, serving(folder) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def ask(one):
            prompt, seed, is_streamed, tokens = one
            said = client.completions.create(
                model="stories260k", prompt=prompt, max_tokens=tokens, seed=seed, stream=is_streamed,
                temperature=0 if seed is None else 1,
            )  # fmt: skip
            if not is_streamed:
                return said.choices[0].text, said.receipt
            events = list(said)
            return "".join(each.choices[0].text for each in events), events[-1].receipt

        begun = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, asked))
        took = time.monotonic() - begun
        wrong = Counter()
        for (prompt, seed, _, tokens), (text, said) in zip(asked, answers, strict=True):
            ids = words(prompt).input_ids
            sampler = Sampler() if seed is None else Sampler(1.0, 1.0, seed)
            (made,) = generate(model, [ids], max_new_tokens=tokens, sampler=sampler, nonces=["0"])
            whole = words.decode([*ids[-4:], *made.output_ids], skip_special_tokens=True)
            wrong["text"] += text != whole[len(words.decode(ids[-4:], skip_special_tokens=True)) :]
            header = read_receipt(Path(folder) / "receipts" / said["id"]).header  # checks the signature
            wrong["receipt"] += (list(header.prompt_ids), header.output_ids) != (ids, made.output_ids)
        names = {said["id"] for _, said in answers}
        print(f"{len(answers)} answers in {took:.0f} s, {len(names)} receipts; wrong: {dict(wrong)}")


def kills(options):
    """Kill a server amid answers; look for the receipts of those that came."""
    draw, received, lost, amid, cut = random.Random(options.seed), 0, 0, 0, 0
    for number in range(options.kills):
        with tempfile.TemporaryDirectory() as folder, serving(folder) as (url, process):
            names, broken = [], []

            def ask(number, url=url, names=names, broken=broken):
                with httpx2.Client(trust_env=False, timeout=60) as web:
                    for turn in range(10**6):
                        body = {"prompt": f"{TEXT} {number} {turn}", "max_tokens": 1 + turn % 4}
                        try:
                            said = web.post(f"{url}/v1/completions", json=body)
                        except httpx2.HTTPError as error:
                            broken.append(error)
                            return
                        names.append(said.json()["receipt"]["id"])

            threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
            for thread in threads:
                thread.start()
            wanted, until = draw.randrange(1, 60), time.monotonic() + 60
            while len(names) < wanted and time.monotonic() < until:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
            for thread in threads:
                thread.join()
            received, cut = received + len(names), cut + len(broken)
            amid += bool(names) and bool(broken)
            for name in names:
                try:
                    read_receipt(Path(folder) / "receipts" / name)
                except Exception as error:
                    lost += 1
                    print(name, error)
            print(f"kill {number + 1}: {len(names)} answers, {len(broken)} cut off", flush=True)
    print(f"{options.kills} kills, {amid} amid answers: {received} received, {cut} cut off;", end=" ")
    print(f"{lost} of those received without a sound receipt")


# --- fuzzing the server ---

BODY = {
    "model": "stories260k", "prompt": TEXT, "max_tokens": 2, "temperature": 1.0, "top_p": 0.9, "seed": 3,
    "stop": ["xx"], "logprobs": 3, "prompt_logprobs": 2, "echo": False, "stream": False, "nonce": "a",
    "return_token_ids": True, "n": 1, "user": "u", "stream_options": {"include_usage": True},
}  # fmt: skip
CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "logprobs": True, "top_logprobs": 2}
CHALLENGE = {"challenge": 1, "commitment": "0" * 64, "beacon": "1" * 64, "generated": 4, "prompt": 2}
PATHS = [
    *["/v1/completions"] * 6,
    *["/v1/chat/completions"] * 2,
    *("/v1/openings", "/v1/models", "/v1/receipts/" + "0" * 64, "/v1/receipts/../key.pem"),
    *("/metrics", "/%00", "/v1/" + "a" * 5000),
]


def much_edited(tree, choose, times):
    """A value with a few nodes changed, as bytes; no JSON where it is too deep."""
    try:
        for _ in range(times):
            tree = edited(tree, choose)
        return dump(tree)
    except (ValueError, RecursionError, OverflowError, UnicodeEncodeError):
        return choose.choice([b"{", b"[" * 10**5])


def request_of(choose):
    """The bytes of a changed request, and whether they are whole."""
    path = choose.choice(PATHS)
    seed = {"/v1/chat/completions": CHAT, "/v1/openings": CHALLENGE}.get(path, BODY)
    body = much_edited(copy.deepcopy(seed), choose, choose.choice([0, 1, 1, 2, 4]))
    if choose.random() < 0.15:
        body = flip(body, choose, b"")
    method = choose.choice(["POST"] * 8 + ["GET", "PUT", "DELETE", "BREW"])
    length = len(body) if choose.random() < 0.9 else choose.choice([0, 1, len(body) * 2, 10**9, -1])
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {length}", "Connection: close"]
    if choose.random() < 0.1:
        name = choose.choice(["Authorization", "Content-Type", "Expect", "X" * 3000])
        lines.append(f"{name}: {choose.choice(ODD)!s:.4000}")
    head = "\r\n".join(lines).encode("utf-8", "replace")
    if choose.random() < 0.05:
        head = flip(head, choose, b"")
    data = head + b"\r\n\r\n" + body
    if choose.random() < 0.05:
        return data[: choose.randrange(len(data))], False
    return data, length == len(body)


def fuzz_server(options):
    choose, outcomes = random.Random(options.seed), Counter()
    with tempfile.TemporaryDirectory() as folder, serving(folder, "--disk", "300MB") as (url, process):
        host, port = url.removeprefix("http://").split(":")
        watched = psutil.Process(process.pid)
        until, count, start, slowest = time.monotonic() + 60 * options.minutes, 0, None, 0.0
        while time.monotonic() < until:
            (data, is_whole), begun = request_of(choose), time.monotonic()
            said = b""
            with suppress(OSError), socket.create_connection((host, int(port)), timeout=SECONDS) as line:
                line.sendall(data)
                if not is_whole:
                    line.shutdown(socket.SHUT_WR)
                if choose.random() < 0.95:
                    while piece := line.recv(2**16):
                        said += piece
                else:
                    said = b"left"
            status = "left" if said else "closed"
            if said.startswith(b"HTTP/1.1 "):
                status = said.split(b" ")[1].decode()
            outcomes[status] += 1
            count += 1
            slowest = max(slowest, time.monotonic() - begun)
            if process.poll() is not None or (status.startswith("5") and status != "507"):
                sys.exit(f"status {status}, process {process.poll()}, after {data[:3000]!r}: {said[:500]!r}")
            if count % 500 == 0:
                now = watched.memory_info().rss / 2**20
                start = start or now
                if now - start > MEGABYTES:
                    sys.exit(f"the server grew by {now - start:.0f} MB")
                print(f"{count}: {now:.0f} MB, {dict(outcomes)}", flush=True)
        ask = {"prompt": TEXT, "max_tokens": 2}
        after = httpx2.post(f"{url}/v1/completions", json=ask, trust_env=False, timeout=30).status_code
        now = watched.memory_info().rss / 2**20
        print(f"{count} requests, {dict(outcomes)}; then {after}")
        print(f"slowest {slowest:.1f} s; grew {now - (start or now):.0f} MB")


# --- fuzzing the client ---


STATUSES = [400, 401, 403, 404, 408, 418, 429, 500, 502, 503, 504]
KINDS = ["text/html", "", "application/jsonp", "text/event-stream"]


def reply(status, body, *headers, kind="application/json"):
    length = f"Content-Length: {len(body)}"
    lines = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", length, "Connection: close", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "replace") + body


def hostile_reply(seeds, choose, trap):
    """What a hostile server sends: a function of a connection."""
    value = copy.deepcopy(choose.choice(seeds))
    kind = choose.random()
    if kind < 0.6:
        data = reply(200, much_edited(value, choose, choose.choice([1, 1, 2, 3])))
        if choose.random() < 0.2:
            data = flip(data, choose, b"")
        if choose.random() < 0.1:
            data = data[: choose.randrange(len(data))]
        return lambda line: line.sendall(data)
    if kind < 0.9:
        body = dump(value)
        odd = [
            reply(choose.choice([301, 302, 303, 307, 308]), b"", f"Location: {trap}/stolen"),
            reply(choose.choice(STATUSES), body, f"Retry-After: {choose.choice(ODD)!s:.40}"),
            reply(200, body, kind=choose.choice(KINDS)),
            reply(200, body, "Content-Encoding: gzip"),
            reply(200, body, f"Refresh: 0; url={trap}", f"Link: <{trap}>; rel=preload"),
            reply(200, b"", "Transfer-Encoding: chunked"),
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFF\r\n",
            b"HTTP/1.1 200 OK\r\n" + b"X: " + b"a" * 2**20,
            b"HTTP/1.1 103 X\r\n\r\n" * choose.choice([1, 10**4]) + reply(200, body),
            b"SSH-2.0-x\r\n", b"", b"\x16\x03\x01\x00\x05hello",
        ]  # fmt: skip
        sent = choose.choice(odd)
        return lambda line: line.sendall(sent)
    if kind < 0.95:

        def slow(line):
            line.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
            for _ in range(100):
                line.sendall(b" ")
                time.sleep(0.02)

        return slow

    def endless(line):
        line.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
        for _ in range(1600):
            line.sendall(b" " * 2**16)  # 100 MB in all

    return endless


def fuzz_client(options):
    model = stories260k("bfloat16")
    words = model.tokenizer
    words.chat_template = TEMPLATE
    reference = Reference(stories260k("float32"), model)
    vocabulary = Vocabulary(words, vocabulary_size(model))
    choose, outcomes = random.Random(options.seed), Counter()
    text = Text(TEXT, tuple(words(TEXT).input_ids[:12]))
    asked = [
        Asking("prompt-logprobs", "ids", "prompt_logprobs", 5, 12, 1, True),
        Asking("prompt-chosen", "ids", "echo", 1, 12, 0, True),
        Asking("logprobs", "ids", "generation", 5, 12, 6, True),
        Asking("logprobs", "chat", "generation", 5, 12, 6, False),
        Asking("tokens", "text", "generation", 1, 12, 6, True),
        Asking("text", "text", "generation", 0, 12, 6, False),
        Asking("sampled", "ids", "generation", 0, 12, 6, True),
    ]
    with tempfile.TemporaryDirectory() as folder, serving(folder) as (url, _):
        honest = Endpoint(f"{url}/v1")
        seeds = []
        for asking in asked:
            with suppress(AnswerError):  # the tiny model's own tokenizer has no chat template
                seeds.append(honest.post(*body_of(asking, "stories260k", text)))
    line, trapped = socket.create_server(("127.0.0.1", 0)), []
    trap_line = socket.create_server(("127.0.0.1", 0))
    trap = f"http://127.0.0.1:{trap_line.getsockname()[1]}"

    def trapping():
        while True:
            trapped.append(trap_line.accept()[0].recv(2**16))

    def answering():
        while True:
            with suppress(OSError), line.accept()[0] as one:
                one.settimeout(5)
                one.recv(2**16)
                hostile_reply(seeds, choose, trap)(one)

    for work in (trapping, answering):
        threading.Thread(target=work, daemon=True).start()
    url = f"http://127.0.0.1:{line.getsockname()[1]}/v1"
    target = Target(Endpoint(url, seconds=1, tries=2, sleep=lambda _: None), "m")
    process, count, largest, slowest, start = psutil.Process(), 0, 0.0, 0.0, None
    until, pick = time.monotonic() + 60 * options.minutes, random.Random(options.seed + 1)
    while time.monotonic() < until:
        asking, begun = pick.choice(asked), time.monotonic()
        try:
            kept = ask_once(target, asking, text, vocabulary)
            if "error" in kept:
                outcomes[kept["error"]] += 1
            else:
                said = positions_of(kept, asking)
                found = measure(reference, asking, kept["prompt_ids"], said) if said else None
                assert found is None or np.isfinite(found.score)
                outcomes["judged" if found else "no-evidence"] += 1
        except AnswerError as error:
            outcomes[error.code] += 1
        count += 1
        slowest = max(slowest, time.monotonic() - begun)
        now = process.memory_info().rss / 2**20
        start = start or now
        largest = max(largest, now - start)
        assert largest < MEGABYTES, f"grew by {largest:.0f} MB: {dict(outcomes)}"
        assert not trapped, trapped[:1]
        if count % 1000 == 0:
            print(f"{count}: {dict(outcomes)}", flush=True)
    print(f"{count} answers, {json.dumps(outcomes)}")
    print(f"grew {largest:.0f} MB, slowest {slowest:.1f} s; trap asked {len(trapped)} times")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["requests", "kills", "serve", "client"])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    {"requests": requests, "kills": kills, "serve": fuzz_server, "client": fuzz_client}[options.what](options)


if __name__ == "__main__":
    main()
