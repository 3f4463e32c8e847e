"""Files that version 0.1.0 wrote load, and are judged as they were: traces, a profile, a receipt with its
challenge and opening, a ledger, a committee's round."""

import json
from pathlib import Path

import pytest

from bitassay.errors import BitassayError
from bitassay.testing.tiny import stories260k
from bitassay.verification import verdict
from bitassay.verification.committee.files import Secret, Task, judge_files, read
from bitassay.verification.ledger import read_ledger
from bitassay.verification.profile import read_profile
from bitassay.verification.receipts.challenge import read_challenge
from bitassay.verification.receipts.opening import read_opening
from bitassay.verification.receipts.receipt import read_receipt
from bitassay.verification.trace import read_trace
from bitassay.verification.verdict import verify_many, verify_opening

FILES = Path(__file__).parent / "version_0_1"
TRACES = ("honest-0", "honest-4", "int4")
EXPECTED = json.loads((FILES / "verdicts.json").read_text())


@pytest.fixture(scope="module")
def old_profile():
    return read_profile(FILES / "profile.json")


@pytest.fixture
def verifier(old_profile, monkeypatch):
    """The model in fp32, as if it were the verifier that the profile names. Against the bf16 states of the
    files its own rounding does not show, whatever machine this is: what version 0.1.0 said with it holds
    everywhere, and what one in bf16 says of honest runs is little more than its own rounding."""
    monkeypatch.setattr(verdict, "numerics", lambda model: old_profile.verifier)
    return stories260k(dtype="float32")


def check(judged, name):
    """The same verdict with the same numbers. Two instruction sets differ by 4e-5."""
    was, now = EXPECTED[name], judged.to_dict()
    for exact in ("status", "profile", "trace_digest", "limit", "n_calibration"):
        assert now[exact] == was[exact]
    assert [reason["code"] for reason in now["reasons"]] == was["codes"]
    assert now["attribution"]["best"] == was["best"]
    assert now["attribution"]["distance"] == pytest.approx(was["attribution_distance"], rel=1e-3)
    assert now["p_value"] == pytest.approx(was["p_value"], abs=1e-9)
    assert now["hidden_distance"] == pytest.approx(was["hidden_distance"], rel=1e-3)
    assert now["mean_margin"] == pytest.approx(was["mean_margin"], rel=1e-3, abs=1e-5)
    assert now["accept_rate"] == pytest.approx(was["accept_rate"], abs=1e-9)
    assert now["score"] == {
        key: pytest.approx(value, rel=1e-3, abs=1e-3) if isinstance(value, float) else value
        for key, value in was["score"].items()
    }


def test_traces_and_profile_give_the_same_verdicts(old_profile, verifier):
    traces = [read_trace(FILES / f"{name}.trace") for name in TRACES]
    judged = verify_many(traces, verifier, profile=old_profile, now=old_profile.created)
    for one, name in zip(judged, TRACES, strict=True):
        check(one, name)


def test_a_receipt_and_its_opening(old_profile, verifier):
    receipt, challenge = read_receipt(FILES / "receipt"), read_challenge(FILES / "challenge.json")
    opening = read_opening(FILES / "opening", receipt, challenge)
    signer = bytes.fromhex((FILES / "key.txt").read_text())
    judged = verify_opening(
        receipt, challenge, opening, verifier, signer=signer, profile=old_profile, now=old_profile.created
    )
    check(judged, "opening")


def test_a_ledger_is_refused_since_it_does_not_name_its_requests(old_profile):
    with pytest.raises(BitassayError, match="a ledger of version 1, which does not say what requests"):
        read_ledger(FILES / "host.ledger", old_profile)


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
