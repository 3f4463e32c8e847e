"""A few hundred cases of benchmarks/fuzz.py, and that it notices what must not be."""

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def fuzz(benchmark):
    return benchmark("fuzz")


@pytest.fixture(scope="module")
def judges(fuzz, tmp_path_factory):
    return fuzz.Judges(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def targets(judges):
    return {target.name: target for target in judges.targets()}


@pytest.mark.slow
def test_no_changed_file_passes_or_breaks_anything(fuzz, targets, tmp_path):
    outcomes = set()

    @settings(
        max_examples=400,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data):
        target, changed = data.draw(fuzz.mutated(list(targets.values())))
        outcomes.add(fuzz.check(target, changed, tmp_path / "case"))

    run()
    assert outcomes >= {"refused", "FAIL", "read"}


def test_seeds_are_read_and_judged(fuzz, targets, tmp_path):
    found = {name: fuzz.check(one, one.seed, tmp_path / "case") for name, one in targets.items()}
    passes = {"trace", "receipt", "challenge", "opening", "profile"}
    assert {name for name, outcome in found.items() if outcome == "PASS"} == passes
    assert "refused" not in found.values()
    assert found["receipt 2"] == "FAIL"  # of another commitment than the one that was challenged


@pytest.mark.parametrize("layout", ["json", "safetensors", "text"])
def test_every_edit_changes_the_file_nearly_always(fuzz, targets, layout):
    choose, seed = random.Random(0), next(one.seed for one in targets.values() if one.layout == layout)
    for edit in fuzz.EDITS[layout]:
        changed = sum(edit(seed, choose, seed) != seed for _ in range(50))
        assert changed > 35, edit.__name__


def check_all(fuzz, target, edit, path):
    """150 cases of one edit; how often each outcome."""
    choose = random.Random(1)
    cases = [edit(target.seed, choose, target.seed) for _ in range(150)]
    return Counter(fuzz.check(target, data, path) for data in cases)


@pytest.mark.slow
def test_it_notices_a_verifier_that_forgets_a_check(fuzz, targets, tmp_path, monkeypatch):
    """The signature; the proof; all claims; an error that is not named."""
    with monkeypatch.context() as patch:
        patch.setattr("bitassay.verification.receipts.receipt.check_signature", lambda *_: None)
        with pytest.raises(AssertionError):
            check_all(fuzz, targets["receipt"], fuzz.edit_json, tmp_path / "case")
    with monkeypatch.context() as patch:
        patch.setattr(
            "bitassay.verification.receipts.opening.root_from_proof", lambda *_: fuzz_root(targets, fuzz)
        )
        with pytest.raises(AssertionError):
            check_all(fuzz, targets["opening"], fuzz.edit_numbers, tmp_path / "case")
    with monkeypatch.context() as patch:
        patch.setattr("bitassay.verification.submissions.claim_defects", lambda *_: [])
        patch.setattr("bitassay.verification.submissions.unanswered", lambda *_: [])
        with pytest.raises(AssertionError):
            check_all(fuzz, targets["trace"], fuzz.edit_header, tmp_path / "case")
    with monkeypatch.context() as patch:
        patch.setattr("bitassay.verification.container._check_tiling", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            check_all(fuzz, targets["trace"], fuzz.edit_numbers, tmp_path / "case")


@pytest.mark.slow
def test_edits_reach_what_lies_behind_the_schema(fuzz, targets, tmp_path, monkeypatch):
    """Signed again, many an edited receipt is judged; many an edited trace is."""
    judged = []
    real = fuzz.Judges.check_opened
    monkeypatch.setattr(fuzz.Judges, "check_opened", lambda self, one: judged.append(one) or real(self, one))
    check_all(fuzz, targets["receipt"], fuzz.edit_json, tmp_path / "case")
    assert len(judged) > 15
    assert check_all(fuzz, targets["trace"], fuzz.edit_header, tmp_path / "case")["FAIL"] > 5


def fuzz_root(targets, fuzz):
    return fuzz.decode(targets["receipt"].seed, Path("receipt")).root


def test_it_notices_what_takes_too_long_or_too_much(fuzz, targets, tmp_path, monkeypatch):
    target = fuzz.Target("slow", b"{}", "json", lambda path: "read")
    monkeypatch.setattr(fuzz, "SECONDS", -1)
    with pytest.raises(AssertionError, match=" s"):
        fuzz.check(target, b"{}", tmp_path / "case")
    monkeypatch.setattr(fuzz, "SECONDS", 10)
    monkeypatch.setattr(fuzz, "MEGABYTES", -1)
    with pytest.raises(AssertionError, match="MB more"):
        fuzz.check(target, b"{}", tmp_path / "case")
