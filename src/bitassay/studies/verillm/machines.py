"""Choose the machines of an experiment: those that are named, or those of this computer that can compute."""

from collections.abc import Sequence
from typing import Any

from bitassay.errors import BitassayError
from bitassay.studies.verillm.parties import DTYPES, Machine, first_machines, other_machines
from bitassay.studies.verillm.trial import LeftOut, Trial, first_that_runs, try_machine
from bitassay.studies.verillm.work import Plan


def make_plan(
    model: str,
    devices: Sequence[str],
    *,
    here: Sequence[str] = (),
    precision: str | None = None,
    trial: Trial = try_machine,
    **fields: Any,
) -> Plan:
    """Return a plan on these machines, or on those of this computer that can compute, in `precision` or in
    the one that suits them. fields: the other fields of `Plan`. Raises BitassayError for more than two
    machines."""
    if len(devices) > 2:
        raise BitassayError(
            f"--devices names {len(devices)} machines", "one, or two: the prover's and the other one"
        )
    named = [Machine(name) for name in devices]
    is_gpu_pair = len(named) == 2 and all(machine.device != "cpu" for machine in named)
    precision = precision or ("fp16" if is_gpu_pair else "bf16")
    left_out: tuple[LeftOut, ...] = ()

    def chosen(candidates: Sequence[Machine]) -> Machine:
        """Return the first that runs here; where none does, the first, which the study then leaves out."""
        nonlocal left_out
        runs_here, failed = first_that_runs(candidates, DTYPES[precision], trial)
        left_out += failed
        return runs_here or candidates[0]

    first = named[0] if named else chosen(first_machines())
    second = named[1] if len(named) == 2 else chosen(other_machines(first))
    machines, local = (first, second), tuple(map(Machine, here))
    return Plan(model, machines, precision=precision, here=local, left_out=left_out, **fields)
