"""Tasks with local data: lm-eval's YAML, and the items that it asks, in the columns of the hub's data sets.

`BITASSAY_DATA` names a folder of data sets (searched first), each file plain or as .gz. Otherwise a bundled
slice is used, evenly spaced over the whole set, if it has as many items as were asked for: a slice never
stands for the whole set. A result always says which was read.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from bitassay.data.corpora import bundled_file, in_data_folder
from bitassay.errors import BitassayError, suggestion
from bitassay.record.files import read_text

Row = dict[str, Any]
Text = Annotated[str, StringConstraints(pattern=r"\S")]
FourTexts = Annotated[list[Text], Field(min_length=4, max_length=4)]


class Item(BaseModel):
    """A line of a data set's file, checked."""

    model_config = ConfigDict(strict=True)
    task: ClassVar[str] = "the task"

    def row(self) -> Row:
        """Return the item in the columns of the hub's data set. Raises ValueError where it has none."""
        return self.model_dump()


@dataclass(frozen=True)
class TaskData:
    """The rows of one task by split, and their source; `digest` is the SHA-256 of the files."""

    splits: dict[str, list[Row]]
    tested: str
    source: str
    is_complete: bool
    digest: str


def lacks_answer(text: str) -> bool:
    """Return whether lm-eval's filter found no answer in a generated text."""
    return text.strip() in ("", "[invalid]")


@dataclass(frozen=True)
class TaskSource:
    """Tasks of lm-eval on one data set.

    yaml: lm-eval's task YAML, a file or a folder whose tasks are pooled; relative to lm-eval's own tasks.
    splits: by name, a split's file of JSON lines under BITASSAY_DATA, and its bundled slice; none leave the
    data to the YAML. tested: the split that is asked. item: what a line holds. has_subjects: whether a column
    `subject` divides the items by task. shots: examples shown where the YAML says nothing. unparsed: whether
    a generated text holds no answer.
    """

    yaml: str | Path
    splits: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    tested: str = "test"
    item: type[Item] = Item
    has_subjects: bool = False
    shots: int = 0
    unparsed: Callable[[str], bool] = lacks_answer

    def read(self, limit: int | None, subject: str | None = None) -> TaskData | None:
        """Return the rows on this machine (of one subject): from BITASSAY_DATA, else from the bundled slice
        if it has `limit` items, else None: the whole set has to come from the hub. Raises BitassayError for a
        file that is truncated or empty, and for a line that is no item."""
        if not self.splits:
            return None
        if self._in_data_folder(self.tested) is not None:
            return self._read(subject, bundled=False)
        data = self._read(subject, bundled=True)
        return data if limit is not None and limit <= len(data.splits[self.tested]) else None

    def _in_data_folder(self, split: str) -> tuple[Path, str] | None:
        path, _ = self.splits[split]
        return in_data_folder((f"{path}.gz", path))

    def _read(self, subject: str | None, bundled: bool) -> TaskData:
        splits, sources, sha = {}, [], hashlib.sha256()
        for split, (_, bundled_slice) in self.splits.items():
            local = None if bundled else self._in_data_folder(split)  # few-shot examples may be bundled
            path, source = local or bundled_file(bundled_slice)
            splits[split] = self.rows(path, subject)
            sources.append(source)
            sha.update(hashlib.sha256(path.read_bytes()).digest())
        return TaskData(splits, self.tested, ", ".join(sources), not bundled, sha.hexdigest())

    def rows(self, path: Path, subject: str | None = None) -> list[Row]:
        """Return the rows of a file (of one subject), checked."""
        rows = _rows(path, path.stat().st_mtime_ns, self.item)
        if subject is None:
            return rows
        known = {row["subject"] for row in rows}
        if subject not in known:
            raise BitassayError(
                f"{path}: no question about {subject!r}; {suggestion(subject, known)}",
                "restore the file, or choose another subject",
            )
        return [row for row in rows if row["subject"] == subject]


@cache
def _rows(path: Path, _changed: int, item: type[Item]) -> list[Row]:
    """All rows of a file; read once as long as it does not change."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(item.model_validate(json.loads(line)).row())
        except ValueError as error:
            problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise BitassayError(
                f"{path}:{number}: not an item of {item.task} ({problem})",
                "restore the file, or unset BITASSAY_DATA",
            ) from error
    if not rows:
        raise BitassayError(f"{path}: no items in it", "restore the file, or unset BITASSAY_DATA")
    return rows


def even_indices(total: int, limit: int | None) -> list[int]:
    """Return `limit` indices evenly spaced over `total`, or all. Raises BitassayError for less than 1."""
    if limit is None or limit >= total > 0:
        return list(range(total))
    if limit < 1:
        raise BitassayError(f"a limit of {limit} items leaves nothing to measure", "--limit 1 or more")
    return [index * total // limit for index in range(limit)]
