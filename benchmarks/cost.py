"""What proof costs: the host's recording and commitment, the verifier's work, and the bytes between them.

    recording     generation with taps on hidden states, and the signed receipt of them / plain generation
    verification  all prefills and statistics, of the whole trace, of a spot check of one segment of layers
                  (the mean over all segments), or of an opening / KV-cached generation
    bytes         of receipt, opening and trace for a token of prompt or output; a receipt's fixed part apart

One request, bf16, batch 1, greedy: a prompt of so many tokens, and as many generated ones, the same in all
runs (an end token does not stop them). In each round the kinds of work take turns, forwards and then
backwards, so that what else the machine does falls on all of them alike. Printed are medians over the rounds
of the ratios within a round, of wall clock and of this process's CPU time (which other processes disturb
less), and the load. Run: OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/cost.py [MODEL]
[--prompt 300] [--tokens 1000] [--rounds 3]
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import bitassay
from bitassay.data.corpora import corpus
from bitassay.engines.decode import generate
from bitassay.engines.segments import needless
from bitassay.engines.taps import tap_layers
from bitassay.record.environment import environment
from bitassay.verification.prove import prove
from bitassay.verification.receipts.challenge import challenge
from bitassay.verification.receipts.opening import open_trace, write_opening
from bitassay.verification.receipts.receipt import commit, encode
from bitassay.verification.spot import verify_segments
from bitassay.verification.structure import Request
from bitassay.verification.trace import Trace, write_trace
from bitassay.verification.verify import verify_many, verify_opening

SPOT = "spot check of one segment"
GOALS = {"recording": 0.03, "verification": 0.08, "receipt_bytes": 600, "receipt_bytes_per_token": 8}


def timed(work) -> tuple[object, float, float]:
    """What `work` gives, its wall-clock seconds and this process's CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = work()
    return value, time.perf_counter() - wall, time.process_time() - cpu


def size(write, *arguments) -> int:
    """Bytes of the file that `write` makes of its last argument."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        write(path, *arguments)
        return path.stat().st_size


def main(model_name: str, n_prompt: int, n_tokens: int, rounds: int) -> dict:
    model = bitassay.load(model_name, dtype="bfloat16")
    model.generation_config.eos_token_id = []  # so that all runs have all the tokens
    text = corpus("wikitext2-raw").text
    prompt = model.tokenizer(text[: 20 * n_prompt], verbose=False).input_ids[:n_prompt]
    key = Ed25519PrivateKey.generate()
    signer = key.public_key().public_bytes_raw()
    request = Request(prompt, "0", None, n_tokens)

    def plain() -> tuple[int, ...]:
        return generate(model, [prompt], max_new_tokens=n_tokens, nonces=["0"])[0].output_ids

    def recorded() -> Trace:
        trace = prove(model, prompt, max_new_tokens=n_tokens)
        commit(trace, key)
        return trace

    def spot_checks() -> None:
        for end in tap_layers(model):
            verify_segments([trace], model, 1, requests=[request], draw=lambda *_, end=end: [end])

    trace = prove(model, prompt, max_new_tokens=n_tokens)  # the caches are warm, too
    for end in tap_layers(model):
        needless(model, tap_layers(model), [end])  # tried once for each model
    receipt = commit(trace, key)
    asked = challenge(receipt)
    opening = open_trace(trace, asked)
    assert trace.n_tokens == n_tokens
    works = {
        "generation": plain,
        "recorded generation": recorded,
        "commitment": lambda: commit(trace, key),
        "verification": lambda: verify_many([trace], model, requests=[request]),
        SPOT: spot_checks,
        "verification of an opening": lambda: verify_opening(
            receipt, asked, opening, model, signer=signer, request=request
        ),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    loads = [os.getloadavg()[0]]
    for round_ in range(rounds):
        for name in list(works)[:: 1 if round_ % 2 else -1]:
            value, wall, cpu = timed(works[name])
            share = len(tap_layers(model)) if name == SPOT else 1
            seconds[name].append((wall / share, cpu / share))
            wall, cpu = seconds[name][-1]
            print(f"{round_} {name}: {wall:.2f} s, CPU {cpu:.2f} s", file=sys.stderr)
            if name == "generation":
                assert value == trace.header.output_ids
        loads.append(os.getloadavg()[0])

    def ratios(name: str, clock: int) -> list[float]:
        return [
            work[clock] / base[clock] for work, base in zip(seconds[name], seconds["generation"], strict=True)
        ]

    rows = [
        {
            "work": name,
            "seconds": statistics.median(wall for wall, _ in seconds[name]),
            "cpu_seconds": statistics.median(cpu for _, cpu in seconds[name]),
            "over_generation": statistics.median(ratios(name, 0)),
            "over_generation_by_round": ratios(name, 0),
            "cpu_over_generation": statistics.median(ratios(name, 1)),
            "cpu_over_generation_by_round": ratios(name, 1),
        }
        for name in works
    ]
    by_name = {row["work"]: row for row in rows}
    tokens = n_prompt + n_tokens
    ids = tokens * 4 * 4 / 3  # four bytes each in base64
    sizes = {
        "receipt": len(encode(receipt)),
        "opening": size(write_opening, opening),
        "trace": size(write_trace, trace),
    }
    return {
        "prompt_tokens": n_prompt,
        "tokens": n_tokens,
        "rounds": rounds,
        "layers": list(tap_layers(model)),
        "rows": rows,
        "bytes": [
            {"file": name, "bytes": count, "bytes_per_token": count / tokens} for name, count in sizes.items()
        ],
        "recording_fraction": by_name["recorded generation"]["over_generation"] - 1,
        "recording_cpu_fraction": by_name["recorded generation"]["cpu_over_generation"] - 1,
        "verification_fraction": by_name["verification"]["over_generation"],
        "verification_cpu_fraction": by_name["verification"]["cpu_over_generation"],
        "receipt_fixed_bytes": sizes["receipt"] - ids,
        "receipt_bytes_per_further_token": ids / tokens,
        "goals": GOALS,
        "load": loads,
        "environment": environment(),
    }


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("model", nargs="?", default="smollm2-135m")
    options.add_argument("--prompt", type=int, default=300)
    options.add_argument("--tokens", type=int, default=1000)
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    print(json.dumps(main(given.model, given.prompt, given.tokens, given.rounds), indent=2))
