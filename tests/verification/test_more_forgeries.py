"""Forged files of all kinds, each by a small edit of an honest one: every one is refused by its code, and none
stops the verifier."""

import copy
import json
import struct
from base64 import b64decode, b64encode
from dataclasses import replace

import numpy as np
import pytest
import torch

from bitassay.engines.sampling import GREEDY
from bitassay.errors import BitassayError
from bitassay.verification.asked import Asked
from bitassay.verification.committee.files import Board, Task, read, read_answers, read_canaries, reveal
from bitassay.verification.committee.rounds import (
    Assignment,
    judge,
    parse_report,
    report,
    report_commitment,
)
from bitassay.verification.receipts.challenge import (
    challenge,
    opened_positions,
    read_challenge,
    write_challenge,
)
from bitassay.verification.receipts.merkle import merkle_node, merkle_proof, merkle_root
from bitassay.verification.receipts.opening import Opening, cell_indices, encode_opening
from bitassay.verification.receipts.receipt import decode, encode, read_receipt, trace_leaves
from bitassay.verification.structure import Request
from bitassay.verification.submissions import ReceiptResponse, check_submission
from bitassay.verification.trace import write_trace
from bitassay.verification.trace_files import verify_files
from verification.receipts import BEACON, OTHER_KEY, SIGNER, codes, refused, signed

TOKENS = 12
ORDER = 2**252 + 27742317777372353535851937790883648493


def request_of(trace):
    return Request(trace.header.prompt_ids, trace.header.nonce, GREEDY, TOKENS)


def split(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(entries, body):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body


# --- traces ---


def field(path, value):
    """A field of the header, as JSON; a function is applied to what is there."""

    def make(entries, body):
        header = json.loads(entries["__metadata__"]["bitassay"])
        *outer, last = path.split(".")
        part = header
        for name in outer:
            part = part[name]
        part[last] = value(part[last]) if callable(value) else value
        return entries | {"__metadata__": {"bitassay": json.dumps(header)}}, body

    return make


def header_text(change):
    def make(entries, body):
        text = change(entries["__metadata__"]["bitassay"])
        return entries | {"__metadata__": {"bitassay": text}}, body

    return make


def entry(name="layer.8", **changes):
    """Fields of the entry of a tensor; a function is applied to the entry's shape or offsets."""

    def make(entries, body):
        one = dict(entries[name])
        for key, value in changes.items():
            one[key] = value(one[key]) if callable(value) else value
        return entries | {name: one}, body

    return make


def renamed(old, new):
    return lambda entries, body: ({(new if k == old else k): v for k, v in entries.items()}, body)


def swapped_offsets(entries, body):
    one, other = (dict(entries[name]) for name in ("layer.8", "layer.17"))
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    return entries | {"layer.8": one, "layer.17": other}, body


def number(bits, place):
    """One number of the states, by its bits in bfloat16."""

    def make(entries, body):
        at = 2 * (place if place >= 0 else len(body) // 2 + place)
        return entries, body[:at] + struct.pack("<H", bits) + body[at + 2 :]

    return make


def raw(change):
    """The header of the safetensors file, as bytes."""
    return lambda entries, body: (change(json.dumps(entries).encode()), body)


ESCAPE, BIDI = "\x1b]0;owned\x07", "\u202e"
TRACES = {
    "an escape in torch": (field("numerics.torch", ESCAPE), "header-field"),
    "a line feed in attention": (field("numerics.attention", "sdpa\nPASS"), "header-field"),
    "letters turned around in cpu_capability": (field("numerics.cpu_capability", BIDI), "header-field"),
    "a device that is not ASCII": (field("numerics.device", "cpü"), "header-field"),
    "zero bytes in kv_dtype": (field("numerics.kv_dtype", "bfloat16\0"), "header-field"),
    "a line separator in transformers": (field("numerics.transformers", "5\u2028"), "header-field"),
    "a line feed at the end": (field("numerics.torch", lambda word: word + "\n"), "header-field"),
    "a delete character": (field("numerics.torch", "2\x7f"), "header-field"),
    "a dtype of 17 letters": (field("numerics.dtype", "b" * 17), "header-field"),
    "a capability of 33 letters": (field("numerics.cpu_capability", "b" * 33), "header-field"),
    "no threads": (field("numerics.threads", 0), "header-field"),
    "too many threads": (field("numerics.threads", 2**16 + 1), "header-field"),
    "threads with a point": (field("numerics.threads", 1.0), "header-field"),
    "a GPU that is a number": (field("numerics.gpu", 7), "header-field"),
    "a GPU with an escape": (field("numerics.gpu", "H200\x1b[2J"), "header-field"),
    "a batch of none": (field("numerics.batch", 0), "header-field"),
    "devices as text": (field("numerics.tensor_parallel", "2"), "header-field"),
    "an engine in two lines": (field("numerics.engine", "vllm\n"), "header-field"),
    "numerics that nobody knows": (field("numerics.gpus", "H200"), "header-field"),
    "a name with an escape": (field("model.name", ESCAPE), "header-field"),
    "a name turned around": (field("model.name", f"a{BIDI}b"), "header-field"),
    "a name isolated from the text": (field("model.name", "a\u2066b"), "header-field"),
    "a name of two lines": (field("model.name", "a\nas a set PASS"), "header-field"),
    "a name with a carriage return": (field("model.name", "FAIL\rPASS"), "header-field"),
    "a name with a control of C1": (field("model.name", "a\x9b2J"), "header-field"),
    "a name of 513 letters": (field("model.name", "a" * 513), "header-field"),
    "a digest in capitals": (field("model.weights_digest", "A" * 64), "header-field"),
    "a digest and a line feed": (field("model.weights_digest", lambda d: d + "\n"), "header-field"),
    "63 digits": (field("model.tokenizer_digest", "0" * 63), "header-field"),
    "an empty configuration": (field("model.config_digest", ""), "header-field"),
    "a recipe that is false": (field("model.recipe_id", False), "header-field"),
    "a model more": (field("model.base", "0" * 64), "header-field"),
    "a temperature below 0": (field("sampling.temperature", -0.1), "header-field"),
    "a temperature that overflows": (header_text(lambda t: t.replace('"temperature":0.0', '"temperature":1e400')), "header-field"),
    "a temperature that is no number": (header_text(lambda t: t.replace('"temperature":0.0', '"temperature":NaN')), "header-malformed"),
    "a nucleus of nothing": (field("sampling.top_p", 0.0), "header-field"),
    "a negative seed": (field("sampling.seed", -1), "header-field"),
    "a seed of 2^63": (field("sampling.seed", 2**63), "header-field"),
    "half a seed": (field("sampling.seed", 1.5), "header-field"),
    "no tokens asked": (field("sampling.max_new_tokens", 0), "header-field"),
    "2^18 + 1 tokens asked": (field("sampling.max_new_tokens", 2**18 + 1), "header-field"),
    "tokens asked: true": (field("sampling.max_new_tokens", True), "header-field"),
    "a beam": (field("sampling.sampler", "beam"), "header-field"),
    "greedy at half a temperature": (field("sampling.temperature", 0.5), "header-field"),
    "a nonce of 129 letters": (field("nonce", "n" * 129), "header-field"),
    "a nonce that only looks right": (field("nonce", "\u0430"), "header-field"),
    "an empty nonce": (field("nonce", ""), "other-nonce"),
    "a prompt within a prompt": (field("prompt_ids", [[1]]), "header-field"),
    "a prompt by keys": (field("prompt_ids", {"0": 1}), "header-field"),
    "a token of 2^31": (field("output_ids", lambda ids: [*ids[:-1], 2**31]), "header-field"),
    "a token with a point": (field("output_ids", lambda ids: [*ids[:-1], 5.0]), "header-field"),
    "a layer with a point": (field("layers", [8.0, 16, 17]), "header-field"),
    "a layer below 0": (field("layers", [-8, 16, 17]), "header-field"),
    "layers from the end": (field("layers", [17, 16, 8]), "wrong-layers"),
    "a layer that the model has not": (field("layers", [8, 16, 18]), "missing-layer"),
    "a position below 0": (field("positions", lambda p: [-1, *p[1:]]), "header-field"),
    "positions from 1": (field("positions", lambda p: [i + 1 for i in p]), "wrong-positions"),
    "position 1 twice": (field("positions", lambda p: [0, 1, 1, *p[3:]]), "wrong-positions"),
    "positions from the end": (field("positions", lambda p: p[::-1]), "wrong-positions"),
    "a position that is false": (field("positions", lambda p: [False, *p[1:]]), "header-field"),
    "one position fewer than rows": (field("positions", lambda p: p[:-1]), "wrong-shape"),
    "version true": (field("schema_version", True), "schema-version"),
    "version 1.0": (field("schema_version", 1.0), "schema-version"),
    "no version": (header_text(lambda t: t.replace('"schema_version":1,', "").replace(',"schema_version":1', "")), "schema-version"),
    "a name twice": (header_text(lambda t: t.replace('"model":{', '"model":{"name":"b",')), "duplicate-key"),
    "half a letter": (field("model.name", "\ud800"), "header-malformed"),
    "two headers": (header_text(lambda t: t + t), "header-malformed"),
    "a header of 0": (header_text(lambda _: "0"), "header-field"),
    "another dtype's entry": (entry(dtype="F16"), "wrong-dtype"),
    "eight bits": (entry(dtype="F8_E4M3"), "wrong-dtype"),
    "no dtype": (entry(dtype=""), "wrong-dtype"),
    "a dtype with a blank": (entry(dtype="BF16 "), "wrong-dtype"),
    "a dtype as torch says it": (entry(dtype="bfloat16"), "wrong-dtype"),
    "a dtype that is an escape": (entry(dtype=ESCAPE), "wrong-dtype"),
    "a width with a point": (entry(shape=lambda s: [s[0], 96.0]), "malformed"),
    "a negative width": (entry(shape=lambda s: [s[0], -96]), "malformed"),
    "twice the rows at half the width": (entry(shape=lambda s: [2 * s[0], 48]), "wrong-shape"),
    "rows and columns exchanged": (entry(shape=lambda s: s[::-1]), "wrong-shape"),
    "nothing in each row": (entry(shape=lambda s: [s[0], 0], data_offsets=[0, 0]), "wrong-shape"),
    "nine dimensions": (entry(shape=[1] * 9), "malformed"),
    "a shape of 2^63": (entry(shape=[2**63, 1]), "malformed"),
    "offsets exchanged": (entry(data_offsets=lambda o: o[::-1]), "wrong-offsets"),
    "offsets that are false": (entry(data_offsets=lambda o: [False, o[1]]), "malformed"),
    "two bytes on": (entry(data_offsets=lambda o: [o[0] + 2, o[1] + 2]), "wrong-offsets"),
    "three offsets": (entry(data_offsets=lambda o: [*o, o[1]]), "malformed"),
    "one tensor's bytes for two": (lambda e, b: (e | {"layer.8": e["layer.17"]}, b), "wrong-offsets"),
    "layers exchanged by their offsets": (swapped_offsets, "states-too-far"),
    "an empty tensor more": (lambda e, b: (e | {"layer.99": {"dtype": "BF16", "shape": [0, 96], "data_offsets": [0, 0]}}, b), "extra-layer"),
    "layer.08": (renamed("layer.8", "layer.08"), "missing-layer"),
    "layer.8 and an invisible mark": (renamed("layer.8", "layer.8\u200e"), "missing-layer"),
    "a second entry of metadata": (lambda e, b: (e | {"__metadata__": e["__metadata__"] | {"format": "pt"}}, b), "not-a-trace"),
    "metadata that is no text": (lambda e, b: (e | {"__metadata__": {"bitassay": 1}}, b), "not-a-trace"),
    "a byte order mark": (raw(lambda text: b"\xef\xbb\xbf" + text), "header-malformed"),
    "more after the JSON": (raw(lambda text: text + b"{}"), "header-malformed"),
    "UTF-16": (raw(lambda text: text.decode().encode("utf-16")), "header-malformed"),
    **{
        f"{name} at {place}": (number(bits, place), "not-finite")
        for name, bits in {
            "a quiet NaN": 0x7FC0,
            "a signalling NaN": 0x7F81,
            "a NaN with a payload": 0x7FE5,
            "a negative NaN": 0xFFFF,
            "infinity": 0x7F80,
            "minus infinity": 0xFF80,
        }.items()
        for place in (0, -1)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TRACES)
def test_a_forged_trace_fails_by_its_code(name, trace, model, profile, tmp_path):
    make, code = TRACES[name]
    path = tmp_path / "x.trace"
    write_trace(path, trace)
    path.write_bytes(joined(*make(*split(path.read_bytes()))))
    result = verify_files([path], model, Asked((request_of(trace),)), name="tiny", profile=profile)
    assert result.verdicts[0].status == "FAIL"
    assert code in codes(result.verdicts[0])
    assert not result.passed
    assert result.pooled.status == "FAIL"


# --- receipts ---


NAMES = ("version", "model", "numerics", "sampling", "nonce", "layers", "prompt", "ids", "root", "key", "signature")  # fmt: skip


def item(name, value):
    """A value of the receipt's list; a function is applied to what is there."""

    def make(data, receipt):
        values = json.loads(data)
        at = NAMES.index(name)
        values[at] = value(values[at]) if callable(value) else value
        return (json.dumps(values, separators=(",", ":"), ensure_ascii=False) + "\n").encode()

    return make


def spelled(old, new):
    def make(data, receipt):
        assert old in data
        return data.replace(old, new, 1)

    return make


def signature(change):
    """The signature, as R and s."""

    def make(data, receipt):
        R, s = receipt.signature[:32], int.from_bytes(receipt.signature[32:], "little")
        R, s = change(R, s)
        return encode(replace(receipt, signature=R + s.to_bytes(32, "little")))

    return make


def loose_bits(text):
    """The same bytes in base64, with bits set that count for nothing."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    other = text[:-1] + digits[digits.index(text[-1]) | 1]
    assert other != text
    assert b64decode(other + "=" * (-len(other) % 4)) == b64decode(text + "=" * (-len(text) % 4))
    return other


def ids(change):
    def changed(text):
        numbers = change(np.frombuffer(b64decode(text + "=" * (-len(text) % 4)), "<u4").tolist())
        return b64encode(np.array(numbers, "<u4").tobytes()).decode().rstrip("=")

    return item("ids", changed)


def version_2(data, receipt):
    return item("numerics", lambda values: [*values, *[None] * 6])(
        spelled(b"receipt 1", b"receipt 2")(data, 0), 0
    )


RECEIPTS = {
    "s + L": (signature(lambda R, s: (R, s + ORDER)), "bad-signature"),
    "-s": (signature(lambda R, s: (R, ORDER - s)), "bad-signature"),
    "s = 0": (signature(lambda R, s: (R, 0)), "bad-signature"),
    "R negated": (signature(lambda R, s: (R[:-1] + bytes([R[-1] ^ 128]), s)), "bad-signature"),
    "R = 0": (signature(lambda R, s: (bytes(32), s)), "bad-signature"),
    "R = identity, s = 0": (signature(lambda R, s: (bytes([1]) + bytes(31), 0)), "bad-signature"),
    "R is no point": (signature(lambda R, s: (b"\xff" * 32, s)), "bad-signature"),
    "R and s exchanged": (lambda d, r: encode(replace(r, signature=r.signature[32:] + r.signature[:32])), "bad-signature"),
    "the signature of another receipt": (lambda d, r: encode(replace(r, signature=signed(r, nonce="x").signature)), "bad-signature"),
    "signed by another": (lambda d, r: encode(signed(r, OTHER_KEY)), "other-signer"),
    "another's signature under the host's key": (lambda d, r: encode(replace(r, signature=signed(r, OTHER_KEY).signature)), "bad-signature"),
    "the key of nobody": (lambda d, r: encode(replace(r, key=bytes([1]) + bytes(31), signature=bytes([1]) + bytes(63))), "weak-key"),
    "a key of order 4": (lambda d, r: encode(replace(r, key=bytes(32))), "bad-signature"),
    "base64 with its padding": (item("root", lambda t: t + "="), "not-canonical"),
    "loose bits in the root": (item("root", loose_bits), "not-canonical"),
    "loose bits in the key": (item("key", loose_bits), "not-canonical"),
    "loose bits in the signature": (item("signature", loose_bits), "not-canonical"),
    "base64 with a line feed": (item("root", lambda t: t[:4] + "\n" + t[4:]), "header-field"),
    "base64 with a blank": (item("key", lambda t: t + " "), "header-field"),
    "base64 of URLs": (item("signature", lambda t: "-_" + t[2:]), "header-field"),
    "a root in hex": (item("root", "0" * 64), "header-field"),
    "a root that is a list": (item("root", [1]), "header-field"),
    "a shorter signature": (item("signature", "A" * 80), "header-field"),
    "a longer root": (item("root", "A" * 88), "header-field"),
    "a letter escaped": (spelled(b'"tiny', b'"\\u0074iny'), "not-canonical"),
    "0 as -0": (spelled(b'"greedy",0.0', b'"greedy",-0.0'), "bad-signature"),
    "0 as 0e0": (spelled(b'"greedy",0.0', b'"greedy",0e0'), "not-canonical"),
    "a carriage return": (spelled(b"\n", b"\r\n"), "not-canonical"),
    "a line feed in front": (lambda d, r: b"\n" + d, "not-canonical"),
    "two receipts": (lambda d, r: d + d, "header-malformed"),
    "a byte order mark": (lambda d, r: b"\xef\xbb\xbf" + d, "header-malformed"),
    "in UTF-16": (lambda d, r: d.decode().encode("utf-16"), "header-malformed"),
    "a zero byte": (lambda d, r: d + b"\0", "header-malformed"),
    "version 3": (spelled(b"receipt 1", b"receipt 3"), "not-a-receipt"),
    "version 2 with the numerics of 1": (spelled(b"receipt 1", b"receipt 2"), "header-field"),
    "version 2 with nothing new": (version_2, "not-canonical"),
    "version 1 with the numerics of 2": (item("numerics", lambda v: [*v, *[None] * 5, "x"]), "header-field"),
    "a batch after signing": (lambda d, r: encode(replace(r, header=r.header.model_copy(update={"numerics": r.header.numerics.model_copy(update={"batch": 16})}))), "bad-signature"),
    "version 2, a batch of 0": (lambda d, r: item("numerics", lambda v: [*v[:10], 0, *v[11:]])(version_2(d, r), r), "header-field"),
    "a configuration of null": (item("model", lambda v: [*v[:4], None]), "not-canonical"),
    "six digests": (item("model", lambda v: [*v, None]), "header-field"),
    "a name with an escape": (item("model", lambda v: [ESCAPE, *v[1:]]), "header-field"),
    "a name turned around": (item("model", lambda v: [BIDI, *v[1:]]), "header-field"),
    "torch with an escape": (item("numerics", lambda v: [*v[:6], ESCAPE, v[7]]), "header-field"),
    "threads that are true": (item("numerics", lambda v: [*v[:4], True, *v[5:]]), "header-field"),
    "a prompt with a point": (item("prompt", lambda n: float(n)), "header-field"),
    "a prompt of nothing": (item("prompt", 0), "header-field"),
    "a prompt of less than nothing": (item("prompt", -1), "header-field"),
    "a prompt of all": (ids(lambda n: n[:4]), "header-field"),
    "one token of the answer in the prompt": (item("prompt", lambda n: n + 1), "bad-signature"),
    "one token more": (ids(lambda n: [*n, 5]), "bad-signature"),
    "two tokens exchanged": (ids(lambda n: [n[1], n[0], *n[2:]]), "bad-signature"),
    "a token of 2^31": (ids(lambda n: [*n[:-1], 2**31]), "header-field"),
    "a layer fewer": (item("layers", [8, 16]), "bad-signature"),
    "a layer below 0": (item("layers", [-1, 16, 17]), "header-field"),
    "layers as text": (item("layers", "8"), "header-field"),
    "no sampling": (item("sampling", []), "header-field"),
    "a nonce that is none": (item("nonce", None), "header-field"),
    "two lists": (lambda d, r: b"[" + d[:-1] + b"]\n", "not-a-receipt"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECEIPTS)
def test_a_forged_receipt_is_refused_by_its_code(name, receipt, asked, opening, trace, model, tmp_path):
    make, code = RECEIPTS[name]
    forged = make(encode(receipt), receipt)
    if name == "a prompt of all":
        forged = item("prompt", 4)(forged, receipt)
    assert forged != encode(receipt)
    sent = ReceiptResponse(forged, asked, encode_opening(opening), SIGNER)
    found = {reason.code for reason in check_submission(sent, model, request_of(trace)).defects}
    (tmp_path / "x").write_bytes(forged)
    if code != "other-signer":
        refused(code, read_receipt, tmp_path / "x")
    # One that can be read and commits to something else is no answer to the challenge either, nor to its own.
    assert found == {code} or (code == "bad-signature" and found == {"other-receipt"})
    if found == {"other-receipt"}:
        again = challenge(decode(forged, tmp_path), beacon=BEACON, generated=8, prompt=3)
        answer = encode_opening(replace(opening, commitment=again.commitment))
        sent = replace(sent, challenge=again, opening=answer)
        assert check_submission(sent, model, request_of(trace)).defects


# --- openings ---


def shown(change):
    """An opening in memory, changed."""
    return lambda opening, trace: encode_opening(replace(opening, **change(opening)))


def in_file(change):
    def make(opening, trace):
        return joined(*change(*split(encode_opening(opening))))

    return make


def content(**fields):
    def make(entries, body):
        said = json.loads(entries["__metadata__"]["bitassay"]) | fields
        return entries | {"__metadata__": {"bitassay": json.dumps(said)}}, body

    return make


def proof(change):
    return shown(lambda o: {"proof": tuple(change(list(o.proof)))})


def states(change):
    return shown(lambda o: {"states": {layer: change(rows) for layer, rows in o.states.items()}})


def exchanged(values, i, j):
    values[i], values[j] = values[j], values[i]
    return values


def of_neighbours(opening, trace):
    at = [min(int(p) + 1, len(trace.header.positions) - 1) for p in opened_positions(ASKED[0], trace.header)]
    rows = {layer: trace.states[layer][at] for layer in trace.header.layers}
    return encode_opening(replace(opening, states=rows))


def proven_neighbours(opening, trace):
    """The cells of other positions, with the right proof of those."""
    at = sorted((p + 1) % len(trace.header.positions) for p in opened_positions(ASKED[0], trace.header))
    hashes = merkle_proof(trace_leaves(trace), cell_indices(at, len(trace.header.layers)))
    rows = {layer: trace.states[layer][at] for layer in trace.header.layers}
    return encode_opening(replace(opening, states=rows, proof=tuple(hashes)))


ASKED = []
OPENINGS = {
    "the first two siblings exchanged": (proof(lambda p: exchanged(p, 0, 1)), "other-root"),
    "the last two siblings exchanged": (proof(lambda p: exchanged(p, -1, -2)), "other-root"),
    "the proof from its end": (proof(lambda p: p[::-1]), "other-root"),
    "one sibling twice": (proof(lambda p: [p[0], p[0], *p[2:]]), "other-root"),
    "a sibling with one bit changed": (proof(lambda p: [bytes([p[0][0] ^ 1]) + p[0][1:], *p[1:]]), "other-root"),
    "two siblings hashed to one": (proof(lambda p: [merkle_node(p[0], p[1]), *p[2:]]), "wrong-shape"),
    "a sibling more": (proof(lambda p: [*p, bytes(32)]), "wrong-shape"),
    "no proof": (shown(lambda o: {"proof": ()}), "wrong-layers"),
    "the first two positions exchanged": (states(lambda r: r[[1, 0, *range(2, len(r))]]), "other-root"),
    "one position for all": (states(lambda r: r[:1].expand_as(r)), "other-root"),
    "the first position twice": (states(lambda r: r[[0, 0, *range(2, len(r))]]), "other-root"),
    "a position more": (states(lambda r: torch.cat([r, r[-1:]])), "wrong-shape"),
    "a position fewer": (states(lambda r: r[1:]), "wrong-shape"),
    "one number a little larger": (states(lambda r: torch.where(r == r[0, 0], r + 0.125, r)), "other-root"),
    "negated": (states(lambda r: -r), "other-root"),
    "the same bits as float16": (states(lambda r: r.view(torch.float16)), "wrong-shape"),
    "the same numbers as float32": (states(lambda r: r.float()), "wrong-shape"),
    "the same bytes, half as wide": (states(lambda r: r[:, :48]), "other-root"),
    "the same bytes, twice as wide": (states(lambda r: r.repeat(1, 2)), "other-root"),
    "layers exchanged": (shown(lambda o: {"states": o.states | {8: o.states[17], 17: o.states[8]}}), "other-root"),
    "a layer left out": (shown(lambda o: {"states": {8: o.states[8], 16: o.states[16]}}), "wrong-layers"),
    "a layer more": (shown(lambda o: {"states": o.states | {4: o.states[8]}}), "wrong-layers"),
    "an inner node as a state": (states(lambda r: torch.cat([torch.frombuffer(bytearray(64), dtype=r.dtype).expand(len(r), 32), r[:, 32:]], 1)), "other-root"),
    "states of the next positions": (of_neighbours, "other-root"),
    "states of the next positions with their proof": (proven_neighbours, "other-root wrong-shape"),
    "NaN": (states(lambda r: r * torch.nan), "other-root"),
    "of another commitment": (shown(lambda o: {"commitment": "0" * 64}), "other-challenge"),
    "of another beacon": (shown(lambda o: {"beacon": "0" * 64}), "other-challenge"),
    "of a beacon in capitals": (shown(lambda o: {"beacon": o.beacon.upper()}), "other-challenge"),
    "version 2": (in_file(content(opening=2)), "other-challenge"),
    "version true": (in_file(content(opening=True)), "other-challenge"),
    "version 1.0": (in_file(content(opening=1.0)), "other-challenge"),
    "a field more": (in_file(content(more=1)), "other-challenge"),
    "a key twice": (in_file(lambda e, b: (e | {"__metadata__": {"bitassay": e["__metadata__"]["bitassay"][:-1] + ',"opening":1}'}}, b)), "duplicate-key"),
    "a proof of signed bytes": (in_file(lambda e, b: (e | {"proof": e["proof"] | {"dtype": "I8"}}, b)), "wrong-shape"),
    "a proof of one row": (in_file(lambda e, b: (e | {"proof": e["proof"] | {"shape": [1, 32 * e["proof"]["shape"][0]]}}, b)), "wrong-shape"),
    "a proof in place of a layer": (in_file(lambda e, b: (e | {"layer.8": e["proof"]}, b)), "wrong-shape"),
    "offsets exchanged": (in_file(swapped_offsets), "other-root"),
    "a byte more": (in_file(lambda e, b: (e, b + b"\0")), "trailing-bytes"),
    "a byte fewer": (in_file(lambda e, b: (e, b[:-1])), "truncated"),
    "nothing": (lambda o, t: b"", "truncated"),
    "a receipt": (lambda o, t: b"[" * 500, "header-oversize"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPENINGS)
def test_a_forged_opening_is_refused_by_its_code(name, receipt, asked, opening, trace, model):
    make, code = OPENINGS[name]
    ASKED[:] = [asked]
    sent = ReceiptResponse(encode(receipt), asked, make(opening, trace), SIGNER)
    found = check_submission(sent, model, request_of(trace))
    assert len(found.defects) == 1
    assert found.defects[0].code in code.split()
    assert found.opened is None


def test_a_larger_tree_in_which_a_leaf_is_a_node_is_no_answer(receipt, trace, model):
    """The host signs a root over twice as many leaves: what is proven of it is proven of no trace."""
    leaves = trace_leaves(trace)
    own = signed(replace(receipt, root=merkle_root([*leaves, *leaves])))
    one = challenge(own, beacon=BEACON, generated=8, prompt=3)
    at = opened_positions(one, trace.header)
    hashes = merkle_proof([*leaves, *leaves], cell_indices(at, len(trace.header.layers)))
    rows = {layer: trace.states[layer][list(at)] for layer in trace.header.layers}
    for shown_hashes in (hashes, hashes[:-1]):
        opened = Opening(one.commitment, one.beacon, rows, tuple(shown_hashes))
        sent = ReceiptResponse(encode(own), one, encode_opening(opened), SIGNER)
        found = {reason.code for reason in check_submission(sent, model, request_of(trace)).defects}
        assert found
        assert found <= {"other-root", "wrong-shape"}


# --- challenges ---


def asking(**fields):
    return lambda plain: json.dumps(plain | fields)


CHALLENGES = {
    "nothing to open": asking(generated=0),
    "less than nothing": asking(prompt=-1),
    "2^18 + 1": asking(generated=2**18 + 1),
    "2^63": asking(prompt=2**63),
    "10^400": asking(generated=10**400),
    "one and a half": asking(generated=1.5),
    "eight as text": asking(prompt="8"),
    "true": asking(generated=True),
    "none": asking(prompt=None),
    "a list": asking(generated=[8]),
    "no number": lambda plain: json.dumps(plain | {"generated": 0}).replace(": 0", ": NaN"),
    "no end": lambda plain: json.dumps(plain | {"prompt": 0}).replace(": 0", ": Infinity"),
    "a beacon in capitals": asking(beacon="A" * 64),
    "a beacon with blanks": asking(beacon="00 " * 21 + "0"),
    "a beacon of 63 digits": asking(beacon="0" * 63),
    "a beacon and a line feed": asking(beacon="0" * 64 + "\n"),
    "a commitment that is none": asking(commitment=None),
    "version as text": asking(challenge="1"),
    "version true": asking(challenge=True),
    "version 1.0": asking(challenge=1.0),
    "a field more": asking(salt="0"),
    "a field fewer": lambda plain: json.dumps({k: v for k, v in plain.items() if k != "prompt"}),
    "a count twice": lambda plain: json.dumps(plain)[:-1] + ', "generated": 1}',
    "a beacon twice": lambda plain: json.dumps(plain)[:-1] + f', "beacon": "{"0" * 64}"}}',
    "nested": lambda plain: "[" * 4000,
    "empty": lambda plain: "",
    "a number of 4000 digits": lambda plain: "1" * 4000,
}


@pytest.mark.parametrize("name", CHALLENGES)
def test_a_forged_challenge_is_refused(name, asked, tmp_path):
    path = tmp_path / "c.json"
    write_challenge(path, asked)
    path.write_text(CHALLENGES[name](json.loads(path.read_text())))
    with pytest.raises(BitassayError, match=r"c\.json: not a (challenge|JSON file)"):
        read_challenge(path)


def test_the_largest_challenge_opens_all(receipt, trace):
    one = challenge(receipt, beacon=BEACON, generated=2**18, prompt=2**18)
    assert opened_positions(one, trace.header) == trace.header.positions


# --- committees ---

GIVEN = Assignment(verifier="ada", items=("x", "f", "p"), planted={"f": "FAIL", "p": "PASS"})
RIGHT = {"x": "PASS", "f": "FAIL", "p": "PASS"}
HONEST = report("ada", RIGHT, bytes(32))
COMMITTED = {"ada": report_commitment("r", HONEST)}
LIES = {
    "another salt": ({"salt": "1" * 64}, "other-report"),
    "another answer": ({"answers": RIGHT | {"x": "FAIL"}}, "other-report"),
    "an answer more": ({"answers": RIGHT | {"y": "PASS"}}, "other-report"),
    "an answer fewer": ({"answers": {"x": "PASS"}}, "other-report"),
    "no answers": ({"answers": {}}, "other-report"),
    "another name": ({"verifier": "ben"}, "other-report"),
}
COMMITTED_LIES = {
    "an item more": (RIGHT | {"y": "PASS"}, "wrong-items"),
    "an item fewer": ({"x": "PASS", "f": "FAIL"}, "wrong-items"),
    "an item that looks like another": ({"x": "PASS", "f": "FAIL", "p\u200b": "PASS"}, "wrong-items"),
    "nothing": ({}, "wrong-items"),
    "all pass": (dict.fromkeys(RIGHT, "PASS"), "missed-planted-failure"),
    "nothing decided": (dict.fromkeys(RIGHT, "INCONCLUSIVE"), "missed-planted-failure"),
}
MALFORMED_REPORTS = {
    "a verdict in small letters": {"answers": {"x": "pass"}},
    "a verdict that is true": {"answers": {"x": True}},
    "a verdict with a blank": {"answers": {"x": "PASS "}},
    "a salt in capitals": {"salt": "A" * 64},
    "a salt of 31 bytes": {"salt": "0" * 62},
    "a salt and a line feed": {"salt": "0" * 64 + "\n"},
    "no name": {"verifier": ""},
    "a long name": {"verifier": "a" * 129},
    "half a letter": {"verifier": "\ud800"},
    "answers in a list": {"answers": [["x", "PASS"]]},
    "a field more": {"round": "r"},
}


@pytest.mark.parametrize("name", LIES)
def test_a_report_that_was_not_committed_to_is_refused(name):
    change, code = LIES[name]
    shown_report = HONEST.model_copy(update=change)
    found = judge("r", [GIVEN], COMMITTED, {"ada": shown_report})["ada"]
    assert [reason.code for reason in found] == [code]
    task = Task(round="r", verifier="ada", verifiers=("ada",), items=GIVEN.items)
    with pytest.raises(BitassayError, match="not the one"):
        reveal(shown_report, task, Board(COMMITTED, {}))


@pytest.mark.parametrize("name", COMMITTED_LIES)
def test_a_report_of_other_answers_is_refused(name):
    answers, code = COMMITTED_LIES[name]
    lie = report("ada", answers, bytes(32))
    found = judge("r", [GIVEN], {"ada": report_commitment("r", lie)}, {"ada": lie})["ada"]
    assert code in [reason.code for reason in found]


@pytest.mark.parametrize("name", MALFORMED_REPORTS)
def test_a_malformed_report_is_refused(name):
    with pytest.raises(BitassayError, match="not a report"):
        parse_report(copy.deepcopy(HONEST.model_dump()) | MALFORMED_REPORTS[name])


@pytest.mark.parametrize("version", [True, 1.0, "1", 2, 0, None])
def test_a_task_of_another_version_is_refused(version, tmp_path):
    (tmp_path / "t.json").write_text(
        json.dumps({"committee": version, "round": "r", "verifier": "a", "verifiers": ["a"], "items": ["x"]})
    )
    with pytest.raises(BitassayError, match=r"t\.json: committee"):
        read(tmp_path / "t.json", Task, "")


def test_files_with_a_key_twice_are_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"x": "PASS", "x": "FAIL"}')
    with pytest.raises(BitassayError, match="twice"):
        read_answers(path)
    path.write_text('{"ada": {"x": "FAIL"}, "ada": {"x": "PASS"}}')
    with pytest.raises(BitassayError, match="twice"):
        read_canaries(path)


def test_there_are_as_many_as_this_file_says():
    tables = (TRACES, RECEIPTS, OPENINGS, CHALLENGES, LIES, COMMITTED_LIES, MALFORMED_REPORTS)
    assert sum(map(len, tables)) > 240
