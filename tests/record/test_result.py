"""run.json: one schema, which is written and read back; files of strangers and of version 0.1."""

import json

import pytest

from bitassay.errors import BitassayError
from bitassay.record.result import KINDS, check_values, new_run, parse_run, read_run, write_run
from bitassay.record.run import open_run_folder, run_plan
from report.example import BASE, RUN
from report.kinds import EVERY

ROWS = [{"recipe": "w4", "ppl": 20.5, "ppl_ci": (19.0, 22.0)}]


def test_what_is_written_is_read_back(tmp_path):
    folder = open_run_folder("evaluation-m", run_plan("evaluation", {"model": "m"}), tmp_path / "run")
    run = write_run(folder, model={"name": "m"}, rows=ROWS)
    assert run["rows"] == [{"recipe": "w4", "ppl": 20.5, "ppl_ci": [19.0, 22.0]}]
    assert (run["schema_version"], run["kind"], run["run_id"]) == (2, "evaluation", folder.run_id)
    assert run["environment"]["bitassay"]
    assert read_run(tmp_path / "run") == read_run(tmp_path / "run" / "run.json") == run


def test_a_result_that_is_not_finite_is_refused_before_it_is_written():
    with pytest.raises(BitassayError, match=r"bitassay eval.*rows\.0\.ppl is inf, not a finite number"):
        new_run("evaluation", rows=[{"ppl": float("inf")}])


@pytest.mark.parametrize("kind", EVERY)
def test_every_kind_is_read_as_it_stands(kind):
    assert parse_run(json.loads(json.dumps(EVERY[kind])), "here") == json.loads(json.dumps(EVERY[kind]))
    for name in KINDS[kind].names:
        with pytest.raises(BitassayError, match=f"{name} is missing"):
            parse_run({key: value for key, value in EVERY[kind].items() if key != name}, "here")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": 3}, "in schema 3; this version of bitassay reads schemas 1 and 2"),
        ({"schema_version": True}, "in schema True"),
        ({"schema_version": None}, "in schema None"),
        ({"kind": "essay"}, "of kind 'essay'; known are assay, evaluation, tasks"),
        ({"kind": None}, "without a kind"),
        ({"kind": ["bench"]}, "not a run of bitassay"),
        ({"model": "toy"}, "model: "),
        ({"created": 5}, "created: "),
        ({"trials": []}, "a run of kind 'assay' has no trials"),
        ({"rows": {}}, "rows is not a list of objects"),
        ({"pairs": [1]}, "pairs is not a list of objects"),
        ({"rows": [BASE] * 100_001}, "rows has more than 100000 entries"),
        ({"rows": [BASE | {"ppl": float("nan")}]}, "rows.0.ppl is nan, not a finite number"),
        ({"rows": [BASE | {"size_bytes": 10**400}]}, "rows.0.size_bytes is beyond 1e+200"),
        ({"rows": [BASE | {"recipe": "x" * 1_000_001}]}, "rows.0.recipe is longer than"),
        ({"rows": [BASE | {"ppl_ci": [25.0, 20.1]}]}, "rows.0.ppl_ci is no interval [low, high]"),
        ({"rows": [BASE | {"kl_ci": [0.1]}]}, "rows.0.kl_ci is no interval"),
        ({"rows": [BASE | {"kl_ci": ["0", "1"]}]}, "rows.0.kl_ci is no interval"),
        ({"rows": [BASE | {"top1_ci": 0.5}]}, "rows.0.top1_ci is no interval"),
        ({"recipes": json.loads("[" * 50 + "]" * 50)}, "levels"),
    ],
)
def test_what_is_no_run_is_refused_in_plain_words(change, said):
    with pytest.raises(BitassayError) as refused:
        parse_run(RUN | change, "here/run.json")
    assert said in refused.value.problem
    assert refused.value.problem.startswith("here/run.json: ")
    assert refused.value.remedy


def test_any_json_value_that_a_run_may_have_passes():
    check_values({"a": [1, 2.5, None, True, "x", {"b": []}], "b_ci": None, "c_ci": [1, 1.5]})
    check_values({"intervals": {"rows": {"ppl_ci": "Student's t"}}})


def test_a_run_of_version_0_1_is_read():
    """Its settings stood at the top level, and the model of the VeriLLM studies was a name."""
    head = {"schema": 1, "kind": "separability", "model": "toy", "created": "2026-01-01T00:00:00+00:00"}
    old = head | {"tokens": 16, "alpha": 0.01, "trials": 9, "rows": EVERY["separability"]["rows"]}
    run = parse_run(old | {"environment": {"cores": 2}}, "here")
    assert run["model"] == {"name": "toy"}
    assert run["settings"] == {"tokens": 16, "alpha": 0.01, "trials": 9}
    assert (run["missing"], run["rows"]) == ([], old["rows"])
    together = parse_run({"schema": 1, "kind": "studies", "runs": [old, old]}, "here")
    assert together["runs"][1]["settings"]["alpha"] == 0.01
    assert together["rows"] == [{"kind": "separability"} | row for row in old["rows"]] * 2
    assert together["model"] == {"name": "toy"}
    with pytest.raises(BitassayError, match="rows is missing"):
        parse_run(head, "here")


def test_a_folder_without_a_result(tmp_path):
    with pytest.raises(BitassayError, match=r"no run\.json"):
        read_run(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(BitassayError, match="not finished"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b'{"kind": "bench", "rows": [', b"\x89PNG\r\n", b"<!doctype html>", b"7"]
)
def test_what_is_no_run_at_all(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(BitassayError, match=r"file: not a (JSON file|run of)"):
        read_run(tmp_path / "file")
