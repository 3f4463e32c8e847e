"""The five experiments of the VeriLLM replication (exp1 ... exp5): what share of hidden-state cells does a
verifier accept, by fixed thresholds, and what do these thresholds catch?

    study   prover -> verifier   hardware                  expected accept rate   bar
    exp1    FP16 -> FP16         the same                  > 95 %                 95 %
    exp2    FP16 -> FP16         other, both directions    90-95 %                90 %
    exp3    INT4 -> FP16         the same                  80-85 %                80 %
    exp4    INT4 -> FP16         other, both directions    70-80 %                70 %
    exp5    FP16 -> INT4         the same                  80-85 %                80 %

Source: the experiment documents, from VeriLLM (arXiv 2509.24257). What they expect stands beside what is
measured. An accept rate alone decides nothing: a bar that INT4 passes is a bar that a cheat passes. So each
experiment also gives the share of FP16, INT8 and INT4 provers that its bar refuses.

1. Provers generate, a process for each precision and machine; traces and their seconds go to files.
2. Verifiers, each a process with numerics of its own, read them and write the statistics of every cell.
3. `trial` and `summary` reduce those to the documents' files, data/raw/expN/..._trialK.json and
   ..._summary.json.

A trial passes where most of its verifiers find an accept rate above the bar. Generated positions of all
sampled layers count; those of the prompt are reported beside them.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

import numpy as np
import torch
from scipy import stats
from transformers import AutoTokenizer

from bitassay.bench.environment import environment
from bitassay.data.corpora import corpus
from bitassay.errors import BitassayError, nearest
from bitassay.models.load import Identity
from bitassay.models.source import resolve
from bitassay.quantize.recipe import find_recipe
from bitassay.record.files import read_json, write_json
from bitassay.record.hashing import digest_file, digest_json
from bitassay.record.progress import Progress, silent
from bitassay.record.run import RunFolder
from bitassay.studies.parties import DTYPES, Machine, Party, is_recipe, process_environment
from bitassay.studies.worker import Cells, Item, Job, read_cells, verification_file, write_job
from bitassay.verify.power import share
from bitassay.verify.verillm import DOCUMENTS, RULE_SETS, CellStatistics, Rules, accepted

SCHEMA = 1
CORPUS = "wikitext2-raw"
MOST_TRIALS = 256  # passages that the corpus is divided into


@dataclass(frozen=True)
class Experiment:
    """prover and verifier: "full" for the dense model, "quantized" for the other one. expected: the
    documents' accept rates, as a range."""

    name: str
    about: str
    prover: str
    verifier: str
    other_hardware: bool
    expected: tuple[float, float]
    bar: float


EXPERIMENTS = {
    one.name: one
    for one in (
        Experiment(
            "exp1", "full precision on both sides, same hardware", "full", "full", False, (0.95, 1.0), 0.95
        ),
        Experiment(
            "exp2", "full precision on both sides, other hardware", "full", "full", True, (0.90, 0.95), 0.90
        ),
        Experiment("exp3", "quantized prover, same hardware", "quantized", "full", False, (0.80, 0.85), 0.80),
        Experiment("exp4", "quantized prover, other hardware", "quantized", "full", True, (0.70, 0.80), 0.70),
        Experiment(
            "exp5", "quantized verifier, same hardware", "full", "quantized", False, (0.80, 0.85), 0.80
        ),
    )
}


@dataclass(frozen=True)
class Plan:
    """machines: two, the first and the one that is "other hardware" for it. precision: of the dense model.
    quantized: recipe or checkpoint of the quantized side. attacks: provers that the bars are tried on beside
    the dense model. here: machines of this computer (default: those whose device it has). role: "prove",
    "verify", or both where None. jobs: processes at a time; gpus: what they are dealt to. batch: prompts that
    a prover answers at a time; timings are true for 1. bar: instead of the experiments' own."""

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

    def party(self, side: str, machine: Machine) -> Party:
        """The party of a side: "full", "quantized", or a precision."""
        precision = {"full": self.precision, "quantized": self.quantized}.get(side, side)
        return Party(precision, machine, DTYPES[self.precision])

    def is_here(self, machine: Machine) -> bool:
        return machine in self.here if self.here else machine.is_here()


@dataclass(frozen=True)
class Direction:
    """One experiment from one machine to another."""

    experiment: Experiment
    prover: Party
    verifiers: tuple[Party, ...]
    attackers: tuple[Party, ...]

    @property
    def label(self) -> str:
        """As the documents name their files: precisions are named where they differ."""
        names = {"full": "fp", "quantized": "quantized"}
        one, two = self.experiment, self.verifiers[0].machine.label
        if one.prover == one.verifier:
            return f"{self.prover.machine.label}_to_{two}"
        return f"{names[one.prover]}_{self.prover.machine.label}_to_{names[one.verifier]}_{two}"


def directions(name: str, plan: Plan) -> list[Direction]:
    """Where the experiment is run: on one machine, or on two in both directions."""
    one = EXPERIMENTS[name] if plan.bar is None else replace(EXPERIMENTS[name], bar=plan.bar)
    first, second = plan.machines
    pairs = [(first, second), (second, first)] if one.other_hardware else [(first, first)]
    return [
        Direction(
            one,
            plan.party(one.prover, source),
            tuple(plan.party(one.verifier, machine) for machine in target.verifiers(plan.verifiers)),
            tuple(plan.party(side, source) for side in dict.fromkeys((plan.precision, *plan.attacks))),
        )
        for source, target in pairs
    ]


def check_plan(names: Sequence[str], plan: Plan, precisions: Sequence[str] = ()) -> None:
    """Raises BitassayError for what plan and further precisions cannot mean, before anything is computed."""
    for name in names:
        if name not in EXPERIMENTS:
            raise BitassayError(
                f"no experiment is called {name!r}; the nearest are {nearest(name, EXPERIMENTS)}"
            )
    if plan.precision not in DTYPES:
        raise BitassayError(
            f"{plan.precision!r} is no precision of the dense model; the nearest are "
            f"{nearest(plan.precision, DTYPES)}"
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
    for precision in (plan.quantized, *plan.attacks, *precisions):
        if is_recipe(precision):
            find_recipe(precision)
        elif precision not in DTYPES and not Path(precision).exists() and "/" not in precision:
            raise BitassayError(
                f"{precision!r} is neither a recipe nor a checkpoint",
                "bitassay recipes list, or give a folder",
            )


def run_experiments(
    names: Sequence[str], plan: Plan, *, out: Path = Path("data"), progress: Progress = silent
) -> dict[str, Any]:
    """Run what of the experiments this computer can, and write trials and summaries under `out`/raw.

    Returns {"rows": ...}, a row for each direction whose cells are all there, and what is `missing` for the
    others. Interrupted, the same call goes on; more trials, verifiers or experiments keep what there is.
    """
    check_plan(names, plan)
    work = Work(plan, out, progress)
    wanted = [direction for name in names for direction in directions(name, plan)]
    if plan.role != "verify":
        work.prove(dict.fromkeys(p for one in wanted for p in (one.prover, *one.attackers)))
    if plan.role != "prove":
        work.verify(
            [
                (p, v)
                for one in wanted
                for p in dict.fromkeys((one.prover, *one.attackers))
                for v in one.verifiers
            ]
        )
    rows, missing = [], []
    for one in wanted:
        provers = (one.prover, *one.attackers)
        if lacking := next(filter(None, (work.lacking(prover, one.verifiers) for prover in provers)), ""):
            missing.append({"study": one.experiment.name, "direction": one.label, "missing": lacking})
        else:
            rows.append(work.report(one))
    return {
        "schema": SCHEMA,
        "kind": "experiments",
        "model": plan.model,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "folder": str(work.folder.path),
        "rows": rows,
        "missing": missing,
    }


class Work:
    """Files of one model and one way of asking: `work/ID` holds traces and cells, `raw` the documents'
    files."""

    def __init__(self, plan: Plan, out: Path, progress: Progress):
        self.plan, self.out, self.progress = plan, out, progress
        self._children: list[Popen[str]] = []
        self._stopped = False
        source = resolve(plan.model, progress)
        self.name = Path(source.name).name
        described = {
            "schema": SCHEMA,
            "weights_digest": Identity(source).weights_digest,
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
                # Machines of one computer are told apart by their first word alone.
                if verification_file(item.trace).exists() and self._verifier_is_here(verifier):
                    assert item.out is not None
                    items.setdefault(verifier, {})[item.out] = item
        self._run("verify", {party: list(found.values()) for party, found in items.items()})

    def _verifier_is_here(self, verifier: Party) -> bool:
        """A verifier's machine is one of the plan's with more numerics."""
        return any(
            self.plan.is_here(machine) and verifier.machine in machine.verifiers(self.plan.verifiers)
            for machine in self.plan.machines
        )

    def lacking(self, prover: Party, verifiers: Sequence[Party]) -> str:
        """What is still needed to judge a prover; empty where nothing."""
        for trial in range(self.plan.trials):
            if not verification_file(self._item(prover, None, trial).trace).exists():
                return f"traces of {prover.name}"
            for verifier in verifiers:
                if not self._cells_file(prover, verifier, trial).exists():
                    return f"{verifier.name} verifying {prover.name}"
        return ""

    def cells(self, prover: Party, verifiers: Sequence[Party]) -> Iterator[list[Cells]]:
        """Trial by trial, what each verifier found."""
        for trial in range(self.plan.trials):
            yield [read_cells(self._cells_file(prover, verifier, trial)) for verifier in verifiers]

    def report(self, one: Direction) -> dict[str, Any]:
        """Write the documents' files of a direction; its row."""
        trials = [self.trial(one, one.prover, index) for index in range(self.plan.trials)]
        tried = {
            party.precision: [self.trial(one, party, index) for index in range(self.plan.trials)]
            for party in one.attackers
        }
        place = self.out / "raw" / one.experiment.name
        for index, trial in enumerate(trials, 1):
            write_json(place / f"{self.name}_{one.label}_trial{index}.json", trial)
        found = summary(one, trials, tried, self.plan)
        write_json(place / f"{self.name}_{one.label}_summary.json", found)
        return row_of(found)

    def trial(self, one: Direction, prover: Party, index: int) -> dict[str, Any]:
        """What all verifiers found in one trace of `prover`."""
        spent = read_json(verification_file(self._item(prover, None, index).trace))
        found = []
        for verifier in one.verifiers:
            cells = read_cells(self._cells_file(prover, verifier, index))
            found.append(judged(verifier, cells, spent["seconds"], self.plan.rules))
        accepting = sum(verdict["accept_rate"] > one.experiment.bar for verdict in found)
        return {
            "schema": SCHEMA,
            "experiment": one.experiment.name,
            "trial": index + 1,
            "model": self.plan.model,
            "prover": {"precision": prover.precision, "machine": prover.machine.name},
            "prompt_tokens": self.plan.prompt_tokens,
            "output_tokens": spent["output_tokens"],
            "generation_seconds": spent["seconds"],
            "rules": rules_of(self.plan.rules),
            "verifiers": found,
            "accept_rate": float(np.mean([verdict["accept_rate"] for verdict in found])),
            "overhead_percentage": float(np.mean([verdict["overhead_percentage"] for verdict in found])),
            "passed": 2 * accepting > len(found),
        }

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
            party: [path for i in items if (path := verification_file(i.trace) if role == "prove" else i.out)]
            for party, items in work.items()
        }
        todo = [party for party, made in files.items() if not all(path.exists() for path in made)]
        verb = {"prove": "proving", "verify": "verifying"}[role]
        paths = [path for made in files.values() for path in made]
        with ThreadPoolExecutor(plan.jobs) as pool:
            try:
                running = []
                for index, party in enumerate(todo):
                    gpu = plan.gpus[index % len(plan.gpus)] if plan.gpus else None
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
            party.machine.name,
            party.dtype,
            tuple(items),
            plan.batch,
            trust_remote_code=plan.trust_remote_code,
        )
        path = self.folder.path / "jobs" / f"{role}-{self._label(party)}.json"
        write_job(path, job)
        if self._stopped:
            return
        child = Popen(
            [sys.executable, "-m", "bitassay.studies.worker", str(path)],
            env=process_environment(party.machine, gpu),
            stdout=DEVNULL,
            stderr=PIPE,
            text=True,
        )
        self._children.append(child)
        _, problem = child.communicate()
        if child.returncode and not self._stopped:
            raise BitassayError(
                f"{party.name} failed: {problem.strip()[-1500:] or f'exit status {child.returncode}'}",
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


# --- judging ---

MEANS = ("Pe", "Pm", "Pw", "mean_epsilon", "mean_absolute")


def cell_rules(cells: Cells, rules: Rules) -> np.ndarray:
    """Which cells hold to `rules`: bool [layers, positions]. The rules' e_m and e_w must be those that the
    cells were computed with."""
    if (rules.e_m, rules.e_w) != (DOCUMENTS.e_m, DOCUMENTS.e_w):
        raise BitassayError(
            f"rules {rules.name!r} have e_m {rules.e_m} and e_w {rules.e_w}; the cells were computed with "
            f"{DOCUMENTS.e_m} and {DOCUMENTS.e_w}"
        )
    unused = torch.zeros(cells.Pe.numel(), dtype=torch.int64)
    flat = CellStatistics(
        **{name: getattr(cells, name).double().flatten() for name in MEANS},
        compared=unused,
        sign_mismatches=unused,
        refused=cells.refused.flatten(),
    )
    return accepted(flat, rules).reshape(cells.Pe.shape).numpy()


def judged(verifier: Party, cells: Cells, generation_seconds: float, rules: Rules) -> dict[str, Any]:
    """What one verifier says of one trace: means over the generated cells, and by layer."""
    part, prompt = cells.part(True), cells.part(False)
    by_rules = {name: cell_rules(cells, one) for name, one in {**RULE_SETS, rules.name: rules}.items()}
    chosen = by_rules[rules.name]
    return {
        "machine": verifier.machine.name,
        "precision": verifier.precision,
        "numerics": cells.verifier,
        "accept_rate": float(chosen[:, part].mean()),
        "accept_rates": {name: float(found[:, part].mean()) for name, found in by_rules.items()},
        "prompt_accept_rate": float(chosen[:, prompt].mean()),
        **means(cells, part),
        "relative_distance": float(cells.distance[-1, part].log().mean().exp()),
        "mean_margin": float(cells.margins.mean()),
        "verification_seconds": cells.seconds,
        "overhead_percentage": 100 * cells.seconds / generation_seconds,
        "layers": [
            {
                "layer": layer,
                "accept_rate": float(chosen[index, part].mean()),
                **{name: _mean(getattr(cells, name)[index, part]) for name in MEANS},
                "relative_distance": float(cells.distance[index, part].log().mean().exp()),
            }
            for index, layer in enumerate(cells.layers)
        ],
    }


def means(cells: Cells, part: slice) -> dict[str, float | None]:
    return {name: _mean(getattr(cells, name)[:, part]) for name in MEANS}


def _mean(values: Any) -> float | None:
    present = values[~values.isnan()]
    return float(present.double().mean()) if len(present) else None


def summary(
    one: Direction,
    trials: Sequence[Mapping[str, Any]],
    tried: Mapping[str, Sequence[Mapping[str, Any]]],
    plan: Plan,
) -> dict[str, Any]:
    """The documents' `aggregate`, with intervals, what they expected, and what the same bar does to other
    provers."""
    rates = [trial["accept_rate"] for trial in trials]
    low, high = one.experiment.expected
    distances = [[v["relative_distance"] for v in trial["verifiers"]] for trial in trials]
    aggregate = {
        "avg_accept_rate": float(np.mean(rates)),
        "accept_rate_ci": mean_interval(rates),
        "avg_overhead_percentage": float(np.mean([trial["overhead_percentage"] for trial in trials])),
        "pass_rate": float(np.mean([trial["passed"] for trial in trials])),
        "pass_rate_ci": list(share(sum(trial["passed"] for trial in trials), len(trials))[1:]),
        "trials": len(trials),
        "verifiers": len(one.verifiers),
        "different_verifiers": len(set(zip(*distances, strict=True))),  # others agree to the last bit, as one
        "avg_relative_distance": float(
            np.mean([verdict["relative_distance"] for trial in trials for verdict in trial["verifiers"]])
        ),
    }
    return {
        "schema": SCHEMA,
        "experiment": one.experiment.name,
        "about": one.experiment.about,
        "model": plan.model,
        "prover": {"precision": one.prover.precision, "machine": one.prover.machine.name},
        "verifier": {"precision": one.verifiers[0].precision, "machine": one.verifiers[0].machine.name},
        "hardware": hardware(one),
        "tokens": plan.tokens,
        "rules": rules_of(plan.rules),
        "bar": one.experiment.bar,
        "summary": {
            "avg_accept_rate": aggregate["avg_accept_rate"],
            "expected_accept_rate": [low, high],
            "as_expected": low <= aggregate["avg_accept_rate"] <= high,
            "passed": 2 * sum(trial["passed"] for trial in trials) > len(trials),
        },
        "aggregate": aggregate,
        "detection": {
            precision: {
                "refused": sum(not trial["passed"] for trial in found),
                "n": len(found),
                "refused_ci": list(share(sum(not trial["passed"] for trial in found), len(found))[1:]),
                "avg_accept_rate": float(np.mean([trial["accept_rate"] for trial in found])),
                "relative_distances": [
                    verdict["relative_distance"] for trial in found for verdict in trial["verifiers"]
                ],
            }
            for precision, found in tried.items()
        },
        "environment": environment(),
    }


def mean_interval(values: Sequence[float], level: float = 0.95) -> list[float] | None:
    """Student's t interval of the mean of shares, within [0, 1]; None for fewer than two values."""
    if len(values) < 2:
        return None
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return [max(float(np.mean(values) - half), 0.0), min(float(np.mean(values) + half), 1.0)]


def hardware(one: Direction) -> str:
    """What stands for the other hardware, said plainly."""
    source, target = one.prover.machine, one.verifiers[0].machine
    if not one.experiment.other_hardware:
        return "the same machine; the verifiers differ in numerics"
    if source.device == target.device:
        return "one machine: other vector instructions or numerics stand in for other hardware"
    return "other hardware"


def rules_of(rules: Rules) -> dict[str, Any]:
    return {
        "name": rules.name,
        "Pe": rules.max_Pe,
        "Pm": rules.min_Pm,
        "Pw": rules.min_Pw,
        "mean_epsilon": rules.max_mean,
        "e_m": rules.e_m,
        "e_w": rules.e_w,
    }


def row_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """A summary as one row of a table."""
    return {
        "study": found["experiment"],
        "prover": f"{found['prover']['precision']} on {found['prover']['machine']}",
        "verifier": f"{found['verifier']['precision']} on {found['verifier']['machine']}",
        "expected": found["summary"]["expected_accept_rate"],
        **found["aggregate"],
        "as_expected": found["summary"]["as_expected"],
        "bar": found["bar"],
        "refused": {name: f"{one['refused']}/{one['n']}" for name, one in found["detection"].items()},
        "detection": found["detection"],
        "hardware": found["hardware"],
        "rules": found["rules"]["name"],
    }
