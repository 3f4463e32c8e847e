"""Numerics say more where it is known; what was written without the new fields keeps its digest and bytes."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from bitassay.engines import engine
from bitassay.record.hashing import digest_json
from bitassay.verification.numerics import Numerics, numerics
from bitassay.verification.receipts.receipt import commit, decode, encode
from bitassay.verification.trace import Trace, read_trace, write_trace
from verification.receipts import KEY

OLD = {
    "dtype": "bfloat16",
    "kv_dtype": "bfloat16",
    "attention": "sdpa",
    "device": "cpu",
    "threads": 2,
    "cpu_capability": "AVX512",
    "torch": "2.9.0+cpu",
    "transformers": "5.1.0",
}
NEW = {
    "gpu": "NVIDIA H200",
    "driver": "580.65.06",
    "batch": 16,
    "tensor_parallel": 8,
    "engine": "vllm",
    "engine_version": "0.11.0",
}


def test_what_is_not_said_is_written_nowhere():
    assert Numerics(**OLD).model_dump(mode="json") == OLD
    assert digest_json(Numerics(**OLD).model_dump(mode="json")) == digest_json(OLD)
    assert Numerics(**OLD, **NEW).model_dump(mode="json") == OLD | NEW
    assert str(Numerics(**OLD)) == "bfloat16 sdpa on AVX512, 2 threads, torch 2.9.0+cpu"
    assert str(Numerics(**OLD, **NEW)).endswith(
        "on NVIDIA H200, torch 2.9.0+cpu, driver 580.65.06, batch 16, tensor parallel 8, engine vllm 0.11.0"
    )


@pytest.mark.parametrize("length", [16, 32, 64])
def test_texts_have_their_lengths(length):
    names = {16: ["dtype", "device"], 32: ["cpu_capability"]}.get(
        length,
        ["torch", "transformers", "attention", "kv_dtype", "gpu", "driver", "engine", "engine_version"],
    )
    for name in names:
        Numerics(**{**OLD, name: "x" * length})
        for wrong in ("x" * (length + 1), "\x1b", "x\n", "é"):
            with pytest.raises(ValidationError):
                Numerics(**{**OLD, name: wrong})


@pytest.mark.parametrize("names", [[], ["gpu"], ["batch"], ["engine", "engine_version"], list(NEW)], ids=str)
def test_receipts_have_the_version_that_their_fields_need(names, trace, tmp_path):
    said = trace.header.numerics.model_copy(update={name: NEW[name] for name in names})
    one = Trace(trace.header.model_copy(update={"numerics": said}), trace.states)
    receipt = commit(one, KEY)
    data = encode(receipt)
    values = json.loads(data)
    assert values[0] == f"bitassay receipt {2 if names else 1}"
    assert len(values[2]) == (14 if names else 8)
    assert decode(data, Path("x")) == receipt
    write_trace(tmp_path / "x.trace", one)
    assert read_trace(tmp_path / "x.trace").header == one.header


def test_a_cpu_says_what_it_always_said(model):
    assert set(numerics(model).model_dump()) == set(OLD)


def test_a_gpu_says_its_name_and_driver(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
    about = tmp_path / "version"
    about.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    monkeypatch.setattr(engine, "Path", lambda _: about)
    found = engine.gpu_numerics(torch.device("cuda", 0))
    assert found == {"gpu": "GPU of cuda:0", "driver": "580.65.06"}
    about.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12\n")
    assert engine.gpu_numerics(torch.device("cuda", 0))["driver"] == "535.183.01"
    about.unlink()
    assert engine.gpu_numerics(torch.device("cuda", 0)) == {"gpu": "GPU of cuda:0"}
