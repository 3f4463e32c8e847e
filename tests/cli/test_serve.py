"""`bitassay serve`: what it refuses, and a server that is killed."""

import json
import os
import signal
import subprocess
import sys
import threading

import httpx2
import pytest

from bitassay.verification.receipts.receipt import read_receipt


def test_others_are_let_in_only_with_a_key(bitassay, tmp_path, monkeypatch):
    monkeypatch.delenv("BITASSAY_SERVE_KEY", raising=False)
    said = bitassay("serve", "stories260k", "--host", "0.0.0.0", "--store", str(tmp_path / "store"))
    assert (said.status, said.out) == (2, "")
    assert "BITASSAY_SERVE_KEY has no API key" in said.err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--tls-cert", "cert.pem"], "go together"),
        (["--tls-cert", "no.pem", "--tls-key", "no.pem"], "no such file"),
        (["--port", "70000"], "ports end"),
        (["--trace-hours", "-1"], "0 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(bitassay, tmp_path, words, why):
    said = bitassay("serve", "stories260k", "--store", str(tmp_path / "store"), *words)
    assert said.status == 2
    assert why in said.err
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_every_answer_before_a_kill_has_its_receipt(tmp_path):
    words = ["serve", "stories260k", "--port", "0", "--store", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "bitassay.cli", *words], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    killer = threading.Timer(120, process.kill)
    killer.start()
    try:
        line = next(line for line in process.stderr if line.startswith("serving"))
        url, received = line.split()[-1], []
        with httpx2.Client(trust_env=False, timeout=30) as web:
            for number in range(20):
                ask = {"prompt": f"The {number}", "max_tokens": 3, "stream": bool(number % 2)}
                answer = web.post(url + "/completions", json=ask)
                events = [part for part in answer.text.split("data: ") if '"receipt"' in part]
                received.append(json.loads(events[-1])["receipt"]["id"])
        process.send_signal(signal.SIGKILL)
        assert all(read_receipt(tmp_path / "receipts" / name) for name in received)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        killer.cancel()
