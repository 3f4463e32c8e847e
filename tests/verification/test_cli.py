"""`bitassay prove`, `calibrate` and `verify` at the command line, with the tiny trained model."""

import inspect
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bitassay.cli import run
from bitassay.cli.calibrate import calibrate as calibrate_command
from bitassay.engines.sampling import seed_of
from bitassay.verification.calibrate import calibrate
from bitassay.verification.pooled import pooled_verdict
from bitassay.verification.profile import read_profile, write_profile
from bitassay.verification.sequential import alarm_at
from bitassay.verification.trace import Trace, read_trace, write_trace

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


def test_a_spot_check_says_what_it_looked_at(folder, traces, profile, capsys):
    common = ["--model", MODEL, "--profile", str(profile)]
    found = objects(capsys, ["verify", str(traces), *common, "--segments", "1"], 0)
    assert [row["status"] for row in found["rows"]] == ["PASS"] * 4
    assert all(row["segments"] and row["mean_margin"] is None for row in found["rows"])
    assert objects(capsys, ["verify", str(traces), *common], 0)["rows"][0]["segments"] is None
    assert run(["verify", str(traces), *common, "--segments", "1", "--ledger", str(folder / "spot")]) == 2
    assert "--segments with --ledger" in capsys.readouterr().err
    assert not (folder / "spot").exists()


def test_the_sequence_of_requests_is_judged_and_kept(folder, traces, profile, capsys):
    kept, common = folder / "host.ledger", ["--model", MODEL, "--profile", str(profile)]
    found = objects(capsys, ["verify", str(traces), *common], 0)["sequential"]
    assert (found["n_requests"], found["alarm_at"]) == (4, None)
    assert found["alpha"] == pytest.approx(0.05 * 3 / 8), "the share of this test"
    for _ in range(2):
        assert run(["verify", str(traces), *common, "--ledger", str(kept)]) == 0
        said = capsys.readouterr().err
        assert "in sequence   no alarm of 4; anytime p" in said
        assert "decision: PASS because set p" in said
    cheap, claim = folder / "many-cheap", ["--recipe", "w2", "--claim", MODEL, "--max-new-tokens", "24"]
    (folder / "others.txt").write_text("".join(f"Once upon a time {name} had a\n" for name in "efgh"))
    prompts = ["--prompts", str(folder / "others.txt"), "--nonce", "cheap"]
    assert run(["prove", MODEL, *prompts, "--out", str(cheap), *claim]) == 0
    found = objects(capsys, ["verify", str(cheap), *common, "--ledger", str(kept)], 1)["sequential"]
    assert found["n_requests"] == 8
    assert 4 < found["alarm_at"] <= 8
    assert found["p_value"] == pytest.approx(math.exp(-max(found["log_wealth"], 0)), rel=0.5)
    found = objects(capsys, ["verify", str(traces), *common, "--ledger", str(kept)], 1)
    assert [row["status"] for row in found["rows"]] == ["PASS"] * 4
    assert found["sequential"]["alarm_at"], "an alarm stays"
    assert found["decision"]["status"] == "FAIL"
    assert run(["verify", str(traces), "--model", MODEL, "--ledger", str(folder / "new.ledger")]) == 1
    assert "no trace could be scored" in capsys.readouterr().err
    assert run(["verify", str(traces), *common, "--ledger", str(folder / "prompts.txt")]) == 2
    assert "not a ledger" in capsys.readouterr().err


def test_a_folder_of_copies_counts_as_one_request(folder, traces, profile, capsys):
    """Twelve copies under other names made the ledger of an honest host give an alarm."""
    copies, common = folder / "copies", ["--model", MODEL, "--profile", str(profile)]
    copies.mkdir()
    one = read_trace(traces / "00000.trace")
    for index in range(12):
        model = one.header.model.model_copy(update={"name": f"name {index}"})
        header = one.header.model_copy(update={"model": model})
        write_trace(copies / f"{index:02d}.trace", replace(one, header=header))
    found = objects(capsys, ["verify", str(copies), *common, "--ledger", str(folder / "copies.ledger")], 0)
    assert found["sequential"]["n_requests"] == found["pooled"]["n_pooled"] == 1
    assert not any("copy of" in note for note in found["rows"][0]["notes"])
    assert all("copy of" in row["notes"][0] for row in found["rows"][1:])
    again = objects(capsys, ["verify", str(copies), *common, "--ledger", str(folder / "copies.ledger")], 0)
    assert again["sequential"] == found["sequential"]
    assert "copy of" in again["rows"][1]["notes"][0]


def test_requests_without_an_answer_count(folder, traces, profile, capsys):
    asked, kept = folder / "asked.txt", folder / "unanswered.ledger"
    asked.write_text("".join(f"Once upon a time {name} had a\n" for name in "abcdefghijkl"))
    common = ["--model", MODEL, "--profile", str(profile), "--max-new-tokens", "24", "--ledger", str(kept)]
    named = ["--prompts", str(asked), "--nonce", "0", "--sampler", "greedy"]
    for _ in range(2):
        found = objects(capsys, ["verify", str(traces), *common, *named], 1)
        assert found["undecided"]["n_requests"] == 12, "4 answered, 8 not, and each once"
        assert found["undecided"]["alarm_at"]
        assert found["decision"]["status"] == "FAIL"
        assert "too-many-undecided p" in found["decision"]["why"]
        assert [row["status"] for row in found["rows"]] == ["PASS"] * 4
    (folder / "nothing").mkdir()
    nothing = ["verify", str(folder / "nothing"), *common[:4], "--unanswered"]
    assert objects(capsys, [*nothing, "3"], 1)["decision"]["status"] == "INCONCLUSIVE"
    assert objects(capsys, [*nothing, "6"], 1)["decision"]["status"] == "FAIL"
    generous = [*nothing, "6", "--inconclusive-budget", "0.9"]
    assert objects(capsys, generous, 1)["decision"]["status"] == "INCONCLUSIVE"
    assert run(["verify", str(traces), *common, "--inconclusive-budget", "0.2"]) == 2
    assert "a budget of 0.1" in capsys.readouterr().err


def test_a_host_that_hides_behind_other_numerics_is_refused(folder, traces, profile, capsys):
    """Also where the profile is found by itself, once the ledger is bound to it."""
    hidden, kept = folder / "hidden", folder / "hidden.ledger"
    hidden.mkdir()
    for index in range(8):
        one = read_trace(traces / f"{index % 4:05d}.trace")
        numerics = one.header.numerics.model_copy(update={"threads": 3})
        ids = (*one.header.prompt_ids, 5 + index)
        positions = tuple(range(len(ids) + one.n_tokens - 1))
        header = one.header.model_copy(
            update={"numerics": numerics, "nonce": f"h{index}", "prompt_ids": ids, "positions": positions}
        )
        states = {layer: torch.cat([rows, rows[-1:]]) for layer, rows in one.states.items()}
        write_trace(hidden / f"{index}.trace", Trace(header, states))
    found = objects(capsys, ["verify", str(hidden), "--model", MODEL, "--profile", str(profile)], 1)
    assert {row["reasons"][0]["code"] for row in found["rows"]} == {"profile-other-numerics"}
    assert found["decision"]["status"] == "FAIL"
    assert found["undecided"]["alarm_at"]
    found_by_itself = write_profile(read_profile(profile))
    common = ["--model", MODEL, "--ledger", str(kept)]
    assert objects(capsys, ["verify", str(traces), *common], 0)["undecided"]["n_requests"] == 4
    found = objects(capsys, ["verify", str(hidden), *common], 1)
    assert {row["reasons"][0]["code"] for row in found["rows"]} == {"no-profile"}
    assert found["undecided"]["n_requests"] == 12
    assert found["decision"]["status"] == "FAIL"
    found_by_itself.unlink()


def test_what_sampler_was_asked_for_is_checked(folder, traces, profile, capsys):
    one, common = folder / "sampled.trace", ["--model", MODEL, "--profile", str(profile)]
    hot = ["--temperature", "1", "--max-new-tokens", "12"]
    prove = ["prove", MODEL, "--prompt", "Once", "--nonce", "n1", "--out", str(one), *hot]
    assert run([*prove, "--seed", "nonce"]) == 0
    assert read_trace(one).header.sampling.seed == seed_of("n1")

    def codes(trace, *asked):
        (row,) = objects(capsys, ["verify", str(trace), *common, *asked], 1)["rows"]
        return {reason["code"] for reason in row["reasons"]}

    asked = ["--temperature", "1", "--nonce", "n1"]
    assert "other-sampler" not in codes(one, *asked, "--seed", "nonce", "--sampler", "gumbel-max")
    assert "other-sampler" in codes(one, *asked), "the default seed is 0"
    assert "other-sampler" in codes(one, *asked, "--seed", "nonce", "--top-p", "0.5")
    assert "other-sampler" in codes(one, "--sampler", "greedy")
    greedy = traces / "00000.trace"
    assert "other-sampler" in codes(greedy, "--temperature", "1")
    assert (
        objects(capsys, ["verify", str(greedy), *common, "--sampler", "greedy"], 0)["rows"][0]["notes"] == []
    )
    row = objects(capsys, ["verify", str(greedy), *common], 0)["rows"][0]
    assert row["notes"] == ["sampler not checked (greedy)"]
    assert "other-sampler" in codes(one, *asked[:2], "--seed", "nonce", "--nonce", "n2")
    for wrong, said in (
        (["--seed", "nonce", "--temperature", "1"], "needs the nonce"),
        (["--sampler", "gumbel-max"], "is a contradiction"),
        (["--seed", "today"], "neither a number nor"),
        (["--seed", "-1"], "between 0 and"),
    ):
        assert run(["verify", str(greedy), *common, *wrong]) == 2
        assert said in capsys.readouterr().err
    prompts = ["--prompts", str(folder / "prompts.txt"), "--nonce", "s", *hot, "--seed", "nonce"]
    assert run(["prove", MODEL, *prompts, "--out", str(folder / "sampled")]) == 0
    assert run(["prove", MODEL, *prompts[:-1], "0", "--out", str(folder / "sampled")]) == 2
    assert "another run" in capsys.readouterr().err
    found = objects(capsys, ["verify", str(folder / "sampled"), *common, *prompts], 1)["rows"]
    assert len(found) == 4
    assert not any(reason["code"] == "other-sampler" for row in found for reason in row["reasons"])


def test_suspects_are_shown_stored_and_named(folder, profile, capsys, monkeypatch):
    path, cheap = folder / "suspects.json", folder / "int4.trace"
    words = ["calibrate", MODEL, "--prompts", str(folder / "many.txt"), *AVERAGE, "--out", str(path)]
    suspects = ["--suspects", "int4", "kv4", "--suspect-runs", "16", "--max-new-tokens", "12"]
    found = objects(capsys, [*words, *suspects], 0)
    with monkeypatch.context() as patched:  # which is the same profile again
        made = read_profile(path)
        patched.setattr("bitassay.verification.calibrate.calibrate", lambda *_, **__: made)
        assert run([*words, *suspects]) == 0
    table = capsys.readouterr().out
    assert "held-out runs of" in table
    assert "none of these" in table
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
    assert run(["calibrate", MODEL, "--study", "exp1", "--key", str(folder / "k.pem")]) == 2
    assert "--study makes none" in capsys.readouterr().err
    assert run(["verify", str(folder), "--model", MODEL, "--profile-signer", "00" * 32]) == 2
    assert "belongs to a file" in capsys.readouterr().err


def test_these_verbs_import_no_torch():
    verbs = "bitassay.cli.prove, bitassay.cli.verify, bitassay.cli.calibrate"
    code = f"import {verbs}, sys; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    )
