"""`bitassay prove`, `calibrate` and `verify` at the command line, with the tiny trained model."""

import inspect
import json
import math
import subprocess
import sys

import pytest

from bitassay.cli import run
from bitassay.cli.calibrate import calibrate as calibrate_command
from bitassay.verification.calibrate import calibrate
from bitassay.verification.pooled import pooled_verdict
from bitassay.verification.sequential import alarm_at
from bitassay.verification.trace import read_trace

MODEL = "stories260k"
AVERAGE = ["--alpha", "0.05", "--guarantee", "average"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, many_prompts):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "prompts.txt").write_text("".join(f"Once upon a time {name} had a\n" for name in "abcd"))
    (folder / "many.txt").write_text("\n".join(many_prompts))
    return folder


@pytest.fixture(scope="module")
def profile(folder):
    path = folder / "profile.json"
    assert run(["calibrate", MODEL, "--prompts", str(folder / "many.txt"), *AVERAGE, "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def traces(folder):
    out = folder / "traces"
    arguments = [
        "prove",
        MODEL,
        "--prompts",
        str(folder / "prompts.txt"),
        "--out",
        str(out),
        "--max-new-tokens",
        "24",
    ]
    assert run(arguments) == 0
    return out


def objects(capsys, arguments, status):
    capsys.readouterr()
    assert run([*arguments, "--format", "json"]) == status
    return json.loads(capsys.readouterr().out)


def test_honest_folder_passes_and_another_model_fails(folder, traces, profile, capsys):
    common = ["--model", MODEL, "--profile", str(profile)]
    asked = ["--prompts", str(folder / "prompts.txt"), "--nonce", "0", "--max-new-tokens", "24"]
    found = objects(capsys, ["verify", str(traces), *common, *asked], 0)
    assert [row["status"] for row in found["rows"]] == ["PASS"] * 4
    assert found["pooled"]["status"] == "PASS"
    cheap = folder / "cheap.trace"
    claim = ["--recipe", "w2", "--claim", MODEL, "--max-new-tokens", "24"]
    assert run(["prove", MODEL, "--prompt", "Once upon a time", "--out", str(cheap), *claim]) == 0
    found = objects(capsys, ["verify", str(cheap), *common], 1)
    assert found["rows"][0]["status"] == "FAIL"
    assert found["rows"][0]["p_value"] < 0.05


def test_the_sequence_of_requests_is_judged_and_kept(folder, traces, profile, capsys):
    kept, common = folder / "host.ledger", ["--model", MODEL, "--profile", str(profile)]
    found = objects(capsys, ["verify", str(traces), *common], 0)["sequential"]
    assert (found["n_requests"], found["alarm_at"], found["alpha"]) == (4, None, 0.05)
    for _ in range(2):
        assert run(["verify", str(traces), *common, "--ledger", str(kept)]) == 0
        assert "no alarm of 4; anytime p" in capsys.readouterr().err
    cheap, claim = folder / "many-cheap", ["--recipe", "w2", "--claim", MODEL, "--max-new-tokens", "24"]
    prompts = ["--prompts", str(folder / "prompts.txt"), "--nonce", "cheap"]
    assert run(["prove", MODEL, *prompts, "--out", str(cheap), *claim]) == 0
    found = objects(capsys, ["verify", str(cheap), *common, "--ledger", str(kept)], 1)["sequential"]
    assert found["n_requests"] == 8
    assert 4 < found["alarm_at"] <= 8
    assert found["p_value"] == pytest.approx(math.exp(-max(found["log_wealth"], 0)), rel=0.5)
    found = objects(capsys, ["verify", str(traces), *common, "--ledger", str(kept)], 1)
    assert [row["status"] for row in found["rows"]] == ["PASS"] * 4
    assert found["sequential"]["alarm_at"], "an alarm stays"
    assert run(["verify", str(traces), "--model", MODEL, "--ledger", str(folder / "new.ledger")]) == 1
    assert "no trace could be scored" in capsys.readouterr().err
    assert run(["verify", str(traces), *common, "--ledger", str(folder / "prompts.txt")]) == 2
    assert "not a ledger" in capsys.readouterr().err


def test_suspects_are_shown_stored_and_named(folder, profile, capsys):
    path, cheap = folder / "suspects.json", folder / "int4.trace"
    words = ["calibrate", MODEL, "--prompts", str(folder / "many.txt"), *AVERAGE, "--out", str(path)]
    suspects = ["--suspects", "int4", "kv4", "--suspect-runs", "16", "--max-new-tokens", "12"]
    capsys.readouterr()
    assert run([*words, *suspects]) == 0
    table = capsys.readouterr().out
    assert "held-out runs of" in table
    assert "none of these" in table
    found = objects(capsys, [*words, *suspects], 0)
    assert found["rows"][0]["alpha"] == 0.05
    assert [row["kind"] for row in found["confusion"]] == ["honest", "int4", "kv4"]
    assert sum(found["confusion"][1][kind] for kind in ("honest", "int4", "kv4", "none of these")) == 8
    claim = ["--recipe", "w4", "--claim", MODEL, "--max-new-tokens", "12", "--out", str(cheap)]
    assert run(["prove", MODEL, "--prompt", "the big cat", *claim]) == 0
    verify = ["verify", str(cheap), "--model", MODEL, "--profile"]
    row = objects(capsys, [*verify, str(path)], 1)["rows"][0]
    assert row["attribution"]["best"] == "int4"
    assert set(row["attribution"]["posterior"]) == {"honest", "int4", "kv4"}
    assert run([*verify, str(path)]) == 1
    assert "int4 (1.00)" in capsys.readouterr().out
    assert objects(capsys, [*verify, str(profile)], 1)["rows"][0]["attribution"] is None
    assert run([*words, "--suspects", "int9"]) == 2
    assert "no such attack; the nearest are 'int" in capsys.readouterr().err


def test_the_command_line_has_the_defaults_of_the_library(capsys):
    command = inspect.signature(calibrate_command).parameters
    function = inspect.signature(calibrate).parameters
    for name in ("suspect_runs", "max_new_tokens", "expires_days", "guarantee"):
        assert command[name].default == function[name].default
    assert run(["calibrate", MODEL, "--prompts", "5"]) == 2
    assert f"too few for alpha {function['alpha'].default}," in capsys.readouterr().err
    assert inspect.signature(pooled_verdict).parameters["alpha"].default == function["alpha"].default
    assert inspect.signature(alarm_at).parameters["alpha"].default == function["alpha"].default


def test_a_quantized_model_that_says_so_is_verified_as_such(folder, capsys):
    out = folder / "open.trace"
    assert (
        run(
            [
                "prove",
                MODEL,
                "--recipe",
                "w4",
                "--prompt",
                "Once",
                "--out",
                str(out),
                "--max-new-tokens",
                "12",
            ]
        )
        == 0
    )
    assert (
        objects(capsys, ["verify", str(out), "--model", MODEL], 1)["rows"][0]["reasons"][0]["code"]
        == "other-recipe"
    )
    row = objects(capsys, ["verify", str(out), "--model", MODEL, "--recipe", "w4"], 1)["rows"][0]
    assert [reason["code"] for reason in row["reasons"]] == ["no-profile"]


def test_prove_keeps_finished_traces_and_makes_damaged_ones_again(folder, traces, capsys):
    kept, damaged = traces / "00000.trace", traces / "00001.trace"
    before = kept.stat().st_mtime_ns
    damaged.write_bytes(damaged.read_bytes()[:-5])
    arguments = [
        "prove",
        MODEL,
        "--prompts",
        str(folder / "prompts.txt"),
        "--out",
        str(traces),
        "--max-new-tokens",
        "24",
    ]
    rows = objects(capsys, arguments, 0)["rows"]
    assert kept.stat().st_mtime_ns == before
    assert read_trace(damaged).n_tokens == rows[1]["output_tokens"]
    assert run([*arguments, "--recipe", "w4", "--claim", MODEL]) == 2
    assert "another run" in capsys.readouterr().err


def test_defects_are_rows_and_missing_files_are_usage_errors(folder, traces, profile, capsys):
    broken = folder / "broken.trace"
    broken.write_bytes(b"\0" * 20)
    found = objects(
        capsys,
        ["verify", str(broken), str(traces / "00000.trace"), "--model", MODEL, "--profile", str(profile)],
        1,
    )
    assert [row["status"] for row in found["rows"]] == ["FAIL", "PASS"]
    assert run(["verify", str(folder / "none.trace"), "--model", MODEL]) == 2
    assert "no trace there" in capsys.readouterr().err
    assert run(["verify", str(traces), "--model", MODEL, "--profile", str(broken)]) == 2


def test_tables_and_csv(traces, profile, capsys):
    capsys.readouterr()
    assert run(["verify", str(traces), "--model", MODEL, "--profile", str(profile), "--format", "csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("trace,status,p_value")
    assert len(lines) == 5
    assert run(["verify", str(traces), "--model", MODEL]) == 1
    assert "INCONCLUSIVE" in capsys.readouterr().out


def test_usage_errors(folder, capsys):
    assert run(["prove", MODEL, "--out", str(folder / "x")]) == 2
    assert "--prompt" in capsys.readouterr().err
    assert run(["calibrate", MODEL, "--prompts", "20", "--alpha", "0.01"]) == 2
    assert "needs 501" in capsys.readouterr().err
    assert run(["calibrate", MODEL, "--prompts", "20", "--alpha", "0.01", "--guarantee", "average"]) == 2
    assert "needs 167" in capsys.readouterr().err
    assert run(["calibrate", MODEL, "--guarantee", "none"]) == 2
    assert run(["calibrate", MODEL, "--prompts", "9000"]) == 2


def test_these_verbs_import_no_torch():
    verbs = "bitassay.cli.prove, bitassay.cli.verify, bitassay.cli.calibrate"
    code = f"import {verbs}, sys; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    )
