"""One party of an experiment at work, in a process of its own:
`python -m bitassay.studies.verillm.worker JOB`.

A job is a JSON file: who works, on which model, and a list of items, each with the file that it makes.

    prove     prompt, nonce, tokens                 -> a trace, and beside it how long it took (.json)
    verify    the trace's path, prompt, nonce       -> the statistics of each cell (.safetensors)

A file that is there is not made again. Everything goes through files, so a job is the same for a process of
this computer and for another computer. Model and recipe are what the user named; traces are untrusted.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.options import AUTO
from bitassay.record.environment import environment
from bitassay.record.files import atomic_file, read_json, write_json
from bitassay.record.processes import end_with_parent
from bitassay.studies.verillm.parties import Machine, Party
from bitassay.verification.detectors.distance import cell_distances
from bitassay.verification.detectors.token_difr import token_margins
from bitassay.verification.detectors.verillm import CellStatistics, run_statistics
from bitassay.verification.numerics import numerics
from bitassay.verification.observe import compare
from bitassay.verification.prove import prove_many
from bitassay.verification.structure import Request, request_defects, shape_defects
from bitassay.verification.trace import Trace, read_trace, write_trace

WARM_UP = 2  # tokens, before a generation is timed
STATISTICS = tuple(field.name for field in fields(CellStatistics))


@dataclass(frozen=True)
class Item:
    """One prompt's work. trace: the file that a prover makes and a verifier reads; out: what a verifier
    makes."""

    prompt: tuple[int, ...]
    nonce: str
    tokens: int
    trace: Path
    out: Path | None = None


@dataclass(frozen=True)
class Job:
    """model: the dense one. batch: prompts generated at a time."""

    role: str
    model: str
    precision: str
    machine: str
    dtype: str
    items: tuple[Item, ...]
    batch: int = 1
    trust_remote_code: bool = False
    attention: str = AUTO


class Spent(BaseModel):
    """What a generation took. The file may come from another computer."""

    model_config = ConfigDict(frozen=True)

    seconds: float = Field(gt=0, allow_inf_nan=False)
    output_tokens: int = Field(ge=1)


class _About(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[int, ...] = Field(min_length=1)
    n_prompt: int = Field(ge=0)
    seconds: float = Field(gt=0, allow_inf_nan=False)
    verifier: dict[str, Any]


@dataclass(frozen=True)
class Cells:
    """What a verifier found in one trace: the VeriLLM statistics (with e_m and e_w of the documents' rules)
    and the relative distance (not below the verifier's floor) of each cell, [layers, positions].

    margins in nats, by output token; n_prompt: positions of the prompt; seconds: of the verifier's work;
    verifier: its numerics.
    """

    layers: tuple[int, ...]
    n_prompt: int
    seconds: float
    verifier: dict[str, Any]
    statistics: CellStatistics
    distance: Float[Tensor, "layers positions"]
    margins: Float[Tensor, " outputs"]

    @property
    def prompt(self) -> CellStatistics:
        return self.statistics[:, : self.n_prompt]

    @property
    def generated(self) -> CellStatistics:
        return self.statistics[:, self.n_prompt :]

    @property
    def log_distances(self) -> Float[Tensor, " layers"]:
        """The mean log relative distance of each layer's generated cells."""
        return self.distance[:, self.n_prompt :].log().mean(-1)


def timing_file(trace: Path) -> Path:
    """Where a prover says how long a trace took."""
    return trace.with_suffix(".json")


def run_job(job: Job) -> None:
    """Do what is not done yet."""
    items = [item for item in job.items if not _done(job, item)]
    if not items:
        return
    party = Party(job.precision, Machine(job.machine), job.dtype)
    model = party.load(job.model, attention=job.attention, trust_remote_code=job.trust_remote_code)
    (_prove if job.role == "prove" else _verify)(job, model, items)


def _done(job: Job, item: Item) -> bool:
    made = timing_file(item.trace) if job.role == "prove" else item.out
    return made is not None and made.exists()


def _prove(job: Job, model: PreTrainedModel, items: Sequence[Item]) -> None:
    prove_many(model, [items[0].prompt], max_new_tokens=min(WARM_UP, items[0].tokens))
    for start in range(0, len(items), job.batch):
        batch = items[start : start + job.batch]
        traces, seconds = timed(
            model,
            lambda batch=batch: prove_many(
                model,
                [item.prompt for item in batch],
                max_new_tokens=batch[0].tokens,
                nonces=[item.nonce for item in batch],
                batch_size=len(batch),
            ),
        )
        for item, trace in zip(batch, traces, strict=True):
            write_trace(item.trace, trace)
            spent = {"seconds": seconds / len(batch), "output_tokens": trace.n_tokens, "batch": len(batch)}
            write_json(timing_file(item.trace), {**spent, "environment": environment(model.device)})


def _verify(job: Job, model: PreTrainedModel, items: Sequence[Item]) -> None:
    for index, item in enumerate(items):
        trace = read_trace(item.trace)
        request = Request(item.prompt, item.nonce, None, item.tokens)
        if defects := shape_defects(trace, model) or request_defects(trace.header, model, request):
            raise BitassayError(
                f"{item.trace}: {defects[0].sentence}", "remove the file and run the same command again"
            )
        assert item.out is not None
        if index == 0:
            statistics_of(trace, model)  # a first forward is slower than all others
        tensors, seconds = timed(model, lambda trace=trace: statistics_of(trace, model))
        about = {
            "layers": trace.header.layers,
            "n_prompt": trace.n_prompt,
            "seconds": seconds,
            "verifier": numerics(model).model_dump(),
        }
        with atomic_file(item.out) as temporary:
            save_file(tensors, temporary, metadata={"bitassay": json.dumps(about)})


def statistics_of(trace: Trace, model: PreTrainedModel) -> dict[str, Tensor]:
    """Return all statistics of `Cells`, by the verifier's own prefill."""
    comparison = compare(trace, model)
    margins = torch.tensor(token_margins(comparison))
    return {**vars(run_statistics(comparison)), "distance": cell_distances(comparison), "margins": margins}


def timed(model: PreTrainedModel, work: Any) -> tuple[Any, float]:
    """What `work` returns and the seconds that it took, the device's queue included."""
    _synchronise(model)
    start = time.perf_counter()
    done = work()
    _synchronise(model)
    return done, time.perf_counter() - start


def _synchronise(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    elif model.device.type == "mps":
        torch.mps.synchronize()


def read_cells(path: Path) -> Cells:
    """What `_verify` wrote. Raises BitassayError where the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            about = _About.model_validate_json((file.metadata() or {})["bitassay"])
            tensors = {name: file.get_tensor(name) for name in (*STATISTICS, "distance", "margins")}
        shape = (len(about.layers), tensors["distance"].shape[-1])
        if shape[1] <= about.n_prompt or any(tensors[n].shape != shape for n in (*STATISTICS, "distance")):
            raise ValueError("the shapes do not fit")
    except (SafetensorError, OSError, LookupError, ValueError) as error:
        raise BitassayError(
            f"{path}: damaged ({error})", "remove this file and run the same command again"
        ) from error
    statistics = CellStatistics(*(tensors[name] for name in STATISTICS))
    return Cells(
        **dict(about), statistics=statistics, distance=tensors["distance"], margins=tensors["margins"]
    )


def read_timing(trace: Path) -> Spent:
    """What the generation of `trace` took. Raises BitassayError where the file does not say."""
    path = timing_file(trace)
    try:
        return Spent.model_validate(read_json(path))
    except ValidationError as error:
        raise BitassayError(
            f"{path}: damaged ({error.errors(include_input=False, include_url=False)[0]['msg']})",
            f"remove it and {trace.name}, and prove again",
        ) from error


_JOB = TypeAdapter(Job)


def write_job(path: Path, job: Job) -> None:
    write_json(path, _JOB.dump_python(job, mode="json"))


def main(path: str) -> int:
    """Run the job in the file; an error that a user can act on goes to stderr without a traceback."""
    try:
        run_job(_JOB.validate_python(read_json(Path(path))))
    except BitassayError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status
    return 0


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main(sys.argv[1]))
