"""Text files of users: wherever they were written, they say the same."""

import codecs
import gzip
import json

import pytest

from bitassay.data.corpora import corpus, pinned, prompts_from
from bitassay.data.windows import Protocol, token_windows
from bitassay.errors import BitassayError
from bitassay.models.identity import tokenizer
from bitassay.quantization.recipe.recipe import read_recipe
from bitassay.record.files import read_json, read_text, read_yaml
from bitassay.verification.committee.files import read_answers, read_canaries, read_items

LF = "Why is it blue?\nHow far? Grüße \x0b\u2028 end\n\n last"
WRITTEN = {
    "LF": lambda text: text.encode(),
    "CR LF": lambda text: text.replace("\n", "\r\n").encode(),
    "CR": lambda text: text.replace("\n", "\r").encode(),
    "mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "mark, CR LF": lambda text: codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode(),
    "mixed": lambda text: text.replace("\n", "\r\n", 1).encode(),
}
JSONL = "".join(json.dumps({"text": text, "prompt": text}) + "\n" for text in ("one\r\n two", "three"))
RECIPE = "name: mine\nweights:\n  format: int4\n  granularity: g64\n  symmetric: false\n"
READERS = {
    "text": ("a.txt", LF, read_text),
    "prompts": ("a.txt", LF, prompts_from),
    "prompts, JSON lines": ("a.jsonl", JSONL, prompts_from),
    "corpus": ("a.txt", LF, lambda path: corpus(str(path))),
    "corpus, JSON lines": ("a.jsonl", JSONL, lambda path: corpus(str(path))),
    "pinned corpus": ("a.txt", LF, lambda path: pinned(str(path))),
    "YAML": ("a.yaml", RECIPE, read_yaml),
    "recipe": ("a.yaml", RECIPE, read_recipe),
    "JSON": ("a.json", '{"a":\n1}', read_json),
    "items": ("items.txt", "a.trace\nb.trace\n", read_items),
    "plants": ("plants.json", '{"ada":\n{"x": "FAIL"}}', read_canaries),
    "answers": ("answers.json", '{"x":\n"PASS"}', read_answers),
}


@pytest.mark.parametrize("how", WRITTEN)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_read_does_not_depend_on_where_it_was_written(tmp_path, reader, how):
    name, text, read = READERS[reader]
    path = tmp_path / name
    path.write_bytes(text.encode())
    plain = read(path)
    path.write_bytes(WRITTEN[how](text))
    assert read(path) == plain


@pytest.mark.parametrize("how", WRITTEN)
def test_a_gzipped_copy_is_the_same_corpus(tmp_path, how):
    (tmp_path / "a.txt").write_bytes(LF.encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(WRITTEN[how](LF)))
    plain, packed = (corpus(pinned(str(tmp_path / name))) for name in ("a.txt", "a.txt.gz"))
    assert packed.text == plain.text
    assert packed.name.split("@")[1] == plain.name.split("@")[1]


def test_what_is_measured_does_not_depend_on_where_it_was_written(stories, tmp_path):
    text = "Once upon a time there was a little girl.\nShe had a red ball.\n\n" * 40
    found = {}
    for how, written in WRITTEN.items():
        (tmp_path / "own.txt").write_bytes(written(text))
        found[how] = token_windows(tokenizer(stories), Protocol(str(tmp_path / "own.txt"), 32, 8))[0]
    assert all(windows.equal(found["LF"]) for windows in found.values())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (LF.encode("utf-16"), "UTF-16 text, not UTF-8"),
        (codecs.BOM_UTF16_BE + LF.encode("utf-16-be"), "UTF-16 text, not UTF-8"),
        (LF.encode("utf-32"), "UTF-32 text, not UTF-8"),
        (LF.encode("utf-16-le"), "zero bytes"),
        (b"\x89PNG\r\n\x1a\n\0\0", "zero bytes"),
        ("Grüße".encode("latin-1"), "not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("reader", READERS)
def test_another_encoding_is_refused_by_its_name(tmp_path, reader, data, said):
    name, _, read = READERS[reader]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(BitassayError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert "UTF-8" in caught.value.remedy
