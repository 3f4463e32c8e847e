"""MMLU: 57 subjects of multiple-choice questions (Hendrycks et al. 2021, 2009.03300).

Files: mmlu/mmlu_{dev,test}.jsonl, lines {"subject", "question", "choices": [4 texts], "answer": 0..3}.
"""

import re
from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Field

from bitassay.data.corpora import bundled_file
from bitassay.data.tasks import FourTexts, Item, TaskSource, Text


class Question(Item):
    """A question; `answer` is the index of the right choice."""

    task: ClassVar[str] = "mmlu"
    question: Text
    subject: Text
    choices: FourTexts
    answer: Annotated[int, Field(ge=0, le=3)]


def is_letter(text: str) -> bool:
    """Return whether a generated text names one of the answers, as lm-eval reads it: punctuation and case
    aside."""
    return re.sub(r"[^\w\s]", "", text).strip().upper() in ("A", "B", "C", "D")


DIRECT = TaskSource(
    yaml="mmlu/default",
    splits={
        "dev": ("mmlu/mmlu_dev.jsonl", "mmlu-dev.jsonl.gz"),
        "test": ("mmlu/mmlu_test.jsonl", "mmlu-test-5.jsonl.gz"),
    },
    item=Question,
    has_subjects=True,
    shots=5,
    unparsed=lambda text: not is_letter(text),
)
GENERATIVE = replace(DIRECT, yaml="mmlu/generative")


def mmlu_subjects() -> list[str]:
    """Return the 57 subjects, in alphabetical order."""
    path, _ = bundled_file("mmlu-dev.jsonl.gz")
    return sorted({row["subject"] for row in DIRECT.rows(path)})
