"""Who takes part in an experiment: a model at some precision on some machine, each in a process of its own.

A *machine* is a device and what else decides the last bits, spelled as `--devices` spells it: the device,
then numerics joined by "+", as in `cuda:0`, `cpu`, `cpu+avx2` or `cpu+eager+1thread`.

    avx512, avx2, default    vector instructions of PyTorch's CPU kernels (ATEN_CPU_CAPABILITY)
    eager, sdpa              transformers' attention implementation
    1thread, 2threads, ...   threads of PyTorch

Where there is only a CPU, other vector instructions stand in for other hardware: the same sums in another
order, as on another chip. A *precision* is fp16, bf16 or fp32; or a recipe, or a quantized checkpoint, which
then runs in the study's dtype.
"""

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel

from bitassay.engines.load import load
from bitassay.errors import BitassayError, suggestion
from bitassay.models.options import AUTO
from bitassay.quantization.pipeline import quantize_cached
from bitassay.quantization.recipe.recipe import find_recipe, shipped_recipes
from bitassay.record.progress import Progress, silent

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
INSTRUCTIONS, ATTENTIONS = ("avx512", "avx2", "default"), ("eager", "sdpa")
_DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")
_THREADS = re.compile(r"(\d+)threads?")
# What the verifiers on one machine differ in, beyond the machine itself.
VERIFIER_NUMERICS = {
    "cpu": ("", "eager", "1thread", "eager+1thread"),
    "cuda": ("", "eager"),
    "mps": ("", "eager"),
}


def _kind(option: str) -> str:
    """What an option decides."""
    return "instructions" if option in INSTRUCTIONS else "attention" if option in ATTENTIONS else "threads"


@dataclass(frozen=True)
class Machine:
    """Raises BitassayError where `name` is not spelled as above."""

    name: str

    def __post_init__(self) -> None:
        device, *options = self.name.split("+")
        if not _DEVICE.fullmatch(device):
            raise BitassayError(
                f"{self.name!r} is no machine: {device!r} is no device",
                "cpu, mps, cuda or cuda:0, and numerics as in cpu+avx2+eager+1thread",
            )
        for option in options:
            if option not in INSTRUCTIONS + ATTENTIONS and not _THREADS.fullmatch(option):
                known = (*INSTRUCTIONS, *ATTENTIONS, "1thread", "2threads")
                raise BitassayError(
                    f"{self.name!r} is no machine: no numerics are called {option!r}; "
                    f"{suggestion(option, known)}"
                )

    @property
    def device(self) -> str:
        return self.name.split("+")[0]

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(self.name.split("+")[1:])

    @property
    def attention(self) -> str:
        """AUTO where the name does not say."""
        return next((option for option in self.options if option in ATTENTIONS), AUTO)

    @property
    def threads(self) -> int | None:
        """Threads of PyTorch; None leaves its own choice."""
        return next((int(found[1]) for option in self.options if (found := _THREADS.fullmatch(option))), None)

    @property
    def label(self) -> str:
        """The name in file names."""
        return self.name.replace(":", "")

    def variables(self) -> dict[str, str]:
        """What the environment of a process on this machine needs."""
        found = {}
        for option in self.options:
            if option in INSTRUCTIONS:
                found["ATEN_CPU_CAPABILITY"] = option
        if self.threads is not None:
            found["OMP_NUM_THREADS"] = str(self.threads)
        return found

    def seen_alone(self) -> "Machine":
        """The same for a process that sees this GPU alone, as number 0."""
        return Machine("+".join(("cuda:0", *self.options)))

    def is_here(self) -> bool:
        """Whether this computer has the device."""
        if self.device.startswith("cuda"):
            return torch.cuda.device_count() > int(self.device.partition(":")[2] or 0)
        return self.device == "cpu" or torch.backends.mps.is_available()

    @property
    def with_more_numerics(self) -> tuple["Machine", ...]:
        """This machine, and those like it with different numerics."""
        kinds = VERIFIER_NUMERICS[self.device.partition(":")[0]]
        said = set(map(_kind, self.options))
        new = [kind for kind in kinds if not said & set(map(_kind, filter(None, kind.split("+"))))]
        return tuple(Machine("+".join(filter(None, (self.name, kind)))) for kind in new)

    def verifiers(self, count: int, without: Collection[str] = ()) -> list["Machine"]:
        """`count` machines like this one with different numerics, without those of these names; past those
        that there are they repeat."""
        there = [machine for machine in self.with_more_numerics if machine.name not in without] or [self]
        return [there[index % len(there)] for index in range(count)]


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

    def load(
        self,
        model: str,
        *,
        attention: str = AUTO,
        trust_remote_code: bool = False,
        progress: Progress = silent,
    ) -> PreTrainedModel:
        """The model as this party runs it. `model` is the dense one; a quantized checkpoint takes its place.
        attention: where the machine's name says none."""
        own = self.machine.attention
        where = {
            "dtype": DTYPES.get(self.precision, self.dtype),
            "device": self.machine.device,
            "attention": attention if own == AUTO else own,
            "trust_remote_code": trust_remote_code,
            "progress": progress,
        }
        if self.precision in DTYPES:
            return load(model, **where)
        if is_recipe(self.precision):
            return quantize_cached(load(model, **where), find_recipe(self.precision), progress=progress)
        return load(self.precision, **where)


def is_recipe(precision: str) -> bool:
    """Whether it names a recipe; otherwise it is a dtype or a checkpoint."""
    return Path(precision).suffix in (".yaml", ".yml") or precision in shipped_recipes()


def other_machines(first: Machine) -> list[Machine]:
    """What may stand in for other hardware where none was named, the best first: the CPU beside a GPU; beside
    a CPU other vector instructions, or another attention."""
    if first.device != "cpu":
        return [Machine("cpu"), Machine("cpu+eager")]
    less = {"DEFAULT": (), "AVX2": ("default",)}
    others = less.get(torch.backends.cpu.get_cpu_capability(), ("avx2", "default"))
    names = [f"cpu+{one}{attention}" for one in others for attention in ("", "+eager")]
    return [machine for machine in map(Machine, (*names, "cpu+eager")) if machine != first]


def first_machines() -> list[Machine]:
    """What may be the machine of a study, the best first: the GPU where there is one."""
    gpu = "cuda:0" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
    device = gpu or "cpu"
    return [Machine(device), Machine(f"{device}+eager")]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within the context, PyTorch runs on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def process_environment(machine: Machine, gpu: int | None = None) -> dict[str, str]:
    """The variables of a process on `machine`; gpu: the only GPU that it may see. Threads that wait sleep:
    spinning, two busy processes slow each other down many times over."""
    seen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **machine.variables(), **seen}
