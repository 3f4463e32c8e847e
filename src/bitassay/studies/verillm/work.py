"""The work behind an experiment: traces by provers, cells by verifiers, each a process, everything in files.

`OUT/work/ID` belongs to one model and one way of asking:

    traces/PROVER/trialK.trace                  and trialK.json: how long it took
    cells/PROVER_to_VERIFIER/trialK.safetensors the statistics of every cell
    jobs/                                       what each process was told

What is there is not made again, so an interrupted run goes on, more trials or parties keep what there is, and
the folder can be carried to another computer for the other half.
"""

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

from transformers import AutoTokenizer

from bitassay.data.corpora import corpus
from bitassay.errors import BitassayError, suggestion
from bitassay.models.identity import Identity
from bitassay.models.options import AUTO
from bitassay.models.source import resolve
from bitassay.quantization.export.fits import check_fit
from bitassay.quantization.recipe.recipe import find_recipe
from bitassay.record.hashing import digest_file, digest_json
from bitassay.record.processes import helper_variables
from bitassay.record.progress import Progress
from bitassay.record.run import RunFolder
from bitassay.studies.verillm.parties import DTYPES, Machine, Party, is_recipe, process_environment
from bitassay.studies.verillm.trial import LeftOut, Trial, left_out, try_machine
from bitassay.studies.verillm.worker import (
    Cells,
    Item,
    Job,
    Spent,
    read_cells,
    read_timing,
    timing_file,
    write_job,
)
from bitassay.verification.detectors.verillm import DOCUMENTS, Rules

SCHEMA = 1
CORPUS = "wikitext2-raw"
MOST_TRIALS = 256  # passages that the corpus is divided into


@dataclass(frozen=True)
class Plan:
    """machines: two, the first and the one that is "other hardware" for it. precision: of the dense model.
    quantized: recipe or checkpoint of the quantized side. attacks: provers that the bars are tried on beside
    the dense model. here: machines of this computer (default: those whose device it has). role: "prove",
    "verify", or both where None. jobs: processes at a time; gpus: what they are dealt to. batch: prompts that
    a prover answers at a time; timings are true for 1. bar: instead of the experiments' own.
    left_out: numerics that cannot be computed here."""

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
    bar: float | None = None
    role: str | None = None
    here: tuple[Machine, ...] = ()
    jobs: int = 1
    gpus: tuple[int, ...] = ()
    batch: int = 1
    trust_remote_code: bool = False
    attention: str = AUTO
    left_out: tuple[LeftOut, ...] = ()

    def party(self, side: str, machine: Machine) -> Party:
        """The party of a side: "full", "quantized", or a precision."""
        precision = {"full": self.precision, "quantized": self.quantized}.get(side, side)
        return Party(precision, machine, DTYPES[self.precision])

    def is_here(self, machine: Machine) -> bool:
        return machine in self.here if self.here else machine.is_here()

    def verifiers_on(self, machine: Machine) -> list[Machine]:
        """The machines of the verifiers there."""
        return machine.verifiers(self.verifiers, [one.numerics for one in self.left_out])

    def tried(self, machines: Iterable[Machine], trial: Trial = try_machine) -> "Plan":
        """The plan, knowing which of these machines' numerics cannot be computed, as far as they are here."""
        here = [machine for machine in machines if self.is_here(machine)]
        plan, seen = self, set[Machine]()
        # What stands in for a verifier that cannot run has to be tried as well.
        while todo := {m: None for one in here for m in (one, *plan.verifiers_on(one)) if m not in seen}:
            seen |= todo.keys()
            found = left_out(todo, DTYPES[self.precision], trial)
            known = {one.numerics for one in plan.left_out}
            more = [one for one in found if one.numerics not in known]
            plan = replace(plan, left_out=(*plan.left_out, *more))
        return plan


def check_plan(plan: Plan, precisions: Sequence[str] = ()) -> None:
    """Raises BitassayError for what plan and further precisions cannot mean, before anything is computed."""
    if plan.precision not in DTYPES:
        raise BitassayError(
            f"{plan.precision!r} is no precision of the dense model; {suggestion(plan.precision, DTYPES)}"
        )
    for value, what in ((plan.tokens, "tokens"), (plan.trials, "trials"), (plan.verifiers, "verifiers")):
        if value < 1:
            raise BitassayError(f"{value} {what}: at least 1 is needed", f"--{what} 3")
    if plan.tokens < 2 or plan.prompt_tokens < 1:
        raise BitassayError(
            "an experiment needs 2 tokens and a prompt of 1", "--tokens 1000 --prompt-tokens 300"
        )
    if plan.jobs < 1:
        raise BitassayError(f"--jobs {plan.jobs}: at least 1 process is needed", "--jobs 1")
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


def dealt(gpus: Sequence[int], parties: Sequence[Party]) -> list[int | None]:
    """The GPU of each party, in turn; None where no GPUs are given or a machine is none."""
    turns = itertools.cycle(gpus or (None,))
    return [next(turns) if party.machine.device.startswith("cuda") else None for party in parties]


def start(path: Path, job: Job, gpu: int | None = None) -> Popen[str]:
    """A process at work on a job, which is written to `path`. gpu: the only GPU that it may see."""
    write_job(path, job)
    return Popen(
        [sys.executable, "-m", "bitassay.studies.verillm.worker", str(path)],
        env=process_environment(Machine(job.machine), gpu) | helper_variables(),
        stdout=DEVNULL,
        stderr=PIPE,
        text=True,
    )


def problem_of(child: Popen[str]) -> str:
    """Wait for a process; why it failed, empty where it did not."""
    try:
        _, said = child.communicate()
    except BaseException:
        child.terminate()
        raise
    return (said.strip()[-1500:] or f"exit status {child.returncode}") if child.returncode else ""


class Work:
    """Files of one model and one way of asking: `work/ID` holds traces and cells, `raw` the documents'
    files."""

    def __init__(self, plan: Plan, out: Path, progress: Progress):
        self.plan, self.out, self.progress = plan, out, progress
        self._children: list[Popen[str]] = []
        self._stopped = False
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

    def prove(self, parties: Mapping[Party, None] | Sequence[Party]) -> None:
        """Traces of all trials by these parties, where their machine is here."""
        self._run(
            "prove",
            {
                party: [self._item(party, None, trial) for trial in range(self.plan.trials)]
                for party in parties
                if self.plan.is_here(party.machine)
            },
        )

    def verify(self, pairs: Sequence[tuple[Party, Party]]) -> None:
        """Cells of all trials of (prover, verifier), where the traces are there and the verifier's machine is
        here."""
        items: dict[Party, dict[Path, Item]] = {}
        for prover, verifier in pairs:
            for trial in range(self.plan.trials):
                item = self._item(prover, verifier, trial)
                if timing_file(item.trace).exists() and self._verifier_is_here(verifier):
                    assert item.out is not None
                    items.setdefault(verifier, {})[item.out] = item
        self._run("verify", {party: list(found.values()) for party, found in items.items()})

    def _verifier_is_here(self, verifier: Party) -> bool:
        """A verifier's machine is one of the plan's with more numerics."""
        return any(
            self.plan.is_here(machine) and verifier.machine in self.plan.verifiers_on(machine)
            for machine in self.plan.machines
        )

    def lacking(self, prover: Party, verifiers: Sequence[Party]) -> str:
        """What is still needed to judge a prover; empty where nothing."""
        for trial in range(self.plan.trials):
            if not timing_file(self._item(prover, None, trial).trace).exists():
                return f"traces of {prover.name}"
            for verifier in verifiers:
                if not self._cells_file(prover, verifier, trial).exists():
                    return f"{verifier.name} verifying {prover.name}"
        return ""

    def cells(self, prover: Party, verifiers: Sequence[Party]) -> Iterator[list[Cells]]:
        """Trial by trial, what each verifier found."""
        for trial in range(self.plan.trials):
            yield [read_cells(self._cells_file(prover, verifier, trial)) for verifier in verifiers]

    def spent(self, prover: Party, trial: int) -> Spent:
        """What a prover's generation took."""
        return read_timing(self._item(prover, None, trial).trace)

    def _cells_file(self, prover: Party, verifier: Party, trial: int) -> Path:
        pair = f"{self._label(prover)}_to_{self._label(verifier)}"
        return self.folder.path / "cells" / pair / f"trial{trial + 1}.safetensors"

    def _item(self, prover: Party, verifier: Party | None, trial: int) -> Item:
        trace = self.folder.path / "traces" / self._label(prover) / f"trial{trial + 1}.trace"
        cells = None if verifier is None else self._cells_file(prover, verifier, trial)
        return Item(tuple(self.prompts[trial]), f"trial-{trial + 1}", self.plan.tokens, trace, cells)

    def _label(self, party: Party) -> str:
        """With a digest where the precision's name does not say all: a recipe may be changed, a folder
        replaced."""
        if party.precision in DTYPES:
            return party.label
        if is_recipe(party.precision):
            return f"{party.label}_{digest_json(find_recipe(party.precision).model_dump(mode='json'))[:6]}"
        config = resolve(party.precision).folder / "config.json"
        return f"{party.label}_{digest_file(config)[:6]}"

    def _run(self, role: str, work: Mapping[Party, Sequence[Item]]) -> None:
        """A process for each party, `jobs` at a time; an error of one stops the others from starting."""
        plan = self.plan
        files = {
            party: [path for i in items if (path := timing_file(i.trace) if role == "prove" else i.out)]
            for party, items in work.items()
        }
        todo = [party for party, made in files.items() if not all(path.exists() for path in made)]
        verb = {"prove": "proving", "verify": "verifying"}[role]
        paths = [path for made in files.values() for path in made]
        with ThreadPoolExecutor(plan.jobs) as pool:
            try:
                running = []
                for party, gpu in zip(todo, dealt(plan.gpus, todo), strict=True):
                    running.append(pool.submit(self._process, role, party, work[party], gpu))
                while running:
                    finished, waiting = wait(running, timeout=1, return_when=FIRST_EXCEPTION)
                    self.progress(verb, sum(path.exists() for path in paths), len(paths))
                    for future in finished:
                        future.result()
                    running = list(waiting)
            except BaseException:
                self._stopped = True
                for child in self._children:
                    child.terminate()
                pool.shutdown(cancel_futures=True)
                raise

    def _process(self, role: str, party: Party, items: Sequence[Item], gpu: int | None) -> None:
        plan = self.plan
        job = Job(
            role,
            plan.model,
            party.precision,
            (party.machine if gpu is None else party.machine.seen_alone()).name,
            party.dtype,
            tuple(items),
            plan.batch,
            trust_remote_code=plan.trust_remote_code,
            attention=plan.attention,
        )
        if self._stopped:
            return
        child = start(self.folder.path / "jobs" / f"{role}-{self._label(party)}.json", job, gpu)
        self._children.append(child)
        if (problem := problem_of(child)) and not self._stopped:
            raise BitassayError(
                f"{party.name} failed: {problem}",
                "mend that and run the same command again; it goes on where it stopped",
            )

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
