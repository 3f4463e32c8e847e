"""`bitassay study`: the experiments of the VeriLLM replication, the INT8/FP8 studies and those of layer
replication, as rows of data."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import App

from bitassay.cli.output import Format, emit
from bitassay.cli.parameters import AS_IT_IS, Count, Loading, Names, Numbers, Share
from bitassay.report.tables import Column, interval, percent

if TYPE_CHECKING:
    from bitassay.studies.machines import Probe
    from bitassay.studies.verillm.work import ExperimentPlan

study = App(name="study", help="List and run the experiments.")

_STUDIES = (
    Column("study", "study", align="left"),
    Column("prover", "prover", align="left"),
    Column("verifier", "verifier", align="left"),
    Column("hardware", "hardware", align="left"),
    Column("expected", "accept rate\nexpected", interval(percent(0))),
    Column("bar", "bar", percent(0)),
    Column("about", "about", align="left"),
)


@study.command(name="list")
def list_(*, format: Format = "table") -> int:
    """The studies and what the documents expect of them.

    Args:
        format: What to print on stdout.
    """
    from bitassay.studies.eight_bit.study import STUDIES as EIGHT_BIT
    from bitassay.studies.replication.study import STUDIES as REPLICATION
    from bitassay.studies.verillm.experiments import EXPERIMENTS

    side = {"full": "FP16", "quantized": "INT4"}
    rows: list[dict[str, Any]] = [
        {
            "study": one.name,
            "prover": side[one.prover],
            "verifier": side[one.verifier],
            "hardware": "other, both directions" if one.other_hardware else "same",
            "expected": list(one.expected),
            "bar": one.bar,
            "about": one.about,
        }
        for one in EXPERIMENTS.values()
    ]
    every = {"prover": "every precision", "verifier": "every precision", "hardware": "same"}
    about = "which precisions a verifier can tell apart"
    rows.append({"study": "separability", **every, "expected": None, "bar": None, "about": about})
    blank = dict.fromkeys(("prover", "verifier", "hardware", "expected", "bar"))
    rows += [
        {"study": one.name, **blank, "about": one.about}
        for one in (*EIGHT_BIT.values(), *REPLICATION.values())
    ]
    emit(rows, _STUDIES, format)
    return 0


@study.command
def run(
    studies: list[str],
    /,
    *,
    model: str | None = None,
    tokens: Count | None = None,
    prompt_tokens: Count | None = None,
    trials: Count | None = None,
    verifiers: Count = 3,
    devices: Names | None = None,
    here: Names | None = None,
    role: Literal["prove", "verify"] | None = None,
    precision: str | None = None,
    quantized: str = "w4",
    attacks: Names | None = None,
    precisions: Names | None = None,
    rules: str = "documents",
    alpha: Share = 0.01,
    jobs: Count | None = None,
    gpus: Numbers | None = None,
    limit: Count | None = None,
    windows: Count = 16,
    window: Count | None = None,
    only: Names | None = None,
    ray: str | None = None,
    out: Path | None = None,
    loading: Loading = AS_IT_IS,
    format: Format = "table",
) -> int:
    """Run STUDIES on a model: provers and verifiers each in a process of their own, everything through files.

    Measured stands beside expected, and beside what the same bar does to INT8 and INT4 provers. Writes
    OUT/raw/STUDY/..._trialK.json and ..._summary.json, OUT/run.json and OUT/report.html. Interrupted, the
    same command goes on. For two computers: run with `--role prove` on one, copy OUT to the other, and run
    there with `--role verify` and the same --devices. Exit status 1 where something of a study could not be
    measured.

    task3.1 to task3.3 are the INT8/FP8 studies; control-table, phase1 to phase4, uses and planes are those of
    layer replication. --model, --limit (task3), --only, --windows, --window, --precision, --devices (one),
    --jobs, --ray and --out are theirs. Each has a run folder, with run.json and report.html.

    Args:
        studies: exp1 to exp5, separability; or task3.1 to task3.3, control-table, phase1 to phase4, uses,
            planes.
        model: A name from `bitassay models list`, a folder, a .gguf file or a hub id (task3: default as
            in the document, Qwen3-1.7B or Qwen2.5-1.5B).
        tokens: Tokens of an output (default: 1000; separability: 16).
        prompt_tokens: Tokens of a prompt, taken from WikiText-2 (default: 300; separability: 48).
        trials: Prompts (default: 3; separability: 100).
        verifiers: Verifiers in a trial. They differ in numerics; past those that there are, they repeat.
        devices: The machine of same-hardware studies, and the other one: cpu, cuda:0, mps; numerics may
            follow, as in cpu+avx2+eager+1thread (default: what is at hand; beside a lone CPU its own other
            vector instructions stand in).
        here: Which of the devices this computer is (default: those that it has).
        role: Do one half only, prove or verify.
        precision: Of the dense model: fp16, bf16, fp32 (default: fp16 as in the documents; bf16 where a
            machine is a CPU, which computes fp16 many times slower). Quantized sides run in it too.
        quantized: The INT4 side: a recipe, or a quantized checkpoint that transformers loads.
        attacks: Provers that the same bar is tried on (default: w8 and the quantized side).
        precisions: What separability compares (default: fp32 fp16 bf16 w8 fp8 w4 w3 w2).
        rules: documents, paper, or a YAML file that `bitassay calibrate --study` wrote.
        alpha: False-positive rate in separability.
        jobs: Processes at a time (default: 1, since more disturb the timings; task3 and
            replication: one a core, as many as memory holds).
        gpus: Which GPUs the processes are dealt to.
        limit: Questions of MMLU in all, spread over its subjects (default: as in the document).
        windows: Windows of WikiText-2, evenly spaced.
        window: Tokens in a window (default: task3 2048, replication 1024).
        only: Groups of a study of replication, or variants of task3 (a name or a part of one, such as row),
            which are then measured alone beside the base model.
        ray: Let a Ray cluster do the work: auto, or its address (extra `ray`).
        out: Folder of results and of the work in progress (default: data; task3 and replication:
            runs/STUDY-MODEL-ID).
        format: What to print on stdout; json has everything.
    """
    from bitassay.cli.checks import check_words

    check_words([model], folder=out)
    from bitassay.errors import BitassayError, suggestion
    from bitassay.studies.eight_bit.study import STUDIES as EIGHT_BIT
    from bitassay.studies.replication.study import STUDIES as REPLICATION
    from bitassay.studies.verillm.experiments import EXPERIMENTS

    model = None if model is None else loading.of(model)
    every = (*EXPERIMENTS, "separability", *EIGHT_BIT, *REPLICATION)
    for name in studies:
        if name not in every:
            raise BitassayError(
                f"no experiment is called {name!r}; {suggestion(name, every)}",
                "bitassay study list",
            )
    if twice := [name for name in studies if studies.count(name) > 1]:
        raise BitassayError(f"the study {twice[0]!r} is given twice", "name each once")
    kinds = {name in EIGHT_BIT or name in REPLICATION for name in studies}
    if len(kinds) > 1:
        raise BitassayError(
            f"{' '.join(studies)}: exp1 to exp5 and separability run in one command, the others in another",
            "one command for each kind",
        )
    if True in kinds:
        from bitassay.cli.variants import run_variant_studies

        return run_variant_studies(
            studies,
            model,
            precision=precision or "bf16",
            devices=devices or [],
            limit=limit,
            windows=windows,
            window=window,
            only=only or (),
            jobs=jobs,
            ray=ray,
            out=out,
            loading=loading,
            format=format,
        )
    from bitassay.cli.progress import show_progress
    from bitassay.record.files import write_json
    from bitassay.report import study as report
    from bitassay.studies.verillm.experiments import run_experiments
    from bitassay.studies.verillm.separability import PRECISIONS, run_separability

    if model is None:
        raise BitassayError("no model was given", "--model smollm2-135m")
    if ray is not None:
        raise BitassayError(
            f"--ray {ray}: only task3 and the studies of replication run there", "leave it out"
        )
    if only:
        raise BitassayError(f"--only {only[0]}: the other studies have no parts", "leave it out")
    experiments, out = [name for name in studies if name != "separability"], out or Path("data")
    plan = make_plan(
        model,
        devices or [],
        here=here or [],
        verifiers=verifiers,
        precision=precision,
        quantized=quantized,
        attacks=tuple(attacks or ("w8", quantized)),
        role=role,
        jobs=1 if jobs is None else jobs,
        gpus=tuple(gpus or ()),
        **loading.options,
        **_rules(rules),
    )
    runs = []
    with show_progress() as progress:
        if experiments:
            asked = _lengths(plan, (tokens, 1000), (prompt_tokens, 300), (trials, 3))
            runs.append(run_experiments(experiments, asked, out=out, progress=progress))
        if "separability" in studies:
            asked = _lengths(plan, (tokens, 16), (prompt_tokens, 48), (trials, 100))
            names = precisions or PRECISIONS
            runs.append(run_separability(asked, precisions=names, alpha=alpha, out=out, progress=progress))
    for one in (one for found in runs for one in found["missing"]):
        verb = "lacks" if one.get("impossible") else "waits for"
        sys.stderr.write(f"{one['study']}: {verb} {one['missing']}\n")
    lost = [one for found in runs for one in found["missing"] if role is None or one.get("impossible")]
    if any(found["rows"] for found in runs):
        write_json(out / "run.json", {"schema": 1, "kind": "studies", "runs": runs})
        report.write_study_report(runs, out / "report.html")
    if format == "json":
        whole = {"rows": [{"kind": one["kind"], **row} for one in runs for row in one["rows"]], "runs": runs}
        emit([], [], "json", whole=whole)
        return 1 if lost else 0
    for found in runs:
        if found["kind"] == "separability":
            emit(report.separability_rows(found), report.separability_columns(found), format)
        else:
            emit(found["rows"], report.EXPERIMENT_COLUMNS, format)
    return 1 if lost else 0


def optimise(studies: list[str], plan: "ExperimentPlan", alpha: float, out: Path, format: Format) -> int:
    """What `bitassay calibrate --study` does."""
    from bitassay.cli.progress import show_progress
    from bitassay.record.files import write_json
    from bitassay.report import study as report
    from bitassay.studies.verillm.thresholds import optimise_thresholds

    with show_progress() as progress:
        found = optimise_thresholds(studies, plan, alpha=alpha, out=out, progress=progress)
    write_json(out / "threshold_optimization" / "run.json", found)
    report.write_study_report([found], out / "threshold_optimization" / "report.html")
    emit(report.threshold_rows(found), report.THRESHOLD_COLUMNS, format, whole=found)
    for row in found["rows"]:
        sys.stderr.write(f"thresholds: {row['file']}\n")
    for one in found["missing"]:
        sys.stderr.write(f"{one['study']}: lacks {one['missing']}\n")
    return 1 if found["missing"] else 0


def make_plan(
    model: str,
    devices: list[str],
    *,
    here: Sequence[str] = (),
    precision: str | None = None,
    probe: "Probe | None" = None,
    **fields: Any,
) -> "ExperimentPlan":
    """A plan on these machines, or on those at hand that can compute, in `precision` or the one that suits
    them."""
    from bitassay.errors import BitassayError, suggestion
    from bitassay.studies.machines import (
        LeftOut,
        Machine,
        first_machines,
        first_that_runs,
        other_machines,
        probe_machine,
    )
    from bitassay.studies.parties import DTYPES
    from bitassay.studies.verillm.work import ExperimentPlan

    if len(devices) > 2:
        raise BitassayError(
            f"--devices names {len(devices)} machines", "one, or two: the prover's and the other one"
        )
    named = [Machine(name) for name in devices]
    precision = precision or ("fp16" if len(named) == 2 and all(m.device != "cpu" for m in named) else "bf16")
    if precision not in DTYPES:
        raise BitassayError(
            f"{precision!r} is no precision of the dense model; {suggestion(precision, DTYPES)}",
            "--precision bf16",
        )
    left_out: tuple[LeftOut, ...] = ()

    def chosen(candidates: Sequence[Machine]) -> Machine:
        """The first that runs here; where none does, the first, which the study then leaves out."""
        nonlocal left_out
        found, failed = first_that_runs(candidates, DTYPES[precision], probe or probe_machine)
        left_out += failed
        return found or candidates[0]

    first = named[0] if named else chosen(first_machines())
    second = named[1] if len(named) == 2 else chosen(other_machines(first))
    return ExperimentPlan(
        model,
        (first, second),
        precision=precision,
        here=tuple(map(Machine, here)),
        left_out=left_out,
        **fields,
    )


def _lengths(plan: "ExperimentPlan", *asked: tuple[int | None, int]) -> "ExperimentPlan":
    """The plan with its tokens, prompt tokens and trials: each as given, or the default."""
    from dataclasses import replace

    tokens, prompt_tokens, trials = (default if given is None else given for given, default in asked)
    return replace(plan, tokens=tokens, prompt_tokens=prompt_tokens, trials=trials)


def _rules(given: str) -> dict[str, Any]:
    """Rules and bar by name or from a file."""
    from bitassay.errors import BitassayError, suggestion
    from bitassay.studies.verillm.thresholds import read_thresholds
    from bitassay.verification.detectors.verillm import RULE_SETS

    if given in RULE_SETS:
        return {"rules": RULE_SETS[given]}
    if Path(given).suffix not in (".yaml", ".yml"):
        raise BitassayError(
            f"no rules are called {given!r}; {suggestion(given, RULE_SETS)}",
            "or give a .yaml file that `bitassay calibrate MODEL --study exp1` wrote",
        )
    rules, bar = read_thresholds(Path(given))
    return {"rules": rules, "bar": bar}
