"""What works with every causal architecture of the installed transformers, tried on tiny random models.

    python benchmarks/architectures.py [MODEL_TYPE ...]     prints a row each
    python benchmarks/architectures.py --docs               writes the table of docs/supported-models.md

A step works when it gives what plain transformers gives, or is refused by one `BitassayError`; anything else
is a fault and ends the run with status 1.

    load      `bitassay.load` says what AutoModelForCausalLM says, to the bit
    walk      every matrix of the decoder layers has a known role
    nearest   int4 in groups of 32; the packed model says what the fake one does
    gptq      the same by GPTQ, calibrated layer by layer; every matrix has codes
    save      the folder, loaded by plain transformers (or by `bitassay.load`), says what was saved
    generate  greedy texts of two prompts, and the hidden states of a forward over them
    tasks     log-likelihoods of continuations that share a context, beside one forward each
    rotate    folded rotations of stream and values leave float64 logits as they are
    smooth    so do scales in norms, values and up projections
    gguf      the file, loaded by `bitassay.load`, says what was saved, to 16 bits
"""

import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import bitassay
from bitassay.engines.decode import generate, prefill
from bitassay.errors import BitassayError
from bitassay.evaluation.likelihood import continuation_scores
from bitassay.models.walk import decoder_layers, matrices, walk
from bitassay.quantization.export.gguf_file import write_gguf
from bitassay.quantization.export.save import save
from bitassay.quantization.inputs.ranges import collect_ranges
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.recipe.transforms import Rotation, Smoothing
from bitassay.quantization.runtime.model import with_tensors
from bitassay.quantization.transforms.rotation import rotate
from bitassay.quantization.transforms.smoothing import smooth
from bitassay.testing.architectures import NOT_BUILT, architectures, save_tiny

TEXT = "Once upon a time there was a little dog who lived in a big red house near the sea. " * 12
IDS = torch.arange(3, 35).view(1, 32)
CLOSE = 2e-4  # of the largest logit: what fp32 loses where the order of operations differs
DOCS = Path(__file__).parents[1] / "docs" / "supported-models.md"
BEGIN, END = "<!-- table: python benchmarks/architectures.py --docs -->", "<!-- end of table -->"


class Fault(Exception):
    """A step neither works nor is refused."""


@dataclass
class Trial:
    """One tiny model on its way through the steps, in a folder of its own."""

    model_type: str
    folder: Path

    @cached_property
    def stored(self) -> Path:
        return save_tiny(self.model_type, self.folder / "base")

    @cached_property
    def base(self) -> PreTrainedModel:
        return bitassay.load(self.stored)

    @cached_property
    def nearest(self) -> PreTrainedModel:
        return bitassay.quantize(self.base, self.recipe("nearest"))

    def recipe(self, name: str, **parts: object) -> Recipe:
        """int4 in groups of 32, which divide every row; with `parts`, calibrated on a text of its own."""
        text = self.folder / "text.txt"
        text.write_text(TEXT)
        weights = {"format": "int4", "granularity": "g32"}
        more = {"calibration": {"corpus": str(text), "samples": 2, "tokens": 32}} if parts else {}
        return Recipe.model_validate({"name": name, "weights": weights} | more | parts)


def load(trial: Trial) -> str:
    loaded = logits(trial.base)
    plain = AutoModelForCausalLM.from_pretrained(trial.stored).eval()
    same(loaded, logits(plain), 0, "the loaded model")
    return "yes"


def walked(trial: Trial) -> str:
    found = walk(trial.base)
    matrices_there = {
        id(p) for p in decoder_layers(trial.base).parameters() if p.ndim >= 2 and p.is_floating_point()
    }
    binned = [linear.weight for linear in found.linears.values()]
    binned += [
        p for kind in (found.experts, found.routers, found.constants, found.others) for p in kind.values()
    ]
    if missed := matrices_there - {id(p) for p in binned}:
        names = [name for name, p in trial.base.named_parameters() if id(p) in missed]
        raise Fault(f"in no bin: {names[:3]}")
    if not matrices(trial.base):
        raise Fault("nothing to quantize")
    return "yes"


def nearest(trial: Trial) -> str:
    packed = with_tensors(trial.base, trial.nearest.quantization, packed=True)
    same(logits(packed), logits(trial.nearest), CLOSE, "the packed model")
    different(logits(trial.nearest), logits(trial.base))
    return "yes"


def gptq(trial: Trial) -> str:
    solved = bitassay.quantize(trial.base, trial.recipe("gptq", gptq={}))
    if missing := set(trial.nearest.quantization.tensors) - set(solved.quantization.tensors):
        raise Fault(f"no codes for {sorted(missing)[:3]}")
    different(logits(solved), logits(trial.nearest))
    return "yes"


def saved(trial: Trial) -> str:
    folder = trial.folder / "saved"
    card = save(trial.nearest, folder)
    again = bitassay.load(folder)
    same(logits(again), logits(trial.nearest), CLOSE, "the folder")
    if card.layout == "bitassay":
        return "own layout"
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    same(logits(plain), logits(trial.nearest), CLOSE, "the folder in plain transformers")
    return "yes"


def generated(trial: Trial) -> str:
    prompts = [list(range(3, 12)), list(range(20, 25))]
    layer = len(decoder_layers(trial.base))
    wrote = generate(trial.base, prompts, max_new_tokens=6, layers=[layer])
    read = prefill(trial.base, prompts, [one.output_ids for one in wrote], layers=[layer])
    for one, other in zip(wrote, read, strict=True):
        same(one.states[layer], other.states[layer], CLOSE, "a prefill over the generated text")
    return "yes"


def tasks(trial: Trial) -> str:
    context = list(range(3, 60))
    pairs = [(context, [70, 71]), (context, [70, 90, 91]), (context[:50], [100]), ([9, 8, 7], [5, 6])]
    found = continuation_scores(trial.base, pairs, max_length=128)
    with torch.inference_mode():
        for (before, after), score in zip(pairs, found, strict=True):
            tokens = torch.tensor([[*before, *after]])
            rows = trial.base(tokens).logits[0].log_softmax(-1)[len(before) - 1 : -1]
            plain = rows.gather(1, torch.tensor(after)[:, None]).sum().item()
            if not abs(plain - score.log_likelihood) <= 1e-3:
                raise Fault(f"a task's log-likelihood is {score.log_likelihood:.4f} instead of {plain:.4f}")
    return "yes"


def rotated(trial: Trial) -> str:
    rotation = Rotation(without_hadamard="orthogonal")
    return _unchanged(trial, lambda model: rotate(model, rotation))


def smoothed(trial: Trial) -> str:
    def change(model: PreTrainedModel) -> None:
        ranges = collect_ranges(model, IDS)
        smooth(model, Smoothing(method="smoothquant"), ranges, lambda name: None)

    return _unchanged(trial, change)


def _unchanged(trial: Trial, change: Callable[[PreTrainedModel], object]) -> str:
    """In float64, but for classes that have a number of float32 in their forward."""
    model = bitassay.load(trial.stored, dtype="float64", attention="eager")
    model.set_experts_implementation("eager")  # the others know no float64
    tolerance = 1e-5  # some norms compute in float32
    try:
        before = logits(model)
    except RuntimeError:
        model, tolerance = model.float(), CLOSE
        before = logits(model)
    change(model)
    same(logits(model), before, tolerance, "the changed model")
    return "yes"


def gguf(trial: Trial) -> str:
    path = trial.folder / "model.gguf"
    write_gguf(trial.nearest, path)
    before = os.environ.get("BITASSAY_CACHE")
    os.environ["BITASSAY_CACHE"] = str(trial.folder / "cache")
    try:
        again = bitassay.load(path)
    finally:
        del os.environ["BITASSAY_CACHE"]
        if before is not None:
            os.environ["BITASSAY_CACHE"] = before
    same(logits(again), logits(trial.nearest), 2e-2, "the GGUF file")
    return "yes"


STEPS: dict[str, Callable[[Trial], str]] = {
    "load": load,
    "walk": walked,
    "nearest": nearest,
    "gptq": gptq,
    "save": saved,
    "generate": generated,
    "tasks": tasks,
    "rotate": rotated,
    "smooth": smoothed,
    "gguf": gguf,
}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits.double()


def same(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    difference = (found.double() - expected.double()).abs().max().item()
    if not difference <= tolerance * expected.double().abs().max().item():
        raise Fault(f"{what} says something else: {difference:.2g} away")


def different(found: Tensor, from_: Tensor) -> None:
    if not found.isfinite().all() or torch.equal(found, from_):
        raise Fault("the quantized model says what it did before, or nothing finite")


def examine(model_type: str, steps: list[str] | None = None) -> dict[str, str]:
    """Each step's outcome: `yes`, `own layout`, `no: <why>`, or `FAULT: <what>`. A model that cannot be
    loaded, walked or quantized is not asked the rest."""
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        trial = Trial(model_type, Path(name))
        for step in steps or STEPS:
            try:
                found[step] = STEPS[step](trial)
            except BitassayError as error:
                where = re.compile(rf"^{re.escape(str(trial.stored))}\S*: ")
                found[step] = f"no: {where.sub('', error.problem)}"
                if "\n" in error.problem:
                    found[step] = f"FAULT: a refusal of several lines: {error.problem}"
            except Exception as error:
                found[step] = f"FAULT: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if step in ("load", "walk", "nearest") and not found[step].startswith("yes"):
                break
    return found


SHOWN = ("nearest", "gptq", "save", "generate", "tasks", "rotate", "smooth", "gguf")


def row(found: dict[str, str]) -> list[str]:
    """What the table says of a model: `yes`, `own layout` or `no` for each step that is shown."""
    return [found.get(step, "no").partition(":")[0] for step in SHOWN]


def table(rows: dict[str, dict[str, str]]) -> str:
    """The table of docs/supported-models.md, and why some models are refused altogether."""
    lines = [f"| model_type | {' | '.join(SHOWN)} |", f"|---|{'---|' * len(SHOWN)}"]
    lines += [f"| {name} | {' | '.join(row(found))} |" for name, found in rows.items()]
    lines += ["", "Refused before any work:", ""]
    for name, found in rows.items():
        last = list(found.values())[-1]
        if len(found) < len(STEPS):
            lines.append(f"- {name}: {last.removeprefix('no: ')}")
    lines += ["", "Listed by transformers and not tried:", ""]
    lines += [f"- {name}: {why}" for name, why in NOT_BUILT.items()]
    return "\n".join(lines)


def documented() -> dict[str, list[str]]:
    """What docs/supported-models.md says, by `model_type`."""
    between = DOCS.read_text().partition(BEGIN)[2].partition(END)[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in between if line[:1] == "|"]
    return {name: said for name, *said in cells[2:]}


def write_docs(rows: dict[str, dict[str, str]]) -> None:
    before, _, rest = DOCS.read_text().partition(BEGIN)
    DOCS.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}")


def main(asked: list[str]) -> int:
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = {}
    for name in [one for one in asked if not one.startswith("--")] or architectures():
        rows[name] = examine(name)
        print(json.dumps({name: rows[name]}), flush=True)
    if "--docs" in asked:
        write_docs(rows)
    return any(text.startswith("FAULT") for found in rows.values() for text in found.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
