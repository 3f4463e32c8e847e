"""Machines of a study, and whether this computer can be one: a *machine* is a device and what else decides
the last bits, spelled as `--devices` spells it. That is the device, then numerics joined by "+", as in
`cuda:0`, `cpu`, `cpu+avx2` or `cpu+eager+1thread`.

    avx512, avx2, default    vector instructions of PyTorch's CPU kernels (ATEN_CPU_CAPABILITY)
    eager, sdpa              transformers' attention implementation
    1thread, 2threads, ...   threads of PyTorch

Where there is only a CPU, other vector instructions stand in for other hardware: the same sums in another
order, as on another chip. Not all numerics that PyTorch offers can be computed: on CPUs with AMX its fused
attention packs 16-bit matrices by AVX-512 instructions, whatever ATEN_CPU_CAPABILITY says, and raises where
that says avx2. So a small product and small attentions (`probe.py`) are tried before any work, in this
process, or in one of their own for vector instructions and GPUs.
"""

import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from bitassay.errors import BitassayError, MissingError, suggestion
from bitassay.models.options import AUTO
from bitassay.record.jobs import Job, Start, ask_once
from bitassay.studies import probe

INSTRUCTIONS, ATTENTIONS = ("avx512", "avx2", "default"), ("eager", "sdpa")
PROBE = "bitassay.studies.probe:start"
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
        return next((int(match[1]) for option in self.options if (match := _THREADS.fullmatch(option))), None)

    @property
    def label(self) -> str:
        """The name in file names."""
        return self.name.replace(":", "")

    @property
    def variables(self) -> dict[str, str]:
        """What the environment of a process on this machine needs."""
        instructions = [option for option in self.options if option in INSTRUCTIONS]
        variables = {"ATEN_CPU_CAPABILITY": instructions[-1]} if instructions else {}
        return variables if self.threads is None else variables | {"OMP_NUM_THREADS": str(self.threads)}

    def seen_alone(self) -> "Machine":
        """Return the machine in a process that sees its GPU alone, as number 0."""
        return Machine("+".join(("cuda:0", *self.options))) if self.device.startswith("cuda") else self

    def is_here(self) -> bool:
        """Return whether this computer has the device."""
        if self.device.startswith("cuda"):
            return torch.cuda.device_count() > int(self.device.partition(":")[2] or 0)
        return self.device == "cpu" or torch.backends.mps.is_available()

    def verifiers(self, count: int, without: Collection[str] = ()) -> list["Machine"]:
        """Return `count` machines like this one that differ in numerics, without those of these names. Where
        there are fewer, they repeat."""
        said = set(map(_kind, self.options))
        machines = [
            Machine("+".join(filter(None, (self.name, numerics))))
            for numerics in VERIFIER_NUMERICS[self.device.partition(":")[0]]
            if not said & set(map(_kind, filter(None, numerics.split("+"))))
        ]
        machines = [machine for machine in machines if machine.name not in without] or [self]
        return [machines[index % len(machines)] for index in range(count)]


def other_machines(first: Machine) -> list[Machine]:
    """Return what may stand in for other hardware where none was named, the best first: the CPU for a GPU;
    for a CPU other vector instructions, or another attention."""
    if first.device != "cpu":
        return [Machine("cpu"), Machine("cpu+eager")]
    less = {"DEFAULT": (), "AVX2": ("default",)}
    others = less.get(torch.backends.cpu.get_cpu_capability(), ("avx2", "default"))
    names = [f"cpu+{instructions}{attention}" for instructions in others for attention in ("", "+eager")]
    return [machine for machine in map(Machine, (*names, "cpu+eager")) if machine != first]


def first_machines() -> list[Machine]:
    """Return what may be the machine of a study, the best first: the GPU where there is one."""
    gpu = "cuda:0" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
    return [Machine(gpu or "cpu"), Machine(f"{gpu or 'cpu'}+eager")]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run PyTorch on `count` threads within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Returns why a machine cannot compute in a dtype (a name of torch); empty where it can.
Probe = Callable[[Machine, str], str]


@dataclass(frozen=True)
class LeftOut:
    """Numerics that cannot be computed here, why, and what is computed instead (None: nothing)."""

    numerics: str
    problem: str
    instead: str | None = None

    def __str__(self) -> str:
        what = f"{self.instead} stands in" if self.instead else "left out"
        return f"{self.numerics} cannot run here ({self.problem}): {what}"


def probe_machine(machine: Machine, dtype: str) -> str:
    """Try the machine where it would work. A Probe."""
    if machine.device == "cpu" and not set(machine.options) & set(INSTRUCTIONS):
        return probe_here(machine, dtype)
    return _probe_in_process(machine, dtype)


def probe_here(machine: Machine, dtype: str) -> str:
    """Try the machine's numerics in this process. A Probe."""
    with threads(machine.threads or torch.get_num_threads()):
        return probe.problem(machine.device, dtype, machine.attention)


@cache
def _probe_in_process(machine: Machine, dtype: str) -> str:
    setup = [machine.device, dtype, machine.attention]
    with tempfile.TemporaryDirectory() as folder:
        job = Job(machine.name, Start(PROBE, setup, Path(folder), machine.variables))
        try:
            return ask_once(job)
        except (MissingError, RuntimeError) as error:
            return str(error).partition(" (see ")[0]


def first_that_runs(
    candidates: Sequence[Machine], dtype: str, probe: Probe = probe_machine
) -> tuple[Machine | None, tuple[LeftOut, ...]]:
    """Return the first machine that can compute, None where none can, and those before it, which cannot."""
    failed: list[LeftOut] = []
    for machine in candidates:
        if not (problem := probe(machine, dtype)):
            return machine, tuple(replace(omission, instead=machine.name) for omission in failed)
        failed.append(LeftOut(machine.name, problem))
    return None, tuple(failed)


def left_out(machines: Iterable[Machine], dtype: str, probe: Probe = probe_machine) -> tuple[LeftOut, ...]:
    """Return those of the machines that cannot compute."""
    problems = {machine: probe(machine, dtype) for machine in dict.fromkeys(machines)}
    return tuple(LeftOut(machine.name, problem) for machine, problem in problems.items() if problem)
