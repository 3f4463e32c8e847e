"""What counts, and how often: nobody can frame an honest host by copies or alterations, and none can hide in
requests without a decision."""

import dataclasses

import pytest

from bitassay.verification.accounting import Answer, Standing, is_hosts_doing, request_digest, standings
from bitassay.verification.ledger import BUDGET, Item, extended, undecided_evidence
from bitassay.verification.structure import Reason, Request
from bitassay.verification.verdict import Verdict
from bitassay.verification.verify import verify_many


def changed(header, part=None, **update):
    if part is None:
        return header.model_copy(update=update)
    return header.model_copy(update={part: getattr(header, part).model_copy(update=update)})


def verdict(status="PASS", code="as-honest", p_value=0.5):
    return Verdict(status, (Reason(code, code),), "m", 12, p_value=p_value)


SOUND, SPOILT = verdict(), verdict("FAIL", "truncated", None)


def standing(answers, verdicts=None, names="abcdef"):
    verdicts = verdicts or [SOUND] * len(answers)
    return standings(answers, verdicts, list(names)[: len(answers)])


def test_a_request_is_named_by_what_a_host_cannot_vary_alone(trace, sampled):
    header, other = trace.header, sampled.header
    same = [
        changed(header, "model", name="another name"),
        changed(header, "model", config_digest=None),
        changed(header, "numerics", threads=3),
        changed(header, "sampling", seed=9, top_p=0.5),
        changed(header, output_ids=(1, 2)),
        changed(header, layers=(8,)),
    ]
    assert {Answer.of(one).request for one in same} == {Answer.of(header).request}
    different = [
        other,
        changed(header, "model", weights_digest="0" * 64),
        changed(header, "model", tokenizer_digest="0" * 64),
        changed(header, "model", recipe_id="0" * 64),
        changed(header, nonce="x"),
        changed(header, prompt_ids=(1, 2)),
        changed(header, "sampling", max_new_tokens=40),
        changed(other, "sampling", seed=9),
        changed(other, "sampling", top_p=0.5),
        changed(other, "sampling", temperature=0.5),
    ]
    assert len({Answer.of(one).request for one in [header, *different]}) == len(different) + 1
    known = request_digest(header.model, header.nonce, header.prompt_ids, header.sampling)
    assert known == Answer.of(header).request, "a request that never came is named as its answer would be"


def test_copies_under_other_names_count_once(trace):
    renamed = [changed(trace.header, "model", name=f"name {index}") for index in range(12)]
    found = standing([Answer.of(one) for one in renamed], names="abcdefghijkl")
    assert found[0] == Standing()
    for one in found[1:]:
        assert (one.counts, one.scores, one.is_fault) == (False, False, False)
        assert one.note == "copy of a; one request counts once"


def test_an_unsigned_second_answer_is_named_and_not_held_against_the_host(trace):
    other = changed(trace.header, output_ids=(7, *trace.header.output_ids[1:]))
    first, second = standing([Answer.of(trace.header), Answer.of(other)])
    assert first == Standing()
    assert (second.counts, second.scores, second.is_fault) == (False, False, False)
    assert second.note.startswith("equivocation: another answer than a")
    half_signed = standing([Answer.of(trace.header), Answer.of(other, b"c" * 32)])[1]
    assert not half_signed.is_fault, "only two signatures convict"


def test_a_second_signed_commitment_is_the_hosts_own_fault(trace):
    signed = [Answer.of(trace.header, bytes([index]) * 32) for index in range(2)]
    assert standing(signed)[1].is_fault
    assert standing([signed[0], signed[0]])[1].note.startswith("copy of a")


def test_a_spoilt_copy_takes_no_place_and_counts_alone_only(trace):
    good, bad = Answer.of(trace.header), Answer.of(changed(trace.header, layers=(8,)))
    spoilt, sound = standing([bad, good], [SPOILT, SOUND])
    assert sound == Standing()
    assert not spoilt.counts
    assert standing([bad, None], [SPOILT, SPOILT]) == [Standing(), Standing()]


def test_of_a_repeated_prompt_statistics_use_the_first_scored_answer(trace):
    answers = [Answer.of(changed(trace.header, nonce=f"n{index}")) for index in range(3)]
    undecided = verdict("INCONCLUSIVE", "no-profile", None)
    found = standing(answers, [undecided, SOUND, SOUND])
    assert [one.scores for one in found] == [True, True, False]
    assert all(one.counts for one in found)
    assert found[2].note == "repeats the prompt of b; statistics use the first answer"


@pytest.fixture
def doing(trace, model, profile):
    """Whether a trace with another header, judged by the fixture's profile, is undecided by the host."""

    def judge(header, profile=profile, here=None):
        (judged,) = verify_many([dataclasses.replace(trace, header=header)], model, profile=profile)
        assert judged.status == "INCONCLUSIVE"
        return is_hosts_doing(judged, header, profile, here or profile.verifier)

    return judge


def test_other_numerics_than_the_profiles_are_the_hosts_doing(trace, profile, doing):
    assert doing(changed(trace.header, "numerics", threads=3))
    another = profile.verifier.model_copy(update={"threads": 3})
    assert not doing(changed(trace.header, "numerics", threads=5), here=another), "the verifier's machine"
    expired = profile.model_copy(update={"expires": profile.created})
    assert not doing(trace.header, expired)
    assert not doing(changed(trace.header, "numerics", threads=3), expired)


def test_reasons_one_by_one(trace, profile):
    header, low = trace.header, profile.generated_positions[0]

    def by(code, header=header):
        return is_hosts_doing(verdict("INCONCLUSIVE", code, None), header, profile, profile.verifier)

    assert by("unlike-calibration")
    assert by("no-configuration")
    for code in ("profile-expired", "unknown-signer", "beyond-profile", "profile-too-small", "no-profile"):
        assert not by(code)
    assert by("no-profile", changed(header, "numerics", threads=3))
    short = changed(header, output_ids=header.output_ids[:low])
    assert by("too-few-tokens", short)
    assert not by("too-few-tokens"), "an opening that shows too few of enough positions"
    assert not by("too-few-tokens", changed(short, "sampling", max_new_tokens=low)), "nobody asked for more"
    assert not is_hosts_doing(SOUND, header, profile, profile.verifier)


@pytest.mark.parametrize("code", ["profile-other-numerics", "too-few-tokens", "unanswered"])
def test_a_host_that_is_never_decided_upon_is_caught_within_60_requests(code):
    for every, within in ((1, 6), (2, 25), (3, 60)):
        items = [
            Item(request=f"{i:064x}", prompt=f"{i:064x}", undecided=code)
            if i % every == 0
            else Item(request=f"{i:064x}", prompt=f"{i:064x}", output="0" * 64, score=0.0, limit=11)
            for i in range(60)
        ]
        evidence = undecided_evidence(extended([], items), BUDGET, 0.01 / 8)
        assert evidence.alarm_at <= within


def test_requests_and_verdicts_of_real_traces(honest, model, profile):
    """Scored as before; each is an answer of its own."""
    verdicts = verify_many(honest[:6], model, profile=profile, requests=[Request()] * 6)
    found = standings([Answer.of(one.header) for one in honest[:6]], verdicts, list("abcdef"))
    assert found == [Standing()] * 6
