"""A run folder belongs to one plan and computes every part once."""

import json

import pytest
import torch

from bitassay.errors import BitassayError
from bitassay.record.run import RunFolder, default_folder

PLAN = {"model": "m", "recipes": ["w4", "w8"], "seed": 0}


def never():
    pytest.fail("computed again")


def test_parts_are_computed_once(tmp_path):
    assert RunFolder(tmp_path / "run", PLAN).part("a", lambda: {"x": 1}) == {"x": 1}
    assert RunFolder(tmp_path / "run", dict(reversed(PLAN.items()))).part("a", never) == {"x": 1}


def test_a_part_that_fails_is_computed_again_and_the_others_are_kept(tmp_path):
    run = RunFolder(tmp_path / "run", PLAN)
    run.part("a", lambda: 1)

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.part("b", interrupted)
    again = RunFolder(tmp_path / "run", PLAN)
    assert (again.part("a", never), again.part("b", lambda: 2)) == (1, 2)


@pytest.mark.parametrize(
    ("change", "keys"),
    [({"seed": 1}, "seed"), ({"recipes": ["w8", "w4"], "model": "n"}, "model, recipes"), ({"new": 1}, "new")],
)
def test_another_plan_is_refused_and_the_difference_named(tmp_path, change, keys):
    RunFolder(tmp_path / "run", PLAN)
    with pytest.raises(BitassayError, match=rf"another plan \(different: {keys}\)"):
        RunFolder(tmp_path / "run", PLAN | change)
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == PLAN


def test_a_plan_that_lost_a_key_is_refused(tmp_path):
    RunFolder(tmp_path / "run", PLAN)
    with pytest.raises(BitassayError, match=r"different: seed\)"):
        RunFolder(tmp_path / "run", {key: PLAN[key] for key in ("model", "recipes")})


def test_other_code_is_refused_and_what_to_do_is_said(tmp_path):
    plan = PLAN | {"versions": {"bitassay": "1.0+aa", "torch": "2"}}
    RunFolder(tmp_path / "run", plan)
    RunFolder(tmp_path / "run", plan)
    said = "began with bitassay 1.0\\+aa, not 1.0\\+bb\n  try: finish it with what it began with, or give another --out"
    with pytest.raises(BitassayError, match=said):
        RunFolder(tmp_path / "run", PLAN | {"versions": {"bitassay": "1.0+bb", "torch": "2"}})
    with pytest.raises(BitassayError, match=r"different: seed, versions\)"):
        RunFolder(tmp_path / "run", plan | {"seed": 1, "versions": {}})
    RunFolder(tmp_path / "old", PLAN)
    with pytest.raises(BitassayError, match=r"bitassay none, not 1.0\+aa"):
        RunFolder(tmp_path / "old", plan)


def test_a_default_folder_is_of_the_work_whatever_does_it():
    first, other, more = (
        default_folder("study-m", plan)
        for plan in (PLAN | {"versions": {"a": "1"}}, PLAN | {"versions": {"a": "2"}}, PLAN | {"seed": 1})
    )
    assert first == other != more
    assert first.parent.name == "runs"


def test_the_id_is_of_the_plan(tmp_path):
    one, same, other = (
        RunFolder(tmp_path / str(i), plan) for i, plan in enumerate((PLAN, PLAN, PLAN | {"seed": 1}))
    )
    assert one.run_id == same.run_id != other.run_id


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(BitassayError, match="not empty and holds no run"):
        RunFolder(tmp_path, PLAN)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(BitassayError, match="a file is where a folder should be"):
        RunFolder(tmp_path / "run", PLAN)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_plan(tmp_path, content):
    RunFolder(tmp_path / "run", PLAN)
    (tmp_path / "run" / "plan.json").write_text(content)
    with pytest.raises(BitassayError, match=r"plan\.json"):
        RunFolder(tmp_path / "run", PLAN)


def test_a_damaged_part_is_named(tmp_path):
    run = RunFolder(tmp_path / "run", PLAN)
    run.part("cell-w4", lambda: 1)
    (tmp_path / "run" / "parts" / "cell-w4.json").write_text("{")
    with pytest.raises(BitassayError, match=r"parts/cell-w4\.json: not a JSON file"):
        run.part("cell-w4", never)


def test_tensors_come_back_and_damage_is_named(tmp_path):
    run = RunFolder(tmp_path / "run", PLAN)
    assert not run.has_tensors("base")
    run.write_tensors("base", {"h": torch.arange(3.0)})
    assert run.has_tensors("base")
    assert RunFolder(tmp_path / "run", PLAN).read_tensors("base")["h"].tolist() == [0, 1, 2]
    path = tmp_path / "run" / "parts" / "base.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BitassayError, match=r"parts/base\.safetensors: damaged"):
        run.read_tensors("base")
