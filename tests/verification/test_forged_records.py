"""Forged proofs, profiles, ledgers, committee files and pairs of receipts, each by a small edit of an honest
one: every one is refused by its code or by the name of what is wrong."""

import json
from base64 import b64decode, b64encode
from dataclasses import replace

import pytest

from bitassay.engines.sampling import GREEDY
from bitassay.errors import BitassayError
from bitassay.verification.accounting import Answer, standings
from bitassay.verification.asked import Asked
from bitassay.verification.committee.files import Commitment, Revealed, Secret, read, read_board
from bitassay.verification.committee.rounds import Assignment, judge, report, report_commitment
from bitassay.verification.ledger import Binding, Item, read_ledger, update_ledger
from bitassay.verification.profile import read_profile, write_profile
from bitassay.verification.profile import signed as vouched
from bitassay.verification.receipts.conflicts import Conflict, check_conflict
from bitassay.verification.receipts.proof import encode_proof, read_proof, sign_proof
from bitassay.verification.structure import Request
from bitassay.verification.trace import write_trace
from bitassay.verification.trace_files import verify_files
from bitassay.verification.verify import verify_many
from verification.receipts import KEY, OTHER_KEY, codes, refused, signed


def decoded(text):
    return b64decode(text + "=" * (-len(text) % 4))


def coded(data):
    return b64encode(data).decode().rstrip("=")


# --- small proofs ---


def proof_item(place, change):
    def make(values):
        return [change(value) if index == place else value for index, value in enumerate(values)]

    return make


def resigned(change):
    """A proof that the host itself signs, of what it likes."""

    def make(trace, receipt):
        one = sign_proof(trace, receipt, KEY, 2)
        changed = replace(one, **change(one))
        return encode_proof(replace(changed, signature=KEY.sign(changed.message)))

    return make


def edited(change):
    def make(trace, receipt):
        values = change(json.loads(encode_proof(sign_proof(trace, receipt, KEY, 2))))
        return (json.dumps(values, separators=(",", ":")) + "\n").encode()

    return make


PROOFS = {
    "one residue another, not signed again": (edited(proof_item(3, lambda t: coded(bytes([decoded(t)[0] ^ 1]) + decoded(t)[1:]))), "bad-signature"),
    "the nibbles of each byte exchanged": (edited(proof_item(3, lambda t: coded(bytes((b >> 4) | (b & 15) << 4 for b in decoded(t))))), "bad-signature"),
    "another step": (edited(proof_item(2, lambda e: e + 1)), "bad-signature"),
    "a position fewer, signed": (resigned(lambda one: {"proof": replace(one.proof, residues=one.proof.residues[:-2])}), "wrong-shape"),
    "a position more, signed": (resigned(lambda one: {"proof": replace(one.proof, residues=one.proof.residues + bytes(2))}), "wrong-shape"),
    "four bytes a token, signed": (resigned(lambda one: {"proof": replace(one.proof, residues=one.proof.residues * 2)}), "wrong-shape"),
    "nothing, signed": (resigned(lambda one: {"proof": replace(one.proof, residues=b"")}), "wrong-shape"),
    "of another commitment, signed": (resigned(lambda one: {"commitment": bytes(32)}), "other-receipt"),
    "signed by another key": (lambda trace, receipt: encode_proof(sign_proof(trace, receipt, OTHER_KEY, 2)), "bad-signature"),
    "of another receipt of the same trace": (lambda trace, receipt: encode_proof(sign_proof(trace, signed(receipt, nonce="x"), KEY, 2)), "other-receipt"),
    "the receipt's signature": (lambda trace, receipt: encode_proof(replace(sign_proof(trace, receipt, KEY, 2), signature=receipt.signature)), "bad-signature"),
    "residues before the exponent": (edited(lambda v: [v[0], v[1], v[3], v[2], v[4]]), "header-field"),
    "an exponent of -129": (edited(proof_item(2, lambda _: -129)), "header-field"),
    "an object": (edited(lambda v: dict(zip("abcde", v, strict=True))), "not-a-proof"),
    "a sixth value": (edited(lambda v: [*v, None]), "not-a-proof"),
    "blanks": (lambda trace, receipt: encode_proof(sign_proof(trace, receipt, KEY, 2)).replace(b",", b", "), "not-canonical"),
    "two proofs": (lambda trace, receipt: 2 * encode_proof(sign_proof(trace, receipt, KEY, 2)), "header-malformed"),
    "nothing at all": (lambda trace, receipt: b"", "header-malformed"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROOFS)
def test_a_forged_proof_is_refused_by_its_code(name, trace, receipt, tmp_path):
    make, code = PROOFS[name]
    path = tmp_path / "x.proof"
    path.write_bytes(make(trace, receipt))
    refused(code, read_proof, path, receipt)


# --- profiles ---


def first_score(value):
    return lambda content: {"scores": [[value, *content["scores"][0][1:]], *content["scores"][1:]]}


def detector(name, change):
    return lambda content: {"detectors": content["detectors"] | {name: change(content["detectors"][name])}}


def fits(**changes):
    """The first fit of a detector with other fields."""
    return lambda curves: [curves[0] | changes, *curves[1:]]


PROFILES = {
    "a score of a million and one": (first_score(1e6 + 1), "scores"),
    "a score that is text": (first_score("0"), "scores"),
    "a run without scores": (lambda c: {"scores": [[], *c["scores"][1:]]}, "scores"),
    "scores of longer runs than it covers": (lambda c: {"scores": [c["scores"][0] * 40, *c["scores"][1:]]}, "more positions"),
    "one run less in unlike": (lambda c: {"unlike": c["unlike"][1:]}, "unlike"),
    "a score that is true": (first_score(True), "scores"),
    "a mean that is text": (detector("token-difr", fits(mean=["0"])), "mean"),
    "no spread": (detector("segment-distance", fits(sd=[0.0])), "sd"),
    "a spread below nothing": (detector("head-margin", fits(sd=[-1.0])), "sd"),
    "two means for three lengths": (detector("rotary-base", fits(mean=[0.0])), "one mean"),
    "lengths that fall": (detector("token-difr", lambda c: [c[0] | {"lengths": c[0]["lengths"][::-1]}]), "ascending"),
    "a detector that decides left out": (lambda c: {"detectors": {k: v for k, v in c["detectors"].items() if k != "rotary-base"}}, "rotary-base"),
    "a segment without a fit": (detector("segment-distance", lambda c: c[:-1]), "one fit for each layer"),
    "a layer without a control": (lambda c: {"control": c["control"][:-1]}, "one fit for each layer"),
    "layers from the end": (lambda c: {"layers": c["layers"][::-1]}, "ascending"),
    "nothing refused, so they say": (lambda c: {"held_out": {"n": 1000, "rejected": 0, "interval": c["held_out"]["interval"]}}, "interval"),
    "more refused than there are": (lambda c: {"held_out": {"n": 3, "rejected": 4, "interval": [0.0, 1.0]}}, "interval"),
    "an alpha of 1": (lambda c: {"alpha": 1.0}, "alpha"),
    "a guarantee of its own": (lambda c: {"guarantee": "certain"}, "guarantee"),
    "valid for 401 days": (lambda c: {"expires": c["created"].replace("20", "21", 1)}, "days"),
    "a date without a zone": (lambda c: {"created": c["created"].replace("Z", "").replace("+00:00", "")}, "time zone"),
    "no positions": (lambda c: {"generated_positions": [0, 11]}, "range"),
    "a name of a detector with a path": (lambda c: {"detectors": c["detectors"] | {"../x": c["control"]}}, "detectors"),
    "numerics with an escape": (lambda c: {"prover": c["prover"] | {"torch": "2\x1b[2J"}}, "prover.torch"),
    "a claim in capitals": (lambda c: {"model": c["model"] | {"weights_digest": "A" * 64}}, "model.weights_digest"),
    "version 4.0": (lambda c: {"schema_version": "4"}, "version"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROFILES)
def test_a_forged_profile_is_refused_by_its_field(name, profile, tmp_path):
    change, said = PROFILES[name]
    path = write_profile(profile, tmp_path / "x.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | change(content)))
    with pytest.raises(BitassayError, match=said) as raised:
        read_profile(path)
    assert "x.json" in str(raised.value)


def test_a_signature_vouches_for_one_profile_alone(profile, tmp_path):
    """A lower alpha under the signature of the same calibration, and a detector that nobody calibrated."""
    path = write_profile(vouched(profile, KEY), tmp_path / "x.json")
    content = json.loads(path.read_text())
    extra = {"detectors": content["detectors"] | {"proof-8": [content["control"][0]]}}
    for change in ({"alpha": 0.049}, {"prompts_digest": "0" * 64}, extra):
        path.write_text(json.dumps(content | change))
        with pytest.raises(BitassayError, match="the signature is not of this profile"):
            read_profile(path)


# --- ledgers ---


def named(index):
    return f"{index:064x}"


def line(**changes):
    """The second request with other fields."""
    return lambda texts: [*texts[:2], json.dumps(json.loads(texts[2]) | changes), *texts[3:]]


def spelled(old, new):
    return lambda texts: [*texts[:2], texts[2].replace(old, new, 1), *texts[3:]]


LEDGERS = {
    "a request twice": (lambda texts: [*texts, texts[1]], "counts a request twice"),
    "the first line again": (lambda texts: [*texts, texts[0]], "not a ledger"),
    "no first line": (lambda texts: texts[1:], "not a ledger"),
    "a score and a reason why there is none": (line(undecided="too-few-tokens"), "neither a score"),
    "neither": (line(score=None, limit=None), "neither a score"),
    "a score of nobody knows what": (line(prompt=None), "unknown request"),
    "a limit of 0": (line(limit=0), "limit"),
    "a limit of 2^18 + 1": (line(limit=2**18 + 1), "limit"),
    "a score as text": (line(score="nan"), "score"),
    "a score that is no number": (spelled('"score":0.0', '"score":NaN'), "not a ledger"),
    "a score that is infinite": (spelled('"score":0.0', '"score":1e999'), "score"),
    "a score twice": (spelled('"score":0.0', '"score":9.0,"score":0.0'), "twice"),
    "a capital": (line(log_wealth=-5.0), "log_wealth"),
    "a digest in capitals": (line(request="A" * 64), "request"),
    "a reason with an escape": (line(score=None, limit=None, undecided="x\x1b[2J"), "undecided"),
    "a date that is none": (line(time="tomorrow"), "time"),
    "two requests in one line": (lambda texts: [*texts[:2], texts[2] + texts[3]], "not JSON"),
    "a budget of 1": (lambda texts: [json.dumps(json.loads(texts[0]) | {"budget": 1}), *texts[1:]], "budget"),
    "another budget": (lambda texts: [json.dumps(json.loads(texts[0]) | {"budget": 0.5}), *texts[1:]], "budget of 0.5"),
    "another profile": (lambda texts: [json.dumps(json.loads(texts[0]) | {"profile": named(1)}), *texts[1:]], "another profile"),
    "another host": (lambda texts: [json.dumps(json.loads(texts[0]) | {"host": named(1)}), *texts[1:]], "another host"),
    "the host twice": (lambda texts: [texts[0].replace('"host":null', '"host":"' + named(1) + '","host":null'), *texts[1:]], "twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEDGERS)
def test_a_forged_ledger_is_refused(name, profile, tmp_path):
    change, said = LEDGERS[name]
    path = tmp_path / "x.ledger"
    items = [Item(request=named(i), prompt=named(i), output=named(i), score=0.0, limit=11) for i in range(3)]
    update_ledger(path, items, Binding(profile=profile.digest))
    texts = path.read_text().splitlines()
    assert len(texts) == 4
    path.write_text("".join(f"{text}\n" for text in change(texts)))
    with pytest.raises(BitassayError, match=said) as raised:
        read_ledger(path, profile)
    assert "x.ledger" in str(raised.value)


# --- committees ---

GIVEN = Assignment(verifier="ada", items=("x", "f"), planted={"f": "FAIL"})
MINE = report("ada", {"x": "PASS", "f": "FAIL"}, bytes(32))
DIGEST = report_commitment("r", MINE)
HANDED_IN = {"committee": 1, "round": "r", "verifier": "ada", "commitment": DIGEST}
COMMITMENTS = {
    "a round that is another": {"round": "s"},
    "a round with an invisible mark": {"round": "r\u200b"},
    "a name in other letters": {"verifier": "\u0430da"},
    "another name": {"verifier": "ben"},
    "a digest and a blank": {"commitment": DIGEST + " "},
    "a digest in capitals": {"commitment": DIGEST.upper()},
    "the report beside it": {"report": MINE.model_dump()},
    "version true": {"committee": True},
}


@pytest.mark.parametrize("name", COMMITMENTS)
def test_a_forged_commitment_counts_against_its_name_alone(name, tmp_path):
    changed = HANDED_IN | COMMITMENTS[name]
    (tmp_path / "ada.json").write_text(json.dumps(changed))
    (tmp_path / "ben.json").write_text(json.dumps(HANDED_IN | {"verifier": "ben"}))
    board = read_board(tmp_path, "r", ["ada", "ben"])
    assert board.unreadable["ada"].code == "unreadable-commitment"
    assert list(board.commitments) == ["ben"]


def test_a_report_of_another_round_does_not_count_in_this_one():
    found = judge("s", [GIVEN], {"ada": DIGEST}, {"ada": MINE})["ada"]
    assert [reason.code for reason in found] == ["other-report"]


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (Revealed, {"committee": 1, "round": "r", "seen": "0" * 63, "report": MINE.model_dump()}),
        (Revealed, {"committee": 1, "round": "", "seen": "0" * 64, "report": MINE.model_dump()}),
        (Secret, {"committee": 1, "round": "r", "assignments": []}),
        (Secret, {"committee": 1, "round": "r", "assignments": [GIVEN.model_dump() | {"planted": {"f": "INCONCLUSIVE"}}]}),
        (Commitment, [HANDED_IN]),
    ],
)  # fmt: skip
def test_a_malformed_file_of_a_round_is_refused_by_name(kind, content, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(BitassayError, match=r"r\.json: "):
        read(tmp_path / "r.json", kind, "")


# --- pairs ---


@pytest.mark.parametrize(
    ("second", "code"),
    [
        (lambda one: one, "no-conflict"),
        (lambda one: signed(one, nonce="other"), "no-conflict"),
        (lambda one: signed(one, OTHER_KEY), "no-conflict"),
        (lambda one: signed(replace(one, root=bytes(32)), OTHER_KEY), "no-conflict"),
        (lambda one: replace(one, root=bytes(32)), "bad-signature"),
    ],
)
def test_what_does_not_convict_a_host_is_no_conflict(receipt, second, code):
    """Another key's answer, another request, a copy, and a receipt that somebody altered."""
    refused(code, check_conflict, Conflict(receipt, second(receipt)))
    check_conflict(Conflict(receipt, signed(replace(receipt, root=bytes(32)))))


def test_an_altered_copy_does_not_take_the_place_of_an_honest_trace(trace, model, profile, tmp_path):
    """Somebody who wants a host refused sends its trace once more, with another token at the end."""
    header = trace.header
    output = (*header.output_ids[:-1], (header.output_ids[-1] + 1) % 512)
    altered = replace(trace, header=header.model_copy(update={"output_ids": output}))
    paths = [tmp_path / "a.trace", tmp_path / "b.trace"]
    for path, one in zip(paths, (trace, altered), strict=True):
        write_trace(path, one)
    asked = Request(header.prompt_ids, header.nonce, GREEDY, 12)
    result = verify_files(paths, model, Asked((asked, asked)), name="tiny", profile=profile)
    assert (result.decision.status, result.passed) == ("PASS", True)
    assert "equivocation" in result.notes[1][0]


def test_no_spelling_of_a_request_makes_two_of_it(trace, model, profile):
    """A greedy answer under ten seeds and nuclei, and under ten names of the model."""
    header = trace.header
    claims = [
        header.model_copy(
            update={"sampling": header.sampling.model_copy(update={"seed": index, "top_p": 0.5})}
        )
        for index in range(10)
    ] + [
        header.model_copy(update={"model": header.model.model_copy(update={"name": f"m{index}"})})
        for index in range(10)
    ]
    (verdict,) = verify_many([trace], model, profile=profile)
    found = standings([Answer.of(each) for each in claims], [verdict] * 20, [str(i) for i in range(20)])
    assert [standing.counts for standing in found] == [True] + [False] * 19
    assert codes(verdict) == {"as-honest"}


def test_there_are_as_many_as_this_file_says():
    assert sum(map(len, (PROOFS, PROFILES, LEDGERS, COMMITMENTS))) >= 70
