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
from bitassay.verification.ledger import Scored, extended, scored, update_ledger
from bitassay.verification.sequential import SequentialEvidence, log_wealth, wealth_by_limit
from bitassay.verification.structure import Request
from bitassay.verification.verdict import verify_many

HOST = "ab" * 32


def requests(count, score=0.0, limit=11, first=0):
    return [Scored(f"{index:064x}", score, limit) for index in range(first, first + count)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "host.ledger"


def test_calls_add_up_to_one_sequence(path, profile):
    rng = np.random.default_rng(0)
    new = [
        one._replace(score=float(score)) for one, score in zip(requests(9), rng.normal(size=9), strict=True)
    ]
    for part in (new[:4], new[4:5], [], new[5:]):
        lines = update_ledger(path, part, profile)
    assert [line.trace for line in lines] == [one.trace for one in new]
    together = extended([], new, profile)
    assert [line.log_wealth for line in lines] == pytest.approx([line.log_wealth for line in together])
    honest = np.array(profile.honest_scores(11))
    expected = log_wealth(np.array([one.score for one in new]), honest) - math.log(2)
    assert [line.log_wealth for line in lines] == pytest.approx(expected.tolist())
    assert len(path.read_text().splitlines()) == 10


def test_no_trace_counts_twice(path, profile):
    first, second = requests(2, score=9.0)
    update_ledger(path, [first, first], profile)
    lines = update_ledger(path, [second, first._replace(score=1.0), second], profile)
    assert [(line.trace, line.score) for line in lines] == [(first.trace, 9), (second.trace, 9)]


def test_each_limit_is_a_game_of_its_own(profile):
    low, high = profile.generated_positions
    new = [*requests(2, 9.0, high), *requests(1, 9.0, low, first=2), *requests(1, 9.0, high, first=3)]
    wealth = [line.log_wealth for line in extended([], new, profile)]
    games = {
        limit: log_wealth(np.full(3, 9.0), np.array(profile.honest_scores(limit))) for limit in (low, high)
    }
    expected = np.append(games[high][:2], [games[low][0], games[high][2]]) - np.log([2, 2, 6, 2])
    assert wealth == pytest.approx(expected.tolist())


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


def test_verdicts_that_count(honest, model, profile):
    """A structural failure proves its case alone, and may be an honest trace in other hands."""
    asked = [Request(), Request(nonce="other"), *[Request()] * 4]
    verdicts = verify_many(honest[:6], model, profile=profile, requests=asked)
    new = scored(verdicts, profile)
    counted = [one for one in verdicts if one.p_value is not None and not one.structural]
    assert verdicts[1].structural
    assert [(one.trace, one.score) for one in new] == [(one.trace, one.score.value) for one in counted]
    assert verdicts[1].trace not in {one.trace for one in new}
    assert len({one.trace for one in verdicts if one.trace}) == sum(one.trace is not None for one in verdicts)
    assert scored(verdicts, profile.model_copy(update={"alpha": 0.2})) == [], "scored by another profile"


def test_a_torn_line_is_dropped_and_nothing_before_it_is_lost(path, profile):
    update_ledger(path, requests(3), profile)
    whole = path.read_bytes()
    for kept in range(len(whole.split(b"\n")[0]), len(whole)):
        path.write_bytes(whole[:kept])
        before = whole[:kept].count(b"\n")
        lines = update_ledger(path, requests(1, first=99), profile)
        assert len(lines) == max(before, 1)
        assert update_ledger(path, [], profile) == lines
    path.write_bytes(whole[:10])
    assert len(update_ledger(path, requests(2), profile)) == 2, "a crash in the very first line"


def test_what_cannot_be_written_is_named_and_leaves_whole_lines(path, profile, monkeypatch):
    update_ledger(path, requests(2), profile)
    write = os.write

    def full(handle, data):
        write(handle, data[:20])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ledger.os, "write", full)
        with pytest.raises(BitassayError, match=r"host\.ledger: no space left"):
            update_ledger(path, requests(3), profile)
    assert [line.trace for line in update_ledger(path, requests(4), profile)] == [
        one.trace for one in requests(4)
    ]


def test_what_a_call_appends_is_on_the_disk_when_it_returns(path, profile, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(
        ledger.os, "fsync", lambda handle: (sync(handle), synced.append(os.fstat(handle).st_size))
    )
    for count in (1, 2):
        update_ledger(path, requests(count), profile)
        assert synced[-1:] == [path.stat().st_size]
    assert len(synced) == 2


def test_one_call_waits_for_another(path, profile):
    with ledger._locked(path):
        second = threading.Thread(target=update_ledger, args=(path, requests(1), profile))
        second.start()
        second.join(0.3)
        assert second.is_alive()
        assert path.read_bytes() == b""
    second.join(30)
    assert len(update_ledger(path, [], profile)) == 1


def _appended(path, profile, first):
    for index in range(10):
        update_ledger(path, requests(1, first=first + index), profile)


def test_two_processes_lose_nothing(path, profile):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_appended, args=(path, profile, first)) for first in (0, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    lines = update_ledger(path, [], profile)
    assert {line.trace for line in lines} == {one.trace for one in requests(15)}
    alone = extended([], [Scored(line.trace, line.score, line.limit) for line in lines], profile)
    assert [line.log_wealth for line in lines] == pytest.approx([line.log_wealth for line in alone])


def refused(path, profile, match, host=None):
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(BitassayError, match=match) as error:
        update_ledger(path, requests(1, first=50), profile, host)
    assert str(path) in str(error.value)
    assert error.value.remedy
    assert before is None or path.read_bytes() == before, "a refused file is left as it is"


def test_a_ledger_belongs_to_one_profile_and_one_host(path, profile):
    update_ledger(path, requests(1), profile, HOST)
    refused(path, profile.model_copy(update={"alpha": 0.2}), "another profile", HOST)
    refused(path, profile, "another host")
    refused(path, profile, "another host", "cd" * 32)
    assert len(update_ledger(path, requests(2), profile, HOST)) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"score": math.nan},
        {"score": 1e999},
        {"log_wealth": math.inf},
        {"limit": 0},
        {"limit": 10**9},
        {"trace": "0"},
        {"time": "soon"},
        {"note": "unknown"},
    ],
)
def test_a_damaged_line_is_refused_and_named(path, profile, change):
    update_ledger(path, requests(3), profile)
    texts = path.read_text().splitlines()
    texts[2] = json.dumps(json.loads(texts[2]) | change)
    path.write_text("\n".join(texts) + "\n")
    refused(path, profile, "line 3: not a ledger: " + next(iter(change)))


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
    update_ledger(path, requests(2), profile)
    twice = path.read_text() + path.read_text().splitlines(keepends=True)[-1]
    path.write_text(twice)
    refused(path, profile, "counts a trace twice")
    monkeypatch.setattr(ledger, "LIMIT_BYTES", 500)
    refused(path, profile, "more than the 500")
    path.unlink()
    with pytest.raises(BitassayError, match="would be longer"):
        update_ledger(path, requests(5), profile)
    assert path.read_bytes() == b""
    with pytest.raises(BitassayError, match=path.parent.name):
        update_ledger(path.parent, [], profile)
    pipe = path.parent / "host.pipe"
    os.mkfifo(pipe)
    refused(pipe, profile, "not a regular file")
