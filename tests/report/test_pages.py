"""Every kind of run has a page, drawn from run.json alone; what has none is refused in plain words."""

import copy
import json
import random
import re

import pytest

from bitassay.errors import BitassayError
from bitassay.record.result import KINDS
from bitassay.report.pages import write_reports
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
    write_reports([folder_of(EVERY[kind])], tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text()
    assert source.rstrip().endswith("</html>")
    assert "toy" in source or kind in ("tasks", "matmul")
    # A label that matplotlib wrote as a formula, or a number in the form of a programming language.
    assert not re.search(r"math(default|text|regular|rm|it)|\\frac|\$\\|\$[^<]*\^", source)
    assert not re.search(r">\s*(nan|None|inf)\s*<", source)


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


def draw_damaged(folder_of, out, kind, seed) -> str | None:
    """What is said of a run with one damage; None where it is drawn all the same."""
    rng, run = random.Random(seed), copy.deepcopy(EVERY[kind])
    path = rng.choice([path for path in places(run) if path])
    if rng.random() < 0.4:
        without(run, path)
    else:
        replaced(run, path, rng.choice(JUNK))
    try:
        write_reports([folder_of(run)], out)
    except BitassayError as error:
        return error.problem


def is_plain(problem, folder):
    return (
        str(folder) in problem
        and "\n" not in problem
        and len(problem) < 1000
        and not PYDANTIC.search(problem)
    )


@pytest.mark.parametrize(("kind", "seed"), [("tasks", 1), ("attack", 2), ("matmul", 3), ("separability", 4)])
def test_a_damaged_run_is_drawn_or_refused(folder_of, tmp_path, kind, seed):
    """Whatever is missing or of another kind: a page, or one line that names the file."""
    said = draw_damaged(folder_of, tmp_path / "page.html", kind, seed)
    assert said is None or is_plain(said, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY)
def test_many_damages(folder_of, tmp_path, kind):
    said = [draw_damaged(folder_of, tmp_path / "page.html", kind, seed) for seed in range(12)]
    assert any(said)
    assert all(is_plain(problem, tmp_path) for problem in said if problem)


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("bench", {"machine": {}}),
        ("search", {"settings": {}}),
        ("analysis", {"layers": []}),
        ("assay", {"rows": []}),
        ("generation", {"texts": {}}),
        ("generation", {"prompts": ["one of two"]}),
        ("thresholds", {"rows": [{}]}),
        ("attack", {"rows": [{"attack": "a"}]}),
    ],
)
def test_a_run_without_what_its_page_needs_is_refused(folder_of, tmp_path, kind, damage):
    with pytest.raises(BitassayError, match="not as this version writes it") as refused:
        write_reports([folder_of(EVERY[kind] | damage)], tmp_path / "page.html")
    assert is_plain(refused.value.problem, tmp_path)


@pytest.mark.parametrize(
    ("kind", "table", "field", "value"),
    [
        ("assay", "rows", "size_bytes", -1),
        ("assay", "rows", "ppl", -20.0),
        ("assay", "rows", "kl_mean", "little"),
        ("assay", "rows", "top1_agreement", 97.1),
        ("assay", "rows", "ppl_delta_ci", [2.0, 3.0]),
        ("assay", "rows", "traces", 8.5e300),
        ("assay", "rows", "p_value", 1.5),
        ("assay", "rows", "verdict", "MAYBE"),
        ("assay", "rows", "recipe", "x" * 10_001),
        ("assay", "rows", "hidden_distance_by_layer", [0.1]),
        ("bench", "rows", "decode_tok_s", -1.0),
        ("bench", "rows", "batch", [1]),
        ("tasks", "rows", "n", "many"),
        ("tasks", "rows", "p_holm", -0.5),
        ("generation", "rows", "bleu", 101.0),
        ("attack", "honest", "n", {}),
        ("attack", "rows", "auc", 2.0),
        ("attack", "rows", "sees", "a little"),
        ("separability", "rows", "tpr_at_fpr", -0.5),
        ("eight-bit", "rows", "direct_acc", 50.0),
        ("eight-bit", "claims", "verdict", "true"),
        ("replication", "rows", "bits_per_weight", -2.0),
        ("search", "rows", "kl_mean", -0.1),
        ("analysis", "matrices", "layer", -1),
        ("thresholds", "rows", "false_positive_rate", 5),
    ],
)
def test_what_cannot_be_is_refused(folder_of, tmp_path, kind, table, field, value):
    run = copy.deepcopy(EVERY[kind])
    run[table][-1][field] = value
    with pytest.raises(BitassayError) as refused:
        write_reports([folder_of(run)], tmp_path / "page.html")
    assert is_plain(refused.value.problem, tmp_path)


def test_studies_of_version_0_1_have_a_page(folder_of, tmp_path):
    """They were a list of runs and nothing else, each with the name of its model."""
    parts = []
    for kind in ("experiments", "separability"):
        run = EVERY[kind]
        parts.append({"schema": 1, "kind": kind, "model": "toy", "rows": run["rows"]} | run["settings"])
    write_reports([folder_of({"schema": 1, "kind": "studies", "runs": parts})], tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text()
    assert "Studies of toy" in source
    assert "Share of 100 runs of each prover" in source


def test_runs_of_any_kind_share_a_page(folder_of, tmp_path):
    folders = [folder_of(EVERY[kind], kind) for kind in ("assay", "studies", "thresholds", "bench")]
    write_reports(folders, tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text()
    assert source.count("<article") == 4
    for title in ("Experiments", "Separability", "Thresholds", "Quality against size", "Roofline"):
        assert source.count(f"<h2>{title}</h2>") == 1
    ids = re.findall(r' id="([^"]*)"', source)
    assert len(ids) == len(set(ids))


def test_a_long_table_is_cut_and_says_so(folder_of, tmp_path):
    rows = EVERY["tasks"]["rows"] * 600
    write_reports([folder_of(EVERY["tasks"] | {"rows": rows})], tmp_path / "page.html")
    assert "200 more rows are in run.json" in (tmp_path / "page.html").read_text()
