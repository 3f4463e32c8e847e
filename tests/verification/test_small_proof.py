"""Small proofs against an independent writer and checker, byte for byte; what is refused; what moves the statistic."""

import ast
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from bitassay.engines.decode import Prefill
from bitassay.errors import BitassayError
from bitassay.models.identity import identity
from bitassay.verification.attacks.forgeries import FORGED_PROOFS
from bitassay.verification.calibrate import calibrate
from bitassay.verification.detectors.detector import Comparison
from bitassay.verification.detectors.distance import CEILING
from bitassay.verification.detectors.registry import DETECTORS
from bitassay.verification.detectors.small_proof import check_claimed, log_mean
from bitassay.verification.proofs import verify_proof
from bitassay.verification.prove import prove_many
from bitassay.verification.receipts.proof import (
    SignedProof,
    SmallProof,
    check_proof,
    decode_proof,
    encode_proof,
    proof_errors,
    read_proof,
    sign_proof,
    signs,
    small_proof,
    step_exponents,
    write_proof,
)
from bitassay.verification.receipts.receipt import commit
from bitassay.verification.structure import Request
from verification import independent_proof as independent
from verification.receipts import KEY, OTHER_KEY, SIGNER, codes, refused

ROOT = Path(__file__).parents[2]
SECRET = bytes(range(32))
COMMITMENT = bytes(range(32))
STATES = torch.tensor([[((37 * i + 11 * n) % 61 - 30) / 16 for i in range(32)] for n in range(3)])
VECTORS = {2: "48c644c8422c", 8: "48c64cc82a682aa044c8e608406a8884422caac264ae2ca6"}
ARGUMENTS = {"nonce": "n1", "commitment": COMMITMENT}


def states(n=40, hidden=64, seed=0, scale=30.0):
    made = torch.randn(n, hidden, generator=torch.Generator().manual_seed(seed)) * scale
    return made.to(torch.bfloat16)


@pytest.fixture(scope="module")
def signed(trace, receipt):
    return sign_proof(trace, receipt, KEY, 8)


# --- the format ---


@pytest.mark.parametrize("size", [2, 8])
def test_the_vectors_of_the_specification(size):
    proof = small_proof(STATES, range(7, 10), dtype="bfloat16", size=size, **ARGUMENTS)
    assert (proof.exponent, proof.residues.hex()) == (-3, VECTORS[size])
    assert independent.residues(STATES.double().numpy(), 7, COMMITMENT, "n1", "bfloat16", size) == (
        proof.exponent,
        proof.residues,
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("size", [2, 8])
def test_both_writers_agree_on_random_states(dtype, size):
    rows = states(6).to(getattr(torch, dtype))
    made = small_proof(rows, range(5, 11), dtype=dtype, size=size, **ARGUMENTS)
    theirs = independent.residues(rows.double().numpy(), 5, COMMITMENT, "n1", dtype, size)
    assert (made.exponent, made.residues) == theirs
    reference = rows.double() * 1.01
    errors = proof_errors(made, reference, range(5, 11), **ARGUMENTS)
    np.testing.assert_allclose(
        errors, independent.errors(*theirs, reference.numpy(), 5, COMMITMENT, "n1"), rtol=1e-12
    )


@pytest.mark.parametrize("size", [2, 8])
def test_the_file_is_the_independent_writers_byte_for_byte(trace, receipt, size):
    header, n_prompt = trace.header, trace.n_prompt
    cells = {
        layer: [row.view(torch.uint8).numpy().tobytes() for row in rows]
        for layer, rows in trace.states.items()
    }
    assert independent.commitment(json.loads(header.model_dump_json()), cells) == receipt.commitment
    rows = trace.states[header.layers[-1]][n_prompt:].double().numpy()
    line = independent.write(
        rows, n_prompt, receipt.commitment, header.nonce, header.numerics.dtype, size, SECRET
    )
    written = encode_proof(sign_proof(trace, receipt, KEY, size))
    assert line == written
    commitment, exponent, data = independent.read(written, receipt.key)
    assert commitment == receipt.commitment
    assert len(data) == size * len(rows)
    assert (
        max(independent.errors(exponent, data, rows, n_prompt, commitment, header.nonce)) <= 4.0**exponent / 4
    )


def test_fewer_projections_are_the_first_of_more():
    assert (signs(COMMITMENT, 3, "n", 64, 16)[:4] == signs(COMMITMENT, 3, "n", 64, 4)).all()
    rows = states()
    two, eight = (
        small_proof(rows, range(40), dtype="bfloat16", size=size, **ARGUMENTS).numbers(40) for size in (2, 8)
    )
    assert (eight[:, :4] == two).all()


@pytest.mark.parametrize("changed", [{"commitment": bytes(32)}, {"position": 4}, {"nonce": "m"}])
def test_other_requests_have_other_signs(changed):
    arguments = {"commitment": COMMITMENT, "position": 3, "nonce": "n", "hidden": 256, "k": 16}
    same = (signs(**arguments) == signs(**(arguments | changed))).mean()
    assert 0.4 < same < 0.6


def test_the_error_is_unbiased():
    """E d^2 = ||x - r||^2 + 4^e / 12, below the wrap."""
    x = states(4000, 32)
    r = x.double() + torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double() * 0.2
    proof = small_proof(x, range(4000), dtype="bfloat16", size=2, **ARGUMENTS)
    expected = (x.double() - r).square().sum(1).mean().item() + 4.0**proof.exponent / 12
    found = proof_errors(proof, r, range(4000), **ARGUMENTS)
    assert found.mean() == pytest.approx(expected, abs=4.5 * found.std() / 4000**0.5)


def test_there_is_no_proof_of_numbers_that_are_not_finite_or_of_other_sizes():
    with pytest.raises(BitassayError, match="NaN"):
        small_proof(states() * math.inf, range(40), dtype="bfloat16", size=2, **ARGUMENTS)
    with pytest.raises(BitassayError, match="4 bytes"):
        small_proof(states(), range(40), dtype="bfloat16", size=4, **ARGUMENTS)
    assert small_proof(states() * 0, range(40), dtype="bfloat16", size=2, **ARGUMENTS).residues == bytes(80)


# --- the file, from strangers ---


def test_a_proof_comes_back_from_its_file(tmp_path, signed, receipt):
    write_proof(tmp_path / "x.proof", signed)
    assert read_proof(tmp_path / "x.proof", receipt) == signed


def test_each_altered_byte_is_refused(signed, receipt, tmp_path):
    data, path = encode_proof(signed), tmp_path / "x.proof"
    for index in range(len(data)):
        path.write_bytes(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
        with pytest.raises(BitassayError):
            read_proof(path, receipt)


def test_what_does_not_belong_to_the_receipt_is_refused(signed, receipt, trace, honest):
    other = next(each for each in honest if each.header.nonce != trace.header.nonce)
    refused("other-receipt", check_proof, sign_proof(other, commit(other, KEY), KEY), receipt)
    refused("bad-signature", check_proof, sign_proof(trace, receipt, OTHER_KEY), receipt)
    moved = replace(signed, proof=replace(signed.proof, exponent=signed.proof.exponent + 1))
    refused("bad-signature", check_proof, moved, receipt)
    for residues in (b"", signed.proof.residues[:-1], signed.proof.residues * 2):
        short = replace(signed, proof=SmallProof(signed.proof.exponent, residues))
        refused("wrong-shape", check_proof, replace(short, signature=KEY.sign(short.message)), receipt)


@pytest.mark.parametrize(
    ("index", "value", "code"),
    [
        (0, "bitassay proof 2", "not-a-proof"),
        (2, True, "header-field"),
        (2, 1.0, "header-field"),
        (2, 128, "header-field"),
        (1, "AA", "header-field"),
        (3, 7, "header-field"),
        (3, "*", "header-field"),
        (4, None, "header-field"),
    ],
)
def test_a_field_of_another_kind_is_refused(signed, tmp_path, index, value, code):
    content = json.loads(encode_proof(signed))
    content[index] = value
    refused(code, decode_proof, json.dumps(content).encode(), tmp_path)


def test_another_spelling_is_refused(signed, tmp_path):
    refused("not-canonical", decode_proof, encode_proof(signed).replace(b",", b", "), tmp_path)
    refused("not-a-proof", decode_proof, b"{}", tmp_path)


def test_the_independent_signature_is_that_of_the_library():
    public = independent.public_key(SECRET)
    assert public == KEY.public_key().public_bytes_raw()
    Ed25519PublicKey.from_public_bytes(public).verify(independent.sign(SECRET, b"text"), b"text")
    assert not independent.verify(public, b"texts", independent.sign(SECRET, b"text"))


# --- the statistic ---


def compared(host, own, reference, trace):
    """One made-up run: states of the last layer at 40 generated positions behind one of the prompt."""
    n = len(host)
    header = trace.header.model_copy(
        update={
            "prompt_ids": (1, 2),
            "output_ids": (3,) * (n + 1),
            "positions": tuple(range(n + 2)),
            "layers": (2,),
        }
    )
    with_prompt = [torch.cat([rows[:1], rows[:1], rows]) for rows in (host, own, reference)]
    positions = range(n + 2)
    logits = torch.zeros(n + 1, 4)
    prefills = [Prefill({2: rows}, logits) for rows in with_prompt[1:]]
    return Comparison(header, positions, {2: with_prompt[0]}, prefills[0], torch.bfloat16, prefills[1])


def noisy(reference, share, seed):
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scale = reference.norm(dim=1, keepdim=True) / reference.shape[1] ** 0.5
    return (reference + share * scale * noise).to(torch.bfloat16)


@pytest.fixture(scope="module")
def reference():
    return states(200, 576, seed=5).double()


def statistic(name, host, own, reference, trace):
    detector = DETECTORS[name]
    (series,) = detector.measure(compared(host, own, reference, trace))
    assert len(series.values) == len(host)
    return detector.statistic(series.values)


@pytest.mark.parametrize("name", ["proof-2", "proof-8"])
def test_an_honest_run_is_near_0_and_a_larger_error_is_its_logarithm(name, reference, trace):
    own = noisy(reference, 0.015, 1)
    honest = statistic(name, noisy(reference, 0.015, 2), own, reference, trace)
    worse = statistic(name, noisy(reference, 0.03, 2), own, reference, trace)
    far = statistic(name, noisy(reference, 0.5, 2), own, reference, trace)
    assert abs(honest) < 0.15
    assert worse - honest == pytest.approx(math.log(2), abs=0.2)
    assert far - honest > 1


def test_noise_of_the_text_takes_itself_out(reference, trace):
    found = [
        statistic("proof-8", noisy(reference, share, 2), noisy(reference, share, 1), reference, trace)
        for share in (0.01, 0.02)
    ]
    assert abs(found[0] - found[1]) < 0.1


def test_the_evidence_takes_2_and_8_bytes_a_token(reference, trace):
    run = compared(reference.to(torch.bfloat16), reference.to(torch.bfloat16), reference, trace)
    for size in (2, 8):
        detector = DETECTORS[f"proof-{size}"]
        assert detector.evidence_bytes(4, 576) == size
        assert len(detector.prove(run).residues) == size * 200


@pytest.mark.parametrize("shift", [-4, -1, 1, 4])
def test_another_step_says_nothing(reference, trace, shift):
    """A finer step would make every error small, a coarser one every residue 0."""
    host = noisy(reference, 0.015, 2)
    run = compared(host, noisy(reference, 0.015, 1), reference, trace)
    (exponent,) = step_exponents(host, "bfloat16", tolerance=0)
    assert exponent in step_exponents(reference, "bfloat16")
    proof = DETECTORS["proof-2"].prove(run)
    moved = check_claimed(run, replace(proof, exponent=exponent + shift), COMMITMENT)
    assert set(moved.values) == {math.log(CEILING)}


def test_the_mean_is_that_of_the_errors():
    assert log_mean([0.0, math.log(3)]) == pytest.approx(math.log(2))
    assert log_mean([-700.0, 700.0]) == pytest.approx(700 - math.log(2))


# --- verdicts ---


@pytest.fixture(scope="module")
def with_proofs(model, prompts):
    return calibrate(
        model,
        model,
        prompts[:56],
        max_new_tokens=12,
        min_positions=6,
        alpha=0.05,
        guarantee="average",
        detectors=["proof-2", "proof-8"],
    )


def judged(trace, proof, model, profile, signer=SIGNER, **asked):
    receipt = commit(trace, KEY)
    unsigned = SignedProof(receipt.commitment, proof(receipt), b"")
    signed = replace(unsigned, signature=KEY.sign(unsigned.message))
    return verify_proof(receipt, signed, model, signer=signer, profile=profile, request=Request(**asked))


def honest_proof(trace, size):
    return lambda receipt: sign_proof(trace, receipt, KEY, size).proof


@pytest.mark.parametrize("size", [2, 8])
def test_a_receipt_and_its_proof_are_enough(trace, model, with_proofs, size):
    verdict = judged(trace, honest_proof(trace, size), model, with_proofs, nonce=trace.header.nonce)
    assert (verdict.status, codes(verdict)) == ("PASS", {"as-honest"})
    assert f"proof-{size}" in verdict.score.detectors
    assert verdict.hidden_distance is None
    assert str(verdict)
    assert json.dumps(verdict.to_dict())


def test_honest_hosts_are_refused_no_more_than_promised(honest, model, with_proofs):
    failed = sum(
        judged(trace, honest_proof(trace, 8), model, with_proofs).status == "FAIL"
        for trace in honest
        if trace.n_tokens == 12
    )
    assert failed <= 6  # of 40 at 5 %: P(more) < 1 %


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("name", FORGED_PROOFS)
def test_a_forger_without_the_model_is_refused(honest, model, with_proofs, name, size):
    for trace in [each for each in honest if each.n_tokens == 12][:3]:
        verdict = judged(
            trace, lambda receipt, trace=trace: FORGED_PROOFS[name](trace, receipt, size), model, with_proofs
        )
        assert (verdict.status, codes(verdict)) == ("FAIL", {"detector-unlikely"})


def test_quantized_weights_are_refused(trace, model, with_proofs, round_weights):
    claim = identity(model)
    cheap = prove_many(round_weights(model, 4), [trace.header.prompt_ids], max_new_tokens=12, claim=claim)[0]
    verdict = judged(cheap, honest_proof(cheap, 8), model, with_proofs)
    assert verdict.status == "FAIL"
    assert "detector-unlikely" in codes(verdict)


def test_what_cannot_be_decided_is_not(trace, model, profile, with_proofs):
    proof = honest_proof(trace, 8)
    unknown = judged(trace, proof, model, with_proofs, signer=None)
    assert (unknown.status, codes(unknown)) == ("INCONCLUSIVE", {"unknown-signer"})
    without = judged(trace, proof, model, profile)
    assert (without.status, codes(without)) == ("INCONCLUSIVE", {"profile-other-detector"})
    assert "calibrate --detectors proof-8" in str(without)


def test_structure_comes_first(trace, model, with_proofs):
    proof = honest_proof(trace, 8)
    assert codes(judged(trace, proof, model, with_proofs, signer=bytes(32))) == {"other-signer"}
    assert codes(judged(trace, proof, model, with_proofs, nonce="another")) == {"other-nonce"}
    other = commit(replace(trace, header=trace.header.model_copy(update={"nonce": "m"})), KEY)
    verdict = verify_proof(
        commit(trace, KEY), sign_proof(trace, other, KEY), model, signer=SIGNER, profile=with_proofs
    )
    assert (verdict.status, codes(verdict)) == ("FAIL", {"other-receipt"})


# --- the specification ---


def test_the_document_has_these_vectors_and_its_writer_needs_nothing_of_the_package():
    text = (ROOT / "docs" / "proof-format.md").read_text()
    drawn = independent.signs(COMMITMENT, 7, "n1", 32, 4)
    rows = STATES.double().numpy()
    vectors = [
        " ".join(f"{word:016x}" for word in independent.philox(1, 1)),
        *("".join("+" if sign > 0 else "-" for sign in row) for row in drawn),
        *VECTORS.values(),
        independent.write(rows, 7, COMMITMENT, "n1", "bfloat16", 2, SECRET).decode().strip(),
        *(
            f"{error:.12f}"
            for error in independent.errors(-3, bytes.fromhex(VECTORS[2]), 1.01 * rows, 7, COMMITMENT, "n1")
        ),
    ]
    header = {"numerics": {"dtype": "bfloat16"}, "positions": [0, 1, 2], "layers": [8, 16]}
    cells = {layer: [bytes([layer, position, 0, 0]) for position in range(3)] for layer in (8, 16)}
    vectors.append(independent.commitment(header, cells).hex())
    assert [vector for vector in vectors if vector not in text] == []
    tree = ast.parse(Path(independent.__file__).read_text())
    names = (
        [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    )
    imported = [name for several in names for name in several]
    assert set(imported) == {"hashlib", "json", "math", "base64", "numpy"}
    assert independent.philox(1, 2) == np.random.Philox(key=1).random_raw(8).tolist()
