import hashlib
from itertools import pairwise

import pytest
import torch

from bitassay.data.corpora import corpus
from bitassay.data.windows import Protocol, token_windows
from bitassay.errors import BitassayError


def test_ids_name_what_changes_the_number():
    assert Protocol().id == "wikitext2-raw/2048"
    assert Protocol(window_tokens=512, windows=12).id == "wikitext2-raw/512[n=12]"


@pytest.fixture(autouse=True)
def _short_texts(short_texts, monkeypatch):
    monkeypatch.setenv("BITASSAY_DATA", str(short_texts))


def test_all_windows_are_the_text_cut_in_order(stories):
    windows, source = token_windows(stories.tokenizer, Protocol(window_tokens=500))
    ids = stories.tokenizer(corpus("wikitext2-raw").text, verbose=False).input_ids
    assert windows.reshape(-1).tolist() == ids[: windows.numel()]
    assert len(ids) - windows.numel() < 500
    assert source.startswith("BITASSAY_DATA")


def test_chosen_windows_are_evenly_spaced_members_of_all(stories):
    every, _ = token_windows(stories.tokenizer, Protocol(window_tokens=500))
    some, _ = token_windows(stories.tokenizer, Protocol(window_tokens=500, windows=7))
    places = [int((every == window).all(1).nonzero()[0, 0]) for window in some]
    gaps = {b - a for a, b in pairwise(places)}
    assert places[0] == 0
    assert max(gaps) - min(gaps) <= 1
    assert places[-1] + max(gaps) >= len(every) - 1


@pytest.mark.parametrize("said", [{"windows": 10**6}, {"window_tokens": 10**8}])
def test_impossible_windows_say_what_is_possible(stories, said):
    with pytest.raises(BitassayError, match="window"):
        token_windows(stories.tokenizer, Protocol(**said))


@pytest.mark.parametrize(
    "said", [{"window_tokens": 0}, {"window_tokens": 1}, {"windows": 0}, {"windows": -1}]
)
def test_what_measures_nothing_is_no_protocol(said):
    with pytest.raises(BitassayError, match="window"):
        Protocol(**said)
    with pytest.raises(BitassayError, match="window"):
        Protocol.parse("wikitext2-raw", **said)


@pytest.mark.parametrize("text", ["wikitext2-raw/0", "wikitext2-raw/64[n=0]"])
def test_nothing_in_an_id_is_not_the_default(text):
    with pytest.raises(BitassayError, match="window"):
        Protocol.parse(text)


def test_the_published_join(monkeypatch, tmp_path):
    """Rows of the data set: a line with its newline, or an empty string; joined by two newlines."""
    folder = tmp_path / "wikitext2"
    folder.mkdir()
    (folder / "wiki.test.raw").write_text(" \n = Title = \n \n A line .\n")
    monkeypatch.setenv("BITASSAY_DATA", str(tmp_path))
    assert corpus("wikitext2-raw").text == "\n\n = Title = \n\n\n\n\n A line .\n"


def test_the_bundled_text_is_the_published_file():
    import gzip
    from importlib.resources import files

    raw = gzip.decompress((files("bitassay") / "data" / "bundled" / "wikitext2-test.raw.gz").read_bytes())
    # sha256 of wiki.test.raw as published with the data set
    assert (
        hashlib.sha256(raw).hexdigest() == "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
    )


def test_a_protocol_of_ones_own_text_says_what_is_in_it(stories, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("Once upon a time there was a dog. " * 200)
    protocol = Protocol.parse("notes.txt/64[n=3]")
    digest = hashlib.sha256((tmp_path / "notes.txt").read_bytes()).hexdigest()[:16]
    assert protocol.id == f"notes.txt@{digest}/64[n=3]"
    assert Protocol.parse(protocol.id) == protocol
    windows, source = token_windows(stories.tokenizer, protocol)
    assert windows.shape == (3, 64)
    assert source == f"notes.txt, sha256 {digest}..."


def test_windows_are_integers(stories):
    windows, _ = token_windows(stories.tokenizer, Protocol(window_tokens=64, windows=2))
    assert windows.shape == (2, 64)
    assert windows.dtype == torch.int64


@pytest.mark.parametrize(
    ("text", "given", "expected"),
    [
        ("ptb-new", {}, Protocol("ptb-new")),
        ("ptb-new", {"window_tokens": 512, "windows": 4}, Protocol("ptb-new", 512, 4)),
        ("c4-new/1024", {"windows": 3}, Protocol("c4-new", 1024, 3)),
        ("c4-new[n=2]", {"window_tokens": 64}, Protocol("c4-new", 64, 2)),
        ("c4-train-new/512[n=16]", {"window_tokens": 512}, Protocol("c4-train-new", 512, 16)),
    ],
)
def test_a_protocol_by_name_or_id(text, given, expected):
    assert Protocol.parse(text, **given) == expected
    assert Protocol.parse(expected.id) == expected


@pytest.mark.parametrize(
    "text", ["c4", "c4-train", "", "ptb-new/", "ptb-new/x", "ptb-new/8[n=]", "ptb-new/8[n=-1]"]
)
def test_what_is_no_protocol(text):
    with pytest.raises(BitassayError, match="no protocol is called"):
        Protocol.parse(text)


def test_an_id_and_options_that_disagree():
    with pytest.raises(BitassayError, match=r"says 512, --window says 1024"):
        Protocol.parse("ptb-new/512", window_tokens=1024)
    with pytest.raises(BitassayError, match=r"says 2, --windows says 3"):
        Protocol.parse("ptb-new[n=2]", windows=3)


@pytest.mark.parametrize("size", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_c4_is_cut_to_256_windows(size, stories, monkeypatch):
    if size == 500:  # which takes the whole text
        monkeypatch.delenv("BITASSAY_DATA")
    every, _ = token_windows(stories.tokenizer, Protocol("c4-train-new", size))
    assert len(every) == 256
    ids = stories.tokenizer(corpus("c4-train-new").text, verbose=False).input_ids
    assert every.flatten().tolist() == ids[: 256 * size]
    longer, _ = token_windows(stories.tokenizer, Protocol("c4-train-new", size, windows=2))
    assert torch.equal(longer, every[[0, 128]])
