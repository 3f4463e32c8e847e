"""Tasks on several models: rows, resuming, and what is refused."""

import importlib.util
import json

import pytest

import bitassay
from bitassay.errors import BitassayError, MissingError
from bitassay.evaluation.statistics import holm, mcnemar

pytest.importorskip("lm_eval")
from lm_eval.models.huggingface import HFLM

from bitassay.data.tasks import TaskSource
from bitassay.evaluation import harness
from bitassay.evaluation.tasks import registry
from bitassay.evaluation.tasks.load import load_tasks, protocol_id
from bitassay.evaluation.tasks.registry import TASKS, find_task
from bitassay.evaluation.tasks.run import (
    Candidate,
    answer,
    evaluate_tasks,
    loaded_candidate,
    quantized_candidate,
)

NEW_TOKENS = 16  # of generated answers, which the tiny model does not end
ASKED = ["mmlu_anatomy", "mmlu_anatomy_generative", "hellaswag", "arc_challenge"]


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch):
    monkeypatch.delenv("BITASSAY_DATA", raising=False)


@pytest.fixture(scope="module")
def run(stories, tmp_path_factory):
    """Three models on four tasks, five items each, and the folder of that run."""
    out = tmp_path_factory.mktemp("tasks") / "run"
    models = [
        loaded_candidate(stories, "base"),
        *(quantized_candidate(stories, name) for name in ("w4", "w2")),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("BITASSAY_DATA", raising=False)
        patch.setattr(harness, "DEFAULT_NEW_TOKENS", NEW_TOKENS)
        return evaluate_tasks(models, ASKED, limit=5, out=out)[0], out, models


def test_rows_are_by_task_metric_and_model(run):
    rows = run[0]["rows"]
    kinds = [("mmlu_anatomy", "acc"), ("mmlu_anatomy_generative", "exact_match")]
    kinds += [(task, metric) for task in ("hellaswag", "arc_challenge") for metric in ("acc", "acc_norm")]
    assert [(row["task"], row["metric"], row["model"]) for row in rows] == [
        (*kind, model) for kind in kinds for model in ("base", "w4", "w2")
    ]
    assert {row["n"] for row in rows} == {5}
    assert [row["protocol"] for row in rows[::3]][:3] == [
        "mmlu_anatomy/5-shot[n=5 of the bundled slice]",
        "mmlu_anatomy_generative/5-shot[n=5 of the bundled slice]",
        "hellaswag/0-shot[n=5 of the bundled slice]",
    ]


def test_comparisons_follow_from_who_got_which_item_right(run):
    rows, out = run[0]["rows"], run[1]
    from bitassay.record.files import read_json

    for start in range(0, len(rows), 3):
        base, *others = rows[start : start + 3]
        assert base["against"] is base["difference"] is base["p_value"] is None
        p_values = []
        right = [
            [
                item["metrics"][row["metric"]] == 1
                for item in read_json(out / f"parts/m{place}-{row['task']}.json")["items"]
            ]
            for place, row in enumerate((base, *others))
        ]
        for row, found in zip(others, right[1:], strict=True):
            lost = sum(a and not b for a, b in zip(right[0], found, strict=True))
            gained = sum(b and not a for a, b in zip(right[0], found, strict=True))
            assert (row["lost"], row["gained"]) == (lost, gained)
            assert row["difference"] == pytest.approx(row["value"] - base["value"])
            assert row["difference_ci"][0] <= row["difference"] <= row["difference_ci"][1]
            assert row["p_value"] == mcnemar(lost, gained)
            assert row["visible_difference"] > 1  # five items show nothing
            p_values.append(row["p_value"])
        assert [row["p_holm"] for row in others] == holm(p_values)


def test_unparsed_texts_are_counted_and_wrong(run):
    """The tiny model tells stories instead of naming a letter."""
    for row in run[0]["rows"]:
        if row["metric"] == "exact_match":
            assert (row["unparsed"], row["value"], row["n"]) == (5, 0, 5)
        else:
            assert row["unparsed"] is None


def test_a_finished_run_asks_no_model_again(run):
    first, out, models = run

    def never():
        raise AssertionError("the model was made again")

    again = [Candidate(one.name, one.about, never) for one in models]
    found, _ = evaluate_tasks(again, ASKED, limit=5, out=out)
    as_lists = [
        {key: list(v) if isinstance(v, tuple) else v for key, v in row.items()} for row in first["rows"]
    ]
    assert [
        {key: list(v) if isinstance(v, tuple) else v for key, v in row.items()} for row in found["rows"]
    ] == as_lists


def test_another_plan_is_not_mixed_in(run):
    with pytest.raises(BitassayError, match=r"another plan .*limit"):
        evaluate_tasks(run[2], ASKED, limit=4, out=run[1])


@pytest.mark.parametrize("task", ["hellaswag", "arc_challenge", "mmlu_anatomy", "mmlu_anatomy_generative"])
def test_answers_are_those_of_lm_evals_hf_model(run, stories, task, monkeypatch):
    from bitassay.record.files import read_json

    monkeypatch.setattr(HFLM, "max_gen_toks", NEW_TOKENS)
    hf = HFLM(pretrained=stories, tokenizer=stories.tokenizer, batch_size=2)
    expected = answer(hf, load_tasks(task, 5)[0])
    found = read_json(run[1] / f"parts/m0-{task}.json")
    for one, other in zip(found["items"], expected["items"], strict=True):
        assert (
            one["answers"] == pytest.approx(other["answers"], abs=1e-3)
            if "gen" not in task
            else other["answers"]
        )
        assert one["metrics"] == other["metrics"]
    assert found["results"] == expected["results"]


def test_the_whole_of_a_folder_is_asked_without_a_limit(monkeypatch, tmp_path):
    row = {"subject": "anatomy", "question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 2}
    (tmp_path / "mmlu").mkdir()
    (tmp_path / "mmlu/mmlu_test.jsonl").write_text(
        "".join(json.dumps(row | {"question": f"{n}?"}) + "\n" for n in range(7))
    )
    monkeypatch.setenv("BITASSAY_DATA", str(tmp_path))
    asked = load_tasks("mmlu_anatomy", None, 2)[0]
    assert (len(asked.items), asked.shots) == (7, 2)
    assert protocol_id("mmlu_anatomy", [asked], None) == "mmlu_anatomy/2-shot"
    assert load_tasks("mmlu_anatomy", 3, 0)[0].items == [0, 2, 4]
    with pytest.raises(BitassayError, match="6 examples were asked for, there are 5"):
        load_tasks("mmlu_anatomy", 3, 6)


def test_names_stand_for_tasks():
    for name, first in (("mmlu", "mmlu_anatomy"), ("mmlu_generative", "mmlu_anatomy_generative")):
        _, source, members = find_task(name)
        assert source is TASKS[name]
        assert (len(members), members[1]) == (57, first)
    assert find_task("hellaswag")[2] == ["hellaswag"]


@pytest.fixture
def few_tasks(monkeypatch):
    """lm-eval's index of all its tasks takes long to read; that of one folder stands for it."""
    arc, manager_of = registry.yaml_path(TASKS["arc_challenge"]), registry.manager_of
    monkeypatch.setattr(registry, "manager_of", lambda path, *more: manager_of(path or arc, *more))


def test_an_unknown_task_is_refused_with_the_nearest(few_tasks):
    with pytest.raises(BitassayError, match="no task 'helaswag'; the nearest are 'hellaswag'"):
        find_task("helaswag")


def test_a_group_of_lm_eval_is_left_to_it(few_tasks):
    manager, source, members = find_task("ai2_arc")
    assert (source, members) == (None, [])
    assert manager.task_index["ai2_arc"].tags == {"arc_challenge", "arc_easy"}


YAML = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "The colour of {{thing}} is"
doc_to_choice: [red, green]
doc_to_target: "{{right}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with a task of one's own and its data."""
    (tmp_path / "own").mkdir()
    rows = [{"thing": "grass", "right": 1}, {"thing": "blood", "right": 0}, {"thing": "leaves", "right": 1}]
    data = tmp_path / "own/colours.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own/colours.yaml").write_text(YAML.replace("DATA", str(data)))
    return tmp_path / "own"


def test_a_task_of_ones_own_by_its_yaml(folder, stories, tmp_path):
    run, _ = evaluate_tasks(
        [loaded_candidate(stories, "base")], ["colours"], include=folder, out=tmp_path / "run"
    )
    [row] = run["rows"]
    assert (row["task"], row["metric"], row["n"], row["protocol"]) == ("colours", "acc", 3, "colours/0-shot")
    assert run["protocols"]["colours"]["sources"] == [str(folder / "colours.yaml")]
    hf = answer(
        HFLM(pretrained=stories, tokenizer=stories.tokenizer), load_tasks("colours", include=folder)[0]
    )
    assert row["value"] == hf["results"]["acc,none"]


def test_other_data_behind_the_same_yaml_is_another_plan(folder):
    [before] = load_tasks("colours", include=folder)
    data = folder / "colours.jsonl"
    data.write_text(data.read_text().replace("grass", "moss"))
    [after] = load_tasks("colours", include=folder)
    assert before.about() != after.about()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task: own\ndoc_to_text: !function utils.prompt\n", "names Python code"),
        ("task: own\nmetadata: !!python/name:os.system\n", "names Python code"),
        ("task: own\ninclude: ../elsewhere.yml\n", "elsewhere.yml: names Python code"),
        ("task: [\n", "not YAML"),
    ],
)
def test_code_in_a_folder_of_tasks_runs_only_where_it_is_trusted(folder, stories, text, said):
    (folder.parent / "elsewhere.yml").write_text("process_docs: !function utils.prompt\n")
    (folder / "utils.py").write_text("raise SystemExit('this ran')\n")
    (folder / "own.yaml").write_text(text)
    with pytest.raises(BitassayError, match=said):
        evaluate_tasks([loaded_candidate(stories, "base")], ["colours"], include=folder)


def test_trusted_code_runs(folder, stories, tmp_path):
    (folder / "utils.py").write_text("def prompt(item):\n    return f\"{item['thing']} is\"\n")
    path = folder / "colours.yaml"
    path.write_text(path.read_text().replace('"The colour of {{thing}} is"', "!function utils.prompt"))
    run, _ = evaluate_tasks(
        [loaded_candidate(stories, "base")],
        ["colours"],
        include=folder,
        trust_remote_code=True,
        out=tmp_path / "run",
    )
    assert run["rows"][0]["n"] == 3


def test_a_folder_without_tasks_is_refused(stories, tmp_path):
    with pytest.raises(BitassayError, match="nowhere: no task YAML in it"):
        evaluate_tasks([loaded_candidate(stories, "base")], ["x"], include=tmp_path / "nowhere")


def test_another_package_can_add_a_task(folder, monkeypatch):
    monkeypatch.setitem(TASKS._items, "colours", TaskSource(folder / "colours.yaml", shots=0))
    [asked] = load_tasks("colours", 2)
    assert (asked.name, asked.items) == ("colours", [0, 1])


def test_data_that_cannot_be_fetched(few_tasks, stories, monkeypatch, tmp_path):
    import datasets

    def offline(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        MissingError, match=r"arc_easy: .*ConnectionError: no route to the hub.*\n.*BITASSAY_DATA"
    ):
        evaluate_tasks([loaded_candidate(stories, "base")], ["arc_easy"], limit=2, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": ["hellaswag"], "limit": 0}, "limit of 0"),
        ({"tasks": []}, "no task was given"),
        ({"tasks": ["hellaswag", "hellaswag"]}, "named twice"),
        ({"tasks": ["hellaswag"], "limit": 3, "shots": -1}, "cannot be asked with -1 examples"),
    ],
)
def test_bad_input_is_refused_before_any_work(stories, tmp_path, options, said):
    with pytest.raises(BitassayError, match=said):
        evaluate_tasks([loaded_candidate(stories, "base")], out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_without_lm_eval_the_extra_is_named(stories, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "bitassay.evaluation.tasks.registry.find_spec",
        lambda name: None if name == "lm_eval" else find_spec(name),
    )
    with pytest.raises(MissingError, match=r"pip install 'bitassay\[tasks\]'"):
        evaluate_tasks([loaded_candidate(stories, "base")], ["hellaswag"])


@pytest.mark.slow
@pytest.mark.real
def test_real_predictions_are_those_of_lm_evals_hf_model():
    model = bitassay.load("smollm2-135m")
    hf = HFLM(pretrained=model, tokenizer=model.tokenizer, batch_size=1)
    from bitassay.evaluation.harness import BitassayLM

    for task in ("hellaswag", "mmlu_anatomy"):
        asked = load_tasks(task, 3)[0]
        ours, expected = answer(BitassayLM(model), asked), answer(hf, asked)
        assert [item["metrics"] for item in ours["items"]] == [item["metrics"] for item in expected["items"]]
        for one, other in zip(ours["items"], expected["items"], strict=True):
            assert one["answers"] == pytest.approx(other["answers"], abs=2e-3)
