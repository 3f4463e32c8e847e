"""`bitassay study`: the experiments of the VeriLLM replication, the INT8/FP8 studies and those of layer
replication (docs/sources.md), as rows of data."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import App

from bitassay.cli.checks import check_words
from bitassay.cli.options import (
    Alpha,
    Count,
    Loading,
    Model,
    Names,
    Numbers,
    Output,
    Precision,
    Window,
    Windows,
)
from bitassay.cli.output import Table, write_page
from bitassay.cli.progress import show_progress
from bitassay.errors import BitassayError, suggestion
from bitassay.report.tables import Column, interval, percent

if TYPE_CHECKING:
    from bitassay.studies.verillm.trial import Trial
    from bitassay.studies.verillm.work import Plan

study = App(name="study", help="List and run the experiments (docs/experiments.md).")


@study.command(name="list")
def list_(*, output: Output = Output()) -> int:
    """List the studies and the results that their sources expect (docs/sources.md)."""
    from bitassay.studies.eight_bit.study import STUDIES as EIGHT_BIT
    from bitassay.studies.replication.study import STUDIES as REPLICATION
    from bitassay.studies.verillm.experiments import EXPERIMENTS

    side = {"full": "FP16", "quantized": "INT4"}
    blank: dict[str, Any] = dict.fromkeys(
        ("study", "prover", "verifier", "hardware", "expected", "bar", "about")
    )
    rows = [
        {
            "study": experiment.name,
            "prover": side[experiment.prover],
            "verifier": side[experiment.verifier],
            "hardware": "other, both directions" if experiment.other_hardware else "same",
            "expected": list(experiment.expected),
            "bar": experiment.bar,
            "about": experiment.about,
        }
        for experiment in EXPERIMENTS.values()
    ]
    every = {"prover": "every precision", "verifier": "every precision", "hardware": "same"}
    about = "which precisions a verifier can tell apart"
    rows.append(blank | every | {"study": "separability", "about": about})
    others = (*EIGHT_BIT.values(), *REPLICATION.values())
    rows += [blank | {"study": plan.name, "about": plan.about} for plan in others]
    expected = Column("expected", "accept rate\nexpected", interval(percent(0)))
    threshold = Column("bar", "threshold", percent(0))
    output.emit((rows, ["study", "prover", "verifier", "hardware", expected, threshold, "about"]))
    return 0


@study.command
def run(
    studies: list[str],
    /,
    *,
    model: Model | None = None,
    tokens: Count | None = None,
    prompt_tokens: Count | None = None,
    trials: Count | None = None,
    verifiers: Count = 3,
    devices: Names | None = None,
    here: Names | None = None,
    role: Literal["prove", "verify"] | None = None,
    precision: Precision | None = None,
    quantized: str = "w4",
    attacks: Names | None = None,
    precisions: Names | None = None,
    rules: str = "documents",
    alpha: Alpha = 0.01,
    jobs: Count | None = None,
    gpus: Numbers | None = None,
    limit: Count | None = None,
    windows: Windows = 16,
    window: Window | None = None,
    only: Names | None = None,
    ray: str | None = None,
    out: Path | None = None,
    loading: Loading = Loading(),
    output: Output = Output(),
) -> int:
    """Run STUDIES on a model. Each prover and each verifier is a process of its own; they communicate by
    files.

    exp1 to exp5 and separability are the VeriLLM experiments. The table compares each measured accept rate
    with the expected one, and with what the same threshold does to INT8 and INT4 provers. They write
    OUT/raw/STUDY/..._trialK.json and ..._summary.json, OUT/run.json and OUT/report.html. To use two
    computers, run with --role prove on one, copy OUT to the other, and run there with --role verify and the
    same --devices. Exit status 1 where a part of a study could not be measured.

    task3.1 to task3.3 are the INT8/FP8 studies; control-table, phase1 to phase4, uses and planes are those of
    layer replication. They take --model, --limit (task3), --only, --windows, --window, --precision, --devices
    (one), --jobs, --ray and --out, and each has a run folder with run.json and report.html.

    An interrupted command continues when it is run again.

    Args:
        studies: exp1 to exp5, separability; or task3.1 to task3.3, control-table, phase1 to phase4, uses,
            planes.
        model: The model (default for task3: the one of the report, Qwen3-1.7B or Qwen2.5-1.5B).
        tokens: Tokens of an output (default: 1000; separability: 16).
        prompt_tokens: Tokens of a prompt, taken from WikiText-2 (default: 300; separability: 48).
        trials: Prompts (default: 3; separability: 100).
        verifiers: Verifiers in a trial. They differ in numerics; a number larger than that of the known
            numerics repeats some.
        devices: The machine of same-hardware studies, and the other one: cpu, cuda:0, mps; numerics may
            follow, as in cpu+avx2+eager+1thread (default: the devices of this computer; a CPU without another
            device uses other vector instructions as the other hardware).
        here: Which of the devices belong to this computer (default: those that it has).
        role: Do only one half, prove or verify.
        precision: Precision of the dense model, and of the quantized sides (default: fp16 as in the VeriLLM
            experiments; bf16 where a machine is a CPU, which computes fp16 many times slower; task3 and
            replication: bf16).
        quantized: The INT4 side: a recipe, or a quantized checkpoint that transformers loads.
        attacks: Provers that the same threshold is tried on (default: w8 and the quantized side).
        precisions: What separability compares (default: fp32 fp16 bf16 w8 fp8 w4 w3 w2).
        rules: documents, paper, or a YAML file that `bitassay calibrate --study` wrote.
        jobs: Processes at a time (default: 1, since more disturb the timings; task3 and replication: one a
            core, as many as memory holds).
        gpus: GPUs that the processes are distributed over.
        limit: Questions of MMLU in all, spread over its subjects (default: as in the report).
        only: Groups of a study of replication, or variants of task3 (a name or a part of one, such as row).
            Only they are measured, and the base model.
        ray: Run on a Ray cluster: auto, or its address (extra `ray`).
        out: Folder of results and of the work in progress (default: data; task3 and replication:
            runs/STUDY-MODEL-ID). A window has 2048 tokens in task3, 1024 in replication.
    """
    check_words([model], folder=out)
    from bitassay.studies.eight_bit.study import STUDIES as EIGHT_BIT
    from bitassay.studies.replication.study import STUDIES as REPLICATION
    from bitassay.studies.verillm.experiments import EXPERIMENTS

    model = None if model is None else loading.of(model)
    every = (*EXPERIMENTS, "separability", *EIGHT_BIT, *REPLICATION)
    for name in studies:
        if name not in every:
            raise BitassayError(
                f"no experiment is called {name!r}; {suggestion(name, every)}", "bitassay study list"
            )
    if repeated := [name for name in studies if studies.count(name) > 1]:
        raise BitassayError(f"the study {repeated[0]!r} is given twice", "name each once")
    kinds = {name in EIGHT_BIT or name in REPLICATION for name in studies}
    if len(kinds) > 1:
        raise BitassayError(
            f"{' '.join(studies)}: exp1 to exp5 and separability run in one command, the others in another",
            "one command for each kind",
        )
    if True in kinds:
        return _run_variants(
            studies, model, precision or "bf16", devices or [], limit, windows, window, tuple(only or ()),
            {"jobs": jobs, "ray": ray, "out": out}, loading, output,
        )  # fmt: skip
    if model is None:
        raise BitassayError("no model was given", "--model smollm2-135m")
    if ray is not None:
        raise BitassayError(
            f"--ray {ray}: only task3 and the studies of replication run there", "leave it out"
        )
    if only:
        raise BitassayError(f"--only {only[0]}: the other studies have no parts", "leave it out")
    plan = make_plan(
        model,
        devices or [],
        here=here or [],
        verifiers=verifiers,
        precision=precision,
        quantized=quantized,
        attacks=tuple(attacks or ("w8", quantized)),
        role=role,
        jobs=jobs or 1,
        gpus=tuple(gpus or ()),
        **loading.options,
        **_rules(rules),
    )
    lengths = {"tokens": tokens, "prompt_tokens": prompt_tokens, "trials": trials}
    return _run_experiments(studies, plan, lengths, precisions, alpha, out or Path("data"), output)


def _run_experiments(
    studies: list[str],
    plan: "Plan",
    lengths: dict[str, int | None],
    precisions: list[str] | None,
    alpha: float,
    out: Path,
    output: Output,
) -> int:
    """Run exp1 to exp5 and separability; write run.json and one page, and print a table of each kind."""
    from bitassay.record.files import write_json
    from bitassay.report import study as report
    from bitassay.studies.verillm.experiments import run_experiments
    from bitassay.studies.verillm.separability import PRECISIONS, run_separability

    def planned(**defaults: int) -> "Plan":
        return replace(plan, **{key: lengths[key] or default for key, default in defaults.items()})

    runs = []
    with show_progress() as progress:
        if names := [name for name in studies if name != "separability"]:
            each = planned(tokens=1000, prompt_tokens=300, trials=3)
            runs.append(run_experiments(names, each, out=out, progress=progress))
        if "separability" in studies:
            each = planned(tokens=16, prompt_tokens=48, trials=100)
            compared = precisions or PRECISIONS
            runs.append(run_separability(each, precisions=compared, alpha=alpha, out=out, progress=progress))
    missing = [part for run in runs for part in run["missing"]]
    for part in missing:
        verb = "lacks" if part.get("impossible") else "waits for"
        print(f"{part['study']}: {verb} {part['missing']}", file=sys.stderr)
    if any(run["rows"] for run in runs):
        write_json(out / "run.json", {"schema": 1, "kind": "studies", "runs": runs})
        report.write_study_report(runs, out / "report.html")
    tables: list[Table] = [
        (report.separability_rows(run), report.separability_columns(run))
        if run["kind"] == "separability"
        else (run["rows"], report.EXPERIMENT_COLUMNS)
        for run in runs
    ]
    rows = [{"kind": run["kind"], **row} for run in runs for row in run["rows"]]
    _emit_each(output, tables, {"rows": rows, "runs": runs})
    return 1 if any(plan.role is None or part.get("impossible") for part in missing) else 0


def _run_variants(
    studies: list[str],
    model: str | None,
    precision: str,
    devices: list[str],
    limit: int | None,
    windows: int,
    window: int | None,
    only: tuple[str, ...],
    work: dict[str, Any],
    loading: Loading,
    output: Output,
) -> int:
    """Run each study of task3 or of replication in a run folder of its own, OUT/STUDY where there are
    several; print a table of its variants and its verdicts."""
    from bitassay.data.windows import Protocol
    from bitassay.models.options import as_device
    from bitassay.report import eight_bit, replication
    from bitassay.report.bench import shown_columns
    from bitassay.report.claims import SHORT_CLAIM_COLUMNS
    from bitassay.studies.eight_bit.run import run_eight_bit
    from bitassay.studies.eight_bit.study import STUDIES as EIGHT_BIT
    from bitassay.studies.eight_bit.study import eight_bit_plan
    from bitassay.studies.replication.run import run_replication
    from bitassay.studies.replication.study import STUDIES as REPLICATION
    from bitassay.studies.verillm.parties import DTYPES, Machine

    if len(devices) > 1 or any(Machine(name).options for name in devices):
        raise BitassayError(
            f"--devices {' '.join(devices)}: one device, without numerics", "--devices cuda:0"
        )
    if work["ray"] is None and devices:
        as_device(devices[0])
    for name in studies:
        if name in REPLICATION and model is None:
            raise BitassayError("no model was given", "--model smollm2-135m")
        if name in REPLICATION and limit is not None:
            raise BitassayError(f"--limit {limit}: {name} asks no questions", "--windows, or --only")
    options = {"dtype": DTYPES[precision], "device": devices[0] if devices else "cpu", **loading.options}
    runs, tables, folders = [], [], []
    with show_progress() as progress:
        for name in studies:
            place = work["out"] / name if work["out"] is not None and len(studies) > 1 else work["out"]
            run_options: dict[str, Any] = {**work, "out": place, "progress": progress}
            if name in REPLICATION:
                protocol = Protocol(windows=windows, window_tokens=window or 1024)
                run, folder = run_replication(
                    name, str(model), protocol=protocol, only=only, **options, **run_options
                )
                columns = replication.ROW_COLUMNS
            else:
                protocol = Protocol(windows=windows, window_tokens=window or 2048)
                questions = limit or EIGHT_BIT[name].questions
                plan = eight_bit_plan(
                    name, model or EIGHT_BIT[name].model, questions, protocol, only, **options
                )
                run, folder = run_eight_bit(plan, **run_options)
                columns = eight_bit.VARIANT_COLUMNS
            write_page(folder)
            runs.append(run)
            folders.append(folder)
            tables.append((run["rows"], shown_columns(columns, run["rows"])))
            if output.format != "csv":
                drafts, claims = run.get("drafts") or [], run["claims"]
                tables += [(drafts, replication.DRAFT_COLUMNS), (claims, SHORT_CLAIM_COLUMNS)]
    _emit_each(output, tables, {"rows": [row for run in runs for row in run["rows"]], "runs": runs})
    for folder in folders:
        print(f"report: {folder / 'report.html'}", file=sys.stderr)
    return 0


def _emit_each(output: Output, tables: list[Table], whole: dict[str, Any]) -> None:
    """Print the tables of several studies; as CSV one after the other."""
    if output.format == "csv":
        for table in tables:
            output.emit(table)
    else:
        output.emit(*tables, json=whole)


def optimise(studies: list[str], plan: "Plan", alpha: float, out: Path, output: Output) -> int:
    """Fit thresholds as `bitassay calibrate --study` does, and print them."""
    from bitassay.record.files import write_json
    from bitassay.report import study as report
    from bitassay.studies.verillm.thresholds import optimise_thresholds

    with show_progress() as progress:
        run = optimise_thresholds(studies, plan, alpha=alpha, out=out, progress=progress)
    write_json(out / "threshold_optimization" / "run.json", run)
    report.write_study_report([run], out / "threshold_optimization" / "report.html")
    output.emit((report.threshold_rows(run), report.THRESHOLD_COLUMNS), json=run)
    for row in run["rows"]:
        print(f"thresholds: {row['file']}", file=sys.stderr)
    for part in run["missing"]:
        print(f"{part['study']}: lacks {part['missing']}", file=sys.stderr)
    return 1 if run["missing"] else 0


def make_plan(
    model: str,
    devices: list[str],
    *,
    here: Sequence[str] = (),
    precision: str | None = None,
    trial: "Trial | None" = None,
    **fields: Any,
) -> "Plan":
    """Return a plan on these machines, or on those of this computer that can compute, in `precision` or in
    the one that suits them."""
    from bitassay.studies.verillm.parties import DTYPES, Machine, first_machines, other_machines
    from bitassay.studies.verillm.trial import LeftOut, first_that_runs, try_machine
    from bitassay.studies.verillm.work import Plan

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
        runs_here, failed = first_that_runs(candidates, DTYPES[precision], trial or try_machine)
        left_out += failed
        return runs_here or candidates[0]

    first = named[0] if named else chosen(first_machines())
    second = named[1] if len(named) == 2 else chosen(other_machines(first))
    machines, local = (first, second), tuple(map(Machine, here))
    return Plan(model, machines, precision=precision, here=local, left_out=left_out, **fields)


def _rules(name: str) -> dict[str, Any]:
    """Return the rules of this name, or the rules and the threshold of a file."""
    from bitassay.studies.verillm.thresholds import read_thresholds
    from bitassay.verification.detectors.verillm import RULE_SETS

    if name in RULE_SETS:
        return {"rules": RULE_SETS[name]}
    if Path(name).suffix not in (".yaml", ".yml"):
        raise BitassayError(
            f"no rules are called {name!r}; {suggestion(name, RULE_SETS)}",
            "or give a .yaml file that `bitassay calibrate MODEL --study exp1` wrote",
        )
    rules, bar = read_thresholds(Path(name))
    return {"rules": rules, "bar": bar}
