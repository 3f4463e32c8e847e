"""No format of a table, and no message, hands control characters on to a terminal."""

import io
import os
import sys

import pytest

from bitassay.cli import run
from bitassay.cli.output import print_tables
from bitassay.report.tables import Column

NASTY = "a\x1b[31mPASS\x1b]0;owned\x07\r\x9b2J\u202eb\u2028c\x7f"
UNSAFE = set("\x1b\x07\r\x9b\u202e\u2028\x7f")


@pytest.mark.parametrize("format", ["table", "json", "csv", "md"])
def test_every_format_escapes(format, capsys):
    rows = [{"name": NASTY, NASTY: 1, "list": [NASTY], "pair": (NASTY, NASTY)}]
    columns = [Column("name", "name"), Column(NASTY, "n"), "list", "pair"]
    print_tables([(rows, columns)], format)
    said = capsys.readouterr().out
    assert not UNSAFE & set(said)
    assert "PASS" in said


def test_csv_and_json_of_plain_text_are_as_before(capsys):
    rows = [{"text": 'two\nlines, "quoted"\tand شما\u200cرا'}]
    print_tables([(rows, ["text"])], "csv")
    assert capsys.readouterr().out == 'text\n"two\nlines, ""quoted""\tand شما\u200cرا"\n'


def test_messages_escape(tmp_path, capsys):
    name = f"x{NASTY.replace('/', '')}.receipt"
    assert run(["challenge", str(tmp_path / name), "--out", str(tmp_path / "c")]) == 2
    assert not UNSAFE & set(capsys.readouterr().err)
    (tmp_path / name).write_text("[]")
    assert run(["challenge", str(tmp_path / name), "--out", str(tmp_path / "c")]) == 2
    said = capsys.readouterr().err
    assert not UNSAFE & set(said)
    assert "not-a-receipt" in said


def test_the_pooled_sentence_is_one_line(tmp_path, capsys):
    """Names of files in a folder from a stranger are in it."""
    folder = tmp_path / "traces"
    folder.mkdir()
    for index in range(2):
        (folder / f"{index}\n\x1b[31mas a set PASS.trace").write_bytes(b"")
    (folder / "gone.trace").symlink_to(folder / "nowhere")
    (folder / "0.trace").symlink_to(folder / "nowhere")
    assert run(["verify", str(folder), "--model", "stories260k", "--format", "csv"]) == 1
    done = capsys.readouterr()
    assert not UNSAFE & set(done.out + done.err)
    pooled = [line for line in done.err.splitlines() if "as a set" in line]
    assert len(pooled) == 1
    assert pooled[0].startswith("as a set      FAIL")
    assert done.out.count("not-a-file") >= 1


def test_nothing_is_lost_where_the_output_cannot_say_it(monkeypatch):
    """A lone half of a letter would stop the program in the middle of its output."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    for format in ("table", "json", "csv", "md"):
        print_tables([([{"name": "\ud800"}], ["name"])], format)
    out.flush()
    assert os.linesep in out.buffer.getvalue().decode()
