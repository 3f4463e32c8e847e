import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitassay.cli import run as command
from bitassay.data.windows import Protocol
from bitassay.engines import arithmetic
from bitassay.errors import BitassayError
from bitassay.models.opened import is_opened
from bitassay.quantization.export.plan import LOADED, OPENED
from bitassay.quantization.recipe.recipe import Recipe, find_recipe
from bitassay.quantization.recipe.solvers import Tune
from bitassay.report.pages import write_report
from bitassay.studies import assay as assay_module
from bitassay.studies import memory
from bitassay.studies.assay import AssayPlan, assay
from bitassay.studies.estimate import estimate_assay
from bitassay.studies.verdicts import Verification

SMALL = {
    "protocol": Protocol(window_tokens=64, windows=3),
    "bench_repeats": 1,
    "bench_tokens": 32,
    "verification": Verification(prompts=4, calibration_prompts=60, new_tokens=24, alpha=0.05),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "assay"
    run, folder = assay("stories260k", ["w8", "w2"], out=out, **SMALL)
    assert folder == out
    return run, folder


def test_rows_hold_what_was_promised(finished):
    run, folder = finished
    quality = ["ppl", "ppl_ci", "ppl_delta", "kl_mean", "top1_agreement"]
    speed = ["prefill_tok_s", "decode_tok_s", "hidden_distance", "verdict"]
    keys = ["recipe", "bits_per_weight", "size_bytes", *quality, *speed]
    assert [row["recipe"] for row in run["rows"]] == ["base", "w8", "w2"]
    for row in run["rows"]:
        assert all(row[key] is not None for key in keys)
    base, w8, w2 = run["rows"]
    assert (base["ppl_delta_ci"], base["kl_ci"]) == ([0, 0], None)  # the base against itself
    assert all(row[key] is not None for row in (w8, w2) for key in ("ppl_delta_ci", "kl_ci", "top1_ci"))
    assert run["protocol"]["intervals"].keys() == {"ppl_ci", "ppl_delta_ci", "kl_ci", "top1_ci"}
    assert base["verdict"] == "PASS"
    assert w2["verdict"] == "FAIL"
    assert base["kl_mean"] == 0 < w8["kl_mean"] < w2["kl_mean"]
    assert base["hidden_distance"] < w8["hidden_distance"] < w2["hidden_distance"]
    assert base["size_bytes"] > w8["size_bytes"] > w2["size_bytes"]
    assert json.loads((folder / "run.json").read_text())["rows"] == json.loads(json.dumps(run["rows"]))


def test_running_again_repeats_nothing(finished, monkeypatch):
    run, folder = finished
    import bitassay.studies.assay as module

    def never(*_, **__):
        raise AssertionError("finished work was done again")

    for name in ("score_windows", "throughput", "honest_profile", "verdict_columns"):
        monkeypatch.setattr(module, name, never)
    again, _ = assay("stories260k", ["w8", "w2"], out=folder, **SMALL)
    assert json.dumps(again["rows"]) == json.dumps(run["rows"])


def test_an_interrupted_run_goes_on_at_the_window_where_it_stopped(tmp_path, monkeypatch):
    import bitassay.studies.assay as module

    options = SMALL | {"verification": None, "bench_repeats": 0}
    whole, _ = assay("stories260k", ["w4"], out=tmp_path / "whole", **options)
    original, seen = module.score_windows, []

    def interrupted(*args, **kwargs):
        for index, scores in original(*args, **kwargs):
            if index == 2 and "stopped" not in seen:
                seen.append("stopped")
                raise KeyboardInterrupt
            seen.append(index)
            yield index, scores

    monkeypatch.setattr(module, "score_windows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        assay("stories260k", ["w4"], out=tmp_path / "cut", **options)
    assert not (tmp_path / "cut" / "run.json").exists()
    run, _ = assay("stories260k", ["w4"], out=tmp_path / "cut", **options)
    assert seen == [0, 1, "stopped", 2]
    assert run["rows"] == whole["rows"]


def test_a_folder_of_another_plan_is_refused(finished):
    _, folder = finished
    with pytest.raises(BitassayError, match=r"another plan \(different: recipes\)"):
        assay("stories260k", ["w8"], out=folder, **SMALL)


def test_a_damaged_part_is_named(tmp_path):
    options = SMALL | {"verification": None, "bench_repeats": 0}
    assay("stories260k", ["w8"], out=tmp_path / "run", **options)
    part = tmp_path / "run" / "parts" / "window-0001.safetensors"
    part.write_bytes(part.read_bytes()[:-40])
    with pytest.raises(BitassayError, match="window-0001"):
        assay("stories260k", ["w8"], out=tmp_path / "run", **options)


def test_replicas_come_with_their_controls(tmp_path):
    options = SMALL | {"verification": None, "bench_repeats": 0}
    weights = {"format": "int2", "granularity": "g32", "scale": "absmax"}
    twice = Recipe(name="twice", weights=weights, replication={"coefficients": "mean"})
    once = Recipe(name="once", weights=weights)
    dense = Recipe(name="dense", weights=None, replication={"coefficients": "mean"})
    run, _ = assay("stories260k", [twice, once, dense], out=tmp_path / "run", **options)
    # A control that is a row already, or the base, is not measured again.
    assert [row["recipe"] for row in run["rows"]] == ["base", "twice", "twice-equal-flops", "once", "dense"]
    assert [(pair["group"], pair["role"], pair["control"]) for pair in run["pairs"]] == [
        ("twice", "single, equal-bits", "once"),
        ("twice", "equal-flops", "twice-equal-flops"),
        ("dense", "single, equal-bits", "base"),
    ]
    kl = {row["recipe"]: row["kl_mean"] for row in run["rows"]}
    for one in run["pairs"]:
        assert one["kl"] == pytest.approx(kl[one["group"]] - kl[one["control"]])
        assert one["beats"] in (None, one["kl"] < 0)
    write_report(run, tmp_path / "report.html")
    assert "Replicas less their controls" in (tmp_path / "report.html").read_text()
    rows = estimate_assay("stories260k", [twice], **options)
    assert rows[0]["work"].startswith("4 models")  # the base, the replica, once, and once at equal work
    run, _ = assay("stories260k", [twice], controls=False, out=tmp_path / "without", **options)
    assert [row["recipe"] for row in run["rows"]] == ["base", "twice"]
    assert run["pairs"] == []


def test_a_layer_at_a_time_gives_the_same_figures(finished, tmp_path, monkeypatch):
    plain = SMALL | {"bench_repeats": 0, "verification": None}
    seen, load_model = [], arithmetic.load

    def loading(*given, **named):
        seen.append(load_model(*given, **named))
        return seen[-1]

    monkeypatch.setattr(assay_module, "chosen_way", lambda *_: (OPENED, 10**9))
    monkeypatch.setattr(arithmetic, "load", loading)
    opened, _ = assay("stories260k", ["w8", "w2"], out=tmp_path / "opened", **plain)
    assert [is_opened(model) for model in seen] == [True]
    for one, other in zip(opened["rows"], finished[0]["rows"], strict=True):
        for key in ("bits_per_weight", "size_bytes", "ppl", "ppl_ci", "kl_mean", "top1_agreement"):
            assert one[key] == other[key]


@pytest.mark.parametrize(
    ("gigabytes", "plan", "match"),
    [
        (0.5, {}, "evaluating .* takes"),
        (0.6, {"bench_repeats": 0}, "verifying runs loaded models"),
        (0.6, {"verification": None}, "timing runs loaded models"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(tmp_path, monkeypatch, gigabytes, plan, match):
    monkeypatch.setattr(memory, "parameter_count", lambda _: 10**8)
    monkeypatch.setattr(memory, "memory_of", lambda *_: {LOADED: 10**9, OPENED: 580_000_000})
    monkeypatch.setattr(arithmetic, "load", None)
    with pytest.raises(BitassayError, match=match) as error:
        assay("stories260k", ["w8"], out=tmp_path / "out", memory=int(gigabytes * 1e9), **SMALL | plan)
    assert error.value.remedy.startswith("--memory")
    assert not (tmp_path / "out").exists()


def test_bad_plans_fail_before_any_work():
    w4 = find_recipe("w4")
    with pytest.raises(BitassayError, match="no recipe"):
        AssayPlan("stories260k", ())
    with pytest.raises(BitassayError, match="two rows"):
        AssayPlan("stories260k", (w4, w4))
    with pytest.raises(BitassayError, match="two rows"):
        AssayPlan("stories260k", (Recipe(name="base", weights=None),))


def test_estimates_grow_with_the_work():
    few = estimate_assay("stories260k", ["w8"], **SMALL)
    many = estimate_assay("stories260k", ["w8", "w4", "w2"], **SMALL)
    assert [row["step"] for row in few] == ["evaluate", "bench", "verify"]
    assert all(row["seconds"] > 0 and row["memory_bytes"] > 0 for row in few)
    assert many[0]["memory_bytes"] >= few[0]["memory_bytes"]  # of models this small, what the text takes
    assert many[1]["memory_bytes"] > few[1]["memory_bytes"]


def test_a_calibrated_recipe_is_estimated_too():
    gptq = Recipe(name="gptq", weights={"format": "int4", "granularity": "g32"}, gptq={})
    tuned = gptq.model_copy(update={"name": "tuned", "tune": Tune(steps=100)})
    rows = estimate_assay("stories260k", [gptq, tuned, "w4"], **SMALL)
    assert [row["step"] for row in rows][:3] == ["quantize gptq", "quantize tuned", "evaluate"]
    assert rows[1]["work"] == "gptq, tune; once"
    assert rows[1]["seconds"] > 2 * rows[0]["seconds"]


COMMAND = [sys.executable, "-m", "bitassay.cli", "assay", "stories260k", "--recipe", "w8", "--window", "64"]


def run_command(*arguments: str, windows: int = 3, **kwargs) -> subprocess.CompletedProcess:
    command = [*COMMAND, "--windows", str(windows), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


def test_json_is_the_only_thing_on_stdout(tmp_path, short_texts):
    words = ("--no-verify", "--no-bench", "--format", "json", "--out", str(tmp_path / "run"))
    done = run_command(*words, env=os.environ | {"BITASSAY_DATA": str(short_texts)})
    assert done.returncode == 0, done.stderr
    assert [row["recipe"] for row in json.loads(done.stdout)["rows"]] == ["base", "w8"]
    assert (tmp_path / "run" / "report.html").exists()
    assert "evaluating" in done.stderr


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(["assay", "stories260k", "--recipe", "w8", "--dry-run", "--format", "csv"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "step,work,memory_bytes,seconds"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_the_same_command_finishes(tmp_path):
    arguments = ["--no-verify", "--no-bench", "--format", "csv", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [*COMMAND, "--windows", "400", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    parts = tmp_path / "run" / "parts"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list(parts.glob("window-*.safetensors"))) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert "same command again" in stderr
    assert "Traceback" not in stderr
    kept = {path.name: path.stat().st_mtime_ns for path in parts.glob("window-*.safetensors")}
    assert 3 <= len(kept) < 400
    done = run_command(*arguments, windows=400)
    assert done.returncode == 0, done.stderr
    assert {name: (parts / name).stat().st_mtime_ns for name in kept} == kept
    assert len(done.stdout.splitlines()) == 3
    assert not [path for path in parts.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root"
)
def test_a_full_disk_is_a_clear_error_and_what_was_finished_stays():
    disk = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=28k", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        done = run_command("--no-verify", "--no-bench", "--out", str(disk / "run"), windows=50)
        assert done.returncode == 3, done.stderr
        assert "no space left" in done.stderr
        assert str(disk / "run") in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        left = [path.name for path in (disk / "run" / "parts").iterdir()]
        assert left
        assert all(name.startswith("window-") for name in left)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_where_the_folder_should_be(tmp_path, capsys):
    (tmp_path / "run").write_text("")
    assert command(["assay", "stories260k", "--recipe", "w8", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path / "run") in said
    assert "Traceback" not in said


def test_too_few_honest_runs_are_refused_before_the_work():
    with pytest.raises(BitassayError, match="10 honest runs are too few for alpha"):
        Verification(prompts=2, calibration_prompts=10, new_tokens=12)
    with pytest.raises(BitassayError, match="8 tokens have 7 generated positions"):
        Verification(new_tokens=8)


def test_runs_that_end_early_cost_the_verdict_not_the_run(tmp_path, monkeypatch, capsys):
    """How long a model answers shows only when it does. The exit status says that a part is missing."""

    def ended_early(*_, **__):
        raise BitassayError("3 honest runs with 8 or more generated positions are too few")

    monkeypatch.setattr("bitassay.studies.assay.honest_profile", ended_early)
    words = ["assay", "stories260k", "--recipe", "w8", "--windows", "2", "--window", "32", "--no-bench"]
    words += ["--prompts", "2", "--calibration-prompts", "38", "--alpha", "0.05", "--new-tokens", "12"]
    assert command([*words, "--out", str(tmp_path / "run"), "--format", "json"]) == 1
    run = json.loads(capsys.readouterr().out)
    assert [row["verdict"] for row in run["rows"]] == ["INCONCLUSIVE", "INCONCLUSIVE"]
    assert "too few" in run["verification"]["reason"]
    assert run["rows"][1]["kl_mean"] > 0
