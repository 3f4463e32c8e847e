"""What a server promises: our own keeps it; one that counts, stops, streams and cuts otherwise is told."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from audit.test_audit import at
from bitassay.audit.client import AnswerError
from bitassay.audit.contract import (
    CHECKS,
    Said,
    check_answer,
    check_call,
    check_long,
    check_same,
    check_stop,
    decide_contract,
    misfit,
    rates,
    stop_in,
    streamed_text,
)
from bitassay.audit.contract_run import Terms, _Asker, contract
from bitassay.audit.wire import words_of
from bitassay.report.pages import write_report
from bitassay.testing.local_server import running

GOOD = {"city": "Paris", "days_ahead": 2, "unit": "celsius"}


@pytest.fixture(scope="module")
def words():
    return words_of("stories260k")[0]


def call(arguments):
    return {"function": {"name": "get_weather", "arguments": json.dumps(arguments)}}


@contextmanager
def fake(words, **faults):
    """A server that answers " a b c ..." by ids, keeps the contract, and breaks what `faults` names."""
    letters = [
        words.tokenizer.convert_tokens_to_ids(each)
        for each in ("a", "b", "c", "d", "e", "i", "m", "n", "o", "s", "t", "u")
    ]

    def answer(body):
        prompt = body["prompt"][-20:] if "cut" in faults else body["prompt"]
        count = body["max_tokens"] + (2 if "endless" in faults else 0)
        seed = sum(at * token for at, token in enumerate(prompt))
        ids = [letters[(seed + n * (n + 3)) % 12] for n in range(count)]
        text, finish = words.tokenizer.decode(ids), "length"
        for stop in body.get("stop", []):
            if stop in text and "unstopped" not in faults:
                text, finish = text[: text.find(stop)], "stop"
                ids = words.tokenizer(text, add_special_tokens=False).input_ids
        listed = {
            "tokens": [f"token_id:{each}" for each in ids],
            "token_logprobs": [-1.0 - seed / 1e7] * len(ids),
            "top_logprobs": None,
        }
        usage = {
            "prompt_tokens": len(body["prompt"]) + ("miscounts" in faults),
            "completion_tokens": len(ids),
        }
        choice = {"text": text, "finish_reason": finish, "token_ids": ids, "logprobs": listed}
        return {"choices": [choice], "usage": usage}

    async def completions(request):
        body = await request.json()
        if not isinstance(body["prompt"], list) or "prompt_logprobs" in body:
            return JSONResponse({}, 400)
        said = answer(body)
        if not body.get("stream"):
            return JSONResponse(said)
        text = said["choices"][0]["text"][: -1 if "streams" in faults else None]
        events = [
            {"choices": [{"text": text[:3]}]},
            {"choices": [{"text": text[3:], "finish_reason": "length"}]},
        ]
        lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
        return StreamingResponse(iter(lines), media_type="text/event-stream")

    async def chat(request):
        body = await request.json()
        needed = "weather" in body["messages"][0]["content"]
        given = GOOD | ({"unit": "kelvin"} if "tools" in faults else {})
        message = {"content": "", "tool_calls": [call(given)]} if needed else {"content": "7"}
        return JSONResponse({"choices": [{"message": message, "finish_reason": "tool_calls"}]})

    async def models(request):
        return JSONResponse({"data": [{"id": "stories", "max_model_len": 200}]})

    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", models),
    ]
    with running(Starlette(routes=routes)) as url:
        yield url


def test_our_own_server_keeps_its_contract(served, words, tmp_path):
    run, folder = contract(
        at(served[0]), words, "stories260k", Terms(requests=2, context=120, out=tmp_path / "run")
    )
    assert run["decision"]["status"] == "PASS", run["problems"]
    checked = {row["check"]: row["n"] for row in run["rows"]}
    assert set(checked) == set(CHECKS) - {"a tool is called", "no tool is called", "arguments fit the schema"}
    assert (checked["usage counts the prompt"], checked["long prompts are taken"]) == (2, 3)
    assert run["rows"][0]["rate_ci"] == pytest.approx([0.158, 1], abs=1e-3)
    write_report(run, folder / "report.html")
    (folder / "parts" / "request-0-00001.json").unlink()
    again, _ = contract(
        at(served[0]), words, "stories260k", Terms(requests=2, context=120, out=tmp_path / "run")
    )
    assert again["rows"] == run["rows"]


FAULTS = {
    "miscounts": "usage counts the prompt",
    "endless": "max_tokens is kept",
    "unstopped": "stop texts end the answer",
    "streams": "streams say the same",
    "cut": "their beginning is read",
    "tools": "arguments fit the schema",
}


def test_faults_are_found_beside_an_honest_server(words, tmp_path):
    with fake(words) as honest, fake(words, **dict.fromkeys(FAULTS, True)) as url:
        clean, _ = contract(at(honest), words, "stories260k", Terms(requests=3, out=tmp_path / "honest"))
        assert clean["decision"]["status"] == "PASS", clean["problems"]
        assert [row["check"] for row in clean["rows"]] == list(CHECKS)
        terms = Terms(requests=5, alpha=0.2, out=tmp_path / "run")
        run, folder = contract(at(url), words, "stories260k", terms, honest=at(honest))
    rows = {row["check"]: row for row in run["rows"]}
    for check in FAULTS.values():
        assert rows[check]["kept"] == 0, check
        assert rows[check]["honest_kept"] == rows[check]["honest_n"] > 0
        assert check in {row["check"] for row in run["problems"]}
    assert rows["a tool is called"]["kept"] == rows["greedy answers repeat"]["kept"] == 5
    assert run["decision"]["status"] == "FAIL"
    assert rows["streams say the same"]["p_value"] < 0.1 < rows["their beginning is read"]["p_value"]
    write_report(run, folder / "report.html")


def test_checks_of_one_answer():
    full = Said("abc", "length", 5, 3, (1, 2, 3))
    assert all(kept for _, kept, _ in check_answer(full, 5, 3))
    early = Said("ab", "length", 5, 2, (1, 2))
    assert [name for name, kept, _ in check_answer(early, 5, 3) if not kept] == ["the end has its reason"]
    over = Said("abcd", "length", 5, 3, (1, 2, 3, 4))
    assert {name for name, kept, _ in check_answer(over, 5, 3) if not kept} == {"usage counts the answer", "max_tokens is kept"}  # fmt: skip
    unknown = Said("abc", "length", 5)
    assert [name for name, *_ in check_answer(unknown, 5, 3)] == ["usage counts the prompt"]
    assert stop_in("one two three four") is not None
    assert stop_in("short") is None
    assert check_stop(Said("one t", "stop"), "wo t")[1]
    assert not check_stop(Said("one two t", "stop"), "wo t")[1]
    assert not check_stop(Said("one t", "length"), "wo t")[1]
    assert check_same("x", "abc", "abd")[2] == "differ from character 2 on"
    one, other = Said("a", "length", 9, logprobs="1"), Said("a", "length", 9, logprobs="2")
    assert [kept for _, kept, _ in check_long(one, other, one, 9)] == [True, True]
    assert [kept for _, kept, _ in check_long(one, one, one, 9)] == [True, False]
    assert [kept for _, kept, _ in check_long(one, other, other, 8)] == [False]  # it does not repeat
    assert check_call(Said("no"), True)[0][:2] == ("a tool is called", False)
    assert check_call(Said("no"), False)[0][1]
    with pytest.raises(AnswerError):
        streamed_text([{"choices": 3}])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, ""),
        ({"days_ahead": "2"}, "days_ahead"),
        ({"days_ahead": True}, "days_ahead"),
        ({"days_ahead": 8}, "days_ahead"),
        ({"unit": "kelvin"}, "other values"),
        ({"more": 1}, "other arguments"),
    ],
)
def test_arguments_that_do_not_fit(change, why):
    found = misfit("get_weather", json.dumps(GOOD | change))
    assert (found == "") if not why else (why in found)
    assert "no tool" in misfit("other", "{}")
    assert "not JSON" in misfit("get_weather", "{")
    assert "no object" in misfit("get_weather", "[]")


def test_rates_are_compared_and_decided():
    def outcomes(check, kept, of):
        return [(check, n < kept, "") for n in range(of)]

    mine = outcomes("streams say the same", 2, 12) + outcomes("greedy answers repeat", 11, 12)
    theirs = outcomes("streams say the same", 12, 12) + outcomes("greedy answers repeat", 12, 12)
    rows = rates(mine, theirs)
    by = {row["check"]: row for row in rows}
    assert by["streams say the same"]["p_value"] < 1e-3
    assert by["greedy answers repeat"]["p_value"] == pytest.approx(0.5)
    assert decide_contract(rows, 0.01)["status"] == "FAIL"
    assert decide_contract(rates(mine, mine), 0.01)["status"] == "PASS"
    assert decide_contract(rates(mine, None), 0.01)["status"] == "INCONCLUSIVE"
    assert decide_contract(rates(outcomes("max_tokens is kept", 11, 12), None), 0.01)["status"] == "FAIL"
    assert decide_contract(rates([], None), 0.01)["status"] == "INCONCLUSIVE"


@pytest.mark.slow
def test_the_command_line(bitassay_command, served, tmp_path):
    url = served[0] + "/v1"
    words = ["audit", url, "--model", "stories", "--reference", "stories260k", "--contract"]
    said = bitassay_command(*words, "--requests", "1", "--context", "80", "--out", str(tmp_path / "run"))
    assert said.status == 0, said.err
    assert "max_tokens is kept" in said.out
    for wrong, why in ((["--suspects", "w4"], "--suspects"), (["--calibrate-from", url, "--calibrate-from", url], "one honest")):  # fmt: skip
        said = bitassay_command(*words, *wrong)
        assert said.status == 2
        assert why in said.err


@pytest.mark.parametrize(
    ("listed", "context"),
    [
        (AnswerError("status-404", "no such path"), 0),
        (AnswerError("status-500", "it broke"), 0),
        ({"data": [{"id": "other"}]}, 0),
        ({"data": "?"}, 0),
        ({"data": [{"id": "other", "max_model_len": 64}, {"id": "m", "max_model_len": 512}]}, 512),
        ({"data": [{"id": "m", "meta": {"n_ctx": 256}}]}, 256),
        (AnswerError("unreachable", "nobody there"), None),
        (AnswerError("status-429", "busy"), None),
    ],
)
def test_the_context_is_what_the_server_says_and_a_lost_server_says_nothing(listed, context):
    def get(_path):
        if isinstance(listed, AnswerError):
            raise listed
        return listed

    asker = SimpleNamespace(
        terms=Terms(), target=SimpleNamespace(endpoint=SimpleNamespace(get=get), model="m")
    )
    if context is None:
        with pytest.raises(AnswerError):
            _Asker._context(asker)
    else:
        assert _Asker._context(asker) == context
