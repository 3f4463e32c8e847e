"""A real server on 127.0.0.1, asked by the `openai` client and by others who mean it less well."""

import json
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import httpx2
import openai
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from audit.conftest import serving
from bitassay.audit.client import AnswerError, Endpoint
from bitassay.audit.server import Limits
from bitassay.audit.store import Full, Store
from bitassay.engines.decode import generate, prefill
from bitassay.engines.sampling import Sampler
from bitassay.engines.stream import Stream
from bitassay.errors import BitassayError
from bitassay.verification.prove import prove
from bitassay.verification.receipts.challenge import challenge, opened_positions
from bitassay.verification.receipts.keys import private_key
from bitassay.verification.receipts.opening import decode_opening
from bitassay.verification.receipts.receipt import decode, read_receipt

PROMPT = "Once upon a time there was a little"


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=served[0] + "/v1", api_key="none", max_retries=0)


def test_a_stream_is_what_generate_makes(model):
    prompt = model.tokenizer(PROMPT).input_ids
    (whole,) = generate(
        model, [prompt], max_new_tokens=9, layers=(3, 5), nonces=["n"], sampler=Sampler(1.0, 0.9, 4)
    )
    stream = Stream(model, prompt, max_new_tokens=9, layers=(3, 5), nonce="n", sampler=Sampler(1.0, 0.9, 4))
    while len(stream.output_ids) < 9 and not stream.step().is_end:
        pass
    assert stream.generation.output_ids == whole.output_ids
    assert all(torch.equal(stream.generation.states[layer], whole.states[layer]) for layer in (3, 5))


def test_completion_is_what_the_engine_generates(client, model):
    prompt = model.tokenizer(PROMPT).input_ids
    (expected,) = generate(model, [prompt], max_new_tokens=12)
    text = model.tokenizer.decode([*prompt, *expected.output_ids], skip_special_tokens=True)
    said = client.completions.create(model="stories", prompt=PROMPT, max_tokens=12, temperature=0)
    assert PROMPT + said.choices[0].text == text
    assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (len(prompt), 12)
    by_ids = client.completions.create(model="stories", prompt=prompt, max_tokens=12, temperature=0)
    assert by_ids.choices[0].text == said.choices[0].text
    streamed = client.completions.create(
        model="stories",
        prompt=PROMPT,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    events = list(streamed)
    assert "".join(event.choices[0].text for event in events[:-1]) == said.choices[0].text
    assert events[-1].usage.completion_tokens == 12
    assert events[-2].receipt["id"] == said.receipt["id"]


def test_chat_streamed_or_not(client, model):
    messages = [{"role": "user", "content": PROMPT}]
    ids = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    (expected,) = generate(model, [ids], max_new_tokens=8)
    options = {"model": "stories", "messages": messages, "max_tokens": 8, "temperature": 0}
    said = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    streamed = "".join(
        event.choices[0].delta.content or ""
        for event in client.chat.completions.create(**options, stream=True)
    )
    assert said.choices[0].message.content == streamed
    assert streamed.strip() == model.tokenizer.decode(expected.output_ids).strip()
    content = said.choices[0].logprobs.content
    assert len(content) == 8
    assert all(
        len(entry.top_logprobs) == 3 and entry.logprob == entry.top_logprobs[0].logprob for entry in content
    )


def test_logprobs_are_those_of_the_model(client, model):
    prompt = model.tokenizer(PROMPT).input_ids
    given = prefill(model, [prompt[:1]], [prompt[1:]])[0].logits.double().log_softmax(-1)
    said = client.completions.create(
        model="stories", prompt=prompt, max_tokens=0, echo=True, logprobs=5,
        extra_body={"prompt_logprobs": 5, "return_token_ids": True, "return_tokens_as_token_ids": True},
    )  # fmt: skip
    (choice,) = said.choices
    expected = [float(row[token]) for row, token in zip(given, prompt[1:], strict=True)]
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected)
    assert choice.logprobs.tokens == [f"token_id:{token}" for token in prompt]
    assert choice.prompt_token_ids == prompt
    assert choice.token_ids == []
    for row, token, listed in zip(given, prompt[1:], choice.prompt_logprobs[1:], strict=True):
        assert listed[str(token)]["rank"] == 1 + int((row > row[token]).sum())
        best = int(row.argmax())
        assert listed[str(best)] | {"decoded_token": ""} == {
            "logprob": float(row[best]),
            "rank": 1,
            "decoded_token": "",
        }
    assert said.usage.completion_tokens == 0
    answered = client.completions.create(
        model="stories", prompt=prompt, max_tokens=3, temperature=0, logprobs=1
    )
    assert len(answered.choices[0].logprobs.token_logprobs) == 3


def test_seeds_repeat_and_are_the_gumbel_rule(client, model):
    options = {"model": "stories", "prompt": PROMPT, "max_tokens": 10, "temperature": 0.9, "top_p": 0.95}
    extra = {"return_token_ids": True, "nonce": "abc"}
    one, two = (client.completions.create(**options, seed=7, extra_body=extra).choices[0] for _ in range(2))
    (expected,) = generate(
        model,
        [model.tokenizer(PROMPT).input_ids],
        max_new_tokens=10,
        sampler=Sampler(0.9, 0.95, 7),
        nonces=["abc"],
    )
    assert one.token_ids == two.token_ids == list(expected.output_ids)
    other = client.completions.create(**options, seed=8, extra_body=extra).choices[0]
    assert other.token_ids != one.token_ids
    hot = options | {"temperature": 3.0, "top_p": 1.0}
    unseeded = {client.completions.create(**hot).choices[0].text for _ in range(2)}
    assert len(unseeded) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts_end_the_answer_and_are_not_sent(client, stream):
    options = {"model": "stories", "prompt": PROMPT, "temperature": 0}
    text = client.completions.create(**options, max_tokens=30).choices[0].text
    stop = text[12:17]
    said = client.completions.create(**options, max_tokens=30, stop=[stop, "never in it"], stream=stream)
    got = "".join(event.choices[0].text for event in said) if stream else said.choices[0].text
    assert got == text[: text.find(stop)]


def test_receipts_are_kept_signed_and_can_be_opened(client, served, web, model):
    url, folder = served
    said = client.completions.create(model="stories", prompt=PROMPT, max_tokens=6, temperature=0)
    name = said.receipt["id"]
    path = folder / "receipts" / name
    receipt = read_receipt(path)  # checks the signature
    assert said.receipt["content"].encode() == path.read_bytes() == web.get(url + said.receipt["url"]).content
    assert receipt.key.hex() == web.get(url + "/v1/models").json()["data"][0]["signer"]
    ours = prove(model, model.tokenizer(PROMPT).input_ids, max_new_tokens=6)
    assert receipt.header == ours.header
    drawn = challenge(receipt)
    answer = web.post(url + "/v1/openings", content=drawn.model_dump_json())
    opening = decode_opening(answer.content, receipt, drawn, Path("opening"))
    assert torch.equal(opening.states[5], ours.states[5][list(opened_positions(drawn, receipt.header))])
    other = drawn.model_copy(update={"commitment": "0" * 64})
    assert web.post(url + "/v1/openings", content=other.model_dump_json()).status_code == 404
    for bad in ("0" * 64, "..%2f..%2fkey.pem", "key.pem"):
        assert web.get(f"{url}/v1/receipts/{bad}").status_code == 404


def test_many_at_a_time_are_neither_lost_nor_crossed(client, served, model):
    prompts = [f"The {word} {number}" for word in ("cat", "dog", "sun") for number in range(4)]

    def ask(prompt):
        said = client.completions.create(
            model="stories", prompt=prompt, max_tokens=4, temperature=0, extra_body={"return_token_ids": True}
        )
        return said.choices[0].token_ids, said.receipt["id"]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, prompts))
    for prompt, (ids, name) in zip(prompts, answers, strict=True):
        tokens = model.tokenizer(prompt).input_ids
        (expected,) = generate(model, [tokens], max_new_tokens=4)
        header = decode((served[1] / "receipts" / name).read_bytes(), Path(name)).header
        assert (header.prompt_ids, header.output_ids) == (tuple(tokens), expected.output_ids)
        assert ids == list(expected.output_ids)


@pytest.mark.slow
def test_five_hundred_requests_eight_at_a_time(served, web):
    url, folder = served

    def ask(number):
        body = {
            "prompt": [1, *(3 + int(digit) for digit in f"{number:03d}")],
            "max_tokens": 2,
            "return_token_ids": True,
        }
        for _ in range(20):
            answer = web.post(url + "/v1/completions", json=body)
            if answer.status_code != 429:
                break
        said = answer.json()
        return body["prompt"], said["choices"][0]["token_ids"], said["receipt"]["id"]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(500)))
    for prompt, output, name in answers:
        header = read_receipt(folder / "receipts" / name).header  # checks the signature
        assert (list(header.prompt_ids), list(header.output_ids)) == (prompt, output)


BAD = [
    b"",
    b"{",
    b"[]",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    b'{"prompt": "\\ud800"}',
    *(
        json.dumps({"prompt": "a"} | change).encode()
        for change in (
            {"prompt": ""}, {"prompt": []}, {"prompt": ["a", "b"]}, {"prompt": [-1]}, {"prompt": [512]}, {"prompt": [10**12]},
            {"prompt": [1, "a"]}, {"prompt": None}, {"prompt": {"a": 1}}, {"prompt": "a " * 600}, {"max_tokens": 10_000},
            {"max_tokens": -1}, {"max_tokens": 1.5}, {"max_tokens": "1"}, {"temperature": -1}, {"temperature": 101},
            {"top_p": 0}, {"top_p": 2}, {"logprobs": 21}, {"prompt_logprobs": 21}, {"logprobs": -1}, {"seed": -1}, {"seed": 2**63},
            {"n": 2}, {"stop": [""]}, {"stop": ["a"] * 5}, {"stop": 3}, {"stream": "yes"}, {"nonce": "a b"}, {"nonce": "x" * 200},
            {"logit_bias": {"1": 100}}, {"tools": []}, {"unknown": 1}, {"frequency_penalty": 0.5},
        )
    ),
]  # fmt: skip


def test_bad_bodies_get_a_400_that_says_why(served, web):
    for body in BAD:
        answer = web.post(served[0] + "/v1/completions", content=body)
        assert answer.status_code == 400, body[:100]
        assert answer.json()["error"]["message"], body[:100]
    roles = [
        {"messages": []},
        {"messages": [{"role": "king", "content": "a"}]},
        {"messages": [{"role": "developer", "content": "a"}]},
    ]
    for body in roles:
        assert web.post(served[0] + "/v1/chat/completions", json=body).status_code == 400
    assert web.post(served[0] + "/v1/completions", json={"prompt": "a", "model": "gpt"}).status_code == 404
    assert web.get(served[0] + "/v1/completions").status_code == 405
    assert web.get(served[0] + "/nothing").json()["error"]["code"] == 404
    assert web.get(served[0] + "/health").text == "ok\n"


def test_random_bodies_never_bring_it_down(served, web):
    choose = random.Random(0)
    values = [
        None,
        True,
        -1,
        0,
        3,
        1e308,
        "",
        "a",
        [],
        [1],
        {},
        [[1, 2]],
        ["a"],
        {"a": []},
        "\x00",
        [None],
        2**64,
    ]
    names = [
        "prompt",
        "max_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "logprobs",
        "echo",
        "prompt_logprobs",
        "stream",
        "nonce",
    ]
    for _ in range(60):
        body = {choose.choice(names): choose.choice(values) for _ in range(4)} | {"max_tokens": 1}
        answer = web.post(served[0] + "/v1/completions", json=body)
        assert answer.status_code in (200, 400), body
    assert web.get(served[0] + "/health").status_code == 200


def test_clients_that_hang_up_leave_nothing_running(served, web):
    host, port = served[0].removeprefix("http://").split(":")
    before = web.get(served[0] + "/metrics").text
    for stream in (True, False, True, False):
        asked = {"prompt": "a", "max_tokens": 400, "temperature": 0, "stream": stream}
        body = json.dumps(asked).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection((host, int(port))) as line:
            line.sendall(head + body)
            if stream:
                line.recv(100)
    said = web.post(served[0] + "/v1/completions", json={"prompt": "a", "max_tokens": 2})
    assert said.status_code == 200
    for _ in range(500):
        metrics = dict(line.split() for line in web.get(served[0] + "/metrics").text.splitlines())
        if metrics["bitassay_requests_active"] == metrics["bitassay_requests_waiting"] == "0":
            break
        threading.Event().wait(0.01)
    assert metrics["bitassay_requests_active"] == "0"
    known = dict(line.split() for line in before.splitlines())
    assert int(metrics["bitassay_answers_total"]) == int(known["bitassay_answers_total"]) + 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_the_servers_own_is_logged_without_what_the_client_sent(model, tmp_path, caplog, stream):
    def failing():
        raise ZeroDivisionError(f"secret {PROMPT}")
        yield

    def fail(job):
        job.work = failing()
        return inner(job)

    with serving(model, tmp_path) as (url, app), httpx2.Client(trust_env=False) as web:
        inner, app.server.scheduler._turn = app.server.scheduler._turn, fail
        ask = {"prompt": PROMPT, "max_tokens": 2, "temperature": 0, "stream": stream}
        answer = web.post(url + "/v1/completions", json=ask)
    assert "ZeroDivisionError" in answer.text
    assert answer.status_code == 500  # of a stream too, as nothing of it has been sent
    (record,) = (each for each in caplog.records if each.name == "bitassay.audit.server")
    assert record.getMessage().startswith(f"ZeroDivisionError at {__file__}:")
    assert not any("secret" in said for said in (answer.text, caplog.text))


def test_the_queue_is_bounded(model, tmp_path, web):
    with serving(model, tmp_path, Limits(together=1, waiting=1)) as (url, app):
        hold = threading.Event()
        inner = app.server.scheduler._turn
        app.server.scheduler._turn = lambda job: hold.wait() and inner(job)
        ask = {"prompt": "a", "max_tokens": 2, "temperature": 0}
        with ThreadPoolExecutor(3) as pool:
            pending = [pool.submit(web.post, url + "/v1/completions", json=ask) for _ in range(3)]
            while not any(each.done() for each in pending):
                threading.Event().wait(0.01)
            hold.set()
            statuses = sorted(each.result().status_code for each in pending)
        assert statuses == [200, 200, 429]


def test_the_body_is_bounded_and_a_key_is_asked_for(model, tmp_path, web):
    with serving(model, tmp_path, Limits(body_bytes=1000), api_key="sesame") as (url, _):
        ask = {"prompt": "a", "max_tokens": 2, "temperature": 0}
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "sesame"}):
            assert web.post(url + "/v1/completions", json=ask, headers=headers).status_code == 401
            assert web.get(url + "/v1/models", headers=headers).status_code == 401
        known = {"authorization": "Bearer sesame"}
        assert web.post(url + "/v1/completions", json=ask, headers=known).status_code == 200
        assert web.post(url + "/v1/completions", content=b"x" * 1001, headers=known).status_code == 413
        assert web.get(url + "/health").status_code == 200


def test_tls(model, tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nobody")])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    here = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])
    made = made.add_extension(here, critical=False)
    (tmp_path / "cert.pem").write_bytes(made.sign(key, SHA256()).public_bytes(Encoding.PEM))
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "cert.key").write_bytes(pem)
    tls = {"ssl_certfile": tmp_path / "cert.pem", "ssl_keyfile": tmp_path / "cert.key"}
    with serving(model, tmp_path / "store", tls=tls) as (url, _):
        secure = url.replace("http:", "https:")
        with httpx2.Client(verify=False, trust_env=False) as web:
            assert web.get(secure + "/health").text == "ok\n"
        with pytest.raises(AnswerError) as error:
            Endpoint(secure + "/v1", tries=1).get("/models")
        assert error.value.code == "tls"
        trusting = Endpoint(secure + "/v1", tries=1, ca_file=tmp_path / "cert.pem")
        assert trusting.get("/models")["data"][0]["id"] == "stories"
        with pytest.raises(AnswerError, match="http or https"):
            Endpoint(url + "/v1", tries=1).get("/models")
    with pytest.raises(BitassayError, match="holds no certificates"):
        Endpoint(secure + "/v1", ca_file=tmp_path / "cert.key")
    with pytest.raises(BitassayError, match="No such file"):
        Endpoint(secure + "/v1", ca_file=tmp_path / "none.pem")


def test_traces_make_room_for_receipts(model, tmp_path, web):
    with serving(model, tmp_path, disk_bytes=20_000) as (url, app):
        ask = {"max_tokens": 4, "temperature": 0}
        for word in ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"]:
            assert web.post(url + "/v1/completions", json=ask | {"prompt": word}).status_code == 200
        store = app.server.served.store
        assert len(list(store.receipts.iterdir())) == 12
        assert 0 < store.n_traces < 12
        assert store.used_bytes <= 20_000
        assert store.used_bytes == sum(
            p.stat().st_size for folder in (store.receipts, store.traces) for p in folder.iterdir()
        )
        store.disk_bytes = store.receipt_bytes
        assert web.post(url + "/v1/completions", json=ask | {"prompt": "z"}).status_code == 507
    again = Store(tmp_path, private_key(tmp_path / "key.pem"), 20_000)
    assert (again.receipt_bytes, again.n_traces) == (store.receipt_bytes, store.n_traces)
    old = Store(tmp_path, private_key(tmp_path / "key.pem"), 20_000, trace_seconds=0)
    with pytest.raises(LookupError):
        old.trace(next(store.traces.iterdir()).name)
    again.disk_bytes = 1
    with pytest.raises(Full):
        again.check_room()
