"""The engine vLLM: what it asks of its worker, beside a stand-in for vLLM; and vLLM itself, where it is."""

import io
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

import bitassay
from bitassay.engines.engine import engine_of
from bitassay.engines.sampling import Sampler
from bitassay.engines.vllm_worker import receive, send
from bitassay.errors import BitassayError, MissingError
from bitassay.models.identity import identity

TEXT, OUTPUT = "Once upon a time there was", [300, 12, 44]
REAL = os.environ.get("BITASSAY_VLLM_PYTHON")


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """An interpreter that finds the stand-in under the name of vLLM."""
    path = tmp_path_factory.mktemp("vllm") / "python"
    folder = Path(__file__).parent / "fake_vllm"
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITASSAY_VLLM_PYTHON", str(path))
        yield


@pytest.fixture(scope="module")
def hosted(stand_in):
    return bitassay.load("stories260k", engine="vllm")


def test_messages_arrive_as_they_were_sent():
    stream = io.BytesIO()
    arrays = {"a": torch.randn(2, 3), "none": torch.empty(0, 4)}
    send(stream, {"kind": "done"}, arrays)
    send(stream, {"token": 7})
    stream.seek(0)
    message, received = receive(stream)
    assert message == {"kind": "done"}
    assert all(torch.equal(received[name], arrays[name]) for name in arrays)
    assert receive(stream) == ({"token": 7}, {})
    with pytest.raises(EOFError):
        receive(stream)


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(1.0, 0.9, 5)])
def test_it_generates_with_states_as_transformers_does(hosted, stories, sampler):
    asked = {"max_new_tokens": 9, "layers": (2, 5), "sampler": sampler}
    ids = engine_of(stories).encode(TEXT)
    (there,) = engine_of(hosted).generate([ids], **asked)
    (here,) = engine_of(stories).generate([ids], **asked)
    assert there.output_ids == here.output_ids
    for layer in (2, 5):
        torch.testing.assert_close(there.states[layer], here.states[layer], atol=1e-4, rtol=1e-4)


def test_it_reads_as_transformers_does(hosted, stories):
    text = [engine_of(stories).encode(TEXT)], [OUTPUT]
    (there,), (here,) = (engine_of(model).prefill(*text, layers=(1, 5)) for model in (hosted, stories))
    torch.testing.assert_close(there.logits, here.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(there.states[5], here.states[5], atol=1e-4, rtol=1e-4)
    (logprobs,) = engine_of(hosted).logprobs(*text)
    torch.testing.assert_close(logprobs, engine_of(stories).logprobs(*text)[0], atol=1e-4, rtol=0)


def test_it_stops_where_it_is_told_to_and_reads_on(hosted, stories):
    ids = engine_of(stories).encode(TEXT)
    (here,) = engine_of(stories).generate([ids], max_new_tokens=9)
    (there,) = engine_of(hosted).generate([ids], max_new_tokens=9, until=lambda output: len(output) == 4)
    assert there.output_ids == here.output_ids[:4]
    (again,) = engine_of(hosted).generate([ids], max_new_tokens=9)
    assert again.output_ids == here.output_ids


def test_it_is_timed_by_its_own_clock(hosted):
    engine = engine_of(hosted)
    read_s, decode_s = engine.time([[1, 2, 3]] * 3, 4)
    assert 0 < read_s < 1
    assert 0 < decode_s < 1
    assert engine.impossible(32, 100, 10) == ""
    assert engine.impossible(33, 10, 10) == "vLLM was started for 32 texts at once"
    assert engine.impossible(32, 200, 10) == "vLLM was started for 4096 tokens at once"
    assert engine.impossible(1, 510, 10) == "vLLM was started for 512 tokens of a text"


def test_its_traces_say_who_ran(hosted, stories):
    trace = bitassay.prove(hosted, TEXT, max_new_tokens=4)
    assert (trace.header.numerics.engine, trace.header.numerics.engine_version) == ("vllm", "0.fake")
    assert not bitassay.verify(trace, stories, expected_prompt=TEXT).structural


def test_refusals(hosted, stories, tmp_path, monkeypatch):
    engine = engine_of(hosted)
    with pytest.raises(BitassayError, match="cannot go on from states"):
        engine.prefill([[1]], [[2]], claimed=[{1: torch.zeros(1, 64)}])
    with pytest.raises(BitassayError, match="no decoder layer 6"):
        engine.generate([[1]], max_new_tokens=1, layers=(6,))
    with pytest.raises(BitassayError, match="vLLM was started for 512"):
        engine.prefill([[1] * 510], [[1, 1, 1]])
    shutil.copytree(identity(stories).source.folder, tmp_path / "refused")
    with pytest.raises(BitassayError, match="vLLM: ValueError: no scheme was found more about it"):
        bitassay.load(tmp_path / "refused", engine="vllm")
    alone = engine_of(bitassay.load("stories260k", engine="vllm"))
    os.kill(alone.process.process.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(BitassayError, match="vLLM ended with status -9"):
            alone.prefill([[1, 2]], [[3]])
    monkeypatch.setenv("BITASSAY_VLLM_PYTHON", str(tmp_path / "nothing"))
    with pytest.raises(MissingError, match="no such file"):
        bitassay.load("stories260k", engine="vllm")
    monkeypatch.setenv("BITASSAY_VLLM_PYTHON", shutil.which("false"))
    with pytest.raises(BitassayError, match="vLLM ended with status 1"):
        bitassay.load("stories260k", engine="vllm")
    monkeypatch.delenv("BITASSAY_VLLM_PYTHON")
    with pytest.raises(MissingError, match="needs vLLM"):
        bitassay.load("stories260k", engine="vllm")


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(REAL is None, reason="BITASSAY_VLLM_PYTHON names no interpreter with vLLM")
def test_vllm_itself(monkeypatch):
    monkeypatch.setenv("BITASSAY_VLLM_PYTHON", str(REAL))
    hosted = bitassay.load("smollm2-135m", engine="vllm")
    ours = bitassay.load("smollm2-135m", dtype="bfloat16")
    ids, layers = engine_of(ours).encode("Why is the sky blue?"), (8, 30)
    (made,) = engine_of(hosted).generate([ids], max_new_tokens=8, layers=layers)
    (read,) = engine_of(ours).prefill([ids], [made.output_ids], layers=layers)
    for layer in layers:
        x, y = made.states[layer].double(), read.states[layer].double()
        assert x.shape == y.shape
        assert ((x - y).norm(dim=-1) / y.norm(dim=-1)).mean() < 0.05
    there, here = (engine_of(model).logprobs([ids], [made.output_ids])[0] for model in (hosted, ours))
    assert (there - here).abs().mean() < 0.1
