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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel

from bitassay.errors import BitassayError, nearest
from bitassay.models.load import AUTO, load
from bitassay.quantize.pipeline import quantize_once
from bitassay.quantize.recipe import find_recipe, shipped_recipes
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
                    f"the nearest are {nearest(option, known)}"
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
    def label(self) -> str:
        """The name in file names."""
        return self.name.replace(":", "")

    def variables(self) -> dict[str, str]:
        """What the environment of a process on this machine needs."""
        found = {}
        for option in self.options:
            if option in INSTRUCTIONS:
                found["ATEN_CPU_CAPABILITY"] = option
            elif threads := _THREADS.fullmatch(option):
                found["OMP_NUM_THREADS"] = threads[1]
        return found

    def seen_alone(self) -> "Machine":
        """The same for a process that sees this GPU alone, as number 0."""
        return Machine("+".join(("cuda:0", *self.options)))

    def is_here(self) -> bool:
        """Whether this computer has the device."""
        if self.device.startswith("cuda"):
            return torch.cuda.device_count() > int(self.device.partition(":")[2] or 0)
        return self.device == "cpu" or torch.backends.mps.is_available()

    def verifiers(self, count: int) -> list["Machine"]:
        """`count` machines like this one with different numerics; past those that there are they repeat."""
        kinds = VERIFIER_NUMERICS[self.device.partition(":")[0]]
        return [
            Machine("+".join(filter(None, (self.name, kinds[index % len(kinds)])))) for index in range(count)
        ]


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
            return quantize_once(load(model, **where), find_recipe(self.precision), progress=progress)
        return load(self.precision, **where)


def is_recipe(precision: str) -> bool:
    """Whether it names a recipe; otherwise it is a dtype or a checkpoint."""
    return Path(precision).suffix in (".yaml", ".yml") or precision in shipped_recipes()


def other_machine(first: Machine) -> Machine:
    """What stands in for other hardware where none was named: the CPU beside a GPU, other vector instructions
    beside a CPU."""
    if first.device != "cpu":
        return Machine("cpu")
    capability = torch.backends.cpu.get_cpu_capability()
    return Machine("cpu+avx2" if capability not in ("AVX2", "DEFAULT") else "cpu+default")


def first_machine() -> Machine:
    """The GPU where there is one."""
    if torch.cuda.is_available():
        return Machine("cuda:0")
    return Machine("mps" if torch.backends.mps.is_available() else "cpu")


def process_environment(machine: Machine, gpu: int | None = None) -> dict[str, str]:
    """The variables of a process on `machine`; gpu: the only GPU that it may see. Threads that wait sleep:
    spinning, two busy processes slow each other down many times over."""
    seen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **machine.variables(), **seen}
