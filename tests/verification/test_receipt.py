"""Receipts and challenges: what is altered, malformed, ground or replayed is refused by name."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitassay.errors import BitassayError
from bitassay.verification.container import TraceError
from bitassay.verification.receipts.challenge import (
    challenge,
    opened_positions,
    read_challenge,
    write_challenge,
)
from bitassay.verification.receipts.opening import check_opening
from bitassay.verification.receipts.receipt import (
    Receipt,
    commit,
    decode,
    encode,
    read_receipt,
    write_receipt,
)
from bitassay.verification.verify import verify_opening
from verification.receipts import BEACON, KEY, OTHER_KEY, SIGNER, codes, refused, signed

# --- the receipt ---


def test_what_is_written_is_read(trace, sampled, tmp_path):
    for one in (trace, sampled):
        receipt = commit(one, KEY)
        write_receipt(tmp_path / "x.receipt", receipt)
        assert read_receipt(tmp_path / "x.receipt") == receipt
        assert receipt.header == one.header


def test_size_is_under_650_bytes_and_8_a_token(trace):
    """With a name, a nonce and version strings of the usual length, and ten sampled layers."""
    numerics = trace.header.numerics.model_copy(
        update={
            "threads": 128,
            "torch": "2.13.0+cu130",
            "transformers": "5.12.10",
            "cpu_capability": "AVX512",
        }
    )
    model = trace.header.model.model_copy(
        update={"name": "meta-llama/Llama-3.3-70B-Instruct", "recipe_id": "a" * 64}
    )
    sampling = trace.header.sampling.model_copy(
        update={"sampler": "gumbel-max", "temperature": 0.75, "top_p": 0.95, "seed": 2**62}
    )
    update = {"nonce": "f" * 32, "model": model, "numerics": numerics, "sampling": sampling}
    update |= {"layers": tuple(range(8, 88, 8)), "prompt_ids": (128255,) * 900, "output_ids": (128255,) * 100}
    receipt = Receipt(trace.header.model_copy(update=update), bytes(32), bytes(32), bytes(64))
    one_token = replace(receipt, header=receipt.header.model_copy(update={"output_ids": (1,)}))
    per_token = (len(encode(receipt)) - len(encode(one_token))) / 99
    assert per_token < 8
    assert len(encode(receipt)) - per_token * 1000 < 650


@pytest.mark.parametrize(
    "change",
    [
        {"nonce": "another"},
        {"prompt_ids": (1, 5, 6)},
        {"output_ids": (5, 6)},
        {"layers": (8, 16)},
        {"layers": (16, 8, 17)},
        {"root": bytes(32)},
        {"key": OTHER_KEY.public_key().public_bytes_raw()},
        {"key": bytes(32)},
        {"signature": bytes(64)},
        {"sampling": {"seed": 1}},
        {"sampling": {"max_new_tokens": 400}},
        {"model": {"name": "another"}},
        {"model": {"weights_digest": "0" * 64}},
        {"model": {"tokenizer_digest": "0" * 64}},
        {"model": {"recipe_id": "0" * 64}},
        {"model": {"config_digest": "0" * 64}},
        {"model": {"config_digest": None}},
        {"numerics": {"threads": 99}},
        {"numerics": {"dtype": "float16"}},
        {"numerics": {"torch": "3"}},
    ],
    ids=str,
)
def test_tampered_claims_break_the_signature(receipt, change, tmp_path):
    ((name, value),) = change.items()
    if name in ("root", "key", "signature"):
        tampered = replace(receipt, **change)
    else:
        part = getattr(receipt.header, name)
        value = part.model_copy(update=value) if isinstance(value, dict) else value
        header = receipt.header.model_copy(update={name: value})
        count = len(header.prompt_ids) + len(header.output_ids) - 1
        tampered = replace(receipt, header=header.model_copy(update={"positions": tuple(range(count))}))
    (tmp_path / "x").write_bytes(encode(tampered))
    refused("bad-signature", read_receipt, tmp_path / "x")


MALFORMED = {
    "empty": (lambda data: b"", "header-malformed"),
    "cut": (lambda data: data[:-20], "header-malformed"),
    "a list": (lambda data: b"[]", "not-a-receipt"),
    "nested": (lambda data: b"[" * 10**6, "header-malformed"),
    "not text": (lambda data: b"\xff" * 40, "header-malformed"),
    "too large": (lambda data: b" " * (2**22 + 1), "oversize"),
    "other version": (lambda data: data.replace(b"receipt 1", b"receipt 3"), "not-a-receipt"),
    "a field more": (lambda data: data[:-2] + b",1]\n", "not-a-receipt"),
    "an object": (lambda data: b'{"version":"bitassay receipt 1"}', "not-a-receipt"),
    "another spelling": (lambda data: data.replace(b",", b", ", 1), "not-canonical"),
    "no last line feed": (lambda data: data[:-1], "not-canonical"),
    "short key": (lambda data: replaced(data, key="AAAA"), "header-field"),
    "key is a number": (lambda data: replaced(data, key=7), "header-field"),
    "root is none": (lambda data: replaced(data, root=None), "header-field"),
    "ids are no base64": (lambda data: replaced(data, ids="!!!!"), "header-field"),
    "half an id": (lambda data: replaced(data, ids="AAA"), "header-field"),
    "no ids": (lambda data: replaced(data, ids=""), "header-field"),
    "all prompt": (lambda data: replaced(data, prompt=10**9), "header-field"),
    "prompt is true": (lambda data: replaced(data, prompt=True), "header-field"),
    "no layers": (lambda data: replaced(data, layers=[]), "header-field"),
    "a layer twice": (lambda data: replaced(data, layers=[8, 8, 17]), "duplicate-layer"),
    "numerics short": (lambda data: replaced(data, numerics=["bfloat16"]), "header-field"),
    "numerics wrong": (lambda data: replaced(data, numerics=[None] * 8), "header-field"),
    "sampling an object": (lambda data: replaced(data, sampling={}), "header-field"),
    "model has no digest": (lambda data: replaced(data, model=["m", None, None, None]), "header-field"),
    "half a character": (
        lambda data: data.replace(b'"tiny-llama"', b'"tiny-\\ud800"'),
        "header-malformed",
    ),
    "nonce with a blank": (lambda data: replaced(data, nonce="a b"), "header-field"),
}


def replaced(data, **fields):
    names = [
        "version",
        "model",
        "numerics",
        "sampling",
        "nonce",
        "layers",
        "prompt",
        "ids",
        "root",
        "key",
        "signature",
    ]
    values = dict(zip(names, json.loads(data), strict=True)) | fields
    return (json.dumps(list(values.values()), separators=(",", ":")) + "\n").encode()


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_receipts_are_refused_by_name(name, receipt, tmp_path):
    make, code = MALFORMED[name]
    (tmp_path / "x").write_bytes(make(encode(receipt)))
    refused(code, read_receipt, tmp_path / "x")


def test_a_receipt_has_one_spelling(receipt, tmp_path):
    assert decode(encode(receipt), tmp_path) == receipt
    assert replaced(encode(receipt)) == encode(receipt)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_receipt_is_refused(data, receipt, tmp_path):
    """One byte changed, put in or taken out, anywhere."""
    whole = encode(receipt)
    at, byte = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.binary(max_size=2))
    damaged = whole[:at] + byte + whole[at + 1 :]
    (tmp_path / "x").write_bytes(damaged)
    if damaged != whole:
        with pytest.raises(TraceError):
            read_receipt(tmp_path / "x")


def test_a_missing_receipt_is_bad_usage(tmp_path):
    with pytest.raises(BitassayError, match=r"none\.receipt") as raised:
        read_receipt(tmp_path / "none.receipt")
    assert not isinstance(raised.value, TraceError)


# --- the challenge ---


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(beacon=st.binary(min_size=32, max_size=32), generated=st.integers(1, 40), prompt=st.integers(1, 40))
def test_a_challenge_opens_what_it_says(receipt, trace, beacon, generated, prompt):
    found = opened_positions(
        challenge(receipt, beacon=beacon, generated=generated, prompt=prompt), trace.header
    )
    inside = sum(position < trace.n_prompt for position in found)
    assert list(found) == sorted(set(found))
    assert set(found) <= set(trace.header.positions)
    assert inside == min(prompt, trace.n_prompt)
    assert len(found) - inside == min(generated, trace.n_tokens - 1)


def test_every_position_is_opened_equally_often(receipt, trace):
    counts = [0] * len(trace.header.positions)
    for index in range(600):
        one = challenge(receipt, beacon=index.to_bytes(32, "little"), generated=4, prompt=1)
        for position in opened_positions(one, trace.header):
            counts[position] += 1
    rates = [count / 600 for count in counts[trace.n_prompt :]]
    assert all(abs(rate - 4 / 11) < 0.1 for rate in rates)


def test_the_challenge_depends_on_beacon_root_and_header_but_not_on_the_signature(receipt, trace):
    def drawn(receipt, beacon=BEACON):
        one = challenge(receipt, beacon=beacon, generated=4, prompt=2)
        return opened_positions(one, trace.header)

    assert len({drawn(receipt, bytes([index]) * 32) for index in range(20)}) > 10
    assert len({drawn(replace(receipt, root=bytes([index]) * 32)) for index in range(20)}) > 10
    assert len({drawn(signed(receipt, nonce=f"n{index}")) for index in range(20)}) > 10
    assert {drawn(replace(receipt, signature=bytes([index]) * 64)) for index in range(20)} == {drawn(receipt)}
    assert challenge(receipt).beacon != challenge(receipt).beacon


def test_a_host_that_foresees_the_beacon_grinds_and_one_that_does_not_is_caught(receipt, trace):
    """A third of the generated positions are bad. The host alters its commitment until none is opened."""
    bad = set(trace.header.positions[trace.n_prompt :: 3])

    def opened(root, beacon):
        one = challenge(replace(receipt, root=root), beacon=beacon, generated=5, prompt=1)
        return set(opened_positions(one, trace.header))

    roots = (index.to_bytes(32, "little") for index in range(10**4))
    ground = next(root for root in roots if not opened(root, BEACON) & bad)
    fresh = [not opened(ground, index.to_bytes(32, "big")) & bad for index in range(500)]
    n = trace.n_tokens - 1
    expected = math.comb(n - len(bad), 5) / math.comb(n, 5)
    assert 0 < expected < 0.1
    assert abs(sum(fresh) / 500 - expected) < 0.05


def test_a_challenge_of_the_ground_receipt_is_not_answered_by_another(receipt, trace, asked, opening, model):
    """Having seen the beacon, the host commits again to what suits it; the challenge names the old one."""
    again = signed(receipt, nonce=receipt.header.nonce + "x")
    refused("other-receipt", check_opening, opening, again, asked)
    assert codes(verify_opening(again, asked, opening, model, signer=SIGNER)) == {"other-receipt"}


def test_challenges_travel_and_malformed_ones_are_bad_usage(asked, tmp_path):
    path = tmp_path / "c.json"
    write_challenge(path, asked)
    assert read_challenge(path) == asked
    plain = json.loads(path.read_text())
    for wrong in (
        plain | {"beacon": "00"},
        plain | {"generated": 0},
        plain | {"prompt": "8"},
        plain | {"generated": 2**40},
        plain | {"more": 1},
        plain | {"challenge": 2},
        [],
        None,
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(BitassayError, match=r"c\.json: not a challenge"):
            read_challenge(path)
    path.write_text(" " * 5000)
    with pytest.raises(BitassayError):
        read_challenge(path)


def test_a_beacon_has_32_bytes(receipt):
    with pytest.raises(BitassayError, match="beacon"):
        challenge(receipt, beacon=b"short")
