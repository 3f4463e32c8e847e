"""An endpoint over time: watched with one ledger, and compared with itself."""

import json

import numpy as np
import pytest
import torch

from audit.conftest import serving
from audit.test_audit import SMALL, at, rounded
from bitassay.audit.change import change, change_p_value, ranks
from bitassay.audit.client import AnswerError, Endpoint
from bitassay.audit.judge import Reference
from bitassay.audit.run import audit
from bitassay.audit.session import Options
from bitassay.audit.watch import watch
from bitassay.audit.wire import Vocabulary, words_of
from bitassay.errors import BitassayError
from bitassay.models.identity import identity
from bitassay.record.result import read_run
from bitassay.report.pages import write_report
from bitassay.testing.tiny import stories260k

FEW = SMALL | {"requests": 2}
HOUR = 3600.0


@pytest.fixture(scope="module")
def reference(model):
    return Reference(stories260k("float32"), model)


@pytest.fixture(scope="module")
def swapped(model, tmp_path_factory):
    with serving(rounded(model, 4), tmp_path_factory.mktemp("swapped"), claim=identity(model)) as (url, _):
        yield url


@pytest.fixture(scope="module")
def watched(served, reference, tmp_path_factory):
    """Two audits of an honest server: what was told, how long was slept, the run and its folder."""
    told, slept = [], []
    run, folder = watch(
        at(served[0]),
        reference,
        Options(out=tmp_path_factory.mktemp("watch") / "w", **FEW),
        HOUR,
        times=2,
        honest=[at(served[0])],
        tell=told.append,
        clock=lambda: 4e9 if slept else 0.0,
        sleep=slept.append,
    )
    return told, slept, run, folder


def test_each_audit_is_kept_and_one_ledger_decides(watched, served, reference):
    told, slept, run, folder = watched
    assert [row["status"] for row in run["rows"]] == ["PASS", "PASS"]
    assert [row["requests"] for row in run["rows"]] == [2, 4]
    assert len(told) == 2
    assert slept, "the second audit waits for its time"
    first, second = (read_run(folder / f"audit-0000{n}") for n in (1, 2))
    assert first["decision"]["tests"].keys() == {"sequence"}
    assert first["decision"]["tests"]["sequence"]["level"] == FEW["alpha"]
    assert second["calibration"]["digest"] == first["calibration"]["digest"]
    assert len((folder / "ledger").read_text().splitlines()) == 1 + 4
    texts = [(folder / f"audit-0000{n}" / "parts" / "texts-audited.json").read_text() for n in (1, 2)]
    assert texts[0] != texts[1]
    write_report(run, folder / "report.html")
    assert "every 3600.0 s" in (folder / "report.html").read_text()


def test_the_same_watch_goes_on_and_ends_at_an_alarm(watched, served, swapped, reference, monkeypatch):
    folder = watched[3]
    asked, post = [], Endpoint.post

    def elsewhere(self, path, body):
        """The server is swapped behind its URL; once it does not answer."""
        asked.append(body)
        if len(asked) == 1:
            raise AnswerError("timeout", "no answer")
        return post(at(swapped).endpoint, path, body)

    monkeypatch.setattr(Endpoint, "post", elsewhere)
    told = []
    again = {"honest": [at(served[0])], "tell": told.append, "sleep": lambda _: None, "clock": lambda: 4e9}
    options = Options(out=folder, **FEW)
    run, _ = watch(at(served[0]), reference, options, HOUR, times=12, **again)
    assert "tried again" in told[0]
    assert run["decision"]["status"] == "FAIL"
    n = len(run["rows"])
    assert 3 <= n < 12
    assert [row["status"] for row in run["rows"][:-1]] == ["PASS"] * (n - 1)
    asked.clear()
    once_more, _ = watch(at(served[0]), reference, options, HOUR, times=12, **again)
    assert not asked
    assert once_more["rows"] == run["rows"]


def test_a_watch_without_a_profile_is_refused(served, reference, tmp_path):
    with pytest.raises(BitassayError, match="honest servers"):
        watch(at(served[0]), reference, Options(out=tmp_path / "w", **FEW), HOUR)


@pytest.fixture(scope="module")
def earlier(served, reference, tmp_path_factory):
    """An audit without a profile: answers to compare with."""
    options = Options(out=tmp_path_factory.mktemp("then") / "run", **(SMALL | {"level": "logprobs"}))
    return audit(at(served[0]), reference, options)[1]


@pytest.fixture(scope="module")
def words():
    return words_of("stories260k")


def test_an_endpoint_that_changes_is_told_from_one_that_does_not(
    earlier, served, swapped, words, tmp_path, monkeypatch
):
    same, _ = change(earlier, at(served[0]), *words, out=tmp_path / "same")
    assert same["decision"] | {"why": ""} == {
        "status": "PASS", "p_value": 1.0, "alpha": 0.01, "requests": 4, "why": "",
    }  # fmt: skip
    other, folder = change(earlier, at(swapped), *words, out=tmp_path / "other")
    assert other["decision"]["status"] == "FAIL"
    assert other["decision"]["p_value"] == pytest.approx(4.0**-4)
    assert all(row["then_now"] > row["now_now"] == 0 for row in other["rows"])
    write_report(other, folder / "report.html")
    monkeypatch.setattr(Endpoint, "post", lambda *_: pytest.fail("asked again"))
    again, _ = change(earlier, at(swapped), *words, out=tmp_path / "other")
    assert again["rows"] == other["rows"]
    monkeypatch.undo()
    strict, _ = change(earlier, at(swapped), *words, alpha=1e-3, out=tmp_path / "strict")
    assert strict["decision"]["status"] == "INCONCLUSIVE"


def test_change_needs_the_same_tokens(earlier, served, words, tmp_path):
    with pytest.raises(BitassayError, match="another tokenizer"):
        change(earlier, at(served[0]), words[0], "0" * 64, out=tmp_path / "x")
    assert isinstance(words[0], Vocabulary)


def test_the_p_value_of_a_change_is_one_for_noise():
    draw = np.random.default_rng(1)
    p_values = [change_p_value([draw.normal(size=4) for _ in range(6)]) for _ in range(600)]
    for alpha in (0.05, 0.2, 0.5):
        assert np.mean(np.array(p_values) <= alpha) <= alpha + 3 * (alpha / 600) ** 0.5
    assert min(p_values) < 0.05
    assert change_p_value([np.array([9.0, 1.0, 2.0, 3.0])] * 5) == pytest.approx(4.0**-5)
    assert change_p_value([np.zeros(4)] * 5) == 1
    assert change_p_value([np.array([1.3e-8, 0.0, 0.0, 0.0])] * 5) == 1, "less than a server can say"
    assert change_p_value([np.array([1.3e-5, 0.0, 0.0, 0.0])] * 5) == pytest.approx(4.0**-5)
    assert ranks(np.array([1.0, 1 + 1e-12, 2.0])).tolist() == [1.5, 1.5, 3]


@pytest.mark.slow
def test_watching_and_comparing_at_the_command_line(bitassay_command, served, earlier, watched, tmp_path):
    url = served[0] + "/v1"
    said = bitassay_command(
        "audit", url, "--model", "stories", "--against", str(earlier), "--format", "json", "--out", str(tmp_path / "c")
    )  # fmt: skip
    assert said.status == 0, said.err
    assert json.loads(said.out)["decision"]["p_value"] == 1
    words = ["audit", url, "--model", "stories", "--reference", "stories260k"]
    small = ["--tokens", "16", "--requests", "2", "--alpha", "0.05", "--out", str(tmp_path / "w")]
    profile = ["--profile", str(watched[3] / "audit-00001" / "profile.json")]
    said = bitassay_command(*words, *small, *profile, "--watch", "1s", "--times", "2")
    assert said.status == 0, said.err
    assert "audit 2: PASS" in said.err


def test_wrong_words_are_refused(bitassay_command, earlier, tmp_path):
    words = ["audit", "http://127.0.0.1:1/v1", "--model", "stories", "--reference", "stories260k"]
    for wrong, why in (
        (["--watch", "soon"], "no interval"),
        (["--watch", "6h"], "--calibrate-from"),
        (["--times", "3"], "--watch"),
        (["--repeats", "3"], "--against"),
        (["--against", str(tmp_path)], "plan.json"),
        (["--against", str(earlier), "--requests", "3"], "--requests"),
        (["--against", str(earlier), "--contract"], "--contract"),
        (["--against", str(earlier), "--tokens", "5"], "--tokens"),
    ):
        said = bitassay_command(*words, *wrong)
        assert said.status == 2
        assert why in said.err
    torch.set_num_threads(1)
