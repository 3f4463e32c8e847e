"""Every kind of run has a page, drawn from run.json alone; what has none is refused in plain words."""

import copy
import json
import random
import re

import pytest

from bitassay.errors import BitassayError
from bitassay.report.pages import KINDS, write_pages
from report.kinds import EVERY

PYDANTIC = re.compile(
    r"Input should|Field required|validation error|pydantic|value_error|\btype=", re.IGNORECASE
)


@pytest.fixture
def folder_of(tmp_path):
    """Writes a run folder and returns it."""

    def write(run, name="run"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "run.json").write_text(json.dumps(run))
        return tmp_path / name

    return write


def test_there_is_an_example_of_every_kind():
    assert EVERY.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", EVERY)
def test_every_kind_has_a_page(folder_of, tmp_path, kind):
    write_pages([folder_of(EVERY[kind])], tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text()
    assert source.rstrip().endswith("</html>")
    assert "toy" in source or kind in ("tasks", "matmul")
    # A label that matplotlib wrote as a formula, or a number in the form of a programming language.
    assert not re.search(r"math(default|text|regular|rm|it)|\\frac|\$\\|\$[^<]*\^", source)
    assert not re.search(r">\s*(nan|None|inf)\s*<", source)


@pytest.mark.parametrize("kind", EVERY)
def test_a_run_json_is_as_good_as_its_folder(folder_of, tmp_path, kind):
    folder = folder_of(EVERY[kind])
    write_pages([folder / "run.json"], tmp_path / "a.html")
    write_pages([folder], tmp_path / "b.html")
    assert (tmp_path / "a.html").read_text() == (tmp_path / "b.html").read_text()


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield from places(one, (*path, key))


def without(run, path):
    *above, last = path
    for key in above:
        run = run[key]
    del run[last]


def replaced(run, path, value):
    *above, last = path
    for key in above:
        run = run[key]
    run[last] = value


JUNK = [None, "x", -1, 1e308, [], {}, True, ["x", 1], float("nan"), "<b>"]


@pytest.mark.parametrize("kind", EVERY)
def test_a_damaged_run_is_drawn_or_refused(folder_of, tmp_path, kind):
    """Whatever is missing or of another kind: a page, or one line that names the file."""
    rng, known = random.Random(7), [path for path in places(EVERY[kind]) if path]
    refused = []
    for _ in range(8):
        run, path = copy.deepcopy(EVERY[kind]), rng.choice(known)
        if rng.random() < 0.4:
            without(run, path)
        else:
            replaced(run, path, rng.choice(JUNK))
        folder = folder_of(run)
        try:
            write_pages([folder], tmp_path / "page.html")
        except BitassayError as error:
            refused.append(error.problem)
    assert refused
    for problem in refused:
        assert str(tmp_path) in problem
        assert "\n" not in problem
        assert len(problem) < 1000
        assert not PYDANTIC.search(problem)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"schema": 2}, "in schema 2; this version reads schema 1"),
        ({"schema": None}, "in schema None"),
        ({"kind": "essay"}, "of kind 'essay'; known are assay, tasks"),
        ({"kind": None}, "without a kind"),
        ({"kind": ["bench"]}, "not a run of bitassay"),
    ],
)
def test_what_has_no_page_says_what_was_seen(folder_of, tmp_path, given, said):
    folder = folder_of(EVERY["bench"] | given)
    with pytest.raises(BitassayError, match=re.escape(str(folder / "run.json"))) as refused:
        write_pages([folder], tmp_path / "page.html")
    assert said in refused.value.problem


@pytest.mark.parametrize(
    "content", [b"", b'{"kind": "bench", "rows": [', b"\x89PNG\r\n", b"<!doctype html>", b"7"]
)
def test_what_is_no_run_at_all(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(BitassayError, match=r"file: not a (JSON file|run of)"):
        write_pages([tmp_path / "file"], tmp_path / "page.html")


def test_only_assays_and_only_studies_of_verifiers_share_a_page(folder_of, tmp_path):
    folders = {kind: folder_of(run, kind) for kind, run in EVERY.items()}
    out = tmp_path / "page.html"
    write_pages([folders["assay"], folders["assay"]], out)
    write_pages([folders["experiments"], folders["studies"], folders["thresholds"]], out)
    assert out.read_text().count("<h2>Experiments</h2>") == 2
    for pair in (("assay", "bench"), ("bench", "bench"), ("search", "assay"), ("studies", "assay")):
        with pytest.raises(BitassayError, match="cannot share a page") as refused:
            write_pages([folders[kind] for kind in pair], out)
        assert f"({pair[1]})" in refused.value.problem
