"""Parties of an experiment: a model at some precision on some machine, each in a process of its own.

A *precision* is fp16, bf16 or fp32; or a recipe, or a quantized checkpoint, which then runs in the study's
dtype. A party's worker is given items, and makes a file for each. Files that exist are not made again.
Everything goes through files, so that another computer can do the other half. Model and recipe are what the
user named; traces are untrusted.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from transformers import PreTrainedModel

from bitassay.bench.roofline import wait_for
from bitassay.engines.load import load
from bitassay.errors import BitassayError
from bitassay.models.options import AUTO
from bitassay.quantization.pipeline import quantize_cached
from bitassay.quantization.recipe.recipe import find_recipe, shipped_recipes
from bitassay.record.environment import environment
from bitassay.record.files import read_json, write_json
from bitassay.record.jobs import Job, Start
from bitassay.record.progress import Progress
from bitassay.studies.machines import Machine
from bitassay.verification.prove import prove_many
from bitassay.verification.trace import write_trace

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
PROVER = "bitassay.studies.parties:prover"
WARM_UP = 2  # tokens, before a generation is timed


@dataclass(frozen=True)
class Party:
    """A model at a precision on a machine. dtype: what a recipe or a quantized checkpoint runs in."""

    precision: str
    machine: Machine
    dtype: str = "float16"

    @property
    def name(self) -> str:
        return f"{self.precision} on {self.machine.name}"

    @cached_property
    def label(self) -> str:
        """The name in file names."""
        words = Path(self.precision).stem if self.precision not in DTYPES else self.precision
        return "_".join((re.sub(r"[^\w.-]", "-", words), self.machine.label))

    def load(self, model: str, *, attention: str = AUTO, trust_remote_code: bool = False) -> PreTrainedModel:
        """Return the model as this party runs it. `model` is the dense one; a quantized checkpoint takes its
        place. attention: where the machine's name says none."""
        named = self.machine.attention
        options = {
            "dtype": DTYPES.get(self.precision, self.dtype),
            "device": self.machine.device,
            "attention": attention if named == AUTO else named,
            "trust_remote_code": trust_remote_code,
        }
        if self.precision in DTYPES:
            return load(model, **options)
        if is_recipe(self.precision):
            return quantize_cached(load(model, **options), find_recipe(self.precision))
        return load(self.precision, **options)


def is_recipe(precision: str) -> bool:
    """Return whether it names a recipe; otherwise it is a dtype or a checkpoint."""
    return Path(precision).suffix in (".yaml", ".yml") or precision in shipped_recipes()


@dataclass(frozen=True)
class Item:
    """One prompt's work. trace: the file that a prover makes and a verifier reads; out: what a verifier
    makes."""

    prompt: tuple[int, ...]
    nonce: str
    tokens: int
    trace: Path
    out: Path | None = None

    @property
    def made(self) -> Path:
        """The file that exists once the item is done."""
        return self.out or timing_file(self.trace)


ITEMS = TypeAdapter(tuple[Item, ...])


def party_job(
    function: str,
    party: Party,
    model: str,
    items: Sequence[Item],
    folder: Path,
    *,
    batch: int = 1,
    gpus: Sequence[int] = (),
    **loading: Any,
) -> Job:
    """Return the job of a party's worker: `function` on items of `model`. batch: prompts that a prover
    answers at a time. gpus: what workers are given, one each. loading: further options of Party.load."""
    machine = party.machine.seen_alone() if gpus else party.machine
    setup = {
        "model": model,
        "party": [party.precision, machine.name, party.dtype],
        "batch": batch,
        "loading": loading,
    }
    content = ITEMS.dump_python(tuple(items), mode="json")
    return Job(party.name, Start(function, setup, folder, machine.variables), content)


def load_party(setup: Any) -> PreTrainedModel:
    """Return the model of a worker that was started by `party_job`."""
    precision, machine, dtype = setup["party"]
    return Party(precision, Machine(machine), dtype).load(setup["model"], **setup["loading"])


def prover(setup: Any, folder: Path, progress: Progress) -> Callable[[Any], None]:
    """Return the function of a prover's jobs: write traces, and how long each took."""
    model, batch = load_party(setup), setup["batch"]

    def prove(content: Any) -> None:
        items = [item for item in ITEMS.validate_python(content) if not item.made.exists()]
        if items:
            prove_many(model, [items[0].prompt], max_new_tokens=min(WARM_UP, items[0].tokens))
        for start in range(0, len(items), batch):
            part = items[start : start + batch]
            traces, seconds = timed(
                model,
                lambda part=part: prove_many(
                    model,
                    [item.prompt for item in part],
                    max_new_tokens=part[0].tokens,
                    nonces=[item.nonce for item in part],
                    batch_size=len(part),
                ),
            )
            for item, trace in zip(part, traces, strict=True):
                write_trace(item.trace, trace)
                timing = GenerationTiming(seconds=seconds / len(part), output_tokens=trace.n_tokens)
                about = {"batch": len(part), "environment": environment(model.device)}
                write_json(timing_file(item.trace), timing.model_dump() | about)

    return prove


class GenerationTiming(BaseModel):
    """How long a generation took. The file may come from another computer."""

    model_config = ConfigDict(frozen=True)

    seconds: float = Field(gt=0, allow_inf_nan=False)
    output_tokens: int = Field(ge=1)


def timing_file(trace: Path) -> Path:
    """Return where a prover says how long a trace took."""
    return trace.with_suffix(".json")


def read_timing(trace: Path) -> GenerationTiming:
    """Return what the generation of `trace` took. Raises BitassayError where the file does not say."""
    path = timing_file(trace)
    try:
        return GenerationTiming.model_validate(read_json(path))
    except ValidationError as error:
        raise BitassayError(
            f"{path}: damaged ({error.errors(include_input=False, include_url=False)[0]['msg']})",
            f"remove it and {trace.name}, and prove again",
        ) from error


def timed(model: PreTrainedModel, work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what `work` returns and the seconds that it took, the device's queue included."""
    wait_for(model.device)
    start = time.perf_counter()
    result = work()
    wait_for(model.device)
    return result, time.perf_counter() - start
