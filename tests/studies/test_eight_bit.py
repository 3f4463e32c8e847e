"""The INT8/FP8 studies on a tiny model: cells, resuming, what the run says. Cells are done inside this process
but for one test, which kills processes."""

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval")

import bitassay
from bitassay.data.windows import Protocol
from bitassay.errors import BitassayError, MissingError
from bitassay.evaluation.quality import evaluate
from bitassay.evaluation.statistics import holm, paired_difference
from bitassay.models.identity import Identity
from bitassay.models.source import resolve
from bitassay.record.run import RunFolder
from bitassay.report.findings import supported
from bitassay.studies import run as run_module
from bitassay.studies.cells import CellRunner, in_turn, read_findings
from bitassay.studies.eight_bit.run import run_eight_bit
from bitassay.studies.eight_bit.study import STUDIES, Study, both_sides, eight_bit_plan, weight_only
from bitassay.studies.variants import Variant, VariantPlan
from workers import in_process

SMALL = Study(
    "small",
    "a few variants",
    (
        Variant("bf16"),
        *(weight_only(format, "g128", kind) for format in ("int8", "fp8") for kind in ("fake", "real")),
        weight_only("fp8", "tensor", "fake"),
    ),
)
PLAN = eight_bit_plan("task3.1", "stories260k", 2, Protocol(windows=5, window_tokens=48), dtype="float32")
SMALL_PLAN = replace(PLAN, study="small", variants=SMALL.variants)


@pytest.fixture(autouse=True)
def _bundled_questions(monkeypatch):
    monkeypatch.delenv("BITASSAY_DATA", raising=False)


@pytest.fixture
def here(monkeypatch):
    """Cells inside this process, and the study `small`."""
    in_process(monkeypatch)
    monkeypatch.setitem(STUDIES, "small", SMALL)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of `small`; tests must not change its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("BITASSAY_DATA", raising=False)
        in_process(patch)
        patch.setitem(STUDIES, "small", SMALL)
        return run_eight_bit(SMALL_PLAN, out=tmp_path_factory.mktemp("run") / "r")


def test_studies_have_the_cells_of_the_document():
    names = [variant.name for variant in STUDIES["task3.1"].variants]
    assert len(names) == len(set(names)) == 1 + 2 * 6 * 2
    assert {"int8-tensor-fake", "fp8-g512-real"} <= set(names)
    tools = {(v.format, v.smoothed, v.torchao) for v in STUDIES["task3.3"].variants[1:]}
    assert len(tools) == 7
    assert ("fp8", True, True) not in tools
    for study in STUDIES.values():
        recipes = {v.recipe.name: v.recipe.recipe_id for v in study.variants if v.recipe is not None}
        assert len(set(recipes.values())) == len(recipes)
        for dtype, name in (("bfloat16", "bf16"), ("float32", "fp32")):
            assert eight_bit_plan(study.name, "stories260k", 2, dtype=dtype).base == name


def test_a_plan_survives_its_file():
    assert VariantPlan.of(json.loads(json.dumps(PLAN.to_dict()))) == PLAN


def test_questions_are_spread_over_subjects():
    assert len(replace(PLAN, questions=200).subjects) == 57
    assert sum(replace(PLAN, questions=200).subjects.values()) == 200
    assert set(replace(PLAN, questions=200).subjects.values()) == {3, 4}
    assert list(replace(PLAN, questions=1).subjects.values()) == [1]


def test_more_questions_than_are_there(tmp_path):
    with pytest.raises(BitassayError, match="10 of a subject of MMLU; 5 come with the package"):
        run_eight_bit(replace(PLAN, questions=570), out=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_text_figures_are_those_of_evaluate(done, stories):
    run, _ = done
    row = next(row for row in run["rows"] if row["variant"] == "fp8-g128-fake")
    recipe = weight_only("fp8", "g128", "fake").recipe
    wanted = evaluate(bitassay.quantize(stories, recipe), against=stories, protocol=PLAN.protocol).quality
    for name, value in wanted.to_dict().items():
        assert row[name] == pytest.approx(value, abs=1e-6), name


def test_real_and_fake_give_the_same_answers(done):
    run, folder = done
    pairs = [pair for pair in run["pairs"] if pair["family"] == "real against fake"]
    assert len(pairs) == 2
    assert all(abs(pair["kl"]) < 1e-6 and pair["direct_difference"] == 0 for pair in pairs)
    names = [variant.name for variant in SMALL.variants]
    fake, real = (
        json.loads((folder / f"parts/questions-{names.index(f'fp8-g128-{kind}'):02d}.json").read_text())
        for kind in ("fake", "real")
    )
    for one, other in zip(fake["direct"]["answers"], real["direct"]["answers"], strict=True):
        assert one == pytest.approx(other, abs=1e-3)


def test_differences_follow_from_the_answers(done):
    run, folder = done
    right = [
        json.loads((folder / f"parts/questions-{place:02d}.json").read_text())["direct"]["right"]
        for place in range(len(SMALL.variants))
    ]
    p_values = [paired_difference(right[0], one).p_value for one in right[1:]]
    assert [row["direct_p_value"] for row in run["rows"][1:]] == p_values
    assert [row["direct_p_holm"] for row in run["rows"][1:]] == holm(p_values)
    assert [row["direct_acc"] for row in run["rows"]] == [sum(one) / 2 for one in right]
    assert {row["direct_n"] for row in run["rows"]} == {2}
    for family in {pair["family"] for pair in run["pairs"]}:
        members = [pair for pair in run["pairs"] if pair["family"] == family]
        assert [m["direct_p_holm"] for m in members] == holm([m["direct_p_value"] for m in members])


def test_groups_that_do_not_divide_a_row_are_named(done):
    """stories260k has rows of 64 and of 172."""
    assert done[0]["uneven_groups"] == {"g128": [64, 172]}


def test_a_run_goes_on_and_ends_the_same(done, here, tmp_path, monkeypatch):
    """Stopped between two cells and in the middle of another, with more of it finished before."""
    folder = shutil.copytree(done[1], tmp_path / "r")
    for part in ("run.json", "parts/text-01-fp8-tensor-fake.safetensors", "parts/questions-02.json"):
        (folder / part).unlink()
    for part in folder.glob("parts/text-00-*"):
        part.unlink()
    worked = []
    work = CellRunner.work

    def stops(self, cell, folder):
        worked.append(cell.name)
        if len(worked) == 3:
            raise KeyboardInterrupt
        work(self, cell, folder)

    monkeypatch.setattr(CellRunner, "work", stops)
    with pytest.raises(KeyboardInterrupt):
        run_eight_bit(SMALL_PLAN, out=folder, jobs=1)
    (folder / "parts/text-01-fp8-tensor-fake.safetensors").unlink()  # stopped in the middle of a cell
    run, _ = run_eight_bit(SMALL_PLAN, out=folder, jobs=1)
    assert worked == ["text-00", "text-01", "questions-02", "text-01", "questions-02"]
    for name in ("rows", "pairs", "claims"):
        assert run[name] == done[0][name]


def test_another_model_under_the_same_name_is_refused(tmp_path):
    folder = RunFolder(tmp_path / "r", PLAN.described("eight-bit", "0" * 64))
    with pytest.raises(BitassayError, match="not those that this study began with"):
        CellRunner(folder.plan)


def test_other_questions_are_refused():
    described = PLAN.described("eight-bit", Identity(resolve("stories260k")).weights_digest)
    CellRunner(described)
    described["questions"]["digest"] = "0" * 64
    with pytest.raises(BitassayError, match="questions of MMLU here are not those"):
        CellRunner(described)


def test_a_part_of_a_study():
    def names(*only):
        plan = eight_bit_plan("task3.1", "stories260k", 2, only=only)
        return [variant.name for variant in plan.variants]

    assert names("row") == ["bf16", "int8-row-fake", "int8-row-real", "fp8-row-fake", "fp8-row-real"]
    assert names("int8-g64-fake", "fp8-row-real") == ["bf16", "int8-g64-fake", "fp8-row-real"]
    with pytest.raises(BitassayError, match="--only raw: no variant is called that"):
        names("raw")
    for windows in (0, -3):
        with pytest.raises(BitassayError, match="leave nothing to measure"):
            eight_bit_plan("task3.1", "stories260k", 2, Protocol(windows=windows))


def test_intervals_of_a_family_hold_together(done):
    run, _ = done
    right = read_findings(
        RunFolder(done[1], json.loads((done[1] / "plan.json").read_text())), SMALL_PLAN
    ).right
    families = [pair["family"] for pair in run["pairs"]]
    assert sorted(families) == ["INT8 against FP8", "real against fake", "real against fake"]
    for pair in run["pairs"]:
        sides = (right[pair[place]]["direct"] for place in ("first", "second"))
        alpha = 0.05 / families.count(pair["family"])
        one = paired_difference(*sides, level=1 - alpha, alpha=alpha)
        assert pair["direct_difference_ci"] == list(one.interval)
        assert pair["direct_visible_difference"] == one.visible_difference


def test_only_what_an_interval_bears_out_is_said(done):
    pair = done[0]["pairs"][0] | {"ppl_ci": None, "direct_p_holm": 1.0, "generate_p_holm": 0.04}
    pair |= {"kl_ci": [-0.2, 0.1], "generate_difference": -0.1}
    [said] = supported({"pairs": [pair]})
    assert said.endswith("(generate)")
    assert " is less accurate than " in said
    [said, _] = supported({"pairs": [pair | {"kl_ci": [-0.2, -0.1]}]})
    assert " is nearer to the base than " in said


def test_a_variant_that_cannot_be_made_says_why(here, tmp_path, monkeypatch):
    def refuses(*_, **__):
        raise MissingError("torchao: no such products", "another device")

    plan = replace(SMALL_PLAN, variants=(Variant("bf16"), both_sides("fp8", False, True)))
    if find_spec("torchao") is None:
        with pytest.raises(MissingError, match="torchao is not installed"):
            run_eight_bit(plan, out=tmp_path / "r")
        assert not (tmp_path / "r").exists()
    monkeypatch.setattr("bitassay.studies.cells.torchao_model", refuses)
    monkeypatch.setattr("bitassay.studies.eight_bit.run.require_torchao", lambda: None)
    monkeypatch.setattr("bitassay.record.versions.version", lambda _name: "0")
    run, _ = run_eight_bit(plan, out=tmp_path / "r")
    assert run["rows"][1]["refused"] == "torchao: no such products"
    assert "direct_acc" not in run["rows"][1]
    assert run["pairs"] == []


def test_blocks_that_are_read_at_once_begin_with_different_variants():
    for blocks in (1, 2, 3):
        orders = [in_turn(PLAN.variants, block, blocks) for block in range(blocks)]
        assert orders[0] == list(PLAN.variants)
        assert len({order[0].name for order in orders}) == blocks
        assert all(sorted(v.name for v in order) == sorted(v.name for v in PLAN.variants) for order in orders)


def test_a_process_with_other_code_does_no_cell(here, tmp_path):
    described = PLAN.described("eight-bit", Identity(resolve("stories260k")).weights_digest)
    began = described | {"versions": described["versions"] | {"bitassay": "0.0.1+abc"}}
    with pytest.raises(BitassayError, match=r"this study began with bitassay 0.0.1\+abc, not"):
        CellRunner(began)


def test_as_many_processes_as_there_is_room_and_work_for(monkeypatch):
    """stories260k: 512 tokens, of whose logits 6 windows of 48 take 0.6 MB in fp32."""
    folder = resolve("stories260k").folder
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    one = 2 * weights + 6 * 48 * 512 * 4

    def size(cells, available, jobs=None):
        monkeypatch.setattr(run_module.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
        return run_module.workers_and_threads(PLAN, folder, cells, jobs)

    monkeypatch.setattr(run_module.os, "sched_getaffinity", lambda _: range(4), raising=False)
    assert size(9, 100 * one) == (4, 1)
    assert size(9, 2 * one) == (2, 2)
    assert size(9, one // 2) == (1, 4)
    assert size(1, 100 * one) == (1, 4)
    assert size(9, one, jobs=3) == (3, 1)
