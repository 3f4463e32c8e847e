"""Files and folders are whole or absent, whatever interrupts them."""

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bitassay.errors import BitassayError, MissingError
from bitassay.record import files
from bitassay.record.files import atomic_file, atomic_folder, read_json, write_json, write_text


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_the_file_appears_whole_and_alone(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interrupted_file_leaves_the_old_one(tmp_path, interruption):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write():
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise interruption

    with pytest.raises(interruption):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def interrupted_at(step: int, write: Callable[[], None]) -> bool:
    """Run `write` with a KeyboardInterrupt before the step-th bytecode that it and what it calls execute, where
    a signal could arrive. False where `write` ended first. Code of the garbage collector may run in between,
    and there an interruption is lost."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            if count == step:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        write()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return count >= step


@pytest.mark.parametrize("kind", ["file", pytest.param("folder", marks=pytest.mark.slow)])
def test_ctrl_c_at_any_moment_leaves_a_whole_result_or_none(tmp_path, kind):
    def write():
        if kind == "file":
            with atomic_file(path) as temporary:
                temporary.write_text("whole")
        else:
            with atomic_folder(path) as temporary:
                (temporary / "a").write_text("whole")

    path, step, outcomes = tmp_path / "out" / "a", 1, set()
    while interrupted_at(step, write):
        left = sorted(str(found.relative_to(path.parent)) for found in path.parent.rglob("*"))
        assert left in ([], ["a"], ["a", "a/a"]), f"step {step}"
        if left:
            assert (path if kind == "file" else path / "a").read_text() == "whole"
        outcomes.add(bool(left))
        shutil.rmtree(path.parent, ignore_errors=True)
        step += 1
    assert outcomes == {False, True}


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_folder_leaves_nothing(tmp_path, interruption):
    def write():
        with atomic_folder(tmp_path / "out") as temporary:
            (temporary / "a").write_text("half")
            raise interruption

    with pytest.raises(interruption):
        write()
    assert not os.listdir(tmp_path)


def test_a_folder_replaces_an_empty_one_but_no_other(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("first")
    with (
        pytest.raises(BitassayError, match="the folder is not empty"),
        atomic_folder(tmp_path / "out") as temporary,
    ):
        (temporary / "a").write_text("second")
    assert (tmp_path / "out" / "a").read_text() == "first"
    assert os.listdir(tmp_path) == ["out"]


def test_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """The order that survives a power cut: sync, then rename."""
    steps = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        files.os, "fsync", lambda number: (steps.append(f"sync {_size(number)}"), sync(number))
    )
    monkeypatch.setattr(files.os, "replace", lambda a, b: (steps.append("rename"), replace(a, b)))
    write_text(tmp_path / "a.txt", "12345")
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "b").write_text("123")
    assert steps == ["sync 5", "rename", "sync 3", "rename"]


def _size(number):
    return os.fstat(number).st_size


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_results_are_as_readable_as_any_file(tmp_path, mask):
    """Also one that safetensors writes, which replaces the file that it is given. In a folder whoever fills it
    decides."""
    before = os.umask(mask)
    try:
        (tmp_path / "plain").write_text("")
        write_text(tmp_path / "a.txt", "text")
        with atomic_file(tmp_path / "b.safetensors") as temporary:
            save_file({"a": torch.arange(5)}, temporary)
        with atomic_folder(tmp_path / "out") as temporary:
            (temporary / "secret").touch(0o600)
        (tmp_path / "folder").mkdir()
    finally:
        os.umask(before)
    modes = {
        str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")
    }
    assert modes["a.txt"] == modes["b.safetensors"] == modes["plain"]
    assert modes["out"] == modes["folder"]
    assert modes["out/secret"] == 0o600


def test_full_disk(small_disk):
    path = small_disk / "a.txt"
    path.write_text("old")
    with pytest.raises(MissingError, match=rf"{path}: no space left on the disk"):
        write_text(path, "x" * 100_000)
    assert path.read_text() == "old"
    assert os.listdir(small_disk) == ["a.txt"]


def test_full_disk_while_tensors_are_saved(small_disk):
    """safetensors reports it in an error of its own."""
    tensors = {"a": torch.zeros(100_000)}
    with pytest.raises(SafetensorError, match="os error 28"):
        save_file(tensors, small_disk / "direct")
    (small_disk / "direct").unlink(missing_ok=True)
    path = small_disk / "a.safetensors"
    with (
        pytest.raises(MissingError, match=rf"{path}: no space left on the disk"),
        atomic_file(path) as temporary,
    ):
        save_file(tensors, temporary)
    assert not os.listdir(small_disk)


def test_full_disk_while_a_model_is_saved(small_disk, stories):
    with (
        pytest.raises(MissingError, match=rf"{small_disk}/out: no space"),
        atomic_folder(small_disk / "out") as temporary,
    ):
        stories.save_pretrained(temporary)
    assert not os.listdir(small_disk)


def test_the_number_behind_a_safetensors_error(tmp_path):
    """The same without a small disk, for machines that may not mount one."""
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(MissingError, match="no space left"), atomic_file(tmp_path / "a"):
        raise full
    with pytest.raises(SafetensorError, match="header too large"), atomic_file(tmp_path / "a"):
        raise SafetensorError("header too large")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [(errno.ENOSPC, MissingError, "no space"), (errno.EDQUOT, MissingError, "no space"), (errno.EACCES,
    BitassayError, "not writable"), (errno.EROFS, BitassayError, "not writable"), (errno.EIO, BitassayError,
    "Input/output")],
)  # fmt: skip
def test_every_os_error_names_the_path(tmp_path, number, kind, text):
    with pytest.raises(kind, match=f"a.txt: .*{text}"), atomic_file(tmp_path / "a.txt"):
        raise OSError(number, os.strerror(number))


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BitassayError, match="a file is where a folder should be"):
        write_text(tmp_path / "file" / "a.txt", "")


def test_a_read_only_file_system():
    """Not even root can write into /proc."""
    with pytest.raises(BitassayError, match=r"/proc/bitassay/a\.txt"):
        write_text(Path("/proc/bitassay/a.txt"), "")


def test_json_comes_back(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": "ä→"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1} x', b"[" * 100_000])
def test_what_is_not_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(BitassayError, match=r"a\.json: not a JSON file"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "content", ['{"a": 1, "a": 1}', '[{"b": {"a": 1, "a": 2}}]', '{"a": 1, "\\u0061": 2}']
)
def test_a_key_that_is_there_twice_is_named(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(BitassayError, match=r"x\.json: not a JSON file \(an object has a key twice"):
        read_json(tmp_path / "x.json")


def test_json_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "a.json").write_text('"' + "x" * 100 + '"')
    with pytest.raises(BitassayError, match="102 bytes, more than the 101"):
        read_json(tmp_path / "a.json", limit_bytes=101)
    assert read_json(tmp_path / "a.json", limit_bytes=102) == "x" * 100


def test_json_that_is_not_there(tmp_path):
    with pytest.raises(BitassayError, match=r"a\.json: no such file"):
        read_json(tmp_path / "a.json")
    with pytest.raises(BitassayError, match="reverse"):
        read_json(tmp_path)


def test_tensors_saved_in_an_atomic_file_come_back(tmp_path):
    with atomic_file(tmp_path / "a.safetensors") as temporary:
        save_file({"a": torch.arange(5)}, temporary)
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [0, 1, 2, 3, 4]
