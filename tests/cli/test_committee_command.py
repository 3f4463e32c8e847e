"""`bitassay committee` through files: four verifiers judge real traces, one of them without looking."""

import contextlib
import io
import json
import shutil
import stat

import pytest
import torch

from bitassay.cli import run
from bitassay.engines.load import load
from bitassay.verification.calibrate import calibrate
from bitassay.verification.profile import write_profile
from bitassay.verification.prove import prove_many
from bitassay.verification.trace import write_trace
from bitassay.verification.verify import verify_many

NAMES = ("ada", "ben", "cyd", "dov")
WORDS = ("day", "night", "cat", "dog", "sun", "tree", "big", "red", "boy")


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """A folder of 3 honest traces, and for each verifier 4 traces with altered tokens and 3 honest ones. Of
    honest traces one in twenty is refused at this alpha, others on each machine, so the 3 are the most
    ordinary of 9."""
    folder = tmp_path_factory.mktemp("committee")
    model = load("stories260k", dtype=torch.float32)
    profile = calibrate(
        model,
        model,
        [f"Once upon a {a} {b}" for a in ("time", "day", "hill") for b in "abcdefghijklmnop"],
        max_new_tokens=16,
        alpha=0.05,
        guarantee="average",
    )
    write_profile(profile, folder / "profile.json")
    proven = prove_many(model, [f"One {word} a girl" for word in WORDS], max_new_tokens=16)
    ordinary = [verdict.p_value for verdict in verify_many(proven, model, profile=profile)]
    honest = [proven[index] for index in sorted(range(len(proven)), key=ordinary.__getitem__)[-3:]]
    forged = honest[0].header.model_copy(update={"output_ids": honest[0].header.output_ids[::-1]})
    plants = {}
    for index, trace in enumerate(honest):
        write_trace(folder / f"r{index}.trace", trace)
    for name in NAMES:
        plants[name] = {}
        for index in range(7):
            path = folder / f"{name}{index}.trace"
            planted = honest[index % 3] if index >= 4 else type(honest[0])(forged, honest[0].states)
            write_trace(path, planted)
            plants[name][str(path)] = "PASS" if index >= 4 else "FAIL"
    (folder / "plants.json").write_text(json.dumps(plants))
    (folder / "items.txt").write_text("".join(f"{folder / f'r{index}.trace'}\n" for index in range(3)))
    return folder


@pytest.fixture(scope="module")
def found(traces, tmp_path_factory):
    """What `bitassay verify --format json` prints about all traces."""
    words = ["--model", "stories260k", "--dtype", "float32", "--profile", str(traces / "profile.json")]
    path = tmp_path_factory.mktemp("found") / "verdicts.json"
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        run(["verify", str(traces), *words, "--format", "json"])
    path.write_text(said.getvalue())
    return path


@pytest.fixture
def committee(traces, found, tmp_path, bitassay):
    """A round in tmp_path, up to the commitments."""

    class Round:
        folder = tmp_path / "round"

        def call(self, verb, *words):
            return bitassay("committee", verb, *map(str, words))

        def assign(self, *more, each=3):
            files = ("--items", traces / "items.txt", "--plants", traces / "plants.json")
            return self.call("assign", *files, "--out", self.folder, "--each", each, *more)

        def task(self, name):
            return self.folder / "tasks" / f"{name}.json"

        def commit(self, name, answers=None):
            if answers is not None:
                (tmp_path / f"{name}.answers").write_text(json.dumps(answers))
            given = found if answers is None else tmp_path / f"{name}.answers"
            files = (
                "--report",
                tmp_path / f"{name}.report",
                "--out",
                tmp_path / "commitments" / f"{name}.json",
            )
            return self.call("commit", self.task(name), "--answers", given, *files)

        def reveal(self, name, *more):
            files = (
                "--commitments",
                tmp_path / "commitments",
                "--out",
                tmp_path / "reveals" / f"{name}.json",
            )
            return self.call("reveal", tmp_path / f"{name}.report", "--task", self.task(name), *files, *more)

        def judge(self, *more):
            for folder in ("commitments", "reveals"):
                (tmp_path / folder).mkdir(exist_ok=True)
            files = ("--commitments", tmp_path / "commitments", "--reveals", tmp_path / "reveals")
            done = self.call("judge", self.folder / "secret.json", *files, "--format", "json", *more)
            whole = json.loads(done.out)
            codes = {row["verifier"]: row["codes"] for row in whole["verifiers"]}
            return done.status, codes, [row["status"] for row in whole["rows"]]

    return Round()


def items_of(committee, name):
    return json.loads(committee.task(name).read_text())["items"]


def test_a_round_of_honest_verifiers(committee, tmp_path):
    assert committee.assign().status == 0
    for name in NAMES:
        assert committee.commit(name).status == 0
    for name in NAMES:
        assert committee.reveal(name).status == 0
    assert committee.judge() == (0, {name: [] for name in NAMES}, ["PASS"] * 3)
    shown = committee.call(
        "judge",
        committee.folder / "secret.json",
        "--commitments",
        tmp_path / "commitments",
        "--reveals",
        tmp_path / "reveals",
    )
    assert "3 PASS" in shown.out
    assert "why not" in shown.out


def test_what_only_its_owner_may_read(committee, tmp_path):
    committee.assign()
    committee.commit("ada")
    for path in (committee.folder / "secret.json", tmp_path / "ada.report"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    public = committee.task("ada").read_text() + (tmp_path / "commitments" / "ada.json").read_text()
    assert "planted" not in public
    assert json.loads((tmp_path / "ada.report").read_text())["salt"] not in public


def test_lazy_verifiers_are_named_and_do_not_vote(committee):
    committee.assign()
    for name in NAMES:
        lazy = {"ben": "PASS", "dov": "FAIL"}.get(name)
        committee.commit(name, lazy and dict.fromkeys(items_of(committee, name), lazy))
    for name in NAMES:
        committee.reveal(name)
    status, codes, verdicts = committee.judge("--quorum", "1")
    assert codes == {
        "ada": [],
        "ben": ["missed-planted-failure"],
        "cyd": [],
        "dov": ["refused-planted-honest"],
    }
    assert (status, verdicts) == (0, ["PASS"] * 3)


def test_nobody_reveals_before_all_have_committed(committee, tmp_path):
    committee.assign()
    for name in NAMES[:3]:
        committee.commit(name)
    early = committee.reveal("ada")
    assert early.status == 2
    assert "no commitment of dov (1 missing)" in early.err
    assert not (tmp_path / "reveals" / "ada.json").exists()
    for name in NAMES[:3]:
        assert committee.reveal(name, "--without", "dov").status == 0
    _, codes, verdicts = committee.judge()
    assert codes == {"ada": [], "ben": [], "cyd": [], "dov": ["no-commitment"]}
    assert verdicts == ["PASS"] * 3


def test_a_commitment_replaced_after_a_reveal_is_noticed(committee):
    committee.assign()
    for name in NAMES:
        committee.commit(name, {"ben": dict.fromkeys(items_of(committee, "ben"), "PASS")}.get(name))
    committee.reveal("ada")
    committee.commit("ben")  # he has seen hers
    for name in NAMES[1:]:
        committee.reveal(name)
    assert committee.judge()[1]["ada"] == ["other-commitments"]


def test_what_one_verifier_sends_cannot_stop_the_round(committee, tmp_path):
    committee.assign()
    for name in NAMES:
        committee.commit(name)
    for name in NAMES[:3]:
        committee.reveal(name)
    for content, code in (
        (b"\xff" * 100, "unreadable-report"),
        (b"[" * 10**6, "unreadable-report"),
        ((tmp_path / "reveals" / "ada.json").read_bytes(), "unreadable-report"),
        ((tmp_path / "commitments" / "dov.json").read_bytes(), "unreadable-report"),
        (b'{"committee":1,"round":"x","seen":NaN,"report":1}', "unreadable-report"),
    ):
        (tmp_path / "reveals" / "dov.json").write_bytes(content)
        assert committee.judge()[1] == {"ada": [], "ben": [], "cyd": [], "dov": [code]}
    (tmp_path / "reveals" / "dov.json").unlink()
    assert committee.judge()[1]["dov"] == ["withheld-report"]
    (tmp_path / "reveals" / "dov.json").mkdir()
    assert committee.judge()[1]["dov"] == ["unreadable-report"]
    (tmp_path / "commitments" / "dov.json").write_text("{}")
    assert committee.judge()[1]["dov"] == ["unreadable-commitment"]


def test_bad_usage_names_the_file(committee, traces, tmp_path):
    def said(status, text, done):
        assert done.status == status
        assert text in done.err
        assert "Traceback" not in done.err

    bad = tmp_path / "bad.json"
    files = ("--items", traces / "items.txt", "--plants", bad, "--out", tmp_path / "x")
    said(2, "No such file", committee.call("assign", *files))
    for content in (
        "[]",
        "{}",
        '{"../up": {"x": "FAIL"}}',
        '{"ada": {"x": "MAYBE"}}',
        '{"ada": {}, "ada": {}}',
        "{",
    ):
        bad.write_text(content)
        said(2, "bad.json", committee.call("assign", *files))
    assert not (tmp_path / "x").exists()
    said(2, "--round", committee.assign("--round", "x" * 200))
    said(2, "verifiers for each item", committee.assign(each=9))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    said(
        2,
        "no items",
        committee.call(
            "assign", "--items", empty, "--plants", traces / "plants.json", "--out", tmp_path / "x"
        ),
    )
    committee.assign()
    said(2, "not empty", committee.assign())
    said(2, "no answer to", committee.commit("ada", {}))
    said(2, "ada.answers", committee.commit("ada", {"x": "YES"}))
    said(2, "ada.answers", committee.commit("ada", [1]))
    for name in NAMES:
        committee.commit(name)
    other = committee.call(
        "reveal",
        tmp_path / "ben.report",
        "--task",
        committee.task("ada"),
        "--commitments",
        tmp_path / "commitments",
        "--out",
        tmp_path / "r",
    )
    said(2, "not the one that ada committed to", other)
    shutil.copy(committee.task("ada"), bad)
    said(2, "bad.json", committee.call("judge", bad, "--commitments", tmp_path, "--reveals", tmp_path))
    said(2, "not a folder", committee.call("judge", bad, "--commitments", bad, "--reveals", tmp_path))
    said(2, "quorum", committee.call("judge", bad, "--commitments", bad, "--reveals", bad, "--quorum", 0))
