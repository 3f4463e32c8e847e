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
    """The model in bf16, as if on the machine that wrote the files."""
    monkeypatch.setattr(verdict, "numerics", lambda model: old_profile.verifier)
    return stories260k(dtype="bfloat16")


def check(judged, name):
    """The same verdict; numbers may differ by what another machine's arithmetic does."""
    was, now = EXPECTED[name], judged.to_dict()
    for exact in ("status", "profile", "trace_digest", "limit", "n_calibration"):
        assert now[exact] == was[exact]
    assert [reason["code"] for reason in now["reasons"]] == was["codes"]
    assert now["p_value"] == pytest.approx(was["p_value"], abs=0.3)
    assert now["hidden_distance"] == pytest.approx(was["hidden_distance"], rel=0.3)
    assert now["mean_margin"] == pytest.approx(was["mean_margin"], abs=0.05)
    assert now["score"].keys() == was["score"].keys()
    assert now["accept_rate"].keys() == was["accept_rate"].keys()
    assert now["attribution"]["best"] == was["best"]


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
