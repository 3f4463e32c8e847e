"""Openings: an honest one passes, and every attack on one is caught by name."""

import json
import os
import struct
from dataclasses import replace
from itertools import combinations
from statistics import fmean, pstdev, stdev

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitassay.errors import BitassayError
from bitassay.models.identity import identity
from bitassay.testing.tiny import tiny_model
from bitassay.verification.container import TraceError
from bitassay.verification.detectors.registry import HEAD, ROTARY, SEGMENTS, STATES
from bitassay.verification.profile import write_profile
from bitassay.verification.prove import prove
from bitassay.verification.receipts.challenge import challenge, opened_positions
from bitassay.verification.receipts.merkle import merkle_proof, merkle_root
from bitassay.verification.receipts.opening import (
    Opening,
    cell_indices,
    check_opening,
    open_trace,
    read_opening,
    write_opening,
)
from bitassay.verification.receipts.receipt import commit, trace_leaves
from bitassay.verification.scores import sampling_margin
from bitassay.verification.structure import Request
from bitassay.verification.trace import Trace
from bitassay.verification.verify import verify, verify_opening
from verification.receipts import BEACON, KEY, OTHER_KEY, SIGNER, codes, refused, signed

TOKENS = 12


def judged(trace, model, profile, *, request=None, generated=TOKENS, prompt=4, key=KEY, **options):
    """The verdict on a host that commits to `trace` and opens what it is asked."""
    receipt = commit(trace, key)
    one = challenge(receipt, beacon=BEACON, generated=generated, prompt=prompt)
    options = {"signer": SIGNER, "profile": profile, "request": request} | options
    return verify_opening(receipt, one, open_trace(trace, one), model, **options)


def test_what_is_written_is_read_and_passes(receipt, asked, opening, trace, model, profile, tmp_path):
    path = tmp_path / "x.opening"
    write_opening(path, opening)
    back = read_opening(path, receipt, asked)
    assert back.proof == opening.proof
    assert all(torch.equal(back.states[layer], opening.states[layer]) for layer in trace.header.layers)
    request = Request(trace.header.prompt_ids, trace.header.nonce, None, TOKENS)
    verdict = verify_opening(receipt, asked, back, model, signer=SIGNER, profile=profile, request=request)
    assert verdict.status == "PASS"
    assert verdict.observation.positions == 8


def test_opening_everything_says_what_the_trace_says(trace, model, profile):
    whole = verify(trace, model, profile=profile)
    opened = judged(trace, model, profile, generated=99, prompt=99)
    assert opened.p_value == whole.p_value
    assert opened.margins == whole.margins
    one = opened_positions(challenge(commit(trace, KEY), beacon=BEACON, generated=99, prompt=4), trace.header)
    assert sum(position >= trace.n_prompt for position in one) == TOKENS - 1
    for layer in trace.header.layers:
        assert opened.distance(layer) == pytest.approx(whole.distance(layer))


def test_a_part_is_judged_by_what_it_can_show(trace, model, profile):
    whole = verify(trace, model, profile=profile)
    opened = judged(trace, model, profile, generated=99, prompt=4)
    assert set(whole.score.detectors) - set(opened.score.detectors) == {SEGMENTS, ROTARY, HEAD}
    assert opened.p_value >= whole.p_value


def test_honest_openings_of_every_length_pass_their_checks(honest, model, profile):
    statuses = [judged(trace, model, profile, generated=8).status for trace in honest[:12]]
    assert statuses.count("FAIL") <= 3
    assert "PASS" in statuses


def test_states_of_another_model_and_tokens_of_another_model_fail(prompts, model, profile, round_weights):
    cheap = round_weights(model, 2)
    traces = [prove(cheap, prompt, max_new_tokens=TOKENS, claim=identity(model)) for prompt in prompts[56:60]]
    verdicts = [judged(trace, model, profile, generated=8) for trace in traces]
    assert {verdict.status for verdict in verdicts if verdict.p_value is not None} == {"FAIL"}


def test_fewer_positions_than_were_calibrated_do_not_decide(trace, model, profile):
    verdict = judged(trace, model, profile, generated=profile.generated_positions[0] - 1)
    assert (verdict.status, codes(verdict)) == ("INCONCLUSIVE", {"too-few-tokens"})
    assert judged(trace, model, profile, generated=profile.generated_positions[0]).status == "PASS"


def test_few_opened_positions_of_a_text_longer_than_calibrated_do_not_decide(trace, model, profile):
    low = profile.generated_positions[0]
    short = profile.model_copy(update={"generated_positions": (low, TOKENS - 2)})
    verdict = judged(trace, model, short, generated=low)
    assert (verdict.status, codes(verdict)) == ("INCONCLUSIVE", {"beyond-profile"})


def test_the_mean_over_a_part_is_taken_two_standard_errors_lower():
    """Against all samples of 4 of 8 numbers: the standard error is the standard deviation of their means."""
    numbers = [0.0, 1, 1, 2, 3, 5, 8, 13]
    means = [sum(some) / 4 for some in combinations(numbers, 4)]
    assert pstdev(means) / (stdev(numbers) * (0.5 / 4) ** 0.5) == pytest.approx(1, abs=1e-6)
    assert sampling_margin(numbers[::2], 8, 100) == pytest.approx(2 * stdev(numbers[::2]) * (0.5 / 4) ** 0.5)
    assert sampling_margin(numbers[::2], 8, 0.1) == pytest.approx(0.2 * (0.5 / 4) ** 0.5)
    assert sampling_margin(numbers[:1], 5, 0.1) == pytest.approx(0.2 * 0.8**0.5)
    assert sampling_margin(numbers, 8, 100) == sampling_margin(numbers[:0], 0, 100) == 0


def test_the_verdict_takes_the_lower_bound_and_reports_the_mean(trace, model, profile):
    part, whole = judged(trace, model, profile, generated=8), verify(trace, model, profile=profile)
    assert part.score.detectors[STATES] < max(
        fit.standardised(fmean(values), TOKENS - 1)
        for fit, series in zip(profile.detectors[STATES], part.observation.series[STATES], strict=True)
        for values in (series.values, series.prompt)
    )
    assert whole.hidden_distance == pytest.approx(part.hidden_distance, rel=0.2)


def test_the_profile_in_the_cache_folder_is_found(trace, model, profile):
    assert codes(judged(trace, model, None)) == {"no-profile"}
    path = write_profile(profile)
    try:
        assert judged(trace, model, None).status == "PASS"
    finally:
        path.unlink()


# --- who signed, and what ---


def test_an_unknown_signer_never_passes_and_another_one_fails(trace, model, profile):
    assert codes(judged(trace, model, profile, signer=None)) == {"unknown-signer"}
    assert judged(trace, model, profile, signer=None).status == "INCONCLUSIVE"
    verdict = judged(trace, model, profile, key=OTHER_KEY)
    assert (verdict.status, codes(verdict)) == ("FAIL", {"other-signer"})


def test_a_tampered_header_fails_even_before_the_states(receipt, asked, opening, model, profile):
    tampered = replace(receipt, header=receipt.header.model_copy(update={"nonce": "mine"}))
    verdict = verify_opening(tampered, asked, opening, model, signer=SIGNER, profile=profile)
    assert (verdict.status, codes(verdict)) == ("FAIL", {"bad-signature"})


def test_a_forged_root_cannot_be_opened(receipt, trace, model, profile):
    """The host signs a root of which it knows no cells, to fit states to the challenge afterwards."""
    forged = signed(replace(receipt, root=bytes(32)))
    one = challenge(forged, beacon=BEACON, generated=8, prompt=3)
    with pytest.raises(BitassayError, match="another trace"):
        open_trace(trace, one)
    honest = open_trace(trace, challenge(receipt, beacon=BEACON, generated=8, prompt=3))
    at = list(opened_positions(one, trace.header))
    fitted = replace(
        honest, commitment=one.commitment, states={layer: rows[at] for layer, rows in trace.states.items()}
    )
    verdict = verify_opening(forged, one, fitted, model, signer=SIGNER, profile=profile)
    assert (verdict.status, codes(verdict)) == ("FAIL", {"other-root"})


def test_states_made_honest_after_the_challenge_are_refused(trace, model, round_weights, prompts, profile):
    """The host commits to the states of a cheap model and opens those of the real one."""
    cheap = Trace(trace.header, {layer: rows * 1.25 for layer, rows in trace.states.items()})
    receipt = commit(cheap, KEY)
    one = challenge(receipt, beacon=BEACON, generated=8, prompt=3)
    at = list(opened_positions(one, trace.header))
    swapped = replace(
        open_trace(cheap, one), states={layer: rows[at] for layer, rows in trace.states.items()}
    )
    verdict = verify_opening(receipt, one, swapped, model, signer=SIGNER, profile=profile)
    assert (verdict.status, codes(verdict)) == ("FAIL", {"other-root"})


def test_a_replayed_receipt_of_another_request_fails(honest, trace, model, profile):
    other = next(one for one in honest if one.header.nonce != trace.header.nonce and one.n_tokens == TOKENS)
    request = Request(nonce=trace.header.nonce)
    verdict = judged(other, model, profile, request=request)
    assert verdict.status == "FAIL"
    assert "other-nonce" in codes(verdict)


def test_an_opening_of_another_receipt_or_beacon_is_refused(honest, receipt, asked, opening, trace, tmp_path):
    other = next(one for one in honest if one.header.nonce != trace.header.nonce and one.n_tokens == TOKENS)
    theirs = commit(other, KEY)
    refused("other-receipt", check_opening, opening, theirs, asked)
    again = challenge(receipt, beacon=bytes(32), generated=8, prompt=3)
    refused("other-challenge", check_opening, opening, receipt, again)
    refused("other-root", check_opening, replace(opening, beacon=again.beacon), receipt, again)
    more = challenge(receipt, beacon=BEACON, generated=9, prompt=3)
    refused("wrong-shape", check_opening, opening, receipt, more)
    write_opening(tmp_path / "x", opening)
    refused("other-challenge", read_opening, tmp_path / "x", receipt, again)


def test_a_withheld_opening_is_refused(receipt, asked, tmp_path):
    refused("withheld-opening", read_opening, tmp_path / "never", receipt, asked)


def test_a_trace_with_positions_left_out_is_not_committed_to(trace):
    header = trace.header.model_copy(update={"positions": trace.header.positions[:-1]})
    fewer = Trace(header, {layer: rows[:-1] for layer, rows in trace.states.items()})
    refused("wrong-positions", commit, fewer, KEY)


def test_what_does_not_fit_the_verifiers_model_fails(trace, model, profile):
    small = tiny_model("llama", num_hidden_layers=17, hidden_size=48, head_dim=12).to(torch.bfloat16)
    assert "wrong-hidden-size" in codes(judged(trace, small, profile))
    assert "missing-layer" in codes(judged(trace, tiny_model("llama", num_hidden_layers=24), profile))
    ids = (*trace.header.output_ids[:-1], 10**6)
    outside = Trace(trace.header.model_copy(update={"output_ids": ids}), trace.states)
    assert codes(judged(outside, model, profile)) == {"token-outside-vocabulary"}


# --- openings in memory that are not what they should be ---


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("other-root", lambda o: {"states": o.states | {8: o.states[8] + 1}}),
        ("other-root", lambda o: {"states": o.states | {8: o.states[8].roll(1, 0)}}),
        ("other-root", lambda o: {"states": o.states | {8: o.states[17], 17: o.states[8]}}),
        ("other-root", lambda o: {"proof": o.proof[:-1]}),
        ("other-root", lambda o: {"proof": (*o.proof, bytes(32))}),
        ("other-root", lambda o: {"proof": (bytes(32), *o.proof[1:])}),
        ("other-root", lambda o: {"proof": ()}),
        ("other-root", lambda o: {"states": {layer: rows[:, :64] for layer, rows in o.states.items()}}),
        ("wrong-layers", lambda o: {"states": {8: o.states[8]}}),
        ("wrong-layers", lambda o: {"states": {}}),
        ("wrong-layers", lambda o: {"states": dict(reversed(o.states.items()))}),
        ("wrong-shape", lambda o: {"states": {layer: rows[:-1] for layer, rows in o.states.items()}}),
        ("wrong-shape", lambda o: {"states": {layer: rows.float() for layer, rows in o.states.items()}}),
        ("wrong-shape", lambda o: {"states": o.states | {8: o.states[8][:, :64]}}),
    ],
)
def test_a_changed_opening_is_refused(code, change, receipt, asked, opening):
    refused(code, check_opening, replace(opening, **change(opening)), receipt, asked)


def test_committed_states_that_are_not_finite_fail(trace, receipt, model, profile):
    """`commit` refuses them, but a host may sign what it likes."""
    broken = Trace(trace.header, {layer: rows * torch.nan for layer, rows in trace.states.items()})
    refused("not-finite", commit, broken, KEY)
    leaves = trace_leaves(broken)
    own = signed(replace(receipt, root=merkle_root(leaves)))
    one = challenge(own, beacon=BEACON, generated=8, prompt=3)
    at = opened_positions(one, trace.header)
    proof = merkle_proof(leaves, cell_indices(at, len(trace.header.layers)))
    states = {layer: rows[list(at)] for layer, rows in broken.states.items()}
    forged = Opening(one.commitment, one.beacon, states, tuple(proof))
    verdict = verify_opening(own, one, forged, model, signer=SIGNER, profile=profile)
    assert (verdict.status, codes(verdict)) == ("FAIL", {"not-finite"})


# --- files that are not openings ---


def parts(opening, path):
    write_opening(path, opening)
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def assemble(entries, body):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(**changes):
    return lambda entries, body: (entries | {"layer.8": entries["layer.8"] | changes}, body)


def metadata(text):
    return lambda entries, body: (entries | {"__metadata__": {"bitassay": text}}, body)


MALFORMED = {
    "no metadata": (lambda e, b: ({k: v for k, v in e.items() if k != "__metadata__"}, b), "not-a-trace"),
    "metadata is no JSON": (metadata("{"), "header-malformed"),
    "metadata is a list": (metadata("[]"), "other-challenge"),
    "metadata of a trace": (metadata('{"schema_version": 1}'), "other-challenge"),
    "a layer left out": (lambda e, b: ({k: v for k, v in e.items() if k != "layer.8"}, b), "wrong-layers"),
    "no proof": (lambda e, b: ({k: v for k, v in e.items() if k != "proof"}, b), "wrong-layers"),
    "a tensor more": (lambda e, b: (e | {"layer.4": e["layer.8"]}, b), "wrong-layers"),
    "entry is no object": (lambda e, b: (e | {"layer.8": 1}, b), "malformed"),
    "other dtype": (entry(dtype="F16"), "wrong-shape"),
    "unknown dtype": (entry(dtype="X"), "wrong-shape"),
    "no columns": (entry(shape=[11, 0], data_offsets=[0, 0]), "wrong-shape"),
    "other rows": (entry(shape=[10, 96]), "wrong-shape"),
    "huge": (entry(shape=[11, 2**40]), "wrong-shape"),
    "proof of another width": (
        lambda e, b: (e | {"proof": e["proof"] | {"shape": [16, 64]}}, b),
        "wrong-shape",
    ),
    "proof in floats": (lambda e, b: (e | {"proof": e["proof"] | {"dtype": "F32"}}, b), "wrong-shape"),
    "other offsets": (entry(data_offsets=[0, 10]), "wrong-offsets"),
    "negative offsets": (entry(data_offsets=[-1, 10]), "malformed"),
    "overlapping": (lambda e, b: (e | {"layer.8": e["layer.16"]}, b), "wrong-offsets"),
    "bytes after the end": (lambda e, b: (e, b + b"\0"), "trailing-bytes"),
    "cut": (lambda e, b: (e, b[:-1]), "truncated"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_refused_by_name(name, receipt, asked, opening, tmp_path):
    make, code = MALFORMED[name]
    path = tmp_path / "x"
    path.write_bytes(assemble(*make(*parts(opening, path))))
    refused(code, read_opening, path, receipt, asked)


def test_a_file_that_is_no_file_is_refused(receipt, asked, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused("not-a-file", read_opening, tmp_path / "pipe", receipt, asked)
    refused("not-a-file", read_opening, tmp_path, receipt, asked)
    (tmp_path / "huge").write_bytes(b"")
    os.truncate(tmp_path / "huge", 2**32)
    refused("oversize", read_opening, tmp_path / "huge", receipt, asked)
    for data in (b"", b"\0" * 7, b"\xff" * 64, struct.pack("<Q", 10**6) + b"[" * 10**6):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(TraceError):
            read_opening(tmp_path / "x", receipt, asked)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_opening_is_refused(data, receipt, asked, opening, tmp_path):
    """One byte changed, put in or taken out, anywhere: nothing is read but what was committed to."""
    path = tmp_path / "x"
    write_opening(path, opening)
    whole = path.read_bytes()
    limit = data.draw(st.sampled_from([len(whole), 700]))
    at, byte = data.draw(st.integers(0, limit - 1)), data.draw(st.binary(max_size=2))
    path.write_bytes(whole[:at] + byte + whole[at + 1 :])
    try:
        back = read_opening(path, receipt, asked)
    except TraceError:
        return
    assert isinstance(back, Opening)
    assert back.proof == opening.proof
    assert all(torch.equal(back.states[layer], opening.states[layer]) for layer in opening.states)
