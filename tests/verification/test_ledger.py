"""What a ledger counts, what it refuses, and that neither a crash nor a second process harms it."""

import json
import math
import multiprocessing
import os
import threading

import numpy as np
import pytest

from bitassay.errors import BitassayError
from bitassay.verification import ledger
from bitassay.verification.ledger import (
    BUDGET,
    Binding,
    Item,
    extended,
    read_ledger,
    score_evidence,
    undecided_evidence,
    update_ledger,
)
from bitassay.verification.sequential import (
    SequentialEvidence,
    anytime_p_value,
    log_wealth,
    looks,
    rate_wealth,
    wealth_by_limit,
)

HOST = "ab" * 32


def name(index):
    return f"{index:064x}"


def requests(count, score=0.0, limit=11, first=0):
    return [
        Item(request=name(index), prompt=name(index), output=name(0), score=score, limit=limit)
        for index in range(first, first + count)
    ]


def changed(item, **update):
    return Item(**item.model_dump() | update)


def undecided(index, prompt=None, code="too-few-tokens"):
    return Item(request=name(index), prompt=name(index if prompt is None else prompt), undecided=code)


def update(path, new, profile, host=None, budget=BUDGET):
    return update_ledger(path, new, Binding(profile=profile.digest, host=host, budget=budget))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "host.ledger"


def test_calls_add_up_to_one_sequence(path, profile):
    rng = np.random.default_rng(0)
    new = [
        changed(one, score=float(score)) for one, score in zip(requests(9), rng.normal(size=9), strict=True)
    ]
    for part in (new[:4], new[4:5], [], new[5:]):
        lines = update(path, part, profile)
    assert [line.request for line in lines] == [one.request for one in new]
    bound, read = read_ledger(path, profile)
    assert (bound, read) == (Binding(profile=profile.digest), lines)
    honest = np.array(profile.honest_scores(11))
    expected = log_wealth(np.array([one.score for one in new]), honest) - math.log(2)
    found = score_evidence(lines, profile.honest_scores, 0.05)
    assert (found.n_requests, found.log_wealth) == (9, pytest.approx(expected[-1]))
    assert found.p_value == pytest.approx(anytime_p_value(expected))
    assert len(path.read_text().splitlines()) == 10


def test_no_request_counts_twice(path, profile):
    first, second = requests(2, score=9.0)
    update(path, [first, first], profile)
    again = [second, changed(first, score=1.0, output=name(7)), second]
    lines = update(path, again, profile)
    assert [(line.request, line.score) for line in lines] == [(first.request, 9), (second.request, 9)]
    missing = Item(undecided="unanswered")
    assert len(update(path, [missing, missing, undecided(0)], profile)) == 4, "unknown ones each count"


def test_a_prompt_counts_once_in_statistics(profile):
    """22 % of honest hosts were accused where one prompt came again and again under other nonces."""
    once = requests(1, 9.0)
    many = [changed(once[0], request=name(index)) for index in range(12)]
    assert score_evidence(extended([], many), profile.honest_scores, 0.05) == score_evidence(
        extended([], once), profile.honest_scores, 0.05
    )
    lines = extended([], [undecided(0, prompt=5), *[undecided(i, prompt=5) for i in range(1, 12)]])
    assert undecided_evidence(lines, BUDGET, 0.05).n_requests == 1
    late = extended([], [undecided(0, prompt=5), changed(once[0], request=name(1), prompt=name(5))])
    assert score_evidence(late, profile.honest_scores, 0.05).n_requests == 1, "the first scored answer"
    assert undecided_evidence(late, BUDGET, 0.05).n_requests == 1


def test_undecided_requests_are_no_scores_and_have_their_own_alarm(path, profile):
    items = [*requests(3), *[undecided(index) for index in range(3, 9)]]
    lines = update(path, items, profile)
    assert score_evidence(lines, profile.honest_scores, 0.01).n_requests == 3
    found = undecided_evidence(lines, BUDGET, 0.01)
    wealth = rate_wealth(np.array([False] * 3 + [True] * 6), BUDGET)
    assert found == SequentialEvidence.of(wealth, 0.01)
    assert found.alarm_at
    assert undecided_evidence(lines, 0.8, 0.01).alarm_at is None
    assert score_evidence([], profile.honest_scores, 0.01) is None
    assert undecided_evidence([], BUDGET, 0.01) is None


def test_each_limit_is_a_game_of_its_own(profile):
    low, high = profile.generated_positions
    limits = [high, high, low, high]
    honest = {limit: np.array(profile.honest_scores(limit)) for limit in (low, high)}
    games = {limit: log_wealth(np.full(3, 9.0), honest[limit]) for limit in (low, high)}
    expected = np.append(games[high][:2], [games[low][0], games[high][2]]) - np.log([2, 2, 6, 2])
    found = wealth_by_limit(np.full(4, 9.0), limits, honest.__getitem__)
    assert found.tolist() == pytest.approx(expected.tolist())


def test_a_long_ledger_is_looked_at_less_often():
    rng = np.random.default_rng(0)
    scores, honest = rng.normal(size=263), rng.normal(size=5)
    found = wealth_by_limit(scores, [9] * 263, lambda limit: honest)
    assert looks(263).tolist() == [*range(1, 257), 258, 260, 262]
    exact = log_wealth(scores, honest) - math.log(2)
    seen = [index - 1 for index in looks(263)]
    assert found[seen] == pytest.approx(exact[seen])
    assert found[256] == found[255]
    assert found[262] == found[261]
    assert np.diff(looks(10**4) / 128).max() <= 10**4 / 128 / 128


def test_an_honest_host_of_many_limits_is_rarely_ever_accused():
    """Scores at different limits are of different kinds; the games share the luck of one calibration."""
    rng, alpha, hosts, n, k, limits = np.random.default_rng(3), 0.2, 150, 6, 40, 2
    accused = 0
    for _ in range(hosts):
        base = rng.exponential(size=n)
        honest = {limit: base * 10.0**limit for limit in range(limits)}
        asked = rng.integers(limits, size=k).tolist()
        scores = rng.exponential(size=k) * 10.0 ** np.array(asked)
        wealth = wealth_by_limit(scores, asked, honest.__getitem__)
        accused += SequentialEvidence.of(wealth, alpha).alarm_at is not None
    assert 0 < accused / hosts <= alpha


def test_a_torn_line_is_dropped_and_nothing_before_it_is_lost(path, profile, monkeypatch):
    monkeypatch.setattr(ledger.os, "fsync", lambda handle: None)  # some thousand times
    update(path, requests(3), profile)
    whole = path.read_bytes()
    for kept in range(len(whole.split(b"\n")[0]), len(whole)):
        path.write_bytes(whole[:kept])
        before = whole[:kept].count(b"\n")
        lines = update(path, requests(1, first=99), profile)
        assert len(lines) == max(before, 1)
        assert update(path, [], profile) == lines
    path.write_bytes(whole[:10])
    assert len(update(path, requests(2), profile)) == 2, "a crash in the very first line"


def test_what_cannot_be_written_is_named_and_leaves_whole_lines(path, profile, monkeypatch):
    update(path, requests(2), profile)
    write = os.write

    def full(handle, data):
        write(handle, data[:20])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ledger.os, "write", full)
        with pytest.raises(BitassayError, match=r"host\.ledger: no space left"):
            update(path, requests(3), profile)
    assert [line.request for line in update(path, requests(4), profile)] == [
        one.request for one in requests(4)
    ]


def test_what_a_call_appends_is_on_the_disk_when_it_returns(path, profile, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(
        ledger.os, "fsync", lambda handle: (sync(handle), synced.append(os.fstat(handle).st_size))
    )
    for count in (1, 2):
        update(path, requests(count), profile)
        assert synced[-1:] == [path.stat().st_size]
    assert len(synced) == 2


def test_one_call_waits_for_another(path, profile):
    with ledger._locked(path):
        second = threading.Thread(target=update, args=(path, requests(1), profile))
        second.start()
        second.join(0.3)
        assert second.is_alive()
        assert path.read_bytes() == b""
    second.join(30)
    assert len(update(path, [], profile)) == 1


def _appended(path, profile, first):
    for index in range(10):
        update(path, requests(1, first=first + index), profile)


def test_two_processes_lose_nothing(path, profile):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_appended, args=(path, profile, first)) for first in (0, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    lines = update(path, [], profile)
    assert {line.request for line in lines} == {one.request for one in requests(15)}


def refused(path, profile, match, host=None, budget=BUDGET):
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(BitassayError, match=match) as error:
        update(path, requests(1, first=50), profile, host, budget)
    assert str(path) in str(error.value)
    assert error.value.remedy
    assert before is None or path.read_bytes() == before, "a refused file is left as it is"


def test_a_ledger_belongs_to_one_profile_one_host_and_one_budget(path, profile):
    update(path, requests(1), profile, HOST)
    refused(path, profile, "a budget of 0.1 for undecided requests, not 0.3", HOST, 0.3)
    with pytest.raises(BitassayError, match="another host"):
        read_ledger(path, None)
    assert read_ledger(path.parent / "none", profile) == (None, [])
    refused(path, profile.model_copy(update={"alpha": 0.2}), "another profile", HOST)
    refused(path, profile, "another host")
    refused(path, profile, "another host", "cd" * 32)
    assert len(update(path, requests(2), profile, HOST)) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"score": math.nan},
        {"score": 1e999},
        {"log_wealth": 0.0},
        {"undecided": "too-few-tokens"},
        {"undecided": "\u001b"},
        {"output": None},
        {"limit": 0},
        {"limit": 10**9},
        {"request": "0"},
        {"time": "soon"},
        {"note": "unknown"},
    ],
)
def test_a_damaged_line_is_refused_and_named(path, profile, change):
    update(path, requests(3), profile)
    texts = path.read_text().splitlines()
    texts[2] = json.dumps(json.loads(texts[2]) | change)
    path.write_text("\n".join(texts) + "\n")
    where = (
        "content" if change.keys() & {"output"} or "too-few-tokens" in change.values() else next(iter(change))
    )
    where = "not JSON" if "score" in change else where  # NaN and Infinity are Python's, not JSON's
    refused(path, profile, "line 3: not a ledger: " + where)


def test_a_ledger_of_version_1_is_refused_by_name(path, profile):
    path.write_text(json.dumps({"schema_version": 1, "profile": profile.digest, "host": None}) + "\n")
    refused(path, profile, "a ledger of version 1, which does not say what requests")


def test_capital_is_not_believed_from_the_file(path, profile):
    """Nothing that a ledger says can raise or hide an alarm but the requests themselves."""
    update(path, requests(8, score=9.0), profile)
    assert score_evidence(read_ledger(path, profile)[1], profile.honest_scores, 0.05).alarm_at
    texts = [json.loads(text) for text in path.read_text().splitlines()]
    assert not any("wealth" in key for text in texts for key in text)


def test_what_is_no_ledger_is_refused(path, profile, monkeypatch):
    for content in (
        b"\n",
        b"[]\n",
        b"{}\n",
        b"\xff\xfe\n",
        b"[" * 10**5 + b"\n",
        b"my notes",
        b"my\nnotes\n",
    ):
        path.write_bytes(content)
        refused(path, profile, "not a ledger")
    path.unlink()
    update(path, requests(2), profile)
    twice = path.read_text() + path.read_text().splitlines(keepends=True)[-1]
    path.write_text(twice)
    refused(path, profile, "counts a request twice")
    monkeypatch.setattr(ledger, "LIMIT_BYTES", 500)
    refused(path, profile, "more than the 500")
    path.unlink()
    with pytest.raises(BitassayError, match="would be longer"):
        update(path, requests(5), profile)
    assert path.read_bytes() == b""
    monkeypatch.undo()
    monkeypatch.setattr(ledger, "LIMIT_LINES", 4)
    update(path, requests(4), profile)
    refused(path, profile, "longer than the 4 requests")
    monkeypatch.setattr(ledger, "LIMIT_LINES", 3)
    refused(path, profile, "more than the 3 requests")
    monkeypatch.undo()
    with pytest.raises(BitassayError, match=path.parent.name):
        update(path.parent, [], profile)
    pipe = path.parent / "host.pipe"
    os.mkfifo(pipe)
    refused(pipe, profile, "not a regular file")
