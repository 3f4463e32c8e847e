"""Digests of unchanged files are remembered; what changed, or cannot be trusted, is read again."""

import json
import os

import pytest

from bitassay.models import digests
from bitassay.models.digests import remembered

GIVEN, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("BITASSAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "REMEMBERED_BYTES", 1)
    monkeypatch.setattr(digests, "SETTLED_S", -60.0)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    return path


def entry(tmp_path):
    (found,) = (tmp_path / "cache" / "digests").glob("*.json")
    return found


def test_an_unchanged_file_is_not_read_again(file):
    assert remembered([file], lambda: GIVEN) == GIVEN
    assert remembered([file], lambda: pytest.fail("was read")) == GIVEN


def test_a_changed_file_is_read_again(file):
    remembered([file], lambda: GIVEN)
    info = file.stat()
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))  # of the same size, and as old as before
    assert remembered([file], lambda: OTHER) == OTHER
    file.write_bytes(b"more weights")
    assert remembered([file], lambda: GIVEN) == GIVEN


@pytest.mark.parametrize(
    "damage",
    [
        lambda said: "",
        lambda said: "[]",
        lambda said: json.dumps(said | {"digest": "c" * 63}),
        lambda said: json.dumps(said | {"digest": 7}),
        lambda said: json.dumps(said | {"files": []}),
    ],
)
def test_a_damaged_entry_is_ignored_and_replaced(file, tmp_path, damage):
    remembered([file], lambda: GIVEN)
    kept = entry(tmp_path)
    kept.write_text(damage(json.loads(kept.read_text())))
    assert remembered([file], lambda: OTHER) == OTHER
    assert remembered([file], lambda: pytest.fail("was read")) == OTHER


def test_an_entry_that_others_can_write_is_ignored(file, tmp_path):
    remembered([file], lambda: GIVEN)
    entry(tmp_path).chmod(0o666)
    assert remembered([file], lambda: OTHER) == OTHER


def test_what_changes_meanwhile_or_just_changed_is_not_remembered(file, tmp_path, monkeypatch):
    def changing():
        file.write_bytes(b"other")
        return GIVEN

    assert remembered([file], changing) == GIVEN
    monkeypatch.setattr(digests, "SETTLED_S", 60.0)
    assert remembered([file], lambda: GIVEN) == GIVEN
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_done_without(file, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    assert remembered([file], lambda: GIVEN) == GIVEN
