"""Questions to measure on: MMLU, HellaSwag and ARC-Challenge, from a local folder or from small slices that
this package carries, in the columns that lm-eval's tasks expect of the hub's data sets.

`BITASSAY_DATA` names a folder of data sets (searched first):

    mmlu/mmlu_{dev,test}.jsonl              {"subject", "question", "choices": [4 texts], "answer": 0..3}
    hellaswag/hellaswag_val.jsonl           {"ctx": "activity: context", "endings": [4 texts], "label": 0..3}
    arc_challenge/ARC-Challenge-{Dev,Test}.jsonl   as upstream: {"id", "question": {"stem", "choices"},
    "answerKey"}

each plain or as .gz. A bundled slice is evenly spaced over the whole set and is used only where it has as
many items as were asked for: never does a part stand for the whole. A result always says which was read.

HellaSwag's file keeps activity and context in one text, in which the sentence that each ending completes is
the last fragment without a full stop; splitting there gives back the published 3243 items from ActivityNet
(with a fragment) and 6799 from WikiHow (without), and lm-eval then prepares them as it does the hub's.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bitassay.data.corpora import bundled_file, in_data_folder
from bitassay.errors import BitassayError, suggestion
from bitassay.record.files import read_text

Row = dict[str, Any]


@dataclass(frozen=True)
class TaskData:
    """The rows of one task by split, and where they came from. `whole` is False for a slice; `digest` names
    the files' bytes."""

    splits: dict[str, list[Row]]
    tested: str
    source: str
    whole: bool
    digest: str


@dataclass(frozen=True)
class _File:
    """Where a split is: under BITASSAY_DATA, and the bundled slice of it."""

    path: str
    bundled: str

    def locate(self, bundled: bool) -> tuple[Path, str] | None:
        return bundled_file(self.bundled) if bundled else in_data_folder((f"{self.path}.gz", self.path))


def _mmlu(row: Row) -> Row:
    return {
        "question": _text(row["question"]),
        "subject": _text(row["subject"]),
        "choices": _texts(row["choices"], 4),
        "answer": _index(row["answer"], 4),
    }


_LAST_FRAGMENT = re.compile(r"(.*[.!?\"')])\s+([^.!?]*[^.!?\s])", re.DOTALL)


def _hellaswag(row: Row) -> Row:
    activity, colon, context = _text(row["ctx"]).partition(": ")
    if not colon:
        raise ValueError("the context does not begin with an activity and a colon")
    found = _LAST_FRAGMENT.fullmatch(context)
    sentences, fragment = (found[1], found[2]) if found else (context, "")
    return {
        "activity_label": activity,
        "ctx_a": sentences,
        "ctx_b": fragment,
        "endings": _texts(row["endings"], 4),
        "label": str(_index(row["label"], 4)),
    }


def _arc(row: Row) -> Row:
    choices = row["question"]["choices"]
    labels = _texts([choice["label"] for choice in choices])
    if row["answerKey"] not in labels:
        raise ValueError(f"the answer {row['answerKey']!r} is none of {labels}")
    return {
        "id": _text(row["id"]),
        "question": _text(row["question"]["stem"]),
        "choices": {"text": _texts([choice["text"] for choice in choices]), "label": labels},
        "answerKey": row["answerKey"],
    }


@dataclass(frozen=True)
class _Family:
    """A data set: its splits, which is tested, and how a line of its files becomes a row of the hub's."""

    files: dict[str, _File]
    tested: str
    convert: Callable[[Row], Row]


FAMILIES = {
    "mmlu": _Family(
        {
            "dev": _File("mmlu/mmlu_dev.jsonl", "mmlu-dev.jsonl.gz"),
            "test": _File("mmlu/mmlu_test.jsonl", "mmlu-test-5.jsonl.gz"),
        },
        "test",
        _mmlu,
    ),
    "hellaswag": _Family(
        {"validation": _File("hellaswag/hellaswag_val.jsonl", "hellaswag-val-200.jsonl.gz")},
        "validation",
        _hellaswag,
    ),
    "arc_challenge": _Family(
        {
            "validation": _File("arc_challenge/ARC-Challenge-Dev.jsonl", "arc-challenge-dev-25.jsonl.gz"),
            "test": _File("arc_challenge/ARC-Challenge-Test.jsonl", "arc-challenge-test-200.jsonl.gz"),
        },
        "test",
        _arc,
    ),
}


def mmlu_subjects() -> list[str]:
    """The 57 subjects, in alphabetical order."""
    path, _ = bundled_file("mmlu-dev.jsonl.gz")
    return sorted({row["subject"] for row in _rows(path, path.stat().st_mtime_ns, "mmlu")})


def task_data(family: str, limit: int | None, subject: str | None = None) -> TaskData | None:
    """What is on this machine of `family`, of one MMLU subject where `subject` is given: the folder that
    BITASSAY_DATA names, else the bundled slice if it has `limit` items; None where there is neither (the
    whole set is then the hub's to give).

    Raises BitassayError for a file that is truncated, empty or has a line of another form, naming both.
    """
    kind = FAMILIES[family]
    if kind.files[kind.tested].locate(bundled=False) is not None:
        return _read(family, subject, bundled=False)
    found = _read(family, subject, bundled=True)
    return found if limit is not None and limit <= len(found.splits[found.tested]) else None


def _read(family: str, subject: str | None, bundled: bool) -> TaskData:
    kind, splits, sources, sha = FAMILIES[family], {}, [], hashlib.sha256()
    for split, file in kind.files.items():
        path, source = file.locate(bundled) or bundled_file(file.bundled)  # few-shot examples may be bundled
        rows = _rows(path, path.stat().st_mtime_ns, family)
        if subject is not None:
            known = {row["subject"] for row in rows}
            rows = [row for row in rows if row["subject"] == subject]
            if not rows:
                raise BitassayError(
                    f"{path}: no question about {subject!r}; {suggestion(subject, known)}",
                    "restore the file, or choose another subject",
                )
        splits[split] = rows
        sources.append(source)
        sha.update(hashlib.sha256(path.read_bytes()).digest())
    return TaskData(splits, kind.tested, ", ".join(sources), not bundled, sha.hexdigest())


@cache
def _rows(path: Path, _changed: int, family: str) -> list[Row]:
    """All rows of a file, checked; read once as long as it does not change."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
            rows.append(FAMILIES[family].convert(row))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise BitassayError(
                f"{path}:{number}: not an item of {family} ({type(error).__name__}: {error})",
                "restore the file, or unset BITASSAY_DATA",
            ) from error
    if not rows:
        raise BitassayError(f"{path}: no items in it", "restore the file, or unset BITASSAY_DATA")
    return rows


def even_indices(total: int, limit: int | None) -> list[int]:
    """`limit` places evenly spaced over `total`, in order; all of them without a limit, or one beyond the
    total. Raises BitassayError for a limit below 1."""
    if limit is None or limit >= total > 0:
        return list(range(total))
    if limit < 1:
        raise BitassayError(f"a limit of {limit} items leaves nothing to measure", "--limit 1 or more")
    return [place * total // limit for place in range(limit)]


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} is not a text")
    return value


def _texts(values: Any, count: int | None = None) -> list[str]:
    if not isinstance(values, Sequence) or isinstance(values, str) or count not in (None, len(values)):
        raise ValueError(f"not a list of {count or 'some'} texts")
    return [_text(value) for value in values]


def _index(value: Any, below: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < below:
        raise ValueError(f"the answer {value!r} is not a number from 0 to {below - 1}")
    return value
