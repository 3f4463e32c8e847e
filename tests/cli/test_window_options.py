"""Windows that a model cannot read, and numbers of them that mean nothing, at the command line."""

import pytest


@pytest.fixture(autouse=True)
def _short_texts(short_texts, monkeypatch):
    monkeypatch.setenv("BITASSAY_DATA", str(short_texts))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "stories260k"], "the model reads 512"),  # 2048 is the published window
        (["eval", "stories260k", "--window", "513"], "--window 512"),
        (["eval", "stories260k", "--protocol", "c4-train-new/1024[n=2]"], "the model reads 512"),
        (["assay", "stories260k", "--recipe", "w4"], "the model reads 512"),
        (["search", "two-bit", "--model", "stories260k", "--window", "600"], "the model reads 512"),
        (["study", "run", "phase1", "--model", "stories260k"], "the model reads 512"),
        (["eval", "stories260k", "--window", "0"], "for --window."),
        (["assay", "stories260k", "--recipe", "w4", "--window", "0"], "for --window."),
        (["assay", "stories260k", "--recipe", "w4", "--windows", "0"], "for --windows."),
        (["eval", "stories260k", "--windows", "-1"], "for --windows."),
        (["search", "two-bit", "--model", "stories260k", "--windows", "0"], "for --windows."),
        (["study", "run", "exp1", "--model", "stories260k", "--tokens", "0"], "for --tokens."),
        (["study", "run", "exp1", "--model", "stories260k", "--tokens", "500"], "512 positions"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(bitassay, words, said):
    done = bitassay(*words)
    assert done.status != 0
    assert said in done.err
    assert "Traceback" not in done.err
    assert not done.out
    assert "quantizing" not in done.err


def test_no_windows_means_all_of_them(bitassay, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a cat. " * 60)
    words = ("eval", "stories260k", "--protocol", str(text), "--window", "64", "--format", "json")
    every, some = bitassay(*words, "--windows", "0"), bitassay(*words, "--windows", "2")
    assert every.status == some.status == 0
    assert '/64"' in every.out
    assert "/64[n=2]" in some.out
