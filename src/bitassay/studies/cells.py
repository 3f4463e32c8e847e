"""One piece of a study of variants at work. Pieces, here *cells*, depend on nothing but the plan, so that any
process on any computer can do any of them, and two that did the same one give the same files.

    text-B           block B of the windows: the base model reads them once, then every variant in turn
                     -> text-B-VARIANT.safetensors (the scores of each token; of each window, the passes of a
                     layer and the bytes of weights that a token took), also for the base
    questions-V      variant V and all questions of MMLU, direct and by text
                     -> questions-V.json
    drafts-D         texts drafted by the first plane of the first variant in planes, D-th length of drafts
                     -> drafts-D.json

and facts-VARIANT.json from whoever makes a variant. One that cannot be made here gives a file that says why.
What is there is not made again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from bitassay.engines.load import load
from bitassay.errors import BitassayError, MissingError
from bitassay.evaluation.divergence import TokenScores, token_scores, window_logits
from bitassay.evaluation.tasks.load import AskedTask, load_tasks
from bitassay.evaluation.tasks.run import answer
from bitassay.models.identity import identity
from bitassay.models.windows import model_windows
from bitassay.quantization.pipeline import quantize_tensors_cached
from bitassay.quantization.runtime.model import with_tensors
from bitassay.record.run import AGAIN, RunFolder, differing
from bitassay.studies.costs import COSTS, Read, facts_of, window_reader
from bitassay.studies.eight_bit.study import ALPHA, SAMPLES
from bitassay.studies.eight_bit.torchao_models import torchao_model
from bitassay.studies.replication.drafts import drafted
from bitassay.studies.variants import Variant, VariantPlan

METHODS = {"direct": "", "generate": "_generative"}
NEW_TOKENS = 16  # of a generated answer; lm-eval reads its first line


@dataclass(frozen=True)
class Cell:
    """kind: "text", of a block of windows, "questions", of a variant, or "drafts", of a length; which: its
    place."""

    kind: str
    which: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.which:02d}"


def cells_of(plan: VariantPlan) -> list[Cell]:
    """All cells, those that take longest first."""
    counts = {"text": len(plan.blocks), "questions": len(plan.variants) if plan.questions else 0}
    counts["drafts"] = len(plan.drafts)
    return [Cell(kind, which) for kind, count in counts.items() for which in range(count)]


def text_part(block: int, variant: Variant) -> str:
    return f"text-{block:02d}-{variant.name}"


def is_done(folder: RunFolder, plan: VariantPlan, cell: Cell) -> bool:
    if cell.kind != "text":
        return folder.has(cell.name)
    return all(_has_text(folder, cell.which, variant) for variant in plan.variants)


def _has_text(folder: RunFolder, block: int, variant: Variant) -> bool:
    part = text_part(block, variant)
    return folder.has_tensors(part) or folder.has(part)


class Bench:
    """What a process keeps from cell to cell: the base model, and the questions as lm-eval holds them.

    begun: what the run folder belongs to (`VariantPlan.described`). Raises BitassayError where the model's
    weights or the questions are not those that the study began with.
    """

    def __init__(self, begun: Mapping[str, Any], threads: int | None = None):
        if threads is not None:
            torch.set_num_threads(threads)
        self.plan = plan = VariantPlan.of(begun["plan"])
        if changed := differing(begun["versions"], plan.versions()):
            raise BitassayError(f"this study began with {changed}", AGAIN)
        self.base = load(
            plan.model,
            dtype=plan.dtype,
            device=plan.device,
            attention=plan.attention,
            trust_remote_code=plan.trust_remote_code,
        )
        if identity(self.base).weights_digest != begun["weights_digest"]:
            raise BitassayError(
                f"{plan.model}: its weights are not those that this study began with",
                "give the same model everywhere, or another --out",
            )
        if plan.source_of_questions() != begun["questions"]:
            raise BitassayError(
                "the questions of MMLU here are not those that this study began with",
                "give the same BITASSAY_DATA everywhere, or another --out",
            )

    def work(self, cell: Cell, folder: RunFolder) -> None:
        """Make the files of a cell that are not there."""
        {"text": self._text, "questions": self._questions, "drafts": self._drafts}[cell.kind](cell, folder)

    def _models(self, variants: Sequence[Variant]) -> Iterator[tuple[Variant, PreTrainedModel | str]]:
        """Each variant's model, one at a time, or why there is none. Two of one recipe are quantized once."""
        recipe = made = None
        for variant in variants:
            if variant.recipe is not None:
                if variant.recipe != recipe:
                    recipe, made = variant.recipe, quantize_tensors_cached(self.base, variant.recipe)
                yield variant, with_tensors(self.base, made, packed=variant.kind == "real")  # type: ignore[arg-type]
            elif variant.torchao:
                assert variant.format is not None
                try:
                    yield (
                        variant,
                        torchao_model(
                            self.base, variant.format, smoothed=variant.smoothed, alpha=ALPHA, samples=SAMPLES
                        ),
                    )
                except MissingError as error:
                    yield variant, error.problem
            else:
                yield variant, self.base

    def _text(self, cell: Cell, folder: RunFolder) -> None:
        assert self.plan.protocol is not None
        windows, _ = model_windows(self.base, self.plan.protocol)
        block = windows[list(self.plan.blocks[cell.which])]
        logits = [window_logits(self.base, window) for window in block]
        variants = in_turn(self.plan.variants, cell.which, len(self.plan.blocks))
        missing = [v for v in variants if not _has_text(folder, cell.which, v)]
        for variant, model in self._models(missing):
            part = text_part(cell.which, variant)
            if isinstance(model, str):
                folder.part(part, lambda why=model: {"refused": why})
                continue
            keep_facts(folder, variant, model)
            read, found = window_reader(self.base, model, variant.reading), {}
            for place, (window, base) in enumerate(zip(block, logits, strict=True)):
                if variant.name == self.plan.base:
                    own, scores = Read(base, 1.0, None), token_scores(base, window[1:])
                else:
                    own = read(window)
                    scores = token_scores(own.logits, window[1:], base)
                found |= {f"{place}/{field}": value for field, value in scores._asdict().items()}
                found |= {f"{place}/{name}": value for name, value in own.costs.items()}
            folder.write_tensors(part, found)

    def _questions(self, cell: Cell, folder: RunFolder) -> None:
        variant = self.plan.variants[cell.which]
        [(_, model)] = self._models([variant])
        if isinstance(model, str):
            folder.part(cell.name, lambda: {"refused": model})
            return
        keep_facts(folder, variant, model)
        folder.part(cell.name, lambda: answers_of(model, self.plan))

    def _drafts(self, cell: Cell, folder: RunFolder) -> None:
        recipe = next(v.recipe for v in self.plan.variants if v.reading is not None)
        assert recipe is not None
        folder.part(cell.name, lambda: drafted(self.plan, recipe, self.plan.drafts[cell.which]))


def in_turn(variants: Sequence[Variant], block: int, blocks: int) -> list[Variant]:
    """The variants in the order in which a block takes them: each begins elsewhere, so that processes at work
    on several do not wait for the same recipe's codes."""
    first = block * len(variants) // blocks
    return [*variants[first:], *variants[:first]]


def keep_facts(folder: RunFolder, variant: Variant, model: PreTrainedModel) -> None:
    """What a variant stores; of torchao's, whose tensors are its own business, next to nothing."""
    folder.part(f"facts-{variant.name}", lambda: {} if variant.torchao else facts_of(model))


@cache
def questions(plan: VariantPlan) -> dict[str, dict[str, AskedTask]]:
    """The questions by subject and method."""
    return {
        subject: {
            method: load_tasks(f"mmlu_{subject}{ending}", count)[0] for method, ending in METHODS.items()
        }
        for subject, count in plan.subjects.items()
    }


def answers_of(model: PreTrainedModel, plan: VariantPlan) -> dict[str, Any]:
    """By method: whether each question was answered rightly, and what was answered (log-likelihoods of the
    four letters in nats, or the text)."""
    from bitassay.evaluation.harness import BitassayLM

    lm = BitassayLM(model)
    lm.max_gen_toks = NEW_TOKENS
    found: dict[str, Any] = {method: {"right": [], "answers": []} for method in METHODS}
    for asked in questions(plan).values():
        for method, question in asked.items():
            for item in answer(lm, question)["items"]:
                [metric] = item["metrics"].values()
                found[method]["right"].append(metric == 1)
                found[method]["answers"].append(item["answers"])
    return found


def read_facts(folder: RunFolder, variant: Variant) -> dict[str, Any]:
    return folder.part(f"facts-{variant.name}", dict)


def read_text(folder: RunFolder, plan: VariantPlan, variant: Variant) -> list[TokenScores] | str:
    """The scores of all windows, or why there are none."""
    found: list[TokenScores] = []
    for held, windows in _blocks(folder, plan, variant):
        if isinstance(held, str):
            return held
        found += [
            TokenScores(*(held[f"{place}/{field}"] for field in TokenScores._fields)) for place in windows
        ]
    return found


def read_costs(folder: RunFolder, plan: VariantPlan, variant: Variant) -> dict[str, float]:
    """Means over all windows: passes of a layer a token, and where planes were read on demand, bytes of
    weights a token."""
    found: dict[str, list[float]] = {}
    for held, windows in _blocks(folder, plan, variant):
        assert not isinstance(held, str)
        for name in COSTS:
            found.setdefault(name, []).extend(
                held[key].item() for place in windows if (key := f"{place}/{name}") in held
            )
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def _blocks(
    folder: RunFolder, plan: VariantPlan, variant: Variant
) -> Iterator[tuple[dict[str, torch.Tensor] | str, range]]:
    """What the cells kept, block by block, and the places of the windows in it."""
    for block, windows in enumerate(plan.blocks):
        part = text_part(block, variant)
        if folder.has(part):
            yield str(folder.part(part, dict)["refused"]), range(0)
        else:
            yield folder.read_tensors(part), range(len(windows))
