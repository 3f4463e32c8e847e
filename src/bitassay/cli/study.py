"""`bitassay study`: VeriLLM experiments, INT8/FP8 studies, studies of layer replication (docs/sources.md)."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import App

from bitassay.cli import options
from bitassay.cli.checks import check_words
from bitassay.cli.progress import show_progress
from bitassay.errors import BitassayError, suggestion
from bitassay.report.tables import Column, interval, percent

if TYPE_CHECKING:
    from bitassay.studies.verillm.work import ExperimentPlan

study = App(name="study", help="List and run the experiments (docs/experiments.md).")


@study.command(name="list")
def list_(*, output: options.Output = options.Output()) -> int:
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
            "bar": experiment.accept_rate_min,
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


@options.group
class VariantStudies:
    """Options of task3 and of the studies of replication alone."""

    limit: options.Count | None = None
    """Questions of MMLU in all, spread over its subjects (task3; default: as many as in the INT8/FP8
    report)."""
    windows: options.Windows = 16
    window: options.Count | None = None
    """Tokens in a window (default: task3 2048, replication 1024)."""
    only: options.Names | None = None
    """Groups of a study of replication, or variants of task3 (a name or a part of one, such as row). Only
    they are measured, and the base model."""
    ray: str | None = None
    """Run on a Ray cluster: auto, or its address (extra `ray`)."""


@study.command
def run(
    studies: list[str],
    /,
    *,
    model: options.Model | None = None,
    tokens: options.Count | None = None,
    prompt_tokens: options.Count | None = None,
    trials: options.Count | None = None,
    verifiers: options.Count = 3,
    here: options.Names | None = None,
    role: Literal["prove", "verify"] | None = None,
    quantized: str = "w4",
    attacks: options.Names | None = None,
    precisions: options.Names | None = None,
    rules: str = "documents",
    alpha: options.Alpha = 0.01,
    out: Path | None = None,
    machines: options.Machines = options.Machines(),
    variants: VariantStudies = VariantStudies(),
    loading: options.Loading = options.Loading(),
    output: options.Output = options.Output(),
) -> int:
    """Run STUDIES on a model. Each prover and each verifier is a process of its own; they communicate by
    files.

    exp1 to exp5 and separability are the VeriLLM experiments. The table compares each measured accept rate
    with the expected one, and with what the same threshold does to INT8 and INT4 provers. They write
    OUT/raw/STUDY/..._trialK.json and ..._summary.json, OUT/run.json and OUT/report.html. To use two
    computers, run with --role prove on one, copy OUT to the other, and run there with --role verify and the
    same --devices. Exit status 1 where a part of a study could not be measured.

    task3.1 to task3.3 are the INT8/FP8 studies; control-table, phase1 to phase4, uses and planes are those of
    layer replication. They take --model (task3 has a default, the model of the INT8/FP8 report), --limit
    (task3), --only, --windows, --window, --precision, --devices (one), --jobs, --ray and --out, and each has
    a run folder with run.json and report.html.

    An interrupted command continues when it is run again.

    Args:
        studies: exp1 to exp5, separability; or task3.1 to task3.3, control-table, phase1 to phase4, uses,
            planes.
        tokens: Tokens of an output (default: 1000; separability: 16).
        prompt_tokens: Tokens of a prompt, taken from WikiText-2 (default: 300; separability: 48).
        trials: Prompts (default: 3; separability: 100).
        verifiers: Verifiers in a trial. They differ in numerics; a number larger than that of the known
            numerics repeats some.
        here: Which of the devices belong to this computer (default: those that it has).
        role: Do only one half, prove or verify.
        quantized: The INT4 side: a recipe, or a quantized checkpoint that transformers loads.
        attacks: Provers that the same threshold is tried on (default: w8 and the quantized side).
        precisions: What separability compares (default: fp32 fp16 bf16 w8 fp8 w4 w3 w2).
        rules: Thresholds: documents (those of the VeriLLM experiments), paper (those of the paper), or a YAML
            file that `bitassay calibrate --study` wrote.
        out: Folder of results and of the work in progress (default: data; task3 and replication:
            runs/STUDY-MODEL-ID).
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
        return _run_variants(studies, model, machines, variants, out, loading, output)
    if model is None:
        raise BitassayError("no model was given", "--model smollm2-135m")
    if variants.ray is not None:
        raise BitassayError(
            f"--ray {variants.ray}: only task3 and the studies of replication run there", "leave it out"
        )
    if variants.only:
        raise BitassayError(f"--only {variants.only[0]}: the other studies have no parts", "leave it out")
    from bitassay.studies.verillm.thresholds import find_rules
    from bitassay.studies.verillm.work import make_plan

    plan = make_plan(
        model,
        machines.devices or [],
        here=here or [],
        verifiers=verifiers,
        precision=machines.precision,
        quantized=quantized,
        attacks=tuple(attacks or ("w8", quantized)),
        role=role,
        jobs=machines.jobs or 1,
        gpus=tuple(machines.gpus or ()),
        **loading.options,
        **find_rules(rules),
    )
    lengths = {"tokens": tokens, "prompt_tokens": prompt_tokens, "trials": trials}
    return _run_experiments(studies, plan, lengths, precisions, alpha, out or Path("data"), output)


def _run_experiments(
    studies: list[str],
    plan: "ExperimentPlan",
    lengths: dict[str, int | None],
    precisions: list[str] | None,
    alpha: float,
    out: Path,
    output: options.Output,
) -> int:
    """Run exp1 to exp5 and separability; write run.json and one page, and print a table of each kind."""
    from bitassay.record.files import write_json
    from bitassay.record.result import new_run
    from bitassay.report.pages import write_report
    from bitassay.studies.verillm.experiments import run_experiments
    from bitassay.studies.verillm.separability import PRECISIONS, run_separability

    asked = {key: value for key, value in lengths.items() if value is not None}
    runs = []
    with show_progress() as progress:
        if names := [name for name in studies if name != "separability"]:
            each = replace(plan, **{"tokens": 1000, "prompt_tokens": 300, "trials": 3} | asked)
            runs.append(run_experiments(names, each, out=out, progress=progress))
        if "separability" in studies:
            each = replace(plan, **{"tokens": 16, "prompt_tokens": 48, "trials": 100} | asked)
            compared = precisions or PRECISIONS
            runs.append(run_separability(each, precisions=compared, alpha=alpha, out=out, progress=progress))
    missing = [part for run in runs for part in run["missing"]]
    for part in missing:
        verb = "lacks" if part.get("impossible") else "waits for"
        print(f"{part['study']}: {verb} {part['missing']}", file=sys.stderr)
    rows = [{"kind": run["kind"], **row} for run in runs for row in run["rows"]]
    together = new_run("studies", model={"name": plan.model}, rows=rows, runs=runs)
    if rows:
        write_json(out / "run.json", together)
        write_report(together, out / "report.html")
    _emit_each(output, runs, together)
    return 1 if any(plan.role is None or part.get("impossible") for part in missing) else 0


def _run_variants(
    studies: list[str],
    model: str | None,
    machines: options.Machines,
    variants: VariantStudies,
    out: Path | None,
    loading: options.Loading,
    output: options.Output,
) -> int:
    """Run each study of task3 or of replication in a run folder of its own, OUT/STUDY where there are
    several; print a table of its variants and its verdicts."""
    from bitassay.data.windows import Protocol
    from bitassay.report.pages import write_report
    from bitassay.studies.eight_bit.run import run_eight_bit
    from bitassay.studies.eight_bit.study import STUDIES as EIGHT_BIT
    from bitassay.studies.eight_bit.study import eight_bit_plan
    from bitassay.studies.machines import Machine
    from bitassay.studies.parties import DTYPES
    from bitassay.studies.replication.run import run_replication
    from bitassay.studies.replication.study import STUDIES as REPLICATION

    on_cluster = variants.ray is not None
    devices = machines.devices or ["cpu" if on_cluster else options.chosen_device("auto")]
    if len(devices) > 1 or Machine(devices[0]).options:
        raise BitassayError(
            f"--devices {' '.join(devices)}: one device, without numerics", "--devices cuda:0"
        )
    device = devices[0] if on_cluster else options.chosen_device(devices[0])
    for name in studies:
        if name in REPLICATION and model is None:
            raise BitassayError("no model was given", "--model smollm2-135m")
        if name in REPLICATION and variants.limit is not None:
            raise BitassayError(f"--limit {variants.limit}: {name} asks no questions", "--windows, or --only")
    arithmetic = {"dtype": DTYPES[machines.precision or "bf16"], "device": device, **loading.options}
    only, windows = tuple(variants.only or ()), variants.windows
    runs = []
    with show_progress() as progress:
        for name in studies:
            study_out = out / name if out is not None and len(studies) > 1 else out
            work: dict[str, Any] = {"jobs": machines.jobs, "ray": variants.ray, "out": study_out}
            work["progress"] = progress
            if name in REPLICATION:
                protocol = Protocol(windows=windows, window_tokens=variants.window or 1024)
                run, folder = run_replication(
                    name, str(model), protocol=protocol, only=only, **arithmetic, **work
                )
            else:
                protocol = Protocol(windows=windows, window_tokens=variants.window or 2048)
                of_report = EIGHT_BIT[name]
                questions = variants.limit or of_report.questions
                plan = eight_bit_plan(name, model or of_report.model, questions, protocol, only, **arithmetic)
                run, folder = run_eight_bit(plan, **work)
            write_report(run, folder / "report.html")
            print(f"report: {folder / 'report.html'}", file=sys.stderr)
            runs.append(run)
    _emit_each(output, runs, {"rows": [row for run in runs for row in run["rows"]], "runs": runs})
    return 0


def _emit_each(output: options.Output, runs: list[dict[str, Any]], together: dict[str, Any]) -> None:
    """Print the tables of several runs, or as JSON one object."""
    if output.format == "json":
        output.emit(json=together)
    else:
        for run in runs:
            output.emit_run(run)


def optimise(
    studies: list[str], plan: "ExperimentPlan", alpha: float, out: Path, output: options.Output
) -> int:
    """Fit thresholds as `bitassay calibrate --study` does, and print them."""
    from bitassay.record.files import write_json
    from bitassay.report.pages import write_report
    from bitassay.studies.verillm.thresholds import optimise_thresholds

    with show_progress() as progress:
        run = optimise_thresholds(studies, plan, alpha=alpha, out=out, progress=progress)
    folder = out / "threshold_optimization"
    write_json(folder / "run.json", run)
    write_report(run, folder / "report.html")
    output.emit_run(run)
    for row in run["rows"]:
        print(f"thresholds: {row['file']}", file=sys.stderr)
    for part in run["missing"]:
        print(f"{part['study']}: lacks {part['missing']}", file=sys.stderr)
    return 1 if run["missing"] else 0
