"""The questions of tasks: bundled, from a folder of one's own, and files with defects."""

import gzip
import json

import pytest

from bitassay.data.tasks import even_indices
from bitassay.errors import BitassayError
from bitassay.evaluation.tasks.mmlu import mmlu_subjects
from bitassay.evaluation.tasks.registry import TASKS

MMLU = {"subject": "anatomy", "question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 2}
HELLASWAG = {"ctx": "Cooking: A man cooks. he", "endings": ["1", "2", "3", "4"], "label": 1}
ARC = {
    "id": "x",
    "question": {"stem": "Why?", "choices": [{"text": "so", "label": "1"}, {"text": "no", "label": "2"}]},
    "answerKey": "2",
}
FILES = {
    "mmlu": ("mmlu/mmlu_test.jsonl", MMLU),
    "hellaswag": ("hellaswag/hellaswag_val.jsonl", HELLASWAG),
    "arc_challenge": ("arc_challenge/ARC-Challenge-Test.jsonl", ARC),
}


def task_data(name, limit, subject=None):
    return TASKS[name].read(limit, subject)


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch):
    monkeypatch.delenv("BITASSAY_DATA", raising=False)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write rows to a data set's file in a folder that BITASSAY_DATA names."""
    monkeypatch.setenv("BITASSAY_DATA", str(tmp_path))

    def call(family, *rows, packed=False):
        path = tmp_path / (FILES[family][0] + (".gz" if packed else ""))
        path.parent.mkdir(exist_ok=True)
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        return path

    return call


def test_there_are_57_subjects():
    subjects = mmlu_subjects()
    assert len(subjects) == 57
    assert (subjects[0], subjects[-1]) == ("abstract_algebra", "world_religions")


def test_a_bundled_slice_never_stands_for_the_whole():
    assert task_data("hellaswag", None) is None
    assert task_data("hellaswag", 201) is None
    found = task_data("hellaswag", 200)
    assert not found.is_complete
    assert found.source == "bundled hellaswag-val-200.jsonl.gz"
    assert len(found.splits["validation"]) == 200


@pytest.mark.parametrize("subject", ["abstract_algebra", "world_religions"])
def test_bundled_mmlu_has_examples_and_questions_of_each_subject(subject):
    found = task_data("mmlu", 5, subject)
    assert [len(found.splits[split]) for split in ("dev", "test")] == [5, 5]
    assert {row["subject"] for rows in found.splits.values() for row in rows} == {subject}


def test_bundled_arc_has_the_columns_of_the_hub():
    row = task_data("arc_challenge", 1).splits["test"][0]
    assert set(row) == {"id", "question", "choices", "answerKey"}
    assert row["answerKey"] in row["choices"]["label"]


def test_hellaswag_is_split_where_the_ending_goes_on():
    rows = task_data("hellaswag", 1).splits["validation"]
    joined = [f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b']}".strip() for row in rows]
    assert joined[0].startswith("Roof shingle removal: A man is sitting on a roof. he")
    assert (rows[0]["ctx_a"], rows[0]["ctx_b"]) == ("A man is sitting on a roof.", "he")
    assert 40 < sum(bool(row["ctx_b"]) for row in rows) < 90  # 32 % of the published items


def test_a_folder_of_ones_own_comes_first(write):
    write("mmlu", MMLU, MMLU | {"subject": "botany"})
    found = task_data("mmlu", None, "anatomy")
    assert found.is_complete
    assert found.source == "bundled mmlu-dev.jsonl.gz, BITASSAY_DATA mmlu/mmlu_test.jsonl"
    assert found.splits["test"] == [MMLU]
    before = found.digest
    write("mmlu", MMLU | {"answer": 1})
    assert task_data("mmlu", None, "anatomy").splits["test"][0]["answer"] == 1  # read again
    assert task_data("mmlu", None, "anatomy").digest != before


def test_numbered_answers_are_kept(write):
    write("arc_challenge", ARC, packed=True)
    row = task_data("arc_challenge", None).splits["test"][0]
    assert row == {
        "id": "x",
        "question": "Why?",
        "choices": {"text": ["so", "no"], "label": ["1", "2"]},
        "answerKey": "2",
    }


@pytest.mark.parametrize(
    ("family", "line"),
    [
        ("mmlu", "{"),
        ("mmlu", "[1]"),
        ("mmlu", MMLU | {"answer": 4}),
        ("mmlu", MMLU | {"answer": True}),
        ("mmlu", MMLU | {"choices": ["a", "b", "c"]}),
        ("mmlu", MMLU | {"question": " "}),
        ("hellaswag", HELLASWAG | {"ctx": "no activity"}),
        ("hellaswag", HELLASWAG | {"endings": "abcd"}),
        ("hellaswag", HELLASWAG | {"label": "1"}),
        ("arc_challenge", ARC | {"answerKey": "C"}),
        ("arc_challenge", ARC | {"question": "Why?"}),
    ],
)
def test_a_bad_line_is_named(write, family, line):
    path = write(family, FILES[family][1], line)
    with pytest.raises(BitassayError, match=rf"{path}:2: not an item of {family}.*\n.*restore the file"):
        task_data(family, None, "anatomy" if family == "mmlu" else None)


@pytest.mark.parametrize("family", FILES)
def test_files_with_nothing_or_half_of_it_are_named(write, family):
    path = write(family)
    with pytest.raises(BitassayError, match=f"{path}: no items in it"):
        task_data(family, None)
    path.unlink()
    path = write(family, *[FILES[family][1]] * 50, packed=True)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(BitassayError, match=f"{path}: truncated"):
        task_data(family, None)


def test_a_subject_that_is_not_in_the_file(write):
    path = write("mmlu", MMLU)
    with pytest.raises(BitassayError, match=f"{path}: no question about 'virology'"):
        task_data("mmlu", None, "virology")


def test_items_are_evenly_spaced():
    assert even_indices(10, None) == list(range(10))
    assert even_indices(10, 4) == [0, 2, 5, 7]
    assert even_indices(3, 8) == [0, 1, 2]
    with pytest.raises(BitassayError, match="limit of 0"):
        even_indices(10, 0)
