"""Structure-aware fuzzing of everything that reads or judges a file from somebody else.

Seeds are real files of a tiny model: traces, a receipt, its challenge, opening and small proof, a profile, a
line of a ledger, and the files of a committee's round. A case takes one of them, edits it a few times (bytes;
the length field; a node of one of its JSON trees put in, left out, doubled, swapped, reordered or replaced by
what is too large, too deep or not a number; numbers of the tensors), reads it and judges what was read. What
must hold:

- The only errors are BitassayErrors; no case takes more than SECONDS or grows the process by MEGABYTES.
- A receipt, challenge or opening that was changed never passes, unless it decodes to the very same content.
  Nor does one that was changed and signed again by the host's own key.
- A trace whose claims were changed never passes. Its tokens, its states and the model's name for people are
  for statistics to judge, or for nobody.
- A spot check of a trace refuses nothing that a full check passes.
- A small proof that was changed is not read; one that the host signs again is judged.
- A line of a ledger that is read is written back as it was.

Run: python benchmarks/fuzz.py [--minutes 10] [--seed 0]. Prints the number of cases by file and outcome; a
violation stops it, shrunk by hypothesis.
"""

import argparse
import copy
import json
import math
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from pydantic import BaseModel

from bitassay.engines.sampling import Sampler
from bitassay.errors import BitassayError
from bitassay.record.environment import environment
from bitassay.testing.tiny import tiny_model
from bitassay.verification.calibrate import calibrate
from bitassay.verification.committee import files
from bitassay.verification.committee.rounds import assign, report, report_commitment
from bitassay.verification.ledger import Binding, Item, read_ledger, update_ledger
from bitassay.verification.profile import read_profile, write_profile
from bitassay.verification.proofs import verify_proof
from bitassay.verification.prove import prove_many
from bitassay.verification.receipts.challenge import (
    Challenge,
    challenge,
    opened_positions,
    read_challenge,
    write_challenge,
)
from bitassay.verification.receipts.opening import Opening, open_trace, read_opening, write_opening
from bitassay.verification.receipts.proof import (
    decode_proof,
    encode_proof,
    read_proof,
    sign_proof,
    write_proof,
)
from bitassay.verification.receipts.receipt import (
    SIGNED,
    Receipt,
    commit,
    decode,
    encode,
    read_receipt,
    write_receipt,
)
from bitassay.verification.spot import verify_segments
from bitassay.verification.structure import RefusedError, Request, expecting
from bitassay.verification.trace import Trace, read_trace, write_trace
from bitassay.verification.verify import verify_many, verify_opening

SECONDS, MEGABYTES = 10, 500
TOKENS = 12
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SIGNER = KEY.public_key().public_bytes_raw()
NOT_A_NUMBER = "the literal NaN "  # replaced in the text, as no JSON writer would write it
ODD: list[Any] = [
    *(None, True, 0, -1, 1, 2, 7, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *(0.5, -0.0, 1e308, 5e-324, NOT_A_NUMBER, "", "0", "x" * 200, "0" * 64, "\x00", "é", "\ud800"),
    *("bfloat16", "float32", "F32", "BF16", "U8", "greedy", "gumbel-max", "layer.8", "layer.9"),
    *([], {}, [0], [[]], {"": 0}, ["x"] * 300, list(range(300)), {"__metadata__": {}}),
]


@dataclass(frozen=True)
class Target:
    """A kind of file. layout: "safetensors" or "json". judge: reads the file at a path and judges what it
    says; gives a word for the outcome. Raises AssertionError where what must hold does not."""

    name: str
    seed: bytes
    layout: str
    judge: Callable[[Path], str]


# --- what is changed ---


@st.composite
def mutated(draw: Any, targets: list[Target]) -> tuple[Target, bytes]:
    """A target and a changed file for it."""
    target = draw(st.sampled_from(targets))
    choose = random.Random(draw(st.integers(0, 2**32)))
    data = target.seed
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        edits = EDITS[target.layout]
        data = draw(st.sampled_from(edits))(data, choose, choose.choice(targets).seed)
    return target, data


def flip(data: bytes, choose: random.Random, _: bytes) -> bytes:
    found = bytearray(data or b"\0")
    for _ in range(choose.choice([1, 1, 2, 8])):
        # Half of them at the front, where the header is.
        place = choose.randrange(choose.choice([len(found), min(len(found), 400)]))
        found[place] = choose.choice([found[place] ^ 1 << choose.randrange(8), choose.randrange(256)])
    return bytes(found)


def cut(data: bytes, choose: random.Random, _: bytes) -> bytes:
    start, stop = sorted(choose.randrange(len(data) + 1) for _ in range(2))
    return choose.choice([data[:start], data[start:], data[:start] + data[stop:]])


def put_in(data: bytes, choose: random.Random, other: bytes) -> bytes:
    place, start = choose.randrange(len(data) + 1), choose.randrange(len(other))
    some = other[start : start + choose.choice([1, 8, 100, 10**6])]
    more = choose.choice([some, b"\0" * 8, b"[" * 10**5, b'{"a":' * 10**5, choose.randbytes(16), data])
    return data[:place] + more + data[place + choose.choice([0, len(more)]) :]


def length_field(data: bytes, choose: random.Random, _: bytes) -> bytes:
    odd = [0, 1, 8, len(data) - 8, len(data), 2**23, 2**23 + 1, 2**31, 2**32, 2**63, 2**64 - 1]
    near = struct.unpack("<Q", data[:8].ljust(8, b"\0"))[0] + choose.choice([-8, -1, 1, 8])
    return struct.pack("<Q", choose.choice([*odd, near % 2**64])) + data[8:]


def edit_json(data: bytes, choose: random.Random, _: bytes) -> bytes:
    try:
        return dump(edited(json.loads(data), choose)) + data[len(data.rstrip()) :]
    except (ValueError, RecursionError, OverflowError):
        return flip(data, choose, b"")


def edit_entries(data: bytes, choose: random.Random, _: bytes) -> bytes:
    """Of a safetensors file, what is said about its tensors."""
    return on_header(data, choose, lambda entries: edited(entries, choose))


def edit_header(data: bytes, choose: random.Random, _: bytes) -> bytes:
    """Of a safetensors file, our own header within its metadata."""

    def change(entries: Any) -> Any:
        text = entries["__metadata__"]["bitassay"]
        changed = dump(edited(json.loads(text), choose)).decode("utf-8", "replace")
        return {**entries, "__metadata__": {"bitassay": changed}}

    return on_header(data, choose, change)


def edit_numbers(data: bytes, choose: random.Random, _: bytes) -> bytes:
    """Of a safetensors file, a few bytes of its tensors: NaN, infinity, zeros, others."""
    size = struct.unpack("<Q", data[:8].ljust(8, b"\0"))[0]
    if not size < len(data) - 16:
        return flip(data, choose, b"")
    place = choose.randrange(8 + size, len(data) - 4)
    new = choose.choice([b"\xc0\x7f", b"\x80\x7f", b"\xff\xff", b"\0\0", b"\1\0", choose.randbytes(2)])
    new *= choose.choice([1, 2, 200])
    return (data[:place] + new)[: len(data)] + data[place + len(new) :]


def on_header(data: bytes, choose: random.Random, change: Callable[[Any], Any]) -> bytes:
    size = struct.unpack("<Q", data[:8].ljust(8, b"\0"))[0]
    try:
        text = dump(change(json.loads(data[8 : 8 + size])))
    except (ValueError, RecursionError, OverflowError, KeyError, TypeError, AttributeError):
        return flip(data, choose, b"")
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def edited(tree: Any, choose: random.Random) -> Any:
    """`tree` with one node changed."""
    tree = copy.deepcopy(tree)
    places = list(nodes(tree))
    if not places or choose.random() < 0.03:
        return choose.choice([odd(choose), [tree], {"a": tree}])
    holder, key = choose.choice(places)
    value = holder[key]
    match choose.randrange(10):
        case 0 | 1:
            holder[key] = odd(choose)
        case 2 | 8 | 9:
            holder[key] = near(value, choose)
        case 3 | 4:
            other, other_key = choose.choice(places)
            holder[key] = copy.deepcopy(other[other_key])
        case 5:
            del holder[key]
        case 6 if isinstance(holder, list):
            holder.insert(choose.randrange(len(holder) + 1), copy.deepcopy(value))
        case 6:
            holder[choose.choice(["x", "", key + "2", "layer.1", "schema_version", "\ud800"])] = value
        case 7 if isinstance(value, list):
            choose.choice([choose.shuffle, lambda found: found.reverse()])(value)
        case 7 if isinstance(holder, dict):
            rest = [(name, holder.pop(name)) for name in list(holder)]
            choose.shuffle(rest)
            holder.update(rest)
        case _:
            holder[key] = odd(choose)
    return tree


def near(value: Any, choose: random.Random) -> Any:
    """Something of the same type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return choose.choice([value + 1, value - 1, -value, 2 * value, 1000 * value, value / 2])
        case str() if value:
            place = choose.randrange(len(value))
            letter = choose.choice("0aZ/+= \n\\")
            return choose.choice([value[:place] + letter + value[place + 1 :], value[:place], value + letter])
        case list() if value:
            return choose.choice([value[:-1], value + value, value[::-1], value * 50])
    return odd(choose)


def odd(choose: random.Random) -> Any:
    if choose.random() < 0.05:
        deep: Any = 0
        for _ in range(choose.choice([50, 500])):
            deep = [deep]
        return deep
    return copy.deepcopy(choose.choice(ODD))


def nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """All places in `tree`, as holder and key or index."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(pairs):
        yield tree, key
        yield from nodes(value)


def dump(tree: Any) -> bytes:
    text = json.dumps(tree, separators=(",", ":"), ensure_ascii=True)
    return text.replace(json.dumps(NOT_A_NUMBER), "NaN").encode()


RAW = [flip, cut, put_in]
EDITS = {
    "text": RAW,
    "json": [*RAW, edit_json, edit_json, edit_json],
    "safetensors": [*RAW, length_field, edit_entries, edit_header, edit_header, edit_numbers],
}


# --- what must hold ---


class Judges:
    """The seeds, and what a verifier makes of changed ones. All is on a tiny model and one thread."""

    def __init__(self, folder: Path):
        choose = random.Random(0)
        prompts = [[1, *(choose.randrange(3, 512) for _ in range(choose.randrange(3, 9)))] for _ in range(60)]
        self.folder = folder
        self.model = tiny_model("llama", num_hidden_layers=9, initializer_range=0.1).to(torch.bfloat16)
        self.profile = calibrate(
            self.model,
            self.model,
            prompts[:56],
            max_new_tokens=TOKENS,
            min_positions=4,
            alpha=0.05,
            guarantee="average",
            detectors=["proof-2"],
        )
        honest = prove_many(self.model, prompts[56:], max_new_tokens=TOKENS, nonces=["a", "b", "c", "d"])
        statuses = [self.verdict(trace, self.request(trace)) for trace in honest]
        self.trace = honest[statuses.index("PASS")]
        self.sampled = prove_many(
            self.model, prompts[56:57], max_new_tokens=TOKENS, sampler=Sampler(0.9, 0.9, 3)
        )[0]
        self.receipt = commit(self.trace, KEY)
        numerics = self.trace.header.numerics.model_copy(update={"gpu": "H200", "batch": 16})
        header = self.trace.header.model_copy(update={"numerics": numerics})
        self.receipt_2 = commit(Trace(header, self.trace.states), KEY)
        self.asked = challenge(self.receipt, beacon=bytes(32), generated=6, prompt=2)
        self.opening = open_trace(self.trace, self.asked)
        self.proof = sign_proof(self.trace, self.receipt, KEY, 2)
        self.item = Item(request="0" * 64, prompt="1" * 64, output="2" * 64, score=0.5, limit=11)

    def targets(self) -> list[Target]:
        def seed(name: str, write: Callable[..., None], *content: Any) -> bytes:
            write(self.folder / name, *content)
            return (self.folder / name).read_bytes()

        given = assign(["x", "y"], {"ada": {"p": "FAIL"}, "ben": {"q": "PASS"}}, each=1, seed=b"")
        secret = files.Secret(round="r", assignments=tuple(given))
        task = files.Task(round="r", verifier="ada", verifiers=("ada", "ben"), items=given[0].items)
        mine = report("ada", dict.fromkeys(given[0].items, "PASS"), bytes(32))
        board = files.Board({"ada": report_commitment("r", mine), "ben": "0" * 64}, {})
        models: dict[str, BaseModel] = {
            "secret": secret,
            "task": task,
            "report": mine,
            "commitment": files.Commitment(round="r", verifier="ada", commitment="0" * 64),
            "revealed": files.reveal(mine, task, board),
        }
        verdicts = {"rows": [{"trace": "x", "status": "PASS"}], "pooled": {}}
        return [
            *(
                Target(name, seed(name, write_trace, one), "safetensors", partial(self.judge_trace, one))
                for name, one in (("trace", self.trace), ("sampled", self.sampled))
            ),
            *(
                Target(name, seed(name, write_receipt, one), "json", partial(self.judge_receipt, one))
                for name, one in (("receipt", self.receipt), ("receipt 2", self.receipt_2))
            ),
            Target("challenge", seed("challenge", write_challenge, self.asked), "json", self.judge_challenge),
            Target(
                "opening", seed("opening", write_opening, self.opening), "safetensors", self.judge_opening
            ),
            Target(
                "profile",
                seed("profile", lambda path, one: write_profile(one, path), self.profile),
                "json",
                self.judge_profile,
            ),
            Target("proof", seed("proof", write_proof, self.proof), "json", self.judge_proof),
            Target("ledger", self.ledger_line(), "json", self.judge_ledger),
            *(
                Target(name, dump(one.model_dump(mode="json")), "json", reads_only(type(one)))
                for name, one in models.items()
            ),
            Target(
                "plants", dump({"ada": {"p": "FAIL"}}), "json", lambda path: word(files.read_canaries(path))
            ),
            Target("answers", dump(verdicts), "json", lambda path: word(files.read_answers(path))),
            Target("items", b"x\ny\n", "text", lambda path: word(files.read_items(path))),
        ]

    def request(self, trace: Trace) -> Request:
        sampling = trace.header.sampling
        prompt, nonce = trace.header.prompt_ids, trace.header.nonce
        return Request(prompt, nonce, sampling.to_sampler(), sampling.max_new_tokens)

    def verdict(self, trace: Trace, request: Request, profile: Any = None) -> str:
        return verify_many([trace], self.model, profile=profile or self.profile, requests=[request])[0].status

    def opened(self, receipt: Receipt, one: Challenge, opening: Opening, request: Request) -> str:
        """What the verdict on an opening is."""
        return verify_opening(
            receipt, one, opening, self.model, signer=SIGNER, profile=self.profile, request=request
        ).status

    def judge_trace(self, seed: Trace, path: Path) -> str:
        """Whole, and by a receipt that the host makes of it."""
        trace, request = read_trace(path), self.request(seed)
        same, status = claims(trace) == claims(seed), self.verdict(trace, request)
        assert same or status != "PASS", "claims were changed, and it passes"
        try:
            read_trace(path, expecting(self.model, request))
        except RefusedError:
            assert status == "FAIL", "a verifier refuses to read what does not fail"
        receipt = commit(trace, KEY)
        one = challenge(receipt, beacon=bytes(32), generated=6, prompt=2)
        opened = self.opened(receipt, one, open_trace(trace, one), request)
        assert same or opened != "PASS", "claims were changed, and the receipt passes"
        options = {"profile": self.profile, "requests": [request]}
        (spot,) = verify_segments([trace], self.model, 1, **options)
        assert same or spot.status != "PASS", "claims were changed, and a spot check passes"
        assert (spot.status, status) != ("FAIL", "PASS"), "a spot check refuses what a full check passes"
        return status

    def judge_receipt(self, seed: Receipt, path: Path) -> str:
        """As it came, and if it can be decoded, signed again."""
        try:
            again = decode(path.read_bytes(), path)
        except BitassayError:
            again = None
        if again is not None:
            signed = replace(again, key=SIGNER)
            signed = replace(signed, signature=KEY.sign(SIGNED + signed.commitment))
            self.check_opened(signed)
            opened_positions(challenge(signed, generated=2**18, prompt=2**18), signed.header)
            assert decode(encode(signed), path) == signed
        receipt = read_receipt(path)
        assert receipt == seed, "another receipt has a signature"
        return self.check_opened(receipt)

    def check_opened(self, receipt: Receipt) -> str:
        status = self.opened(receipt, self.asked, self.opening, self.request(self.trace))
        assert status != "PASS" or receipt == self.receipt, "another receipt passes"
        return status

    def judge_challenge(self, path: Path) -> str:
        asked = read_challenge(path)
        if asked.commitment == self.asked.commitment:
            assert self.opened(self.receipt, asked, open_trace(self.trace, asked), Request()) != "FAIL"
        status = self.opened(self.receipt, asked, self.opening, self.request(self.trace))
        assert status != "PASS" or asked == self.asked, "the answer to another challenge passes"
        return status

    def judge_opening(self, path: Path) -> str:
        opening = read_opening(path, self.receipt, self.asked)
        assert opening.proof == self.opening.proof
        assert list(opening.states) == list(self.opening.states)
        for layer, rows in opening.states.items():
            assert torch.equal(rows, self.opening.states[layer]), "other states have a proof"
        return self.opened(self.receipt, self.asked, opening, self.request(self.trace))

    def judge_proof(self, path: Path) -> str:
        """As it came, and if it can be decoded, signed again."""
        try:
            again = decode_proof(path.read_bytes(), path)
        except BitassayError:
            again = None
        if again is not None:
            signed = replace(again, commitment=self.receipt.commitment)
            signed = replace(signed, signature=KEY.sign(signed.message))
            assert decode_proof(encode_proof(signed), path) == signed
            verdict = verify_proof(self.receipt, signed, self.model, signer=SIGNER, profile=self.profile)
            assert verdict.status != "INCONCLUSIVE"
        assert read_proof(path, self.receipt) == self.proof, "another proof has a signature"
        return word(path)

    def ledger_line(self) -> bytes:
        path = self.folder / "ledger"
        update_ledger(path, [self.item], Binding(profile=self.profile.digest))
        return path.read_bytes().splitlines()[1]

    def judge_ledger(self, path: Path) -> str:
        text = (self.folder / "ledger").read_bytes().splitlines()[0] + b"\n" + path.read_bytes() + b"\n"
        path.write_bytes(text)
        _, lines = read_ledger(path, self.profile)
        path.unlink()
        items = [Item(**line.model_dump(exclude={"time"})) for line in lines]
        again = update_ledger(path, items, Binding(profile=self.profile.digest))
        assert [Item(**line.model_dump(exclude={"time"})) for line in again] == items
        return word(path)

    def judge_profile(self, path: Path) -> str:
        """It is the verifier's own, so only that it decides without a crash."""
        profile = read_profile(path)
        self.verdict(self.sampled, self.request(self.sampled), profile)
        return self.verdict(self.trace, self.request(self.trace), profile)


def claims(trace: Trace) -> dict[str, Any]:
    """What no statistic has to judge, and what the verifier is not indifferent to."""
    found = trace.header.model_dump(exclude={"output_ids", "positions"})
    found["model"].pop("name")
    if found["sampling"]["sampler"] == "greedy":  # then these have no effect
        found["sampling"] |= {"top_p": None, "seed": None}
    return found


def reads_only(kind: type[BaseModel]) -> Callable[[Path], str]:
    return lambda path: word(files.read(path, kind, "write it again"))


def word(_: object) -> str:
    return "read"


def check(target: Target, data: bytes, path: Path) -> str:
    """One case; the outcome. Raises whatever must not be."""
    path.write_bytes(data)
    cpu, before = time.process_time(), peak_megabytes()
    try:
        outcome = target.judge(path)
        said = outcome
    except BitassayError as error:
        outcome, said = "refused", str(error)
    assert said.strip().encode(), "an error that says nothing"
    seconds, grown = time.process_time() - cpu, peak_megabytes() - before
    assert seconds < SECONDS, f"{seconds:.1f} s"
    assert grown < MEGABYTES, f"{grown:.0f} MB more"
    return outcome


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main(minutes: float, first_seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        targets = Judges(folder).targets()
        for target in targets:
            check(target, target.seed, folder / "case")
        counts: Counter[tuple[str, str]] = Counter()
        slowest, stop, rounds = 0.0, time.monotonic() + 60 * minutes, 0

        def one_case(case: tuple[Target, bytes]) -> None:
            nonlocal slowest
            start = time.process_time()
            counts[case[0].name, check(*case, folder / "case")] += 1
            slowest = max(slowest, time.process_time() - start)

        while time.monotonic() < stop:
            run = given(mutated(targets))(one_case)
            run = settings(
                max_examples=500,
                deadline=None,
                database=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            )(run)
            hypothesis_seed(first_seed + rounds)(run)()
            rounds += 1
            print(f"{sum(counts.values())} cases", file=sys.stderr)
    return {
        "minutes": minutes,
        "seeds": [first_seed, first_seed + rounds - 1],
        "cases": sum(counts.values()),
        "rows": [
            {"file": file, "outcome": outcome, "cases": count}
            for (file, outcome), count in sorted(counts.items())
        ],
        "slowest_case_cpu_seconds": slowest,
        "peak_megabytes": math.ceil(peak_megabytes()),
        "environment": environment(),
    }


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("--minutes", type=float, default=10)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    print(json.dumps(main(chosen.minutes, chosen.seed), indent=2))
