"""Files that version 0.1.0 wrote load, and say what they said: traces, a receipt with its challenge and
opening, a committee's round. Its profiles, and ledgers by them, are refused with the remedy: they are of other
detectors."""

import json
from pathlib import Path

import pytest
import torch

from bitassay.errors import BitassayError
from bitassay.testing.tiny import stories260k
from bitassay.verification.calibrate import calibrate
from bitassay.verification.committee.files import Secret, Task, judge_files, read
from bitassay.verification.ledger import read_ledger
from bitassay.verification.profile import read_profile
from bitassay.verification.prove import prove
from bitassay.verification.receipts.challenge import read_challenge
from bitassay.verification.receipts.opening import read_opening
from bitassay.verification.receipts.receipt import read_receipt
from bitassay.verification.trace import read_trace
from bitassay.verification.verify import verify, verify_many, verify_opening

FILES = Path(__file__).parent / "version_0_1"
TRACES = ("honest-0", "honest-4", "int4")
EXPECTED = json.loads((FILES / "verdicts.json").read_text())


@pytest.fixture(scope="module")
def verifier():
    """The model in fp32. Against the bf16 states of the files its own rounding does not show, whatever machine
    this is: what version 0.1.0 said with it holds everywhere, and what one in bf16 says of honest runs is
    little more than its own rounding."""
    return stories260k(dtype="float32")


@pytest.fixture(scope="module")
def profile(verifier, many_prompts):
    """Of honest runs in bf16 of today, as if they came from the machine of the files."""
    host, old = stories260k(dtype="bfloat16"), read_trace(FILES / "honest-0.trace").header
    made = calibrate(host, verifier, many_prompts, max_new_tokens=24, alpha=0.05, guarantee="average")
    assert made.model.is_same_model(old.model)
    return made.model_copy(update={"prover": old.numerics})


def check(judged, name):
    """The same verdict with the same numbers. Two instruction sets differ by 4e-5."""
    was, now = EXPECTED[name], judged.to_dict()
    for exact in ("status", "trace_digest", "limit"):
        assert now[exact] == was[exact]
    assert list(dict.fromkeys(reason["code"] for reason in now["reasons"])) == was["codes"]
    assert now["hidden_distance"] == pytest.approx(was["hidden_distance"], rel=1e-3)
    assert now["mean_margin"] == pytest.approx(was["mean_margin"], rel=1e-3, abs=1e-5)
    assert now["accept_rate"] == pytest.approx(was["accept_rate"], abs=1e-9)


def test_traces_have_the_same_verdicts_by_a_profile_of_today(profile, verifier):
    traces = [read_trace(FILES / f"{name}.trace") for name in TRACES]
    judged = verify_many(traces, verifier, profile=profile)
    for one, name in zip(judged, TRACES, strict=True):
        check(one, name)


def test_a_receipt_and_its_opening(profile, verifier):
    receipt, challenge = read_receipt(FILES / "receipt"), read_challenge(FILES / "challenge.json")
    opening = read_opening(FILES / "opening", receipt, challenge)
    signer = bytes.fromhex((FILES / "key.txt").read_text())
    check(verify_opening(receipt, challenge, opening, verifier, signer=signer, profile=profile), "opening")


def test_a_host_of_today_writes_the_trace_that_it_wrote():
    """The tokens, and what is claimed; the states are of the instruction set."""
    old = read_trace(FILES / "honest-0.trace").header
    new = prove(stories260k(dtype="bfloat16"), old.prompt_ids, max_new_tokens=24, nonce=old.nonce).header
    for field in ("model", "sampling", "layers", "nonce", "prompt_ids"):
        assert getattr(new, field) == getattr(old, field)
    assert new.numerics.dtype == old.numerics.dtype == str(torch.bfloat16).removeprefix("torch.")


def test_a_profile_is_refused_with_the_remedy(verifier):
    with pytest.raises(BitassayError, match=r"profile\.json: a profile of version 2; this reads 4") as error:
        read_profile(FILES / "profile.json")
    assert error.value.remedy == "bitassay calibrate MODEL"
    with pytest.raises(BitassayError, match="a profile of version 2"):
        verify(read_trace(FILES / "honest-0.trace"), verifier, profile=FILES / "profile.json")


def test_a_ledger_is_refused_since_it_does_not_name_its_requests(profile):
    with pytest.raises(BitassayError, match="a ledger of version 1, which does not say what requests"):
        read_ledger(FILES / "host.ledger", profile)


def test_a_round_of_a_committee():
    secret = read(FILES / "round" / "secret.json", Secret, "")
    assert read(FILES / "round" / "tasks" / "anna.json", Task, "").verifiers == ("anna", "ben", "cleo")
    judged, reports = judge_files(secret, FILES / "round" / "commitments", FILES / "round" / "reveals")
    assert {name: [reason.code for reason in reasons] for name, reasons in judged.items()} == {
        "anna": [],
        "ben": ["missed-planted-failure"],
        "cleo": [],
    }
    assert reports["anna"].answers["af1"] == "FAIL"
