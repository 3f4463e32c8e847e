"""One piece of an INT8/FP8 study at work. Pieces, here *cells*, depend on nothing but the plan, so that any
process on any computer can do any of them, and two that did the same one give the same files.

    text-B           block B of the windows: the base model reads them once, then every variant in turn
                     -> text-B-VARIANT.safetensors (the scores of each token), also for the base
    questions-V      variant V and all questions of MMLU, direct and by text
                     -> questions-V.json

A variant that cannot be made here gives a file that says why. What is there is not made again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from bitassay.data.windows import token_windows
from bitassay.errors import BitassayError, MissingError
from bitassay.evaluate.divergence import TokenScores, token_scores, window_logits
from bitassay.evaluate.questions import AskedTask, Leaf
from bitassay.evaluate.tasks import answer
from bitassay.models.load import identity, load, tokenizer
from bitassay.quantize.model import bits_per_weight, quantization_of, size_bytes, with_tensors
from bitassay.quantize.pipeline import quantize_tensors_once
from bitassay.record.run import RunFolder
from bitassay.studies.eight_bit import BASE, NEW_TOKENS, SAMPLES, EightBitPlan, Variant
from bitassay.studies.torchao_models import torchao_model

METHODS = {"direct": "", "generate": "_generative"}


@dataclass(frozen=True)
class Cell:
    """kind: "text", of a block of windows, or "questions", of a variant; which: its place."""

    kind: str
    which: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.which:02d}"


def cells_of(plan: EightBitPlan) -> list[Cell]:
    """All cells, those that take longest first."""
    return [Cell("text", block) for block in range(len(plan.blocks))] + [
        Cell("questions", variant) for variant in range(len(plan.variants))
    ]


def text_part(block: int, variant: Variant) -> str:
    return f"text-{block:02d}-{variant.name}"


def is_done(folder: RunFolder, plan: EightBitPlan, cell: Cell) -> bool:
    if cell.kind == "questions":
        return folder.has(cell.name)
    return all(_has_text(folder, cell.which, variant) for variant in plan.variants)


def _has_text(folder: RunFolder, block: int, variant: Variant) -> bool:
    part = text_part(block, variant)
    return folder.has_tensors(part) or folder.has(part)


class Bench:
    """What a process keeps from cell to cell: the base model, and the questions as lm-eval holds them.

    Raises BitassayError where the model's weights are not those that the study began with.
    """

    def __init__(self, plan: EightBitPlan, weights_digest: str, threads: int | None = None):
        if threads is not None:
            torch.set_num_threads(threads)
        self.plan = plan
        self.base = load(
            plan.model, dtype=plan.dtype, device=plan.device, trust_remote_code=plan.trust_remote_code
        )
        if identity(self.base).weights_digest != weights_digest:
            raise BitassayError(
                f"{plan.model}: its weights are not those that this study began with",
                "give the same model everywhere, or another --out",
            )

    def work(self, cell: Cell, folder: RunFolder) -> None:
        """Make the files of a cell that are not there."""
        (self._text if cell.kind == "text" else self._questions)(cell, folder)

    def _models(self, variants: Sequence[Variant]) -> Iterator[tuple[Variant, PreTrainedModel | str]]:
        """Each variant's model, one at a time, or why there is none. Two of one recipe are quantized once."""
        recipe = made = None
        for variant in variants:
            if variant.recipe is not None:
                if variant.recipe != recipe:
                    recipe, made = variant.recipe, quantize_tensors_once(self.base, variant.recipe)
                yield variant, with_tensors(self.base, made, packed=variant.kind == "real")  # type: ignore[arg-type]
            elif variant.torchao:
                assert variant.format is not None
                try:
                    yield (
                        variant,
                        torchao_model(self.base, variant.format, smoothed=variant.smoothed, samples=SAMPLES),
                    )
                except MissingError as error:
                    yield variant, error.problem
            else:
                yield variant, self.base

    def _text(self, cell: Cell, folder: RunFolder) -> None:
        windows, _ = token_windows(tokenizer(self.base), self.plan.protocol)
        block = windows[list(self.plan.blocks[cell.which])]
        logits = [window_logits(self.base, window) for window in block]
        missing = [v for v in self.plan.variants if not _has_text(folder, cell.which, v)]
        for variant, model in self._models(missing):
            part = text_part(cell.which, variant)
            if isinstance(model, str):
                folder.part(part, lambda why=model: {"refused": why})
                continue
            found = {}
            for place, (window, base) in enumerate(zip(block, logits, strict=True)):
                if variant.name == BASE:
                    scores = token_scores(base, window[1:])
                else:
                    scores = token_scores(window_logits(model, window), window[1:], base)
                found |= {f"{place}/{field}": value for field, value in scores._asdict().items()}
            folder.write_tensors(part, found)

    def _questions(self, cell: Cell, folder: RunFolder) -> None:
        variant = self.plan.variants[cell.which]
        [(_, model)] = self._models([variant])
        if isinstance(model, str):
            folder.part(cell.name, lambda: {"refused": model})
            return
        folder.part(cell.name, lambda: facts_of(model) | answers_of(model, self.plan))


def facts_of(model: PreTrainedModel) -> dict[str, Any]:
    """What a variant stores; None of what torchao holds, whose tensors are its own business."""
    done = quantization_of(model)
    return {
        "recipe_id": None if done is None else done.recipe.recipe_id,
        "bits_per_weight": bits_per_weight(model),
        "size_bytes": size_bytes(model),
        "columns": sorted({tensor.shape[1] for tensor in done.tensors.values()}) if done else [],
    }


@cache
def questions(plan: EightBitPlan) -> dict[str, dict[str, AskedTask]]:
    """The questions by subject and method."""
    return {
        subject: {
            method: AskedTask.of(Leaf(f"mmlu_{subject}{ending}", "mmlu", subject), count, None)
            for method, ending in METHODS.items()
        }
        for subject, count in plan.subjects.items()
    }


def answers_of(model: PreTrainedModel, plan: EightBitPlan) -> dict[str, Any]:
    """By method: whether each question was answered rightly, and what was answered (log-likelihoods of the
    four letters in nats, or the text)."""
    from bitassay.evaluate.once import OnceReadLM

    lm = OnceReadLM(model)
    lm.max_gen_toks = NEW_TOKENS
    found: dict[str, Any] = {method: {"right": [], "answers": []} for method in METHODS}
    for asked in questions(plan).values():
        for method, question in asked.items():
            for item in answer(lm, question)["items"]:
                [metric] = item["metrics"].values()
                found[method]["right"].append(metric == 1)
                found[method]["answers"].append(item["answers"])
    return found


def read_text(folder: RunFolder, plan: EightBitPlan, variant: Variant) -> list[TokenScores] | str:
    """The scores of all windows, or why there are none."""
    found: list[TokenScores] = []
    for block, windows in enumerate(plan.blocks):
        part = text_part(block, variant)
        if folder.has(part):
            return str(folder.part(part, dict)["refused"])
        held = folder.read_tensors(part)
        found += [
            TokenScores(*(held[f"{place}/{field}"] for field in TokenScores._fields))
            for place in range(len(windows))
        ]
    return found
