"""Attacks against detectors: how often is each caught, at what rate of false positives?

1. Honest runs answer the same requests under several numerics (`VARIANTS`), pooled: a threshold must hold for
   all of them, not only for the verifier's own. Sampled requests have honest runs of their own.
2. Each attack answers them too (`verification/attacks/`), and `observe` reduces every answer to the series of
   all detectors.
3. Honest runs judge all others (`evaluation.py`).
"""

import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import TypeAdapter
from transformers import PreTrainedModel

from bitassay.engines.arithmetic import Arithmetic
from bitassay.engines.decode import TokenIds
from bitassay.engines.sampling import GREEDY, Sampler
from bitassay.errors import BitassayError, MissingError, at_least, find
from bitassay.models.config import text_config
from bitassay.models.identity import identity
from bitassay.quantization.export.fits import check_fit
from bitassay.record.environment import environment
from bitassay.record.files import check_folder
from bitassay.record.jobs import ask_once
from bitassay.record.progress import Progress, silent
from bitassay.record.result import write_run
from bitassay.record.run import open_run_folder, run_plan
from bitassay.studies.attacks.evaluation import (
    FOLDS,
    CrossFit,
    attack_rows,
    evaluated,
    fewest_counted,
    honest_rows,
)
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
from bitassay.studies.verdicts import chosen_prompts
from bitassay.verification.attacks.attack import Setting
from bitassay.verification.attacks.hosts import honest_prefill
from bitassay.verification.attacks.registry import ATTACKS
from bitassay.verification.detectors.registry import DETECTORS
from bitassay.verification.observe import Observation, compare, observe
from bitassay.verification.prove import prove_many
from bitassay.verification.scores import runs_needed
from bitassay.verification.structure import Request
from bitassay.verification.submissions import Submission, check_submission
from bitassay.verification.trace import Trace, read_trace

MOST_CANDIDATES = 400
SAMPLED = Sampler(temperature=0.8, top_p=0.95, seed=7)
PRECISIONS = {dtype: precision for precision, dtype in DTYPES.items()}
TIMED, ROUNDS = 3, 3  # traces on which the detectors are timed, and how often
_OBSERVATIONS = TypeAdapter(list[Observation])


@dataclass(frozen=True)
class AttackPlan(Arithmetic):
    """sequences: requests that honest runs and attacks answer, each with an honest greedy output of `tokens`
    tokens (sampled ones may end sooner)."""

    sequences: int = 100
    tokens: int = 64
    alpha: float = 0.01
    batch: int = 32
    seed: int = 0
    dtype: str = field(default="bfloat16", kw_only=True)
    attacks: tuple[str, ...] = field(default_factory=lambda: tuple(ATTACKS))
    variants: tuple[str, ...] = field(default_factory=lambda: tuple(VARIANTS))


@dataclass(frozen=True)
class RequestSet:
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


def _eager(requests: RequestSet) -> list[Trace]:
    trust = requests.trust_remote_code
    return requests.prove(requests.plan.loaded(requests.name, attention="eager", trust_remote_code=trust))


def _prefill(requests: RequestSet) -> list[Trace]:
    return honest_prefill(
        requests.traces, requests.model, [trace.header.output_ids for trace in requests.traces]
    )


def _one_thread(requests: RequestSet) -> list[Trace]:
    with threads(1):
        return requests.prove()


def _other_instructions(requests: RequestSet) -> list[Trace]:
    """Greedily in a process of its own that is told to use other vector instructions; batches are those of
    `prove_many`, of similar length."""
    machine = requests.other or other_machines(Machine(requests.plan.device))[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        items = [
            Item(tuple(prompt), nonce, requests.plan.tokens, folder / f"{nonce}.trace")
            for prompt, nonce in zip(requests.prompts, requests.nonces, strict=True)
        ]
        job = party_job(
            PROVER,
            Party(PRECISIONS[requests.plan.dtype], machine, requests.plan.dtype),
            requests.name,
            sorted(items, key=lambda item: len(item.prompt)),
            folder,
            batch=requests.plan.batch,
            trust_remote_code=requests.trust_remote_code,
            attention=requests.plan.attention,
        )
        ask_once(job)
        return [read_trace(item.trace) for item in items]


def _here(*options: str) -> Callable[[Machine], list[Machine]]:
    return lambda host: [Machine("+".join((host.name, *options)))]


@dataclass(frozen=True)
class Variant:
    """One way of running the model honestly. machines: whose numerics it has, of a host, as `parties` spells
    them; the first that can compute here. sampled: with the sampler SAMPLED instead of greedily."""

    about: str
    run: Callable[[RequestSet], list[Trace]]
    sampled: bool = False
    machines: Callable[[Machine], Sequence[Machine]] = lambda host: [host]


VARIANTS = {
    "same": Variant(
        "cached decode in batches, as the verifier's numerics are", lambda requests: requests.traces
    ),
    "eager": Variant("eager attention", _eager, machines=_here("eager")),
    "thread-1": Variant("one thread", _one_thread, machines=_here("1thread")),
    "batch-1": Variant("one request at a time", lambda requests: requests.prove(batch=1)),
    "batch-8": Variant("eight requests at a time", lambda requests: requests.prove(batch=8)),
    "isa": Variant(
        "a process with other vector instructions (AVX2 where AVX-512 is the default)",
        _other_instructions,
        machines=other_machines,
    ),
    "prefill": Variant("states from one prefill instead of cached decode", _prefill),
    "sampled": Variant("sampled, otherwise the same", lambda requests: requests.traces, sampled=True),
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
    """Run the study and return the finished run and its folder; interrupted, the same call goes on. Numerics
    that cannot be computed here are `left_out`, or another machine stands in.

    Raises BitassayError for an unknown attack or variant, and where the honest runs are too few for alpha,
    MissingError where the verifier's own numerics cannot be computed.
    """
    check_plan(plan)
    check_folder(out)
    check_fit(model, tokens=plan.tokens, trust_remote_code=trust_remote_code, progress=progress)
    plan, other, left_out = runnable(plan, probe)
    for omission in left_out:
        progress(str(omission))
    check_plan(plan)
    base = plan.loaded(model, trust_remote_code=trust_remote_code, progress=progress)
    known, here = identity(base), environment(base.device)
    settings = {**asdict(plan), "numerics": here["cpu_capability"], "threads": here["threads"]}
    # A run may be widened: what is attacked and what is pooled do not change the parts that are there.
    work = {key: value for key, value in settings.items() if key not in ("attacks", "variants")}
    work |= {"model": known.weights_digest, "config": known.config_digest, "detectors": list(DETECTORS)}
    folder = open_run_folder(f"attack-{Path(model).stem}", run_plan("attack", work), out)
    greedy = RequestSet(model, base, (), GREEDY, plan, trust_remote_code, other)
    chosen = folder.part("requests", lambda: _choose(greedy, progress))
    greedy = replace(greedy, prompts=[tuple(prompt) for prompt in chosen])
    requests = {False: greedy, True: replace(greedy, sampler=SAMPLED)}

    def part(
        name: str, sampled: bool, run: Callable[[RequestSet], Sequence[Submission]]
    ) -> list[Observation]:
        def compute() -> Any:
            progress(name)
            asked = requests[sampled]
            observed = observe(run(asked), base, asked.requests, progress=progress)
            return _OBSERVATIONS.dump_python(observed, mode="json")

        return _OBSERVATIONS.validate_python(folder.part(name, compute))

    def attacks(name: str) -> list[Observation]:
        attack = ATTACKS[name]
        return part(f"attack-{name}", attack.sampled, lambda asked: attack.run(asked.setting))

    honest = {
        name: part(f"honest-{name}", VARIANTS[name].sampled, VARIANTS[name].run) for name in plan.variants
    }
    attacked = {name: attacks(name) for name in plan.attacks}
    pools = {
        sampled: CrossFit(
            {name: runs for name, runs in honest.items() if VARIANTS[name].sampled == sampled}, plan.alpha
        )
        for sampled in sorted({VARIANTS[name].sampled for name in plan.variants})
    }
    progress("timing the detectors")
    cost = {
        sampled: folder.part("costs-sampled" if sampled else "costs", partial(costs, requests[sampled]))
        for sampled in pools
    }
    run = write_run(
        folder,
        model={"name": model, "weights_digest": known.weights_digest},
        settings=settings,
        interval="95 %, Clopper-Pearson over runs",
        environment=here,
        rows=[
            row
            for name in plan.attacks
            for row in attack_rows(
                name, pools[ATTACKS[name].sampled], attacked[name], plan.tokens, cost[ATTACKS[name].sampled]
            )
        ],
        timed=TIMED,
        costs=[
            {"sampler": "sampled" if sampled else "greedy", "detector": name, **measured}
            for sampled, by_detector in cost.items()
            for name, measured in by_detector.items()
        ],
        honest=honest_rows(pools, plan.tokens),
        about={name: ATTACKS[name].about for name in plan.attacks},
        left_out=[asdict(omission) for omission in left_out],
        numerics_pooled={name: VARIANTS[name].about for name in plan.variants},
    )
    return run, folder.path


def check_plan(plan: AttackPlan) -> None:
    """Raise BitassayError for what the plan cannot mean."""
    for name in plan.attacks:
        find(ATTACKS, name, "attack", f"any of {', '.join(ATTACKS)}")
    for name in plan.variants:
        find(VARIANTS, name, "numerics", f"any of {', '.join(VARIANTS)}")
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
    """Return the plan without variants whose numerics cannot be computed here, the machine of `isa`, and what
    was left out or replaced."""
    dtype, host = plan.dtype, Machine(plan.device)
    if problem := probe(host, dtype):
        raise MissingError(f"{dtype} cannot be computed here: {problem}", "unset ATEN_CPU_CAPABILITY")
    known: dict[tuple[Machine, ...], tuple[Machine | None, tuple[LeftOut, ...]]] = {(host,): (host, ())}
    kept, left_out, other = [], list[LeftOut](), None
    for name in plan.variants:
        machines = tuple(VARIANTS[name].machines(host))
        if machines not in known:
            known[machines] = first_that_runs(machines, dtype, probe)
        machine, failed = known[machines]
        left_out += [replace(omission, numerics=f"{name}: {omission.numerics}") for omission in failed]
        if machine is not None:
            kept.append(name)
        if name == "isa":
            other = machine
    return replace(plan, variants=tuple(kept)), other, tuple(left_out)


def _choose(requests: RequestSet, progress: Progress) -> list[list[int]]:
    """Return prompts whose honest output has all the tokens."""
    plan, prompts = requests.plan, []
    candidates = chosen_prompts(requests.model, MOST_CANDIDATES, plan.seed)
    for first in range(0, len(candidates), plan.batch):
        progress("choosing requests", len(prompts), plan.sequences)
        traces = replace(requests, prompts=candidates[first : first + plan.batch]).traces
        prompts += [list(trace.header.prompt_ids) for trace in traces if trace.n_tokens == plan.tokens]
        if len(prompts) >= plan.sequences:
            return prompts[: plan.sequences]
    raise BitassayError(
        f"only {len(prompts)} of {len(candidates)} prompts get {plan.tokens} tokens from this model",
        "fewer --tokens or --sequences",
    )


def costs(requests: RequestSet) -> dict[str, dict[str, float]]:
    """Return for each detector, for a token of the output: bytes of evidence, the verifier's seconds beyond
    the prefill, the prefill's, and the host's beyond generation. Detectors that are evaluated together share
    the evidence.

    Seconds are medians over ROUNDS and TIMED honest traces, one at a time; the detectors take turns, so that
    what else the machine does falls on all of them alike. A first round is not counted.
    """
    few, model = replace(requests, prompts=requests.prompts[:TIMED]), requests.model
    measured: dict[tuple[str, str], list[float]] = {}

    def timed(kind: str, name: str, tokens: int, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = work()
        measured.setdefault((kind, name), []).append((time.perf_counter() - start) / tokens)
        return value

    def middle(kind: str, name: str = "") -> float:
        return median(measured.get((kind, name), [0.0]))

    for round in range(ROUNDS + 1):
        if round == 1:
            measured.clear()
        for trace, request in zip(few.traces, few.requests, strict=True):
            tokens = trace.n_tokens
            comparison = timed("prefill", "", tokens, partial(compare, trace, model))
            for name, detector in DETECTORS.items():
                proof = None
                if detector.prove is not None:
                    proof = timed("prove", name, tokens, partial(detector.prove, comparison))
                check = partial(detector.check, comparison, proof)
                if detector.exact:
                    check = partial(check_submission, trace, model, request)
                timed("check", name, tokens, check)
    layers, hidden = len(few.traces[0].header.layers), text_config(model).hidden_size
    return {
        name: {
            "bytes_per_token": max(DETECTORS[each].evidence_bytes(layers, hidden) for each in detectors),
            "seconds_per_token": sum(middle("check", each) for each in detectors),
            "prefill_seconds_per_token": middle("prefill"),
            "prover_seconds_per_token": max(middle("prove", each) for each in detectors),
        }
        for name, detectors in evaluated().items()
    }
