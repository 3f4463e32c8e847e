"""Attacks against detectors: how often does each detector catch each attack, at what rate of false
accusations?

1. Honest runs answer the same requests under several numerics (`VARIANTS`), pooled: a threshold must hold for
   all of them, not only for the verifier's own. Sampled requests have honest runs of their own.
2. Each attack answers them too, by traces (`attacks/hosts.py`) or by receipts (`attacks/forgeries.py`), and
   `observe` reduces every answer to a few numbers a position.
3. Honest runs judge all others (`cross_fitted.py`).
"""

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from transformers import PreTrainedModel

from bitassay.engines.decode import TokenIds
from bitassay.engines.load import load
from bitassay.engines.sampling import GREEDY, Sampler
from bitassay.errors import BitassayError, MissingError, at_least, suggestion
from bitassay.models.identity import identity
from bitassay.models.options import AUTO
from bitassay.quantization.export.fits import check_fit
from bitassay.record.environment import environment
from bitassay.record.files import check_folder, write_json
from bitassay.record.jobs import ask_once
from bitassay.record.progress import Progress, silent
from bitassay.record.run import RunFolder, default_folder
from bitassay.studies.attacks.cross_fitted import FOLDS, Court, fewest_counted, honest_rows, judged_rows
from bitassay.studies.machines import (
    LeftOut,
    Machine,
    Probe,
    first_that_runs,
    other_machines,
    probe_machine,
    threads,
)
from bitassay.studies.parties import DTYPES, PROVER, Item, Party, party_job
from bitassay.studies.verification import chosen_prompts
from bitassay.verification.attacks.forgeries import RECEIPT_ATTACKS
from bitassay.verification.attacks.hosts import TRACE_ATTACKS, Setting, honest_prefill
from bitassay.verification.detectors.registry import DETECTORS, Seconds, measure
from bitassay.verification.exchange import Handed
from bitassay.verification.observation import Observation, observe
from bitassay.verification.profile import runs_needed
from bitassay.verification.prove import prove_many
from bitassay.verification.structure import Request
from bitassay.verification.trace import Trace, read_trace

SCHEMA = 1
ATTACKS = TRACE_ATTACKS | RECEIPT_ATTACKS
MOST_CANDIDATES = 400
SAMPLED = Sampler(temperature=0.8, top_p=0.95, seed=7)
PRECISION = "bf16"
TIMED = 3  # traces on which the detectors are timed
_OBSERVATIONS, _SECONDS = TypeAdapter(list[Observation]), TypeAdapter(Seconds)


@dataclass(frozen=True)
class AttackPlan:
    """sequences: requests that honest runs and attacks answer, each with an honest greedy output of `tokens`
    tokens (sampled ones may end sooner)."""

    sequences: int = 100
    tokens: int = 64
    alpha: float = 0.01
    batch: int = 32
    seed: int = 0
    attention: str = AUTO
    attacks: tuple[str, ...] = tuple(ATTACKS)
    variants: tuple[str, ...] = field(default_factory=lambda: tuple(VARIANTS))


@dataclass(frozen=True)
class Bench:
    """Requests with one sampler, and the model that answers them honestly. name: where the model was loaded
    from. other: the machine of the variant `isa`."""

    name: str
    model: PreTrainedModel
    prompts: Sequence[TokenIds]
    sampler: Sampler
    plan: AttackPlan
    trust_remote_code: bool = False
    other: Machine | None = None

    @property
    def nonces(self) -> list[str]:
        return [f"attack-{index}" for index in range(len(self.prompts))]

    @property
    def requests(self) -> list[Request]:
        return [
            Request(prompt, nonce, self.sampler, self.plan.tokens)
            for prompt, nonce in zip(self.prompts, self.nonces, strict=True)
        ]

    @functools.cached_property
    def traces(self) -> list[Trace]:
        """Honest, by the verifier's own numerics: what attacks forge from."""
        return self.prove()

    @property
    def setting(self) -> Setting:
        return Setting(self.model, self.traces, self.plan.batch)

    def prove(self, model: PreTrainedModel | None = None, batch: int | None = None) -> list[Trace]:
        return prove_many(
            model or self.model,
            self.prompts,
            max_new_tokens=self.plan.tokens,
            sampler=self.sampler,
            nonces=self.nonces,
            batch_size=batch or self.plan.batch,
        )


def _eager(bench: Bench) -> list[Trace]:
    model = load(
        bench.name, dtype=DTYPES[PRECISION], attention="eager", trust_remote_code=bench.trust_remote_code
    )
    return bench.prove(model)


def _prefill(bench: Bench) -> list[Trace]:
    return honest_prefill(bench.traces, bench.model, [trace.header.output_ids for trace in bench.traces])


def _one_thread(bench: Bench) -> list[Trace]:
    with threads(1):
        return bench.prove()


def _other_instructions(bench: Bench) -> list[Trace]:
    """Greedily in a process of its own that is told to use other vector instructions; batches are those of
    `prove_many`, of similar length."""
    machine = bench.other or other_machines(HOST)[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        items = [
            Item(tuple(prompt), nonce, bench.plan.tokens, folder / f"{nonce}.trace")
            for prompt, nonce in zip(bench.prompts, bench.nonces, strict=True)
        ]
        job = party_job(
            PROVER,
            Party(PRECISION, machine, DTYPES[PRECISION]),
            bench.name,
            sorted(items, key=lambda item: len(item.prompt)),
            folder,
            batch=bench.plan.batch,
            trust_remote_code=bench.trust_remote_code,
            attention=bench.plan.attention,
        )
        ask_once(job)
        return [read_trace(item.trace) for item in items]


HOST = Machine("cpu")


def _here(*options: str) -> Callable[[], list[Machine]]:
    return lambda: [Machine("+".join((HOST.name, *options)))]


@dataclass(frozen=True)
class Variant:
    """One way of running the model honestly. machines: whose numerics it has, as `parties` spells them; the
    first that can compute here. sampled: with the sampler SAMPLED instead of greedily."""

    about: str
    run: Callable[[Bench], list[Trace]]
    sampled: bool = False
    machines: Callable[[], Sequence[Machine]] = lambda: [HOST]


VARIANTS = {
    "same": Variant("cached decode in batches, as the verifier's numerics are", lambda bench: bench.traces),
    "eager": Variant("eager attention", _eager, machines=_here("eager")),
    "thread-1": Variant("one thread", _one_thread, machines=_here("1thread")),
    "batch-1": Variant("one request at a time", lambda bench: bench.prove(batch=1)),
    "batch-8": Variant("eight requests at a time", lambda bench: bench.prove(batch=8)),
    "isa": Variant(
        "a process with other vector instructions (AVX2 where AVX-512 is the default)",
        _other_instructions,
        machines=lambda: other_machines(HOST),
    ),
    "prefill": Variant("states from one prefill instead of cached decode", _prefill),
    "sampled": Variant("sampled, otherwise the same", lambda bench: bench.traces, sampled=True),
    "sampled-eager": Variant("sampled, eager attention", _eager, True, _here("eager")),
    "sampled-thread-1": Variant("sampled, one thread", _one_thread, True, _here("1thread")),
}


def attack(
    model: str,
    plan: AttackPlan,
    *,
    out: Path | None = None,
    trust_remote_code: bool = False,
    probe: Probe = probe_machine,
    progress: Progress = silent,
) -> tuple[dict[str, Any], Path]:
    """Run the study; the finished run and its folder. Interrupted, the same call goes on. Numerics that
    cannot be computed here are `left_out`, or another machine's stand in.

    Raises BitassayError for an unknown attack or variant, and where the honest runs are too few for alpha,
    MissingError where the verifier's own numerics cannot be computed.
    """
    check_plan(plan)
    if out is not None:
        check_folder(out)
    check_fit(model, tokens=plan.tokens, trust_remote_code=trust_remote_code, progress=progress)
    plan, other, left_out = runnable(plan, probe)
    for one in left_out:
        progress(str(one))
    check_plan(plan)
    base = load(
        model,
        dtype=DTYPES[PRECISION],
        attention=plan.attention,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    known = identity(base)
    described = {"schema": SCHEMA, "kind": "attack", "model": known.weights_digest, **asdict(plan)}
    described |= {"config": known.config_digest}
    described |= {"numerics": environment()["cpu_capability"], "threads": torch.get_num_threads()}
    # A run may be widened: what is attacked and what is pooled do not change the parts that are there.
    folder = _folder(
        out, model, {key: value for key, value in described.items() if key not in ("attacks", "variants")}
    )
    greedy = Bench(model, base, (), GREEDY, plan, trust_remote_code, other)
    chosen = folder.part("requests", lambda: _choose(greedy, progress))
    greedy = replace(greedy, prompts=[tuple(prompt) for prompt in chosen])
    benches = {False: greedy, True: replace(greedy, sampler=SAMPLED)}

    def part(name: str, sampled: bool, run: Callable[[Bench], Sequence[Handed]]) -> list[Observation]:
        def compute() -> Any:
            progress(name)
            bench = benches[sampled]
            found = observe(run(bench), base, bench.requests, progress=progress)
            return _OBSERVATIONS.dump_python(found, mode="json")

        return _OBSERVATIONS.validate_python(folder.part(name, compute))

    def attacks(name: str) -> list[Observation]:
        one = ATTACKS[name]
        return part(f"attack-{name}", one.sampled, lambda bench: one.run(bench.setting))

    honest = {
        name: part(f"honest-{name}", VARIANTS[name].sampled, VARIANTS[name].run) for name in plan.variants
    }
    attacked = {name: attacks(name) for name in plan.attacks}
    courts = {
        sampled: Court(
            {name: runs for name, runs in honest.items() if VARIANTS[name].sampled == sampled}, plan.alpha
        )
        for sampled in sorted({VARIANTS[name].sampled for name in plan.variants})
    }
    layers = len(honest[plan.variants[0]][0].log_distances)
    hidden = base.config.get_text_config().hidden_size
    seconds = {sampled: _seconds(folder, benches[sampled], progress) for sampled in courts}
    run = {
        **described,
        "model": {"name": model, "weights_digest": identity(base).weights_digest},
        "run_id": folder.run_id,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "rows": [
            row
            for name in plan.attacks
            for row in judged_rows(
                name,
                courts[ATTACKS[name].sampled],
                attacked[name],
                plan.tokens,
                costs(seconds[ATTACKS[name].sampled], layers, hidden),
            )
        ],
        "timed": TIMED,
        "costs": [
            {"sampler": "sampled" if sampled else "greedy", "detector": name, **cost}
            for sampled, measured in seconds.items()
            for name, cost in costs(measured, layers, hidden).items()
        ],
        "honest": honest_rows(courts, plan.tokens),
        "about": {name: ATTACKS[name].about for name in plan.attacks},
        "left_out": [asdict(one) for one in left_out],
        "numerics_pooled": {name: VARIANTS[name].about for name in plan.variants},
    }
    write_json(folder.path / "run.json", run)
    return run, folder.path


def check_plan(plan: AttackPlan) -> None:
    """Raises BitassayError for what the plan cannot mean."""
    for given, known, kind in ((plan.attacks, ATTACKS, "attack"), (plan.variants, VARIANTS, "numerics")):
        for name in given:
            if name not in known:
                raise BitassayError(
                    f"no {kind} is called {name!r}; {suggestion(name, known)}", f"any of {', '.join(known)}"
                )
    at_least(1, batch=plan.batch)
    at_least(0, seed=plan.seed)
    if not 0 < plan.alpha < 1:
        raise BitassayError(f"alpha {plan.alpha:g} is not between 0 and 1", "--alpha 0.01")
    if plan.tokens < 2 or plan.sequences < 2 * FOLDS:
        raise BitassayError("a study needs 2 tokens and 10 sequences at least", "--tokens 64 --sequences 100")
    if plan.sequences > MOST_CANDIDATES:
        raise BitassayError(
            f"{plan.sequences} sequences: at most {MOST_CANDIDATES} prompts are tried",
            f"--sequences {MOST_CANDIDATES} or fewer",
        )
    for sampled in {ATTACKS[name].sampled for name in plan.attacks}:
        pooled = [name for name in plan.variants if VARIANTS[name].sampled == sampled]
        scores = len(pooled) * fewest_counted(plan.sequences)
        if scores < (needed := runs_needed(plan.alpha)):
            raise BitassayError(
                f"{plan.sequences} sequences under {len(pooled)} {'sampled ' * sampled}numerics give "
                f"{scores} honest scores; alpha {plan.alpha:g} needs {needed}",
                "more --sequences, more --numerics or a larger --alpha",
            )


def runnable(
    plan: AttackPlan, probe: Probe = probe_machine
) -> tuple[AttackPlan, Machine | None, tuple[LeftOut, ...]]:
    """The plan without variants whose numerics cannot be computed here, the machine of `isa`, and what was
    left out or replaced."""
    dtype = DTYPES[PRECISION]
    if problem := probe(HOST, dtype):
        raise MissingError(f"{dtype} cannot be computed here: {problem}", "unset ATEN_CPU_CAPABILITY")
    known: dict[tuple[Machine, ...], tuple[Machine | None, tuple[LeftOut, ...]]] = {(HOST,): (HOST, ())}
    kept, left_out, other = [], list[LeftOut](), None
    for name in plan.variants:
        machines = tuple(VARIANTS[name].machines())
        if machines not in known:
            known[machines] = first_that_runs(machines, dtype, probe)
        found, failed = known[machines]
        left_out += [replace(one, numerics=f"{name}: {one.numerics}") for one in failed]
        if found is not None:
            kept.append(name)
        if name == "isa":
            other = found
    return replace(plan, variants=tuple(kept)), other, tuple(left_out)


def _choose(bench: Bench, progress: Progress) -> list[list[int]]:
    """Prompts whose honest output has all the tokens."""
    plan, found = bench.plan, []
    candidates = chosen_prompts(bench.model, MOST_CANDIDATES, plan.seed)
    for first in range(0, len(candidates), plan.batch):
        progress("choosing requests", len(found), plan.sequences)
        traces = replace(bench, prompts=candidates[first : first + plan.batch]).traces
        found += [list(trace.header.prompt_ids) for trace in traces if trace.n_tokens == plan.tokens]
        if len(found) >= plan.sequences:
            return found[: plan.sequences]
    raise BitassayError(
        f"only {len(found)} of {len(candidates)} prompts get {plan.tokens} tokens from this model",
        "fewer --tokens or --sequences",
    )


def _seconds(folder: RunFolder, bench: Bench, progress: Progress) -> Seconds:
    """What the detectors take on a few honest traces, here and now."""

    def compute() -> Any:
        progress("timing the detectors")
        few = replace(bench, prompts=bench.prompts[:TIMED])
        return _SECONDS.dump_python(measure(few.traces, few.model, few.requests), mode="json")

    name = "seconds" if bench.sampler == GREEDY else "seconds-sampled"
    return _SECONDS.validate_python(folder.part(name, compute))


def costs(seconds: Seconds, layers: int, hidden: int) -> dict[str, dict[str, float]]:
    """Of each detector, for a token of the output: bytes of evidence, the verifier's seconds beyond the
    prefill, the prefill's, and the host's beyond generation."""
    return {
        name: {
            "bytes_per_token": detector.evidence_bytes(layers, hidden),
            "seconds_per_token": seconds.check[name],
            "prefill_seconds_per_token": seconds.prefill,
            "prover_seconds_per_token": seconds.prove[name],
        }
        for name, detector in DETECTORS.items()
    }


def _folder(out: Path | None, model: str, described: dict[str, Any]) -> RunFolder:
    return RunFolder(out or default_folder(f"attack-{Path(model).stem}", described), described)
