"""Which numerics can this computer compute? A small product and small attentions are tried before any work,
where they would be computed: in this process, or in one of their own for vector instructions and GPUs.

Not all can that PyTorch offers. On CPUs with AMX its fused attention packs 16-bit matrices by AVX-512
instructions, whatever ATEN_CPU_CAPABILITY says, and raises where that says avx2.
"""

import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from bitassay.studies.verillm import probe
from bitassay.studies.verillm.parties import INSTRUCTIONS, Machine, process_environment, threads

COMMAND = (sys.executable, "-m", "bitassay.studies.verillm.probe")

# Why this machine cannot compute in this dtype (a name of torch); empty where it can.
Trial = Callable[[Machine, str], str]


@dataclass(frozen=True)
class LeftOut:
    """Numerics that cannot be computed here, why, and what is computed instead (None: nothing)."""

    numerics: str
    problem: str
    instead: str | None = None

    def __str__(self) -> str:
        what = f"{self.instead} stands in" if self.instead else "left out"
        return f"{self.numerics} cannot run here ({self.problem}): {what}"


def try_machine(machine: Machine, dtype: str) -> str:
    """Try the machine where it would work. A Trial."""
    if machine.device == "cpu" and not set(machine.options) & set(INSTRUCTIONS):
        return try_here(machine, dtype)
    return _try_in_process(machine, dtype)


def try_here(machine: Machine, dtype: str) -> str:
    """Try the machine's numerics in this process. A Trial."""
    with threads(machine.threads or torch.get_num_threads()):
        return probe.problem(machine.device, dtype, machine.attention)


@cache
def _try_in_process(machine: Machine, dtype: str) -> str:
    done = subprocess.run(
        [*COMMAND, machine.device, dtype, machine.attention],
        env=process_environment(machine),
        capture_output=True,
        text=True,
    )
    if done.returncode < 0:
        return f"its process was ended by signal {-done.returncode}"
    return done.stderr.strip().rpartition("\n")[2] or "it failed" if done.returncode else ""


def first_that_runs(
    candidates: Sequence[Machine], dtype: str, trial: Trial = try_machine
) -> tuple[Machine | None, tuple[LeftOut, ...]]:
    """The first machine that can compute, None where none can; and those before it, which cannot."""
    failed: list[LeftOut] = []
    for machine in candidates:
        if not (problem := trial(machine, dtype)):
            return machine, tuple(replace(one, instead=machine.name) for one in failed)
        failed.append(LeftOut(machine.name, problem))
    return None, tuple(failed)


def left_out(machines: Iterable[Machine], dtype: str, trial: Trial = try_machine) -> tuple[LeftOut, ...]:
    """Those of the machines that cannot compute."""
    tried = {machine: trial(machine, dtype) for machine in dict.fromkeys(machines)}
    return tuple(LeftOut(machine.name, problem) for machine, problem in tried.items() if problem)
