"""A hostile server on 127.0.0.1: every fault has its name, memory is bounded, and nothing else is asked."""

import json
import socket
import threading
from contextlib import contextmanager, suppress

import numpy as np
import pytest

from bitassay.audit.client import AnswerError, Endpoint, checked_url, strict_json
from bitassay.audit.distance import as_said, distances, statistic, top_distance
from bitassay.audit.wire import Position, Vocabulary, read_answer
from bitassay.errors import BitassayError

KEY = "sk-hostile-0123456789"
OK = b'{"choices": [{"text": "a"}]}'


def reply(status, body, kind="application/json", *more):
    lines = [
        f"HTTP/1.1 {status} X",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *more,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


@contextmanager
def hostile(*replies):
    """A server that gives each of `replies` to one connection, the last to all further ones; yields its
    address and what it was asked."""
    asked, listening = [], socket.create_server(("127.0.0.1", 0))
    listening.settimeout(0.05)
    stop = threading.Event()

    def serve():
        number = 0
        while not stop.is_set():
            try:
                line, _ = listening.accept()
            except TimeoutError:
                continue
            with line:
                line.settimeout(30)
                asked.append(line.recv(2**16))
                answer = replies[min(number, len(replies) - 1)]
                number += 1
                with suppress(OSError):
                    answer(line) if callable(answer) else line.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1", asked
    finally:
        stop.set()
        thread.join()
        listening.close()


def endpoint(url, **options):
    return Endpoint(url, **({"sleep": lambda _: None, "tries": 3, "seconds": 5} | options))


def endless(line):
    line.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    for _ in range(200):
        line.sendall(b" " * 2**16)


def drips(line):
    line.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    for _ in range(6000):  # until the client hangs up
        line.sendall(b" ")
        threading.Event().wait(0.01)


def drips_headers(line):
    line.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    for _ in range(6000):
        line.sendall(b"a")
        threading.Event().wait(0.01)


def informs(line):
    for _ in range(6000):
        line.sendall(b"HTTP/1.1 103 Early Hints\r\nX: a\r\n\r\n")
        threading.Event().wait(0.01)


FAULTS = {
    "redirect": reply(307, b"", "text/plain", "Location: http://127.0.0.1:1/stolen"),
    "wrong-type": reply(200, b"<html>", "text/html"),
    "not-json": reply(200, OK[:-5]),
    "not-finite": reply(200, b'{"a": NaN}'),
    "status-404": reply(404, b"no model"),
    "status-500": reply(500, b"down"),
    "status-429": reply(429, b"slowly", "text/plain", "Retry-After: 1"),
    "broken": lambda line: None,
    "too-large": endless,
    "timeout": drips,
}


@pytest.mark.parametrize("code", FAULTS)
def test_each_fault_has_its_name(code):
    with hostile(FAULTS[code]) as (url, asked), pytest.raises(AnswerError) as error:
        endpoint(url, answer_bytes=2**20, seconds=0.2 if code == "timeout" else 5).post("/completions", {})
    assert error.value.code == code
    assert len(asked) == (
        3 if code in ("status-500", "status-429", "broken") else 1 if code != "timeout" else len(asked)
    )


def test_what_passes_is_tried_again_and_waits_are_as_asked():
    waits = []
    faults = (
        FAULTS["broken"],
        FAULTS["status-500"],
        reply(429, b"", "text/plain", "Retry-After: 7"),
        reply(200, OK),
    )
    with hostile(*faults) as (url, asked):
        assert endpoint(url, tries=4, sleep=waits.append).post("/completions", {}) == json.loads(OK)
    assert len(asked) == 4
    assert waits[2] == 7
    assert all(0 < wait < 10 for wait in waits)


@pytest.mark.parametrize("never", [drips_headers, informs])
def test_the_time_of_an_answer_is_that_of_its_headers_too(never):
    with hostile(never) as (url, asked), pytest.raises(AnswerError) as error:
        endpoint(url, seconds=0.2, tries=6).post("/completions", {})
    assert error.value.code == "timeout"
    assert len(asked) == 2


def test_a_deadline_is_that_of_the_request_under_way():
    with hostile(reply(200, OK)) as (url, _):
        target = endpoint(url, seconds=5)
        target._deadline.until = 0.0
        assert target.post("/completions", {}) == json.loads(OK)


@pytest.mark.parametrize(("status", "hint"), [(401, "--key-env"), (404, "/v1")])
def test_what_to_try_where_a_server_refuses(status, hint):
    with hostile(reply(status, b"no")) as (url, _), pytest.raises(AnswerError) as error:
        endpoint(url).post("/completions", {})
    assert hint in error.value.remedy


def test_a_server_that_is_not_there():
    with pytest.raises(AnswerError, match="cannot be reached") as error:
        endpoint("http://127.0.0.1:1/v1").get("/models")
    assert error.value.code == "unreachable"


def test_a_key_that_is_sent_back_is_taken_out(monkeypatch):
    monkeypatch.setenv("HOSTILE", KEY)
    said = json.dumps({"choices": [{"text": f"your key is {KEY}"}]}).encode()
    with hostile(reply(200, said), reply(404, KEY.encode())) as (url, asked):
        target = endpoint(url, key_env="HOSTILE")
        assert target.post("/completions", {})["choices"][0]["text"] == "your key is ***"
        with pytest.raises(AnswerError) as error:
            target.post("/completions", {})
    assert KEY not in str(error.value)
    assert all(
        f"authorization: bearer {KEY}" in each.decode().lower().replace(KEY.lower(), KEY) for each in asked
    )
    assert KEY not in repr(vars(target)["url"])


@pytest.mark.parametrize(
    "url", ["", "ftp://a/v1", "http://", "a/v1", "http://u:p@a/v1", "http://a/v1?key=1", "http://a/v1#x"]
)
def test_urls_that_are_none_are_refused(url):
    with pytest.raises(BitassayError):
        checked_url(url)


def test_deep_json_is_an_error():
    with pytest.raises(AnswerError):
        strict_json(b"[" * 200_000, "here")


def test_json_that_a_file_or_a_dictionary_could_not_hold():
    with pytest.raises(AnswerError, match="twice"):
        strict_json(b'{"a": [{"b": 1, "b": 2}]}', "here")
    halves = b'["\\ud800x", "\\uD83D\\ude00", "\\\\ud800"]'
    assert strict_json(halves, "here") == ["\ufffdx", "\U0001f600", "\\ud800"]


@pytest.fixture(scope="module")
def vocabulary(stories):
    return Vocabulary(stories.tokenizer, 512)


def choice(**fields):
    return {"choices": [{"text": "a"} | fields]}


def listed(tokens, values, tops):
    return choice(logprobs={"tokens": tokens, "token_logprobs": values, "top_logprobs": tops})


MALFORMED = {
    "malformed": [
        [], {}, {"choices": []}, {"choices": [1]}, choice(logprobs=3), choice(token_ids=["a"]), choice(token_ids=[-1]),
        listed(["token_id:5"], [], []), choice(prompt_logprobs=[None]), choice(prompt_logprobs=[None, {"a": {"logprob": -1.0}}, None]),
        choice(prompt_logprobs=[None, {"5": {"logprob": -1.0}}, {"6": {"logprob": -1.0}}]),
        choice(token_ids=[5, 6], logprobs={"tokens": ["token_id:5"], "token_logprobs": [-1.0], "top_logprobs": None}),
        choice(token_ids=[6], logprobs={"tokens": ["token_id:5"], "token_logprobs": [-1.0], "top_logprobs": None}),
    ],
    "not-finite": [listed(["token_id:5"], [float("nan")], [None]), listed(["token_id:5"], [-1.0], [{"token_id:6": float("-inf")}])],
    "outside-vocabulary": [choice(token_ids=[512]), listed(["token_id:512"], [-1.0], [None]), listed(["token_id:5"], [-1.0], [{"token_id:999999999": -1.0}])],
    "above-zero": [listed(["token_id:5"], [0.5], [None])],
    "other-prompt": [choice(prompt_token_ids=[1, 2])],
}  # fmt: skip


@pytest.mark.parametrize(
    ("code", "value"), [(code, value) for code, values in MALFORMED.items() for value in values]
)
def test_answers_that_cannot_be_are_refused_by_name(vocabulary, code, value):
    with pytest.raises(AnswerError) as error:
        read_answer(value, vocabulary, [1, 2, 3])
    assert error.value.code == code


def test_the_three_spellings_say_the_same(vocabulary):
    expected = (Position(5, -0.5, ((5, -0.5), (6, -1.5))),)
    old = listed(["token_id:5"], [-0.5], [{"token_id:5": -0.5, "token_id:6": -1.5}])
    entry = {"token": "x", "id": 5, "logprob": -0.5, "top_logprobs": [{"token": "x", "id": 5, "logprob": -0.5}, {"token": "y", "id": 6, "logprob": -1.5}]}  # fmt: skip
    assert read_answer(old, vocabulary, [1]).output == expected
    assert read_answer(choice(logprobs={"content": [entry]}), vocabulary, [1]).output == expected
    ranked = [None, {"5": {"logprob": -0.5, "rank": 1}, "6": {"logprob": -1.5, "rank": 2}}]
    assert read_answer(choice(prompt_logprobs=ranked), vocabulary, [1, 5]).prompt == expected
    named = listed([vocabulary.tokenizer.decode([300])], [-0.5], [None])
    assert read_answer(named, vocabulary, [1]).output[0].token == 300


def log_softmax(values):
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


def test_distances_are_zero_for_what_the_reference_says_itself():
    rows = log_softmax(np.random.default_rng(0).normal(size=(7, 30)) * 3)
    tokens = rows.argsort(1)[:, -3].tolist()
    for level in ("prompt-logprobs", "logprobs", "chosen", "prompt-chosen"):
        said = as_said(level, tokens, rows, 5)
        assert distances(level, said, rows, 5) == pytest.approx(np.zeros(7), abs=1e-12)
    greedy = as_said("tokens", tokens, rows, 0)
    assert distances("tokens", greedy, rows, 0) == pytest.approx(np.zeros(7))
    other = [Position(token) for token in tokens]
    assert distances("tokens", other, rows, 0) == pytest.approx(rows.max(1) - rows[range(7), tokens])


def test_a_top_distance_by_hand_and_missing_tokens_count_as_little_as_they_can():
    row = np.log(np.array([0.5, 0.3, 0.2]))
    moved = Position(0, row[0] + 0.1, ((0, row[0] + 0.1), (1, row[1] - 0.1)))
    weights, d = np.array([0.5, 0.3]) / 0.8, np.array([0.1, -0.1])
    assert top_distance(moved, row, 2) == pytest.approx(weights @ np.abs(d - weights @ d))
    shifted = Position(0, row[0] + 1, ((0, row[0] + 1), (1, row[1] + 1)))
    assert top_distance(shifted, row, 2) == pytest.approx(0)  # a constant does not count
    without = Position(0, row[0], ((0, row[0]), (2, row[2])))
    bound = np.array([0.0, 0.0, row[2] - row[1]])
    weights = np.array([0.5, 0.2, 0.3])
    assert top_distance(without, row, 2) == pytest.approx(weights @ np.abs(bound - weights @ bound))
    assert top_distance(Position(0, -9999.0, ((0, -9999.0), (1, row[1]))), row, 2) <= 10
    assert statistic("logprobs", 0.02, 0.02) == 0 < statistic("tokens", 0.01, 0.0)
