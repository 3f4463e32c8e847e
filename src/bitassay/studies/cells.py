"""The jobs of a study of variants, here *cells*.
They depend on nothing but the plan, so that any worker on any computer can do any of them, and two workers
that do the same one write the same files.

    text-B           block B of the windows: the base model reads them once, then every variant in turn
                     -> text-B-VARIANT.safetensors (the scores of each token; of each window, the passes of a
                     layer and the bytes of weights that a token took), also for the base
    questions-V      variant V and all questions of MMLU, direct and by text -> questions-V.json
    drafts-D         texts by speculative decoding with the D-th length of drafts -> drafts-D.json

and facts-VARIANT.json by whoever makes a variant. For a variant that cannot be made here, a file says why.
Files that exist are not made again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bitassay.bench.timing import turns
from bitassay.errors import BitassayError, MissingError
from bitassay.evaluation.divergence import TokenScores, token_scores, window_logits
from bitassay.evaluation.tasks.load import AskedTask, load_tasks
from bitassay.evaluation.tasks.run import answer
from bitassay.models.identity import identity
from bitassay.models.positions import model_windows
from bitassay.quantization.pipeline import quantize_tensors_cached
from bitassay.quantization.runtime.model import Quantization, with_tensors
from bitassay.record.progress import Progress
from bitassay.record.run import AGAIN, RunFolder, differing
from bitassay.studies.costs import COSTS, WindowResult, facts_of, window_reader, with_costs
from bitassay.studies.speculation import check_speculation
from bitassay.studies.torchao_models import torchao_model
from bitassay.studies.variants import Findings, Variant, VariantPlan

METHODS = {"direct": "", "generate": "_generative"}
NEW_TOKENS = 16  # of a generated answer; lm-eval reads its first line


@dataclass(frozen=True)
class Cell:
    """kind: "text", of a block of windows, "questions", of a variant, or "drafts", of a length; which: its
    number."""

    kind: str
    which: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.which:02d}"


def cells_of(plan: VariantPlan) -> list[Cell]:
    """Return all cells of a study, those that take longest first."""
    counts = {
        "text": len(plan.blocks),
        "questions": len(plan.variants) if plan.questions else 0,
        "drafts": len(plan.drafts),
    }
    return [Cell(kind, which) for kind, count in counts.items() for which in range(count)]


def is_done(folder: RunFolder, plan: VariantPlan, cell: Cell) -> bool:
    """Return whether all files of a cell exist."""
    if cell.kind != "text":
        return folder.has(cell.name)
    return all(_has_text(folder, cell.which, variant) for variant in plan.variants)


def _text_part(block: int, variant: Variant) -> str:
    return f"text-{block:02d}-{variant.name}"


def _has_text(folder: RunFolder, block: int, variant: Variant) -> bool:
    part = _text_part(block, variant)
    return folder.has_tensors(part) or folder.has(part)


def start(setup: Any, folder: Path, progress: Progress) -> Callable[[Any], None]:
    """Return the function of a worker's jobs: kind and number of a cell. setup: the plan of the run
    folder."""
    runner, run = CellRunner(setup), RunFolder(folder, setup)
    return lambda content: runner.work(Cell(*content), run)


class CellRunner:
    """What a worker keeps from cell to cell: the base model, and the questions as lm-eval holds them.

    begun: what the run folder belongs to (`VariantPlan.described`). Raises BitassayError where the code, the
    model's weights or the questions are not those that the study began with.
    """

    def __init__(self, begun: Mapping[str, Any]):
        self.plan = plan = VariantPlan.of(begun["plan"])
        if changed := differing(begun["versions"], plan.versions()):
            raise BitassayError(f"this study began with {changed}", AGAIN)
        self.base = plan.loaded(plan.model, trust_remote_code=plan.trust_remote_code)
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
        """Make the files of a cell that do not exist."""
        {"text": self._text, "questions": self._questions, "drafts": self._drafts}[cell.kind](cell, folder)

    def _models(self, variants: Sequence[Variant]) -> Iterator[tuple[Variant, PreTrainedModel | str]]:
        """Yield each variant's model, one at a time, or why there is none. Two of one recipe are quantized
        once."""
        made: Quantization | None = None
        for variant in variants:
            model = self.base
            if variant.torchao:
                assert variant.format is not None
                try:
                    model = torchao_model(self.base, variant.format, smoothed=variant.smoothed)
                except MissingError as error:
                    model = error.problem
            elif variant.recipe is not None:
                if made is None or made.recipe != variant.recipe:
                    made = quantize_tensors_cached(self.base, variant.recipe)
                model = with_tensors(self.base, made, packed=variant.kind == "real")
            yield variant, model

    def _text(self, cell: Cell, folder: RunFolder) -> None:
        assert self.plan.protocol is not None
        windows, _ = model_windows(self.base, self.plan.protocol)
        block = windows[list(self.plan.blocks[cell.which])]
        logits = [window_logits(self.base, window) for window in block]
        variants = in_turn(self.plan.variants, cell.which, len(self.plan.blocks))
        missing = [v for v in variants if not _has_text(folder, cell.which, v)]
        for variant, model in self._models(missing):
            part = _text_part(cell.which, variant)
            if isinstance(model, str):
                folder.part(part, lambda why=model: {"refused": why})
                continue
            keep_facts(folder, variant, model)
            read, tensors = window_reader(self.base, model, variant.reading), {}
            for index, (window, base) in enumerate(zip(block, logits, strict=True)):
                if variant.name == self.plan.base:
                    result, scores = WindowResult(base, 1.0, None), token_scores(base, window[1:])
                else:
                    result = read(window)
                    scores = token_scores(result.logits, window[1:], base)
                for name, value in (scores._asdict() | result.costs).items():
                    tensors[f"{index}/{name}"] = value
            folder.write_tensors(part, tensors)

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
        folder.part(cell.name, lambda: check_speculation(self.plan, recipe, self.plan.drafts[cell.which]))


def in_turn(variants: Sequence[Variant], block: int, blocks: int) -> list[Variant]:
    """Return the variants in the order of a block. Each block begins with another one, so that workers on
    several blocks do not wait for the same recipe's codes."""
    return turns(variants, block * len(variants) // blocks)


def keep_facts(folder: RunFolder, variant: Variant, model: PreTrainedModel) -> None:
    """Write what a variant stores; nothing of torchao's, whose tensors have formats of their own."""
    folder.part(f"facts-{variant.name}", lambda: {} if variant.torchao else facts_of(model))


def questions(plan: VariantPlan) -> dict[str, dict[str, AskedTask]]:
    """Return the questions by subject and method."""
    return _questions(tuple(plan.subjects.items()))


@cache
def _questions(subjects: tuple[tuple[str, int], ...]) -> dict[str, dict[str, AskedTask]]:
    return {
        subject: {
            method: load_tasks(f"mmlu_{subject}{ending}", count)[0] for method, ending in METHODS.items()
        }
        for subject, count in subjects
    }


def answers_of(model: PreTrainedModel, plan: VariantPlan) -> dict[str, Any]:
    """Return by method whether each question was answered rightly, and what was answered (log-likelihoods of
    the four letters in nats, or the text)."""
    from bitassay.evaluation.harness import BitassayLM

    lm = BitassayLM(model)
    lm.max_gen_toks = NEW_TOKENS
    answers: dict[str, Any] = {method: {"right": [], "answers": []} for method in METHODS}
    for asked in questions(plan).values():
        for method, question in asked.items():
            for item in answer(lm, question)["items"]:
                [metric] = item["metrics"].values()
                answers[method]["right"].append(metric == 1)
                answers[method]["answers"].append(item["answers"])
    return answers


def read_findings(folder: RunFolder, plan: VariantPlan) -> Findings:
    """Read what all cells made."""
    findings = Findings(plan, {variant.name: variant for variant in plan.variants})
    for number, (name, variant) in enumerate(findings.variants.items()):
        asked = folder.part(f"questions-{number:02d}", dict) if plan.questions else {}
        text = _read_text(folder, plan, variant)
        if why := asked.get("refused") or (text if isinstance(text, str) else None):
            findings.refused[name] = why
            continue
        assert not isinstance(text, str)
        findings.facts[name] = folder.part(f"facts-{name}", dict)
        if plan.questions:
            findings.asked[name] = asked
            findings.right[name] = {method: asked[method]["right"] for method in METHODS}
        if plan.blocks:
            findings.text[name], costs = text
            findings.facts[name] = with_costs(findings.facts[name], costs)
    return findings


def _read_text(
    folder: RunFolder, plan: VariantPlan, variant: Variant
) -> tuple[list[TokenScores], dict[str, float]] | str:
    """Return the scores of all windows and the mean costs of a token, or why there are none."""
    scores, costs = list[TokenScores](), {name: list[float]() for name in COSTS}
    for block, windows in enumerate(plan.blocks):
        part = _text_part(block, variant)
        if folder.has(part):
            return str(folder.part(part, dict)["refused"])
        tensors = folder.read_tensors(part)
        for index in range(len(windows)):
            scores.append(TokenScores(*(tensors[f"{index}/{field}"] for field in TokenScores._fields)))
            for name, values in costs.items():
                if (key := f"{index}/{name}") in tensors:
                    values.append(tensors[key].item())
    return scores, {name: sum(values) / len(values) for name, values in costs.items() if values}
