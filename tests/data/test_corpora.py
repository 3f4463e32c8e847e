"""Corpora and prompts: the bundled ones, a folder of one's own, and files with defects."""

import gzip
import hashlib
import json

import pytest

from bitassay.data.corpora import bundled_prompts, corpus, pinned, prompts_from, same_text
from bitassay.errors import BitassayError, MissingError


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


def c4(count: int) -> bytes:
    return gzip.compress("".join(json.dumps({"text": f"d{n}"}) + "\n" for n in range(count)).encode())


def test_c4_new_is_the_first_1100_documents_joined_by_a_space(data):
    (data / "c4").mkdir()
    (data / "c4" / "c4-validation.00000-of-00008.json.gz").write_bytes(c4(1200))
    found = corpus("c4-new")
    assert found.text == " ".join(f"d{n}" for n in range(1100))
    assert found.source == "BITASSAY_DATA c4/c4-validation.00000-of-00008.json.gz"


def test_what_follows_the_1100_documents_is_not_read(data):
    (data / "c4").mkdir()
    path = data / "c4" / "c4-validation.00000-of-00008.json.gz"
    path.write_bytes(gzip.compress(gzip.decompress(c4(1100)) + b"damaged"))
    assert corpus("c4-new").text.endswith(" d1099")


def test_the_training_documents_stand_in_for_c4_under_a_name_of_their_own(data):
    (data / "c4").mkdir()
    (data / "c4" / "c4_en_train_first1000.jsonl.gz").write_bytes(c4(3))
    assert corpus("c4-train-new").text == "d0 d1 d2"
    with pytest.raises(MissingError, match="c4-new: its text does not come with this package"):
        corpus("c4-new")


def test_ptb_new_is_stripped_lines_joined_by_a_space(data):
    (data / "ptb").mkdir()
    (data / "ptb" / "ptb.test.txt").write_text(" no it was n't \n but <unk> N\n")
    assert corpus("ptb-new").text == "no it was n't but <unk> N"


@pytest.mark.parametrize("name", ["ptb-new", "c4-new"])
def test_a_text_that_may_not_be_carried_is_asked_for(name):
    with pytest.raises(MissingError, match="set BITASSAY_DATA to a folder with"):
        corpus(name)


def test_texts_that_are_the_same():
    assert same_text("c4-train", "c4-train-new")
    assert not same_text("c4-train", "c4-new")


def test_a_file_of_ones_own_is_called_by_what_is_in_it(tmp_path):
    path, packed = tmp_path / "notes.txt", tmp_path / "chat.jsonl.gz"
    path.write_text("a text\n")
    packed.write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert corpus(str(path)).text == "a text\n"
    assert corpus(str(packed)).text == "one\n\ntwo"
    name = pinned(str(path))
    assert name == f"{path}@{hashlib.sha256(b'a text' + bytes([10])).hexdigest()[:16]}"
    assert pinned(name) == name
    assert corpus(name).text == "a text\n"
    copied = tmp_path / "again.txt"
    copied.write_text("a text\n")
    assert same_text(name, str(copied))
    assert not same_text(name, str(packed))
    assert not same_text(name, "c4-train")
    path.write_text("another\n")
    with pytest.raises(BitassayError, match="means another text"):
        corpus(name)


def test_a_file_of_ones_own_with_defects(tmp_path):
    with pytest.raises(BitassayError, match=r"missing.txt: No such file"):
        pinned(str(tmp_path / "missing.txt"))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(BitassayError, match=r"empty.txt: the corpus is empty"):
        corpus(str(tmp_path / "empty.txt"))
    (tmp_path / "chat.jsonl").write_text('{"prompt": "no text"}\n')
    with pytest.raises(BitassayError, match=r"chat.jsonl:1: not a JSON object with a field 'text'"):
        corpus(str(tmp_path / "chat.jsonl"))
    with pytest.raises(BitassayError, match=r"unknown corpus 'notes\.pdf'"):
        corpus("notes.pdf")
