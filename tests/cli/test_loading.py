"""How models are found and loaded, at the command line: the same options on every verb, and nothing of the
libraries on stderr."""

import logging
import shutil
import subprocess
import sys
import warnings

import pytest
from safetensors.torch import load_file, save_file

from bitassay import cli
from bitassay.cli.options import Loading
from bitassay.cli.quiet import quiet, without_bars
from bitassay.errors import BitassayWarning
from bitassay.models.source import resolve

LOADING = [["assay"], ["quantize"], ["eval"], ["generate"], ["bench"], ["prove"], ["verify"], ["calibrate"]]
LOADING += [["attack"], ["study", "run"], ["search"], ["models", "check"]]


@pytest.mark.parametrize("verb", LOADING, ids=" ".join)
def test_every_verb_that_loads_a_model_says_how(verb, capsys):
    assert cli.run([*verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--attention", "--revision", "--trust-remote-code"))


def test_a_revision_joins_the_model():
    assert Loading(revision="v2").of("some/model") == "some/model@v2"
    assert Loading().of("some/model@v2") == "some/model@v2"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["models", "check", "stories260k", "--revision", "main"], "has no revision main"),
        (["models", "pull", "stories260k@main"], "has no revision main"),
        (["eval", "stories260k", "--attention", "spda"], "unknown attention 'spda'; the nearest are 'sdpa'"),
    ],
)
def test_what_cannot_be_loaded_so_is_one_clear_line(words, said, capsys):
    assert cli.run(words) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown


@pytest.mark.slow
def test_stderr_has_our_lines_alone(tmp_path):
    """In a process of its own: libraries decide at their import what they print. With a file that nothing
    loads, which is our one warning, and a checkpoint that compressed-tensors reads, which logs and draws."""
    run = [sys.executable, "-m", "bitassay.cli"]
    folder = tmp_path / "q"
    made = subprocess.run(
        [*run, "quantize", "stories260k", "--recipe", "w4", "--out", folder], capture_output=True, text=True
    )
    (folder / "bitassay.json").unlink()
    save_file(load_file(folder / "model.safetensors"), folder / "old.safetensors")
    words = ["eval", folder, "--windows", "1", "--window", "32"]
    read = subprocess.run([*run, *map(str, words)], capture_output=True, text=True)
    assert (made.returncode, read.returncode) == (0, 0), made.stderr + read.stderr
    lines = (made.stderr + read.stderr).splitlines()
    size = "q: 4.43 bits a weight in this folder, 4.32 in the recipe"
    assert size in lines
    known = (
        size,
        "device: ",
        "quantizing by w4",
        "packing",
        "writing",
        "loading",
        "evaluating on",
        "warning: ",
    )
    assert not [line for line in lines if line and not line.startswith(known)]
    assert [line for line in lines if line.startswith("warning")] == [
        f"warning: {folder / 'old.safetensors'}: nothing loads this file, so it is no part of the model; remove it"
    ]


def test_libraries_are_quiet_and_we_are_not(capsys):
    from tqdm import tqdm

    before = logging.root.manager.disable
    with quiet(), without_bars():
        logging.getLogger("torch").warning("noise")
        warnings.warn("noise", FutureWarning, stacklevel=1)
        list(tqdm(range(3), disable=False))
        logging.getLogger("torch").error("an error")
        warnings.warn("ours", BitassayWarning, stacklevel=1)
    shown = capsys.readouterr().err
    assert "noise" not in shown
    assert "0/3" not in shown
    assert "warning: ours" in shown
    assert logging.root.manager.disable == before
    list(tqdm(range(3)))
    assert "3/3" in capsys.readouterr().err


def test_attention_is_in_force(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(resolve("stories260k").folder, folder)
    out = tmp_path / "x.trace"
    words = ["prove", str(folder), "--prompt", "a", "--out", str(out), "--max-new-tokens", "2"]
    assert cli.run([*words, "--attention", "eager"]) == 0
    from bitassay.verification.trace import read_trace

    assert read_trace(out).header.numerics.attention == "eager"


def test_a_folder_of_another_configuration_is_not_taken_for_finished(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(resolve("stories260k").folder, folder)
    words = ["quantize", str(folder), "--recipe", "w8", "--no-check", "--out", str(tmp_path / "w8")]
    assert cli.run(words) == 0
    assert cli.run(words) == 0
    assert "finished before" in capsys.readouterr().err
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06'))
    assert cli.run(words) == 2
    assert "give another --out" in capsys.readouterr().err
