"""Attacks against detectors: how often does each detector catch each attack, at what rate of false
accusations?

1. Honest runs answer the same requests under several numerics (`VARIANTS`), pooled: a threshold must hold for
   all of them, not only for the verifier's own. Sampled requests have honest runs of their own.
2. Each attack answers them too, by traces (`verify/attacks.py`) or by receipts (`verify/forgeries.py`), and
   `observe` reduces every answer to a few numbers a position.
3. Requests are dealt into FOLDS. The statistics of a fold's runs are standardised and judged by honest runs
   of the other folds only: a quarter of these requests fits mean and spread, the others give the scores that
   p-values count. So each run is judged once, by requests that are not its own, and the honest ones give a
   held-out rate of false accusations. A run is caught where p = (1 + #{honest scores >= score}) / (n + 1) <=
   alpha.

Intervals are Clopper-Pearson, 95 %. For honest runs they take the runs as independent; runs of one request
under several numerics are not quite.
"""

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from transformers import PreTrainedModel

from bitassay.bench.environment import environment
from bitassay.errors import BitassayError, nearest
from bitassay.generate.decode import TokenIds
from bitassay.generate.sampling import GREEDY, Sampler
from bitassay.models.load import identity, load
from bitassay.record.files import read_json, write_json
from bitassay.record.hashing import digest_json
from bitassay.record.progress import Progress, silent
from bitassay.record.run import RunFolder
from bitassay.studies.assay import chosen_prompts
from bitassay.verify.attacks import TRACE_ATTACKS, Setting, honest_prefill
from bitassay.verify.detectors import (
    DETECTORS,
    GRID,
    HonestFit,
    Observation,
    Seconds,
    Statistics,
    measure,
    observe,
)
from bitassay.verify.exchange import Handed
from bitassay.verify.forgeries import RECEIPT_ATTACKS
from bitassay.verify.power import auc, share, threshold, tokens_to
from bitassay.verify.profile import runs_needed
from bitassay.verify.prove import prove_many
from bitassay.verify.structure import Request
from bitassay.verify.trace import Trace, read_trace, write_trace

SCHEMA = 1
ATTACKS = TRACE_ATTACKS | RECEIPT_ATTACKS
FOLDS = 5
MOST_CANDIDATES = 400
SAMPLED = Sampler(temperature=0.8, top_p=0.95, seed=7)
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
    attacks: tuple[str, ...] = tuple(ATTACKS)
    variants: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bench:
    """What a variant of honest numerics may use."""

    name: str
    model: PreTrainedModel
    prompts: Sequence[TokenIds]
    sampler: Sampler
    plan: AttackPlan

    def prove(self, model: PreTrainedModel | None = None, batch: int | None = None) -> list[Trace]:
        return prove_many(
            model or self.model,
            self.prompts,
            max_new_tokens=self.plan.tokens,
            sampler=self.sampler,
            nonces=nonces(len(self.prompts)),
            batch_size=batch or self.plan.batch,
        )


def _eager(bench: Bench) -> list[Trace]:
    return bench.prove(load(bench.name, dtype="bfloat16", attention="eager"))


def _prefill(bench: Bench) -> list[Trace]:
    traces = bench.prove()
    return honest_prefill(traces, bench.model, [trace.header.output_ids for trace in traces])


def _one_thread(bench: Bench) -> list[Trace]:
    with threads(1):
        return bench.prove()


def _other_instructions(bench: Bench) -> list[Trace]:
    """The same in a process of its own that is told to use other vector instructions."""
    here = torch.backends.cpu.get_cpu_capability()
    other = "avx2" if here not in ("AVX2", "DEFAULT") else "default"
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        write_json(
            job, {"model": bench.name, "prompts": list(map(list, bench.prompts)), **asdict(bench.plan)}
        )
        done = subprocess.run(
            [sys.executable, "-m", "bitassay.studies.attack", str(job), folder],
            env={**os.environ, "ATEN_CPU_CAPABILITY": other},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            raise BitassayError(
                f"the {other} process failed: {done.stderr[-400:]}", "leave out `--numerics isa`"
            )
        return [read_trace(path) for path in sorted(Path(folder).glob("*.trace"))]


@dataclass(frozen=True)
class Variant:
    """One way of running the model honestly. sampled: with the sampler SAMPLED instead of greedily."""

    about: str
    run: Callable[[Bench], list[Trace]]
    sampled: bool = False


VARIANTS = {
    "same": Variant("cached decode in batches, as the verifier's numerics are", lambda bench: bench.prove()),
    "eager": Variant("eager attention", _eager),
    "thread-1": Variant("one thread", _one_thread),
    "batch-1": Variant("one request at a time", lambda bench: bench.prove(batch=1)),
    "batch-8": Variant("eight requests at a time", lambda bench: bench.prove(batch=8)),
    "isa": Variant("a process with AVX2 where AVX-512 is the default", _other_instructions),
    "prefill": Variant("states from one prefill instead of cached decode", _prefill),
    "sampled": Variant("sampled, otherwise the same", lambda bench: bench.prove(), sampled=True),
    "sampled-eager": Variant("sampled, eager attention", _eager, sampled=True),
    "sampled-thread-1": Variant("sampled, one thread", _one_thread, sampled=True),
}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within the context, PyTorch runs on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def nonces(count: int) -> list[str]:
    return [f"attack-{index}" for index in range(count)]


def attack(
    model: str,
    plan: AttackPlan,
    *,
    out: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> tuple[dict[str, Any], Path]:
    """Run the study; the finished run and its folder. Interrupted, the same call goes on.

    Raises BitassayError for an unknown attack or variant, and where the honest runs are too few for alpha.
    """
    plan = replace(plan, variants=plan.variants or tuple(VARIANTS))
    check_plan(plan)
    base = load(model, dtype="bfloat16", trust_remote_code=trust_remote_code, progress=progress)
    described = {"schema": SCHEMA, "kind": "attack", "model": identity(base).weights_digest, **asdict(plan)}
    described |= {"numerics": environment()["cpu_capability"], "threads": torch.get_num_threads()}
    # A run may be widened: what is attacked and what is pooled do not change the parts that are there.
    folder = _folder(
        out, model, {key: value for key, value in described.items() if key not in ("attacks", "variants")}
    )
    chosen = folder.part("requests", lambda: _choose(base, plan, progress))
    prompts = [tuple(prompt) for prompt in chosen]
    honest: dict[str, list[Observation]] = {}
    for name in plan.variants:
        variant = VARIANTS[name]
        bench = Bench(model, base, prompts, SAMPLED if variant.sampled else GREEDY, plan)
        requests = _requests(bench)
        honest[name] = _part(
            folder, f"honest-{name}", lambda v=variant, b=bench: v.run(b), base, requests, progress
        )
    references: dict[bool, list[Trace]] = {}

    def setting(sampled: bool) -> Setting:
        if sampled not in references:
            references[sampled] = Bench(model, base, prompts, SAMPLED if sampled else GREEDY, plan).prove()
        return Setting(base, references[sampled], plan.batch)

    attacked: dict[str, list[Observation]] = {}
    for name in plan.attacks:
        one = ATTACKS[name]
        requests = _requests(Bench(model, base, prompts, SAMPLED if one.sampled else GREEDY, plan))
        attacked[name] = _part(
            folder, f"attack-{name}", lambda one=one: one.run(setting(one.sampled)), base, requests, progress
        )
    courts = {
        sampled: Court(
            {name: runs for name, runs in honest.items() if VARIANTS[name].sampled == sampled}, plan.alpha
        )
        for sampled in sorted({VARIANTS[name].sampled for name in plan.variants})
    }
    layers = len(honest[plan.variants[0]][0].log_distances)
    hidden = base.config.get_text_config().hidden_size
    seconds = {sampled: _seconds(folder, base, prompts, sampled, plan, progress) for sampled in courts}
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
                plan,
                costs(seconds[ATTACKS[name].sampled], layers, hidden),
            )
        ],
        "timed": TIMED,
        "costs": [
            {"sampler": "sampled" if sampled else "greedy", "detector": name, **cost}
            for sampled, measured in seconds.items()
            for name, cost in costs(measured, layers, hidden).items()
        ],
        "honest": honest_rows(courts, plan),
        "about": {name: ATTACKS[name].about for name in plan.attacks},
        "numerics_pooled": {name: VARIANTS[name].about for name in plan.variants},
    }
    write_json(folder.path / "run.json", run)
    return run, folder.path


def check_plan(plan: AttackPlan) -> None:
    """Raises BitassayError for what the plan cannot mean."""
    for given, known, kind in ((plan.attacks, ATTACKS, "attack"), (plan.variants, VARIANTS, "numerics")):
        for name in given:
            if name not in known:
                raise BitassayError(f"no {kind} is called {name!r}; the nearest are {nearest(name, known)}")
    if plan.tokens < 2 or plan.sequences < 2 * FOLDS:
        raise BitassayError("a study needs 2 tokens and 10 sequences at least", "--tokens 64 --sequences 100")
    for sampled in {ATTACKS[name].sampled for name in plan.attacks}:
        pooled = [name for name in plan.variants if VARIANTS[name].sampled == sampled]
        scores = len(pooled) * fewest_counted(plan.sequences)
        if scores < (needed := runs_needed(plan.alpha)):
            raise BitassayError(
                f"{plan.sequences} sequences under {len(pooled)} {'sampled ' * sampled}numerics give "
                f"{scores} honest scores; alpha {plan.alpha:g} needs {needed}",
                "more --sequences, more --numerics or a larger --alpha",
            )


def _choose(model: PreTrainedModel, plan: AttackPlan, progress: Progress) -> list[list[int]]:
    """Prompts whose greedy honest output has all the tokens."""
    found: list[list[int]] = []
    candidates = chosen_prompts(model, MOST_CANDIDATES, plan.seed)
    for start in range(0, len(candidates), plan.batch):
        progress("choosing requests", len(found), plan.sequences)
        chunk = candidates[start : start + plan.batch]
        traces = Bench("", model, chunk, GREEDY, plan).prove()
        found += [
            list(prompt) for prompt, trace in zip(chunk, traces, strict=True) if trace.n_tokens == plan.tokens
        ]
        if len(found) >= plan.sequences:
            return found[: plan.sequences]
    raise BitassayError(
        f"only {len(found)} of {len(candidates)} prompts get {plan.tokens} tokens from this model",
        "fewer --tokens or --sequences",
    )


def _requests(bench: Bench) -> list[Request]:
    words = nonces(len(bench.prompts))
    return [
        Request(prompt, nonce, bench.sampler, bench.plan.tokens)
        for prompt, nonce in zip(bench.prompts, words, strict=True)
    ]


def _part(
    folder: RunFolder,
    name: str,
    run: Callable[[], Sequence[Handed]],
    model: PreTrainedModel,
    requests: Sequence[Request],
    progress: Progress,
) -> list[Observation]:
    def compute() -> Any:
        progress(name)
        return _OBSERVATIONS.dump_python(observe(run(), model, requests, progress=progress), mode="json")

    return _OBSERVATIONS.validate_python(folder.part(name, compute))


def _seconds(
    folder: RunFolder,
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    sampled: bool,
    plan: AttackPlan,
    progress: Progress,
) -> Seconds:
    """What the detectors take on a few honest traces, here and now."""

    def compute() -> Any:
        progress("timing the detectors")
        bench = Bench("", model, prompts[:TIMED], SAMPLED if sampled else GREEDY, plan)
        return _SECONDS.dump_python(measure(bench.prove(), model, _requests(bench)), mode="json")

    return _SECONDS.validate_python(folder.part("seconds-sampled" if sampled else "seconds", compute))


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
    if out is not None:
        return RunFolder(out, described)
    return RunFolder(Path("runs") / f"attack-{Path(model).stem}-{digest_json(described)[:8]}", described)


# --- judging ---


class Court:
    """One pool of honest runs, which decides on runs that answer the same requests in the same order. For
    each detector and number of tokens every fold has a fit and a threshold, by honest runs of the other
    folds."""

    def __init__(self, honest: Mapping[str, Sequence[Observation]], alpha: float):
        self.honest, self.alpha = honest, alpha
        self._judges: dict[tuple[str, int], list[tuple[HonestFit, float]]] = {}

    def decide(self, detector: str, n: int, runs: Sequence[Observation]) -> tuple[np.ndarray, np.ndarray]:
        """Score of each run after n tokens, and whether it is caught."""
        statistics = DETECTORS[detector].statistics
        if (detector, n) not in self._judges:
            known = [
                (index, statistics(one, n)) for pool in self.honest.values() for index, one in enumerate(pool)
            ]
            self._judges[detector, n] = [_judge(known, fold, self.alpha) for fold in range(FOLDS)]
        judges = [self._judges[detector, n][index % FOLDS] for index in range(len(runs))]
        scores = [fit.score(statistics(one, n)) for (fit, _), one in zip(judges, runs, strict=True)]
        caught = [score > limit for (_, limit), score in zip(judges, scores, strict=True)]
        return np.array(scores, np.float64), np.array(caught, bool)

    @functools.cache  # noqa: B019 a court lives as long as its study
    def honest_scores(self, detector: str, n: int) -> np.ndarray:
        """Of all honest runs, each by the fit of its own fold."""
        return np.concatenate([self.decide(detector, n, runs)[0] for runs in self.honest.values()])


def fits(request: int) -> bool:
    """Whether a request's honest runs go into the fit of other folds; those of the others are counted."""
    return request // FOLDS % 4 == 0


def fewest_counted(sequences: int) -> int:
    """The requests that are counted for the fold that has the fewest of them."""
    counted = [request % FOLDS for request in range(sequences) if not fits(request)]
    return min(len(counted) - counted.count(fold) for fold in range(FOLDS))


def _judge(
    known: Sequence[tuple[int, Statistics | None]], fold: int, alpha: float
) -> tuple[HonestFit, float]:
    """Fit and threshold by requests of the other folds: a quarter fits, the others are counted."""
    others = [(index, one) for index, one in known if one is not None and index % FOLDS != fold]
    fit = HonestFit.of([one for request, one in others if fits(request)])
    counted = [fit.score(one) for request, one in others if not fits(request)]
    return fit, threshold(np.array(counted, np.float64), alpha)


def judged_rows(
    attack: str,
    court: Court,
    attacked: Sequence[Observation],
    plan: AttackPlan,
    cost: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """One row a detector; `cost` as `costs` gives it."""
    grid = [n for n in GRID if n < plan.tokens] + [plan.tokens]
    rows = []
    for name, detector in DETECTORS.items():
        decided = {n: court.decide(name, n, attacked) for n in grid}
        caught = {n: share(int(hits.sum()), len(attacked)) for n, (_, hits) in decided.items()}
        honest_scores = court.honest_scores(name, plan.tokens)
        ranked, found = auc(honest_scores, decided[plan.tokens][0]), caught[plan.tokens]
        fixed = [detector.accepts(one, plan.tokens) for one in attacked]
        by_limits = [accepts for accepts in fixed if accepts is not None]
        rows.append(
            {
                "attack": attack,
                "detector": name,
                "auc": ranked.value,
                "auc_ci": [ranked.low, ranked.high],
                "tpr_at_1pct_fpr": found.value,
                "tpr_ci": [found.low, found.high],
                "tokens_to_99": tokens_to({n: rate.value for n, rate in caught.items()}),
                **cost[name],
                "n_honest": len(honest_scores),
                "n_attacked": len(attacked),
                "tokens": plan.tokens,
                "alpha": plan.alpha,
                "sees": "all" if found.low >= 0.9 else "nothing" if found.low <= plan.alpha else "some",
                "tpr_by_tokens": {str(n): rate.value for n, rate in caught.items()},
                "refused_at_published_limits": 1 - float(np.mean(by_limits)) if by_limits else None,
            }
        )
    return rows


def honest_rows(courts: Mapping[bool, Court], plan: AttackPlan) -> list[dict[str, Any]]:
    """Held-out false accusations of each detector under each of the numerics, and pooled."""
    rows = []
    for sampled, court in courts.items():
        pool = court.honest
        for detector in DETECTORS:
            refused = {
                name: int(court.decide(detector, plan.tokens, runs)[1].sum()) for name, runs in pool.items()
            }
            counts = {name: (refused[name], len(runs)) for name, runs in pool.items()}
            counts["sampled, pooled" if sampled else "pooled"] = (
                sum(refused.values()),
                sum(map(len, pool.values())),
            )
            accepts = DETECTORS[detector].accepts
            fixed = [accepts(one, plan.tokens) for runs in pool.values() for one in runs]
            decided = [one for one in fixed if one is not None]
            rows += [
                {
                    "numerics": name,
                    "detector": detector,
                    "refused": bad,
                    "n": n,
                    "false_positive_rate": bad / n,
                    "false_positive_ci": list(share(bad, n)[1:]),
                    "refused_at_published_limits": 1 - float(np.mean(decided))
                    if decided and name.endswith("pooled")
                    else None,
                }
                for name, (bad, n) in counts.items()
            ]
    return rows


def _prove_job(job: str, folder: str) -> None:
    """The other process of `_other_instructions`: prove what the job says, greedily."""
    given = read_json(Path(job))
    plan = AttackPlan(sequences=given["sequences"], tokens=given["tokens"], batch=given["batch"])
    base = load(given["model"], dtype="bfloat16")
    for index, trace in enumerate(Bench(given["model"], base, given["prompts"], GREEDY, plan).prove()):
        write_trace(Path(folder) / f"{index:05d}.trace", trace)


if __name__ == "__main__":
    _prove_job(*sys.argv[1:])
