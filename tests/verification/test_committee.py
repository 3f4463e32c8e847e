"""Verifiers that are lazy, copy, pass all or fail all are caught; honest ones are not accused."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitassay.errors import BitassayError
from bitassay.verification.committee.rounds import (
    assign,
    committee_status,
    honest_canaries_needed,
    judge,
    majority_share,
    parse_report,
    report,
    report_commitment,
)

NAMES = ("ada", "ben", "cyd", "dov")
TRUTH = {f"item-{index}": "FAIL" if index % 5 == 0 else "PASS" for index in range(20)}
PLANTS = {
    name: {f"{name}-f{i}": "FAIL" for i in range(4)} | {f"{name}-p{i}": "PASS" for i in range(4)}
    for name in NAMES
}
ROUND = "round 7"
ALL = TRUTH | {item: answer for own in PLANTS.values() for item, answer in own.items()}


@pytest.fixture(scope="module")
def assignments():
    return {one.verifier: one for one in assign(list(TRUTH), PLANTS, each=3, seed=b"secret")}


def honest(assignment):
    return {item: ALL[item] for item in assignment.items}


def outcome(assignments, **dishonest):
    """The codes against each verifier, where those named answer by their own function of the assignments."""
    reports = {
        name: report(name, dishonest[name](assignments) if name in dishonest else honest(assignments[name]))
        for name in NAMES
    }
    commitments = {name: report_commitment(ROUND, one) for name, one in reports.items()}
    return codes(judge(ROUND, list(assignments.values()), commitments, reports))


def codes(judged):
    return {name: [reason.code for reason in reasons] for name, reasons in judged.items()}


def test_honest_verifiers_are_not_accused_and_decide(assignments):
    assert outcome(assignments) == {name: [] for name in NAMES}
    reports = {name: report(name, honest(one)) for name, one in assignments.items()}
    judged = dict.fromkeys(NAMES, ())
    assert {item: committee_status(item, reports, judged) for item in TRUTH} == TRUTH


def test_one_that_passes_all_is_caught(assignments):
    assert outcome(assignments, ben=lambda all: dict.fromkeys(all["ben"].items, "PASS")) == {
        "ada": [], "ben": ["missed-planted-failure"], "cyd": [], "dov": []
    }  # fmt: skip


def test_one_that_fails_all_is_caught(assignments):
    found = outcome(assignments, ben=lambda all: dict.fromkeys(all["ben"].items, "FAIL"))
    assert found == {"ada": [], "ben": ["refused-planted-honest"], "cyd": [], "dov": []}


def test_one_that_never_decides_is_caught(assignments):
    found = outcome(assignments, ben=lambda all: dict.fromkeys(all["ben"].items, "INCONCLUSIVE"))
    assert found["ben"] == ["missed-planted-failure", "refused-planted-honest"]


def test_one_that_copies_a_friends_answers_is_caught(assignments):
    """Ada shows Ben her answers before he commits; he guesses the usual answer where he has none of hers."""

    def copied(all):
        return {item: honest(all["ada"]).get(item, "PASS") for item in all["ben"].items}

    assert outcome(assignments, ben=copied)["ben"] == ["missed-planted-failure"]
    assert outcome(assignments, ben=lambda all: honest(all["ada"]))["ben"] == ["wrong-items"]


def test_a_copied_commitment_cannot_be_revealed(assignments):
    ada, ben = report("ada", honest(assignments["ada"])), report("ben", honest(assignments["ben"]))
    commitments = {"ada": report_commitment(ROUND, ada), "ben": report_commitment(ROUND, ada)}
    given = [assignments["ada"], assignments["ben"]]
    assert codes(judge(ROUND, given, commitments, {"ada": ada, "ben": ben}))["ben"] == ["other-report"]
    assert codes(judge(ROUND, given, commitments, {"ada": ada, "ben": ada})) == {
        "ada": [],
        "ben": ["other-report"],
    }


def test_answers_cannot_be_changed_after_the_others_revealed(assignments):
    one = assignments["ada"]
    before, commitment = report("ada", honest(one)), {}
    commitment["ada"] = report_commitment(ROUND, before)
    item = next(item for item in one.items if item in TRUTH)
    for after in (
        before.model_copy(update={"answers": before.answers | {item: "INCONCLUSIVE"}}),
        before.model_copy(update={"salt": "0" * 64}),
    ):
        assert codes(judge(ROUND, [one], commitment, {"ada": after})) == {"ada": ["other-report"]}
    assert codes(judge("round 8", [one], commitment, {"ada": before})) == {"ada": ["other-report"]}
    assert codes(judge(ROUND, [one], commitment, {})) == {"ada": ["withheld-report"]}
    assert codes(judge(ROUND, [one], {}, {"ada": before})) == {"ada": ["no-commitment"]}


def test_a_lazy_one_is_caught_as_often_as_the_formula_says(assignments):
    one, caught, skipped = assignments["cyd"], 0, 0.1
    failures = sum(answer == "FAIL" for answer in one.planted.values())
    assert failures == 12  # its own four, and of the others' twelve two thirds
    for trial in range(300):
        choose = random.Random(trial)
        answers = {item: "PASS" if choose.random() < skipped else ALL[item] for item in one.items}
        lazy = report("cyd", answers, bytes(32))
        found = judge(ROUND, [one], {"cyd": report_commitment(ROUND, lazy)}, {"cyd": lazy})
        caught += bool(found["cyd"])
    assert caught / 300 == pytest.approx(1 - (1 - skipped) ** failures, abs=0.08)


def test_an_unlucky_honest_verifier_is_not_accused(assignments):
    one = assignments["dov"]
    assert honest_canaries_needed(0.05) == 3 <= 4
    for unlucky in (1, 2):
        answers = honest(one) | {f"dov-p{i}": "FAIL" for i in range(unlucky)}
        mine = report("dov", answers)
        assert judge(ROUND, [one], {"dov": report_commitment(ROUND, mine)}, {"dov": mine}) == {"dov": ()}


def test_caught_verifiers_have_no_vote(assignments):
    reports = {name: report(name, honest(one)) for name, one in assignments.items()}
    item = next(
        item for item in TRUTH if TRUTH[item] == "PASS" and all(item in reports[n].answers for n in NAMES[:3])
    )
    for name in ("ada", "ben"):
        reports[name] = report(name, dict.fromkeys(assignments[name].items, "FAIL"))
    commitments = {name: report_commitment(ROUND, one) for name, one in reports.items()}
    judged = judge(ROUND, list(assignments.values()), commitments, reports)
    assert committee_status(item, reports, dict.fromkeys(NAMES, ())) == "FAIL"
    assert committee_status(item, reports, judged, quorum=1) == "PASS"
    assert committee_status(item, reports, judged, quorum=2) == "INCONCLUSIVE"


def test_a_tie_is_no_majority(assignments):
    reports = {"ada": report("ada", {"x": "PASS"}), "ben": report("ben", {"x": "FAIL"})}
    assert committee_status("x", reports, {"ada": (), "ben": ()}) == "INCONCLUSIVE"


@settings(deadline=None, max_examples=30)
@given(seed=st.binary(max_size=8), each=st.integers(1, 4))
def test_every_item_goes_to_so_many_and_plants_look_like_the_rest(seed, each):
    given = assign(list(TRUTH), PLANTS, each=each, seed=seed)
    counts = Counter(item for one in given for item in one.items)
    assert {counts[item] for item in ALL} == {each}
    for one in given:
        assert (
            {item for item in one.items if item not in TRUTH} == set(one.planted) >= set(PLANTS[one.verifier])
        )
        assert all(ALL[item] == answer for item, answer in one.planted.items())
        assert len(set(one.items)) == len(one.items)
    assert given == assign(list(TRUTH), PLANTS, each=each, seed=seed)


# --- coalitions ---


def dealt(n, each, seed, count=30, plants=4):
    """The assignments, and which items are real, of so many verifiers, items and failing plants each."""
    names = [f"v{index}" for index in range(n)]
    items = [f"item {index}" for index in range(count)]
    canaries = {
        name: {f"{name} {kind} {index}": kind for kind in ("FAIL", "PASS") for index in range(plants)}
        for name in names
    }
    return assign(items, canaries, each=each, seed=seed), set(items)


def lists(assignments, coalition):
    """How many of a coalition have each of its items."""
    return Counter(item for one in assignments[:coalition] for item in one.items)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_two_that_compare_their_lists_cannot_pass_unseen_what_they_share(n):
    """Each looks at what it alone has, and both pass what they share."""
    for trial in range(20):
        assignments, items = dealt(n, 2, bytes([trial]))
        shared = {item for item, count in lists(assignments, 2).items() if count == 2}
        assert shared & items
        reports = {}
        for one in assignments:
            truth = {item: one.planted.get(item, "FAIL") for item in one.items}
            lazy = dict.fromkeys(shared & set(one.items), "PASS")
            reports[one.verifier] = report(one.verifier, truth | lazy if one in assignments[:2] else truth)
        commitments = {name: report_commitment(ROUND, one) for name, one in reports.items()}
        found = codes(judge(ROUND, assignments, commitments, reports))
        assert found["v0"] == found["v1"] == ["missed-planted-failure"]


SIZES = [(3, 2, 2), (5, 2, 2), (5, 3, 2), (5, 3, 3), (8, 3, 3)]


@pytest.mark.parametrize(("n", "each", "coalition"), SIZES)
def test_who_else_has_an_item_says_nothing_about_it(n, each, coalition):
    """Over many rounds, of real items and of plants alike, the formula's share is in a coalition's hands."""
    held = {True: [], False: []}
    for trial in range(150):
        assignments, items = dealt(n, each, trial.to_bytes(4, "little"))
        counts = lists(assignments, coalition)
        for item in {item for one in assignments for item in one.items}:
            held[item in items].append(2 * counts[item] > each)
    expected = majority_share(coalition, each, n)
    for found in held.values():
        sd = (expected * (1 - expected) / len(found)) ** 0.5
        assert sum(found) / len(found) == pytest.approx(expected, abs=4.5 * sd)


@pytest.mark.parametrize(("n", "each", "coalition"), SIZES)
def test_a_coalition_that_skips_a_share_is_caught_as_one_verifier_is(n, each, coalition):
    """It passes unseen a share s of what a majority of it has: 1 - (1 - s)^f are caught, f its failing plants
    there."""
    share, caught, expected, trials = 0.2, 0, 0.0, 200
    for trial in range(trials):
        choose = random.Random(trial)
        assignments, _ = dealt(n, each, trial.to_bytes(4, "little"))
        counts = lists(assignments, coalition)
        mine = sorted(item for item, count in counts.items() if 2 * count > each)
        skipped = {item for item in mine if choose.random() < share}
        planted = {item: answer for one in assignments[:coalition] for item, answer in one.planted.items()}
        failures = sum(planted.get(item) == "FAIL" for item in mine)
        expected += (1 - (1 - share) ** failures) / trials
        reports = {}
        for one in assignments[:coalition]:
            truth = {item: one.planted.get(item, "FAIL") for item in one.items}
            lazy = dict.fromkeys(skipped & set(one.items), "PASS")
            reports[one.verifier] = report(one.verifier, truth | lazy, bytes(32))
        commitments = {name: report_commitment(ROUND, one) for name, one in reports.items()}
        found = judge(ROUND, assignments[:coalition], commitments, reports)
        caught += any(found.values()) / trials
    assert caught == pytest.approx(expected, abs=4 * 0.5 / trials**0.5)
    assert expected > 0.3


def test_each_lacks_failing_plants_that_another_has(assignments):
    """So copied answers do not help, as long as not everybody has everything."""
    for one in assignments.values():
        for other in assignments.values():
            if one is not other:
                own = {item for item, answer in one.planted.items() if answer == "FAIL"}
                assert own - set(other.items)


def test_majority_share():
    assert majority_share(2, 2, 2) == 1
    assert majority_share(2, 2, 3) == pytest.approx(1 / 3)
    assert majority_share(1, 2, 3) == 0
    assert majority_share(2, 3, 5) == pytest.approx(3 / 10)
    assert majority_share(1, 1, 4) == pytest.approx(1 / 4)


def test_plants_are_shuffled_among_the_rest(assignments):
    for one in assignments.values():
        places = [index for index, item in enumerate(one.items) if item in one.planted]
        count, n = len(one.planted), len(one.items)
        assert places not in (list(range(count)), list(range(n - count, n)))


def test_impossible_assignments_are_refused():
    for items, each in (["x"], 0), (["x"], 5), (["x", "x"], 1), (["ada-f0"], 1):
        with pytest.raises(BitassayError):
            assign(items, PLANTS, each=each, seed=b"")


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        {"verifier": "a", "salt": "0" * 64},
        {"verifier": "a", "salt": "0", "answers": {}},
        {"verifier": "", "salt": "0" * 64, "answers": {}},
        {"verifier": "a", "salt": "0" * 64, "answers": {"x": "MAYBE"}},
        {"verifier": "a", "salt": "0" * 64, "answers": {1: "PASS"}},
        {"verifier": "a", "salt": "0" * 64, "answers": ["PASS"]},
        {"verifier": "a", "salt": "0" * 64, "answers": {"\ud800": "PASS"}},
        {"verifier": "a", "salt": "0" * 64, "answers": {}, "more": 1},
    ],
)
def test_malformed_reports_are_bad_usage(content):
    with pytest.raises(BitassayError, match="not a report"):
        parse_report(content)
