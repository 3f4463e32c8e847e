"""`prove --commit-only`, `challenge`, `open` and `verify`, through files."""

import json
import os
import stat
from dataclasses import replace

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from bitassay.cli import run
from bitassay.engines.load import load
from bitassay.verification.calibrate import calibrate
from bitassay.verification.profile import write_profile
from bitassay.verification.receipts.keys import private_key
from bitassay.verification.receipts.receipt import commit, read_receipt, write_receipt
from bitassay.verification.trace import read_trace, write_trace

MODEL = ("stories260k", "--dtype", "float32")
VERIFY = ("--model", *MODEL)
OTHER_SIGNER = "3b6a27bcceb6a42d62a3a8d02a6f0d73653215771de243a63ac048a18b59da29"  # of the secret 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A host's folder with a trace, its receipt, a challenge and the opening; the verifier's profile."""
    folder = tmp_path_factory.mktemp("receipts")
    model = load("stories260k", dtype=torch.float32)
    prompts = [
        f"Once upon a {a} there was {b}" for a in ("time", "day", "hill", "night") for b in "abcdefghijkl"
    ]
    profile = calibrate(model, model, prompts, max_new_tokens=24, alpha=0.05, guarantee="average")
    write_profile(profile, folder / "profile.json")
    words = [
        "--prompt",
        "One day a girl",
        "--nonce",
        "n1",
        "--max-new-tokens",
        "24",
        "--out",
        str(folder / "x.trace"),
    ]
    assert run(["prove", *MODEL, *words, "--commit-only", "--key", str(folder / "host.pem")]) == 0
    assert (
        run(["challenge", str(folder / "x.receipt"), "--generated", "12", "--out", str(folder / "x.json")])
        == 0
    )
    opening = ["--challenge", str(folder / "x.json"), "--out", str(folder / "x.opening")]
    assert run(["open", str(folder / "x.trace"), *opening]) == 0
    return folder


@pytest.fixture
def verify(folder, bitassay):
    """Exit status, verdict and codes of `bitassay verify`."""

    def call(*, opening="x.opening", receipt="x.receipt", challenge="x.json", signer=None, nonce="n1"):
        signer = [] if signer == "" else ["--signer", signer or read_receipt(folder / "x.receipt").key.hex()]
        files = ["--receipt", str(folder / receipt), "--challenge", str(folder / challenge)]
        more = ["--profile", str(folder / "profile.json"), "--nonce", nonce, "--format", "json"]
        done = bitassay("verify", str(folder / opening), *VERIFY, *files, *signer, *more)
        row = json.loads(done.out)["rows"][0]
        return done.status, row["status"], [reason["code"] for reason in row["reasons"]]

    return call


def test_an_honest_host_passes_and_shows_only_what_was_asked(folder, verify):
    assert verify() == (0, "PASS", ["as-honest"])
    assert (folder / "x.opening").stat().st_size < (folder / "x.trace").stat().st_size
    tokens = len(read_receipt(folder / "x.receipt").header.positions) + 1
    assert (folder / "x.receipt").stat().st_size < 600 + 8 * tokens


def test_the_verifier_needs_no_trace(folder, verify):
    os.rename(folder / "x.trace", folder / "kept")
    try:
        assert verify()[1] == "PASS"
    finally:
        os.rename(folder / "kept", folder / "x.trace")


def test_attacks_fail_by_name(folder, verify, bitassay):
    assert verify(opening="withheld.opening") == (1, "FAIL", ["withheld-opening"])
    assert verify(nonce="n2") == (1, "FAIL", ["other-nonce"])
    assert verify(signer=OTHER_SIGNER) == (1, "FAIL", ["other-signer"])
    assert verify(signer="") == (1, "INCONCLUSIVE", ["unknown-signer"])
    (folder / "bad.receipt").write_bytes((folder / "x.receipt").read_bytes().replace(b'"n1"', b'"n2"'))
    assert verify(receipt="bad.receipt") == (1, "FAIL", ["bad-signature"])
    assert bitassay("challenge", str(folder / "x.receipt"), "--out", str(folder / "again.json")).status == 0
    assert verify(challenge="again.json") == (1, "FAIL", ["other-challenge"])
    assert verify(opening="x.trace") == (1, "FAIL", ["other-challenge"])
    assert verify(opening="x.receipt") == (1, "FAIL", ["header-oversize"])


def test_a_second_signed_answer_to_a_request_in_a_ledger_is_the_hosts_fault(folder, bitassay):
    trace = read_trace(folder / "x.trace")
    named = trace.header.model.model_copy(update={"name": "as before"})
    again = replace(trace, header=trace.header.model_copy(update={"model": named}))
    write_trace(folder / "z.trace", again)
    write_receipt(folder / "z.receipt", commit(again, private_key(folder / "host.pem")))
    files = [str(folder / name) for name in ("z.receipt", "z.json", "z.trace", "z.opening")]
    assert bitassay("challenge", files[0], "--generated", "12", "--out", files[1]).status == 0
    assert bitassay("open", files[2], "--challenge", files[1], "--out", files[3]).status == 0
    signer = ["--signer", read_receipt(folder / "x.receipt").key.hex(), "--nonce", "n1"]
    kept = ["--profile", str(folder / "profile.json"), "--ledger", str(folder / "host.ledger")]

    def verify(name):
        where = [str(folder / f"{name}.{end}") for end in ("opening", "receipt", "json")]
        words = [where[0], *VERIFY, "--receipt", where[1], "--challenge", where[2], *signer, *kept]
        done = bitassay("verify", *words, "--format", "json")
        return done.status, json.loads(done.out)

    for _ in range(2):
        assert verify("x")[0] == 0
        status, found = verify("z")
        assert status == 1
        assert [reason["code"] for reason in found["rows"][0]["reasons"]] == ["equivocation"]
        assert found["decision"]["why"].startswith(
            "1 of 1 fail exact checks: equivocation: the host also signed"
        )
        assert found["sequential"]["n_requests"] == 1
    receipts = [str(folder / f"{name}.receipt") for name in "xz"]
    assert bitassay("receipts", "check", *receipts).status == 1, "a proof for others"


def test_the_key_is_made_once_for_its_owner_alone(folder, bitassay):
    assert stat.S_IMODE((folder / "host.pem").stat().st_mode) == 0o600
    words = [
        "--prompt",
        "A cat",
        "--max-new-tokens",
        "4",
        "--out",
        str(folder / "y.trace"),
        "--format",
        "json",
    ]
    done = bitassay("prove", *MODEL, *words, "--commit-only", "--key", str(folder / "host.pem"))
    row = json.loads(done.out)["rows"][0]
    assert row["public_key"] == read_receipt(folder / "x.receipt").key.hex()
    assert row["receipt"] == str(folder / "y.receipt")
    assert row["receipt_bytes"] == (folder / "y.receipt").stat().st_size


def test_a_folder_of_prompts_gives_a_receipt_each(folder, bitassay):
    (folder / "prompts.txt").write_text("Once\nTwice\n")
    words = ["--prompts", str(folder / "prompts.txt"), "--out", str(folder / "many"), "--max-new-tokens", "4"]
    for _ in range(2):
        done = bitassay("prove", *MODEL, *words, "--commit-only", "--key", str(folder / "host.pem"))
        assert done.status == 0
        assert [read_receipt(path).header.nonce for path in sorted((folder / "many").glob("*.receipt"))] == [
            "0-0",
            "0-1",
        ]
        (folder / "many" / "00001.receipt").unlink()


def test_bad_usage(folder, bitassay, tmp_path):
    def said(status, text, *words):
        done = bitassay(*map(str, words))
        assert done.status == status
        assert text in done.err
        assert "Traceback" not in done.err

    trace, receipt, asked = folder / "x.trace", folder / "x.receipt", folder / "x.json"
    prove = ("prove", *MODEL, "--prompt", "A", "--max-new-tokens", 2, "--out", tmp_path / "t.trace")
    said(2, "go together", *prove, "--commit-only")
    said(2, "go together", *prove, "--key", tmp_path / "k")
    said(2, "not a private key", *prove, "--commit-only", "--key", tmp_path)
    (tmp_path / "k").write_text("secret")
    said(2, "chmod 600", *prove, "--commit-only", "--key", tmp_path / "k")
    (tmp_path / "k").chmod(0o600)
    said(2, "not a private key", *prove, "--commit-only", "--key", tmp_path / "k")
    other = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "k").write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    said(2, "not an Ed25519 key", *prove, "--commit-only", "--key", tmp_path / "k")
    challenge = ("challenge", receipt, "--out", tmp_path / "c.json")
    said(2, "is not hex", *challenge, "--beacon", "xyz")
    said(2, "beacon", *challenge, "--beacon", "00")
    said(2, "generated", *challenge, "--generated", 0)
    said(2, "signed by", *challenge, "--signer", OTHER_SIGNER)
    said(2, "not of prime order", *challenge, "--signer", "00" * 32)
    said(2, "not a public key", *challenge, "--signer", OTHER_SIGNER.upper())
    said(2, "not a public key", *challenge, "--signer", "00")
    said(2, "not-a-file", "challenge", tmp_path, "--out", tmp_path / "c.json")
    said(2, "header-malformed", "challenge", trace, "--out", tmp_path / "c.json")
    assert not (tmp_path / "c.json").exists()
    said(2, "bytes, more than", "open", trace, "--challenge", trace, "--out", tmp_path / "o")
    said(2, "another trace", "open", folder / "y.trace", "--challenge", asked, "--out", tmp_path / "o")
    said(2, "one opening", "verify", trace, *VERIFY, "--receipt", receipt)
    said(2, "one opening", "verify", trace, trace, *VERIFY, "--receipt", receipt, "--challenge", asked)
    (tmp_path / "no.json").write_text("{}")
    words = ("--receipt", receipt, "--challenge", tmp_path / "no.json")
    said(2, "not a challenge", "verify", trace, *VERIFY, *words)


def test_a_receipt_and_its_proof_are_judged_without_a_challenge(folder, bitassay, tmp_path):
    words = (
        "--prompt",
        "One day a girl",
        "--nonce",
        "n1",
        "--max-new-tokens",
        "24",
        "--out",
        tmp_path / "x.trace",
    )
    signed = ("--commit-only", "--key", folder / "host.pem", "--proof", "8", "--format", "json")
    (row,) = json.loads(bitassay("prove", *MODEL, *map(str, (*words, *signed))).out)["rows"]
    proof = tmp_path / "x.proof"
    assert row["proof"] == str(proof)
    assert proof.stat().st_size < 200 + 11 * row["output_tokens"]
    os.remove(tmp_path / "x.trace")
    receipt = read_receipt(tmp_path / "x.receipt")

    def judged(path):
        files = ("--proof", path, "--signer", receipt.key.hex(), "--profile", tmp_path / "p.json")
        done = bitassay("verify", *map(str, (tmp_path / "x.receipt", *VERIFY, *files, "--format", "json")))
        (found,) = json.loads(done.out)["rows"]
        return done.status, found["status"], [reason["code"] for reason in found["reasons"]]

    model = load("stories260k", dtype=torch.float32)
    prompts = [
        f"Once upon a {a} there was {b}" for a in ("time", "day", "hill", "night") for b in "abcdefghijkl"
    ]
    options = {"max_new_tokens": 24, "alpha": 0.05, "guarantee": "average", "detectors": ["proof-8"]}
    write_profile(calibrate(model, model, prompts, **options), tmp_path / "p.json")
    assert judged(proof) == (0, "PASS", ["as-honest"])
    altered = tmp_path / "altered.proof"
    altered.write_bytes(proof.read_bytes().replace(b'",-', b'",-1', 1))
    assert judged(altered) == (1, "FAIL", ["bad-signature"])
    assert judged(tmp_path / "x.receipt") == (1, "FAIL", ["not-a-proof"])
    assert bitassay("prove", *MODEL, *map(str, (*words, "--proof", "2"))).status == 2
    both = ("--challenge", str(folder / "x.json"))
    assert bitassay("verify", str(tmp_path / "x.receipt"), *VERIFY, "--proof", str(proof), *both).status == 2
    missing = bitassay("verify", str(tmp_path / "no.receipt"), *VERIFY, "--proof", str(proof))
    assert (missing.status, "no.receipt: no such file" in missing.err) == (2, True)
    assert judged(tmp_path / "no.proof") == (1, "FAIL", ["withheld-proof"])
