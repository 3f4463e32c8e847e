"""The command line as a whole: exit statuses, streams, and how it fails."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from bitassay import cli
from bitassay.errors import BitassayError, MissingError, nearest, suggestion

COMMAND = [sys.executable, "-c", "from bitassay.cli import main; main()"]
# Output is held back until the end, as it is for most users, whatever this test run is set to.
BUFFERED = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
HEAVY = {
    "torch",
    "transformers",
    "numpy",
    "scipy",
    "matplotlib",
    "pydantic",
    "huggingface_hub",
    "compressed_tensors",
}


def start(*words, **options):
    return subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize("words", [["--help"], ["--version"], [], ["nonsense"]])
def test_nothing_heavy_is_imported_to_say_hello(words):
    script = f"""
import sys
from bitassay import cli
cli.run({words!r})
print("imported:", *sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1].strip() == "imported:"


def test_help_of_a_verb_imports_no_torch():
    script = f"""
import sys
from bitassay import cli
for verb in {list(cli.VERBS)}:
    cli.run([verb, "--help"])
    assert "torch" not in sys.modules, verb
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"bitassay {verb}" in done.stdout for verb in cli.VERBS)


def test_help_names_every_verb(bitassay):
    done = bitassay("--help")
    assert done.status == 0
    assert all(re.search(rf"│ {verb} ", done.out) for verb in cli.VERBS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["asay"], "no verb is called 'asay'; the nearest are 'assay'"),
        (["--nonsense"], "--nonsense"),
        (["assay", "stories260k", "--recipe", "w4", "--nonsense"], "--nonsense"),
        (["assay", "stories260k"], "--recipe"),
        (["assay", "stories260k", "--recipe", "w4", "--windows", "many"], "many"),
        (["assay", "stories260k", "--recipe", "w4", "--format", "yaml"], "yaml"),
        (["models", "check"], "MODEL"),
        (["models", "nonsense"], "nonsense"),
        (["models", "list", "too", "many"], "too"),
        (["recipes", "show", "w44"], "no recipe is called 'w44'; the nearest are 'w4'"),
        (["models", "check", "stories"], "no model is called 'stories'; the nearest are 'stories260k'"),
        (["report"], "no run folder was given"),
    ],
)
def test_bad_usage_is_2_and_says_what_on_stderr(bitassay, words, said):
    done = bitassay(*words)
    assert done.status == 2
    assert done.out == ""
    assert said.lower() in done.err.lower()
    assert "Traceback" not in done.err


@pytest.fixture
def failing(bitassay, monkeypatch):
    """Run a verb that raises."""

    def call(error, **options):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr("bitassay.models.source.resolve", fail)
        return bitassay("models", "pull", "stories260k", **options)

    return call


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (BitassayError("a is wrong", "b"), 2, "error: a is wrong\n  try: b\n"),
        (MissingError("a is not there", "c"), 3, "error: a is not there\n  try: c\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 3, "out of memory"),
        (OSError(28, "No space left on device", "/x/y"), 3, "error: /x/y: No space left on device\n"),
    ],
)
def test_what_is_expected_to_go_wrong(failing, error, status, said):
    done = failing(error)
    assert (done.status, done.out) == (status, "")
    assert said in done.err
    assert "Traceback" not in done.err


def test_debug_lets_the_exception_through(failing):
    with pytest.raises(BitassayError, match="a is wrong"):
        failing(BitassayError("a is wrong"), debug=True)


def test_a_bug_is_not_dressed_up(failing):
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError())


def test_debug_shows_the_traceback_and_may_stand_anywhere():
    for words in (["--debug", "asay"], ["asay", "--debug"]):
        process = start(*words)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (1, "")
        assert "Traceback" in err
        assert "no verb is called 'asay'" in err


def test_interrupted_from_outside():
    """SIGINT to a real process in the middle of a verb."""
    script = """
import time, threading
from bitassay import cli
import bitassay.models.source as source
def wait(*_):
    print("waiting", flush=True)
    time.sleep(60)
source.resolve = wait
cli.main(["models", "pull", "stories260k"])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "run the same command again" in err
    assert "Traceback" not in err


def test_a_reader_that_goes_away_is_no_error():
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen(
        [*COMMAND, "models", "list"], stdout=write, stderr=subprocess.PIPE, text=True, env=BUFFERED
    )
    os.close(write)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_stdout_that_is_full():
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [*COMMAND, "models", "list"], stdout=full, stderr=subprocess.PIPE, text=True, env=BUFFERED
        )
    assert process.returncode == 3
    assert process.stderr == "error: No space left on device\n"


def test_a_verb_on_a_full_disk(bitassay, tmp_path, monkeypatch):
    """The cache is on a file system with room for nothing."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        (disk / "filler").write_bytes(b"x" * 60_000)
        monkeypatch.setattr(
            "bitassay.models.source._dequantize",
            lambda path, digest, out: (out / "w").write_bytes(b"x" * 100_000),
        )
        monkeypatch.setenv("BITASSAY_CACHE", str(disk / "cache"))
        (tmp_path / "m.gguf").write_bytes(b"GGUF")
        done = bitassay("models", "pull", str(tmp_path / "m.gguf"))
        assert done.status == 3
        assert re.search(
            rf"error: {disk}/cache/dequantized/m-[\w-]+: no space left on the disk\n  try: ", done.err
        )
        assert not [p for p in (disk / "cache" / "dequantized").iterdir() if p.suffix != ".lock"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_nearest_names():
    assert nearest("w5", ["w4", "w8", "fp8"]) == "'w8', 'w4'"
    assert nearest("zzz", ["b", "a"]) == "'a', 'b'"
    assert nearest("zzz", [f"name-{n}" for n in range(20)]) == ""
    assert nearest("name", [f"name-{n}" for n in range(20)]).count(",") == 2
    assert nearest("W4", ["w4", "qwerty"]) == "'w4'"


def test_what_is_said_where_no_name_is_near():
    many = [f"name-{n}" for n in range(20)]
    assert suggestion("name-33", many).startswith("the nearest are 'name-3'")
    assert suggestion("zzz", ["b", "a"]) == "there are 'a', 'b'"
    assert suggestion("zzz", many) == "none of the 20 that there are is close"
    assert suggestion("zzz", many, short=20).count("'name-") == 20


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(),
    reason="this system has no pages of 2 MB on request",
)
def test_large_tensors_are_in_pages_of_two_megabytes():
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from bitassay.cli import main
        try:
            main(["recipes", "list"])
        except SystemExit:
            import torch
            tensor = torch.ones(2**26, dtype=torch.uint8)
            memory = Path("/proc/self/smaps_rollup").read_text()
            print(memory.partition("AnonHugePages:")[2].split()[0], file=sys.stderr)
    """)
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert int(done.stderr.split()[-1]) >= 2**15  # kB, of 2**16
