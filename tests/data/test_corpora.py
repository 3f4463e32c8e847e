"""Corpora and prompts: the bundled ones, a folder of one's own, and files with defects."""

import gzip
import json

import pytest

from bitassay.data.corpora import bundled_prompts, corpus, prompts_from
from bitassay.errors import BitassayError


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty folder of data sets."""
    (tmp_path / "wikitext2").mkdir()
    monkeypatch.setenv("BITASSAY_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch):
    monkeypatch.delenv("BITASSAY_DATA", raising=False)


def test_bundled_wikitext_is_the_whole_test_set():
    found = corpus("wikitext2-raw")
    assert found.source == "bundled wikitext2-test.raw.gz"
    assert found.text.count("\n\n") == 4357  # the published test set has 4358 rows
    assert "Robert Boulter is an English film , television and theatre actor" in found.text


def test_bundled_c4_is_a_thousand_documents():
    found = corpus("c4-train")
    assert found.source == "bundled c4-train-1000.jsonl.gz"
    assert len(found.text) == 2_189_457 + 999 * 2


def test_documents_of_json_lines_are_joined_by_an_empty_line(data):
    (data / "c4").mkdir()
    path = data / "c4" / "c4_en_train_first1000.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n\n{"text": "two\\nlines"}\n'))
    assert corpus("c4-train").text == "one\n\ntwo\nlines"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n{"prompt": "two"}\n'))
    with pytest.raises(BitassayError, match=rf"{path}:2: not a JSON object with a field 'text'"):
        corpus("c4-train")


def test_rows_are_joined_as_in_the_published_protocol(data):
    (data / "wikitext2" / "wiki.test.raw").write_text(" one \n \n two\x0bthree\n")
    found = corpus("wikitext2-raw")
    assert found.text == " one \n\n\n\n\n two\x0bthree\n"  # rows " one \n", "", " two\x0bthree\n"
    assert found.source == "BITASSAY_DATA wikitext2/wiki.test.raw"


def test_gzipped_data_is_preferred(data):
    (data / "wikitext2" / "wiki.test.raw").write_text("plain\n")
    (data / "wikitext2" / "wiki.test.raw.gz").write_bytes(gzip.compress(b"packed\n"))
    assert corpus("wikitext2-raw").text == "packed\n"


def test_a_data_folder_without_the_corpus_gives_the_bundled_one(data):
    assert corpus("wikitext2-raw").source.startswith("bundled")


def test_a_data_folder_that_is_not_there(monkeypatch):
    monkeypatch.setenv("BITASSAY_DATA", "/nowhere/data")
    with pytest.raises(BitassayError, match="BITASSAY_DATA=/nowhere/data: no such folder"):
        corpus("wikitext2-raw")


@pytest.mark.parametrize("content", ["", "\n \n\t\n"])
def test_an_empty_corpus(data, content):
    path = data / "wikitext2" / "wiki.test.raw"
    path.write_text(content)
    with pytest.raises(BitassayError, match=rf"{path}: the corpus is empty"):
        corpus("wikitext2-raw")


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-20], lambda b: b[:5], lambda b: b[:50] + b"\0" * 20 + b[70:], lambda b: b"text"]
)
def test_a_damaged_gz(data, damage):
    path = data / "wikitext2" / "wiki.test.raw.gz"
    path.write_bytes(damage(gzip.compress(bytes(range(32, 127)) * 3)))
    with pytest.raises(BitassayError, match=str(path)):
        corpus("wikitext2-raw")


def test_text_in_another_encoding(data):
    (data / "wikitext2" / "wiki.test.raw").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(BitassayError, match="not UTF-8"):
        corpus("wikitext2-raw")


def test_unknown_corpus():
    with pytest.raises(BitassayError, match=r"unknown corpus 'wikitext'; the nearest are 'wikitext2-raw'"):
        corpus("wikitext")


def test_bundled_prompts():
    prompts = bundled_prompts()
    assert len(prompts) == 800
    assert len(set(prompts)) > 790
    assert prompts == bundled_prompts()
    assert prompts[0].startswith("Compose an engaging travel blog post about a recent trip to Hawaii")


def test_prompts_from_text(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n  \ntwo words\n")
    assert prompts_from(tmp_path / "p.txt") == ["one", "two words"]


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_prompts_from_json_lines(tmp_path, name):
    text = "".join(json.dumps({"prompt": p, "other": 1}) + "\n" for p in ("one\nline", "zwei ä"))
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert prompts_from(tmp_path / name) == ["one\nline", "zwei ä"]


@pytest.mark.parametrize(
    "line", ["{", '{"text": "x"}', "[1]", '"x"', "3", '{"prompt": ""}', '{"prompt": 3}', '{"prompt": null}']
)
def test_a_bad_line_is_named(tmp_path, line):
    (tmp_path / "p.jsonl").write_text('{"prompt": "good"}\n' + line + "\n")
    with pytest.raises(BitassayError, match=r"p\.jsonl:2: "):
        prompts_from(tmp_path / "p.jsonl")


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_no_prompts(tmp_path, name):
    (tmp_path / name).write_text("\n  \n")
    with pytest.raises(BitassayError, match="no prompts in it"):
        prompts_from(tmp_path / name)


def test_no_such_prompts_file(tmp_path):
    with pytest.raises(BitassayError, match=r"p\.txt: No such file"):
        prompts_from(tmp_path / "p.txt")
