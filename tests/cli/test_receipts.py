"""`prove --commit-only`, `challenge`, `open` and `verify`, through files."""

import json
import os
import stat

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from bitassay.cli import run
from bitassay.engines.load import load
from bitassay.verification.calibrate import calibrate
from bitassay.verification.profile import write_profile
from bitassay.verification.receipts.receipt import read_receipt

MODEL = ("stories260k", "--dtype", "float32")
VERIFY = ("--model", *MODEL)


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
    assert verify(signer="00" * 32) == (1, "FAIL", ["other-signer"])
    assert verify(signer="") == (1, "INCONCLUSIVE", ["unknown-signer"])
    (folder / "bad.receipt").write_bytes((folder / "x.receipt").read_bytes().replace(b'"n1"', b'"n2"'))
    assert verify(receipt="bad.receipt") == (1, "FAIL", ["bad-signature"])
    assert bitassay("challenge", str(folder / "x.receipt"), "--out", str(folder / "again.json")).status == 0
    assert verify(challenge="again.json") == (1, "FAIL", ["other-challenge"])
    assert verify(opening="x.trace") == (1, "FAIL", ["other-challenge"])
    assert verify(opening="x.receipt") == (1, "FAIL", ["header-oversize"])


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
    said(2, "signed by", *challenge, "--signer", "00" * 32)
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
