"""ARC-Challenge: science questions of grade schools (Clark et al. 2018, 1803.05457).

Files as published: arc_challenge/ARC-Challenge-{Dev,Test}.jsonl, lines {"id", "question": {"stem", "choices":
[{"text", "label"}]}, "answerKey"}.
"""

from typing import ClassVar

from bitassay.data.tasks import Item, Row, TaskSource, Text


class Choice(Item):
    """An answer and its letter or number."""

    text: Text
    label: Text


class Stem(Item):
    """The question's text and its answers."""

    stem: Text
    choices: list[Choice]


class Question(Item):
    """A question; `answerKey` is the label of the right choice."""

    task: ClassVar[str] = "arc_challenge"
    id: Text
    question: Stem
    answerKey: Text

    def row(self) -> Row:
        choices = self.question.choices
        labels = [choice.label for choice in choices]
        if self.answerKey not in labels:
            raise ValueError(f"the answer {self.answerKey!r} is none of {labels}")
        return {
            "id": self.id,
            "question": self.question.stem,
            "choices": {"text": [choice.text for choice in choices], "label": labels},
            "answerKey": self.answerKey,
        }


ARC_CHALLENGE = TaskSource(
    yaml="arc/arc_challenge.yaml",
    splits={
        "validation": ("arc_challenge/ARC-Challenge-Dev.jsonl", "arc-challenge-dev-25.jsonl.gz"),
        "test": ("arc_challenge/ARC-Challenge-Test.jsonl", "arc-challenge-test-200.jsonl.gz"),
    },
    item=Question,
)
