"""A recorded audit is judged again without any request, and nothing in its folder is believed unchecked."""

import json
import shutil

import pytest

from audit.conftest import serving
from audit.test_audit import SMALL, at, rounded
from bitassay.audit.client import Endpoint
from bitassay.audit.judge import Reference
from bitassay.audit.replay import replay
from bitassay.audit.run import audit
from bitassay.audit.session import Options
from bitassay.audit.suspects import CLAIMED, Suspect
from bitassay.errors import BitassayError
from bitassay.models.identity import identity
from bitassay.testing.tiny import stories260k


@pytest.fixture(scope="module")
def reference(model):
    return Reference(stories260k("float32"), model)


@pytest.fixture(scope="module")
def recorded(served, model, reference, tmp_path_factory):
    """An audit of a server in 4 bits, calibrated on the honest one; its run and its folder."""
    with serving(rounded(model, 4), tmp_path_factory.mktemp("host"), claim=identity(model)) as (url, _):
        options = Options(out=tmp_path_factory.mktemp("recorded") / "run", **SMALL)
        return audit(at(url), reference, options, honest=[at(served[0])])


@pytest.fixture
def copied(recorded, tmp_path):
    return shutil.copytree(recorded[1], tmp_path / "copy")


def test_a_replay_asks_nothing_and_says_the_same(recorded, copied, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(Endpoint, "_once", lambda *_: pytest.fail("a request"))
    for path in (*copied.glob("parts/score-*"), copied / "run.json"):
        path.unlink()
    run, _ = replay(copied, reference, out=tmp_path / "out")
    was = recorded[0]
    assert run["decision"] == was["decision"]
    assert run["decision"]["status"] == "FAIL"
    assert run["rows"] == was["rows"]
    assert run["receipts"] == was["receipts"]
    assert run["receipts"]["valid"] == 4
    assert run["calibration"]["scores"] == was["calibration"]["scores"]
    for path in copied.glob("parts/answer-1-*"):
        path.unlink()
    less, _ = replay(copied, reference, out=tmp_path / "less")  # by the profile that the folder keeps
    assert less["decision"] == was["decision"]
    strict, _ = replay(copied, reference, alpha=1e-9, out=tmp_path / "strict")
    assert strict["decision"]["status"] == "PASS"


def test_suspects_are_told_apart(recorded, reference, model, tmp_path):
    suspects = {f"w{bits}": Suspect(lambda bits=bits: rounded(model, bits)) for bits in (8, 4)}
    run, _ = replay(recorded[1], reference, suspects=suspects, out=tmp_path / "out")
    rows = {row["suspect"]: row for row in run["suspects"]}
    assert run["suspects"][0]["suspect"] == "w4"
    assert set(rows) == {"w4", "w8", CLAIMED}
    assert (rows["w4"]["nearest"], rows["w4"]["answers"]) == (4, 4)
    assert rows["w4"]["seen"] == pytest.approx(1, abs=0.1)
    assert rows[CLAIMED]["seen"] is None
    assert rows[CLAIMED]["distance"] > 5 * rows["w4"]["distance"]


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


ANSWER = "parts/answer-0-00001.json"
WRONG = {
    "outside": (ANSWER, lambda v: v["prompt"][3].update(top=[[512, -1.0]]), "token id 512"),
    "above-zero": (ANSWER, lambda v: v["prompt"][3].update(logprob=0.5), "less than or equal"),
    "not-finite": (ANSWER, lambda v: v["prompt"][3].update(logprob=float("nan")), "finite"),
    "other-prompt": (ANSWER, lambda v: v["prompt_ids"].reverse(), "another prompt"),
    "other-tokens": (ANSWER, lambda v: v["prompt"].reverse(), "another prompt"),
    "few-texts": ("parts/texts-audited.json", lambda v: v.pop(), "3 texts"),
    "level": ("parts/probe-0.json", lambda v: v["asking"].update(level="tokens"), "not asked for"),
    "kind": ("plan.json", lambda v: v.update(kind="bench"), "kind"),
    "tokens": ("plan.json", lambda v: v["reference"].update(tokenizer_digest="0" * 64), "--reference"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_no_audit_writes_is_refused(name, copied, reference, tmp_path):
    file, change, why = WRONG[name]
    edit(copied / file, change)
    with pytest.raises(BitassayError, match=why):
        replay(copied, reference, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_receipt_of_a_changed_answer_is_not_valid(copied, reference, tmp_path):
    edit(copied / ANSWER, lambda v: v["output"][0].update(token=v["output"][0]["token"] ^ 1))
    run, _ = replay(copied, reference, out=tmp_path / "out")
    assert (run["receipts"]["given"], run["receipts"]["valid"]) == (4, 3)


def test_replay_at_the_command_line(bitassay_command, recorded, tmp_path):
    words = ["audit", "--replay", str(recorded[1]), "--format", "json", "--out", str(tmp_path / "out")]
    said = bitassay_command(*words)
    assert said.status == 1, said.err
    run = json.loads(said.out)
    assert run["decision"] == recorded[0]["decision"]
    for more, why in (
        (["--seed", "3"], "--replay asks nothing"),
        (["--watch", "6h"], "--watch says nothing"),
        (["--suspects", "w4,w44"], "w44"),
        (["--reference", "no-such"], "no-such"),
    ):
        said = bitassay_command(*words, *more)
        assert said.status == 2
        assert why in said.err
    said = bitassay_command("audit", "--replay", str(tmp_path), "--model", "x")
    assert said.status == 2
    assert bitassay_command("audit", "http://a/v1", "--model", "m").status == 2
