"""The files of an experiment: traces by provers, statistics of their cells by verifiers, each a worker.

`OUT/work/ID` belongs to one model and one way of asking:

    traces/PROVER/trialK.trace                  and trialK.json: how long it took
    cells/PROVER_to_VERIFIER/trialK.safetensors the statistics of every cell
    workers/                                    logs of the processes

Files that exist are not made again, so an interrupted run goes on, more trials or parties keep what there is,
and the folder can be carried to another computer for the other half.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from bitassay.data.corpora import corpus
from bitassay.errors import BitassayError, at_least, suggestion
from bitassay.models.identity import Identity
from bitassay.models.options import AUTO
from bitassay.models.source import resolve
from bitassay.quantization.export.fits import check_fit
from bitassay.quantization.recipe.recipe import find_recipe
from bitassay.record.hashing import digest_file, digest_json
from bitassay.record.jobs import local_workers, run_jobs
from bitassay.record.progress import Progress
from bitassay.record.run import RunFolder
from bitassay.studies.machines import (
    LeftOut,
    Machine,
    Probe,
    first_machines,
    first_that_runs,
    left_out,
    other_machines,
    probe_machine,
)
from bitassay.studies.parties import (
    DTYPES,
    PROVER,
    GenerationTiming,
    Item,
    Party,
    is_recipe,
    party_job,
    read_timing,
    timing_file,
)
from bitassay.studies.verillm.verifier import VERIFIER, TraceStatistics, read_statistics
from bitassay.verification.detectors.verillm import DOCUMENTS, Rules

SCHEMA = 1
CORPUS = "wikitext2-raw"
MOST_TRIALS = 256  # passages that the corpus is divided into


@dataclass(frozen=True)
class ExperimentPlan:
    """machines: two, the first and the one that is "other hardware" for it. precision: of the dense model.
    quantized: recipe or checkpoint of the quantized side. attacks: provers that the thresholds are tried on
    besides the dense model. here: machines of this computer (default: those whose device it has). role:
    "prove", "verify", or both where None. jobs: processes at a time; gpus: what these take turns to use.
    batch: prompts that a prover answers at a time; timings are true for 1. accept_rate_min: replaces that
    of the experiments. left_out: numerics that cannot be computed here."""

    model: str
    machines: tuple[Machine, Machine]
    tokens: int = 1000
    prompt_tokens: int = 300
    trials: int = 3
    verifiers: int = 3
    precision: str = "bf16"
    quantized: str = "w4"
    attacks: tuple[str, ...] = ("w8", "w4")
    rules: Rules = DOCUMENTS
    accept_rate_min: float | None = None
    role: str | None = None
    here: tuple[Machine, ...] = ()
    jobs: int = 1
    gpus: tuple[int, ...] = ()
    batch: int = 1
    trust_remote_code: bool = False
    attention: str = AUTO
    left_out: tuple[LeftOut, ...] = ()

    def party(self, side: str, machine: Machine) -> Party:
        """Return the party of a side: "full", "quantized", or a precision."""
        precision = {"full": self.precision, "quantized": self.quantized}.get(side, side)
        return Party(precision, machine, DTYPES[self.precision])

    def is_here(self, machine: Machine) -> bool:
        """Return whether a machine is this computer's."""
        return machine in self.here if self.here else machine.is_here()

    def verifiers_on(self, machine: Machine) -> list[Machine]:
        """Return the machines of the verifiers there."""
        return machine.verifiers(self.verifiers, [left.numerics for left in self.left_out])

    def probed(self, machines: Iterable[Machine], probe: Probe = probe_machine) -> "ExperimentPlan":
        """Return the plan with those numerics of the machines left out that cannot be computed, as far as
        they are here."""
        here = [machine for machine in machines if self.is_here(machine)]
        plan, seen = self, set[Machine]()
        # What stands in for a verifier that cannot run has to be tried as well.
        while todo := {
            m: None for first in here for m in (first, *plan.verifiers_on(first)) if m not in seen
        }:
            seen |= todo.keys()
            known = {left.numerics for left in plan.left_out}
            failed = left_out(todo, DTYPES[self.precision], probe)
            more = tuple(left for left in failed if left.numerics not in known)
            plan = replace(plan, left_out=plan.left_out + more)
        return plan


def make_plan(
    model: str,
    devices: Sequence[str],
    *,
    here: Sequence[str] = (),
    precision: str | None = None,
    probe: Probe = probe_machine,
    **fields: Any,
) -> ExperimentPlan:
    """Return a plan on these machines, or on those of this computer that can compute, in `precision` or in
    the one that suits them. fields: the other fields of the plan. Raises BitassayError for more than two
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
        runs_here, failed = first_that_runs(candidates, DTYPES[precision], probe)
        left_out += failed
        return runs_here or candidates[0]

    first = named[0] if named else chosen(first_machines())
    second = named[1] if len(named) == 2 else chosen(other_machines(first))
    machines, local = (first, second), tuple(map(Machine, here))
    return ExperimentPlan(model, machines, precision=precision, here=local, left_out=left_out, **fields)


def check_plan(plan: ExperimentPlan, precisions: Sequence[str] = ()) -> None:
    """Raise BitassayError for what plan and further precisions cannot mean, before anything is computed."""
    if plan.precision not in DTYPES:
        raise BitassayError(
            f"{plan.precision!r} is no precision of the dense model; {suggestion(plan.precision, DTYPES)}"
        )
    at_least(
        1, trials=plan.trials, verifiers=plan.verifiers, jobs=plan.jobs, prompt_tokens=plan.prompt_tokens
    )
    at_least(2, tokens=plan.tokens)
    if plan.role not in (None, "prove", "verify"):
        raise BitassayError(f"no role is called {plan.role!r}", "--role prove or --role verify")
    if (plan.rules.e_m, plan.rules.e_w) != (DOCUMENTS.e_m, DOCUMENTS.e_w):
        raise BitassayError(
            f"rules {plan.rules.name!r} have e_m {plan.rules.e_m:g} and e_w {plan.rules.e_w:g}; cells are "
            f"kept with {DOCUMENTS.e_m:g} and {DOCUMENTS.e_w:g}",
            "leave e_m and e_w out of the file",
        )
    for precision in (plan.quantized, *plan.attacks, *precisions):
        if is_recipe(precision):
            find_recipe(precision)
        elif precision not in DTYPES and not Path(precision).exists() and "/" not in precision:
            raise BitassayError(
                f"{precision!r} is neither a recipe nor a checkpoint",
                "bitassay recipes list, or give a folder",
            )


class Work:
    """Files of one model and one way of asking: `work/ID` holds traces and statistics, `raw` the experiments'
    files."""

    def __init__(self, plan: ExperimentPlan, out: Path, progress: Progress):
        self.plan, self.out, self.progress = plan, out, progress
        check_fit(
            plan.model,
            tokens=plan.prompt_tokens + plan.tokens - 1,
            trust_remote_code=plan.trust_remote_code,
            progress=progress,
        )
        source = resolve(plan.model, progress)
        self.name = Path(source.name).name
        described = {
            "schema": SCHEMA,
            "weights_digest": Identity(source).weights_digest,
            "config_digest": Identity(source, own_code=plan.trust_remote_code).config_digest,
            "attention": plan.attention,
            "tokens": plan.tokens,
            "prompt_tokens": plan.prompt_tokens,
            "corpus": CORPUS,
            "dtype": DTYPES[plan.precision],
        }
        self.folder = RunFolder(out / "work" / digest_json(described)[:12], described)
        self.prompts = self._prompts(source.folder)

    def do(self, pairs: Iterable[tuple[Party, Party]]) -> None:
        """Do this computer's share of (prover, verifier) pairs: traces where the prover's machine is here,
        then statistics where the traces exist and the verifier's machine is here."""
        pairs, trials = list(pairs), range(self.plan.trials)
        if self.plan.role != "verify":
            provers = [p for p in dict.fromkeys(pair[0] for pair in pairs) if self.plan.is_here(p.machine)]
            self._run(PROVER, {p: [self._item(p, None, trial) for trial in trials] for p in provers})
        if self.plan.role == "prove":
            return
        items: dict[Party, dict[Path, Item]] = {}
        for prover, verifier in pairs:
            for item in [self._item(prover, verifier, trial) for trial in trials]:
                if timing_file(item.trace).exists() and self._verifier_is_here(verifier):
                    items.setdefault(verifier, {})[item.made] = item
        self._run(VERIFIER, {party: list(by_file.values()) for party, by_file in items.items()})

    def _verifier_is_here(self, verifier: Party) -> bool:
        """A verifier's machine is one of the plan's with more numerics."""
        return any(
            self.plan.is_here(machine) and verifier.machine in self.plan.verifiers_on(machine)
            for machine in self.plan.machines
        )

    def _run(self, function: str, work: Mapping[Party, Sequence[Item]]) -> None:
        """Do the items of each party by a worker of its own, `jobs` at a time."""
        plan, folder = self.plan, self.folder.path
        todo = {party: items for party, items in work.items() if not all(i.made.exists() for i in items)}
        paths = [item.made for items in work.values() for item in items]
        verb = "proving" if function == PROVER else "verifying"
        jobs = [
            party_job(
                function,
                party,
                plan.model,
                items,
                folder,
                batch=plan.batch,
                gpus=plan.gpus,
                trust_remote_code=plan.trust_remote_code,
                attention=plan.attention,
            )
            for party, items in todo.items()
        ]
        run_jobs(
            jobs,
            local_workers(min(plan.jobs, len(jobs)), folder / "workers", plan.gpus),
            tick=lambda _: self.progress(verb, sum(path.exists() for path in paths), len(paths)),
            progress=self.progress,
        )

    def lacking(self, prover: Party, verifiers: Sequence[Party]) -> str:
        """Return what is still needed to judge a prover; empty where nothing."""
        for trial in range(self.plan.trials):
            if not timing_file(self._item(prover, None, trial).trace).exists():
                return f"traces of {prover.name}"
            for verifier in verifiers:
                if not self._item(prover, verifier, trial).made.exists():
                    return f"{verifier.name} verifying {prover.name}"
        return ""

    def statistics(self, prover: Party, verifiers: Sequence[Party]) -> Iterator[list[TraceStatistics]]:
        """Yield, trial by trial, what each verifier measured."""
        for trial in range(self.plan.trials):
            yield [read_statistics(self._item(prover, verifier, trial).made) for verifier in verifiers]

    def timing(self, prover: Party, trial: int) -> GenerationTiming:
        """Return how long a prover's generation took."""
        return read_timing(self._item(prover, None, trial).trace)

    def _item(self, prover: Party, verifier: Party | None, trial: int) -> Item:
        folder, label, out = self.folder.path, self._label(prover), None
        if verifier is not None:
            pair = f"{label}_to_{self._label(verifier)}"
            out = folder / "cells" / pair / f"trial{trial + 1}.safetensors"
        trace = folder / "traces" / label / f"trial{trial + 1}.trace"
        return Item(tuple(self.prompts[trial]), f"trial-{trial + 1}", self.plan.tokens, trace, out)

    def _label(self, party: Party) -> str:
        """With a digest where the precision's name does not say all: a recipe may be changed, a folder
        replaced."""
        if party.precision in DTYPES:
            return party.label
        if is_recipe(party.precision):
            return f"{party.label}_{digest_json(find_recipe(party.precision).model_dump(mode='json'))[:6]}"
        return f"{party.label}_{digest_file(resolve(party.precision).folder / 'config.json')[:6]}"

    def _prompts(self, folder: Path) -> list[list[int]]:
        """A passage of the corpus for each trial, evenly spaced, as it is: no chat template, so that the text
        goes on for as long as it is asked to."""
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=self.plan.trust_remote_code)
        ids = tokenizer(corpus(CORPUS).text).input_ids
        length, trials = self.plan.prompt_tokens, MOST_TRIALS
        if self.plan.trials > trials or len(ids) < length * 2:
            raise BitassayError(
                f"{self.plan.trials} trials of {length} prompt tokens: the corpus has {len(ids)} tokens",
                f"at most {trials} trials, and shorter prompts",
            )
        step = (len(ids) - length) // trials
        return [ids[start : start + length] for start in range(0, step * self.plan.trials, step)]
