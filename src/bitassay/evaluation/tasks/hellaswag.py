"""HellaSwag: the likeliest ending of a context (Zellers et al. 2019, 1905.07830).

File: hellaswag/hellaswag_val.jsonl, lines {"ctx": "activity: context", "endings": [4 texts], "label": 0..3}.

The file keeps activity and context in one text. The sentence that each ending completes is the last fragment
without a full stop; splitting there gives back the published 3243 items from ActivityNet (with a fragment)
and 6799 from WikiHow (without), which lm-eval then prepares as it does the hub's.
"""

import re
from typing import Annotated, ClassVar

from pydantic import Field

from bitassay.data.tasks import FourTexts, Item, Row, TaskSource, Text

_LAST_FRAGMENT = re.compile(r"(.*[.!?\"')])\s+([^.!?]*[^.!?\s])", re.DOTALL)


class Context(Item):
    """A context with four endings; `label` is the index of the right one."""

    task: ClassVar[str] = "hellaswag"
    ctx: Annotated[Text, Field(pattern=": ")]
    endings: FourTexts
    label: Annotated[int, Field(ge=0, le=3)]

    def row(self) -> Row:
        activity, _, context = self.ctx.partition(": ")
        split = _LAST_FRAGMENT.fullmatch(context)
        sentences, fragment = split.groups() if split else (context, "")
        return {
            "activity_label": activity,
            "ctx_a": sentences,
            "ctx_b": fragment,
            "endings": self.endings,
            "label": str(self.label),
        }


HELLASWAG = TaskSource(
    yaml="hellaswag/hellaswag.yaml",
    splits={"validation": ("hellaswag/hellaswag_val.jsonl", "hellaswag-val-200.jsonl.gz")},
    tested="validation",
    item=Context,
)
