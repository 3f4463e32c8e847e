"""llama.cpp's server as a target, pretended: answers as its `server-task.cpp` writes them, of stories260k."""

import math

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from audit.test_audit import SMALL, at
from bitassay.audit.answering import entries_of
from bitassay.audit.judge import Reference
from bitassay.audit.run import audit
from bitassay.audit.session import Options
from bitassay.engines.stream import Stream
from bitassay.testing.local_server import running
from bitassay.testing.tiny import stories260k

LOWEST = -3.4028234663852886e38  # what it writes for a probability of 0


def fake(model, asked):
    """The completions of llama.cpp's server; `asked` gets the bodies."""
    tokens = model.tokenizer

    def named(token, logprob):
        text = str(tokens.decode([token]))
        return {"id": token, "token": text, "bytes": list(text.encode()), "logprob": logprob}

    async def completions(request):
        body = await request.json()
        asked.append(body)
        if body.get("echo"):
            return JSONResponse({"error": {"code": 500, "message": "Only no echo is supported"}}, 500)
        prompt = body["prompt"] if isinstance(body["prompt"], list) else tokens(body["prompt"]).input_ids
        stream, content = Stream(model, prompt, max_new_tokens=body["max_tokens"]), []
        probs = body.get("n_probs", body.get("logprobs", 0))
        for _ in range(body["max_tokens"]):
            step = stream.step()
            (entry,) = entries_of(step.logits[None], [step.token], probs)
            top = [named(token, value) for token, value in entry.top]
            top[-1:] = [named(entry.top[-1][0], LOWEST)] if len(top) == 20 else top[-1:]
            content.append(named(step.token, entry.logprob) | {"top_logprobs": top})
            if step.is_end:
                break
        text = str(tokens.decode([each["id"] for each in content]))
        choice = {"text": text, "index": 0, "logprobs": {"content": content} if probs else None}
        usage = {
            "completion_tokens": len(content),
            "prompt_tokens": len(prompt),
            "total_tokens": len(content) + len(prompt),
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        return JSONResponse(
            {
                "choices": [choice | {"finish_reason": "length"}],
                "model": "stories",
                "system_fingerprint": "b1-0c1e570",
                "object": "text_completion",
                "usage": usage,
                "timings": {"prompt_n": len(prompt)},
            }
        )

    return Starlette(routes=[Route("/v1/completions", completions, methods=["POST"])])


@pytest.mark.parametrize("level", ["tokens", pytest.param("logprobs", marks=pytest.mark.slow)])
def test_its_answers_are_read_and_its_cache_is_off(model, level, tmp_path):
    asked = []
    reference = Reference(stories260k("float32"), model)
    with running(fake(model, asked)) as url:
        few = Options(level=level, out=tmp_path / "run", **(SMALL | {"requests": 2}))
        run, _ = audit(at(url), reference, few)
    given = {row["evidence"]: row["given"] for row in run["probes"]}
    assert given["ids of generated tokens"]
    assert given["log-probabilities by generation"]
    assert "log-probabilities by echo" not in given
    assert not [body for body in asked if body.get("echo")]
    assert run["settings"]["asked_by"]["llamacpp"]
    assert run["settings"]["asked_by"]["k"] == (20 if level == "logprobs" else 1)
    judged = [body for body in asked if body["max_tokens"] == SMALL["tokens"]]
    assert len(judged) == 2
    assert all(body["cache_prompt"] is False and body["logprobs"] >= 1 for body in judged)
    assert all(row["positions"] == SMALL["tokens"] for row in run["rows"])
    assert all(math.isfinite(row["score"]) for row in run["rows"])
    if level == "tokens":
        assert [row["score"] for row in run["rows"]] == [0, 0]  # it computes as the control does
