"""The experiments. Workers run inside this process, which saves importing everything anew for each; one test
runs them as they are."""

import json
import shutil
from dataclasses import replace

import pytest

from bitassay.errors import BitassayError
from bitassay.record.files import read_json, write_json
from bitassay.studies.machines import Machine
from bitassay.studies.parties import Party
from bitassay.studies.verillm.experiments import EXPERIMENTS, directions, run_experiments
from bitassay.studies.verillm.verifier import read_statistics
from bitassay.studies.verillm.work import ExperimentPlan, Work
from bitassay.verification.detectors.verillm import DOCUMENTS, PAPER
from workers import in_process

CPU, OTHER = Machine("cpu"), Machine("cpu+avx2")
PLAN = ExperimentPlan(
    "stories260k", (CPU, OTHER), tokens=6, prompt_tokens=12, trials=2, verifiers=2, precision="bf16"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """exp2 and exp3, run once; tests must not change the folder."""
    out = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch)
        return run_experiments(["exp2", "exp3"], PLAN, out=out), out


def test_the_documents_files_are_there(finished):
    run, out = finished
    names = sorted(str(path.relative_to(out / "raw")) for path in (out / "raw").rglob("*.json"))
    assert names == sorted(
        f"{study}/stories260k_{direction}_{what}.json"
        for study, direction in [
            ("exp2", "cpu_to_cpu+avx2"),
            ("exp2", "cpu+avx2_to_cpu"),
            ("exp3", "quantized_cpu_to_fp_cpu"),
        ]
        for what in ("trial1", "trial2", "summary")
    )
    assert not any(":" in name for name in names)
    assert (run["missing"], len(run["rows"])) == ([], 3)


def test_the_documents_fields_hold_what_the_trials_say(finished):
    _, out = finished
    trials = [read_json(path) for path in sorted((out / "raw" / "exp3").glob("*trial*.json"))]
    found = read_json(next((out / "raw" / "exp3").glob("*summary.json")))
    aggregate = found["aggregate"]
    assert aggregate["avg_accept_rate"] == pytest.approx(sum(t["accept_rate"] for t in trials) / 2)
    assert aggregate["pass_rate"] == sum(t["passed"] for t in trials) / 2
    for trial in trials:
        for verdict in trial["verifiers"]:
            share = 100 * verdict["verification_seconds"] / trial["generation_seconds"]
            assert verdict["overhead_percentage"] == pytest.approx(share)
            assert [layer["layer"] for layer in verdict["layers"]] == [5]
    assert found["summary"]["expected_accept_rate"] == [0.8, 0.85]
    assert found["hardware"].startswith("the same machine")
    assert aggregate["different_verifiers"] == 2


def test_verifiers_that_agree_to_the_last_bit_are_one(tmp_path, started):
    """The third verifier on a CPU has one thread, as all have in this process."""
    run = run_experiments(["exp1"], replace(PLAN, verifiers=3, trials=1, attacks=()), out=tmp_path)
    assert (run["rows"][0]["verifiers"], run["rows"][0]["different_verifiers"]) == (3, 2)


def test_int4_accepts_fewer_cells_than_full_precision_and_lies_farther(finished):
    run, _ = finished
    detection = run["rows"][2]["detection"]
    assert set(detection) == {"bf16", "w8", "w4"}
    assert detection["w4"]["avg_accept_rate"] <= detection["bf16"]["avg_accept_rate"]
    assert min(detection["w4"]["relative_distances"]) > 3 * max(detection["bf16"]["relative_distances"])


def test_the_judged_numbers_come_from_the_cells(finished):
    """The accept rate of a trial, counted again from the numbers in the file of its cells."""
    _, out = finished
    trial = read_json(out / "raw" / "exp2" / "stories260k_cpu_to_cpu+avx2_trial1.json")
    [file] = out.glob("work/*/cells/bf16_cpu_to_bf16_cpu+avx2/trial1.safetensors")
    cells = read_statistics(file)
    assert cells.n_prompt == 12
    found = cells.statistics
    holds = (
        (found.Pe < 0.05)
        & ((found.Pm > 0.75) | found.Pm.isnan())
        & (found.Pw > 0.5)
        & (found.mean_epsilon.abs() < 0.01)
        & ~found.refused
    )
    verdict = trial["verifiers"][0]
    assert verdict["accept_rate"] == pytest.approx(float(holds[:, 12:].double().mean()))
    assert verdict["prompt_accept_rate"] == pytest.approx(float(holds[:, :12].double().mean()))
    assert verdict["numerics"]["attention"] == "sdpa"
    assert trial["verifiers"][1]["numerics"]["attention"] == "eager"


def test_the_same_again_computes_nothing(finished, tmp_path, started):
    _, out = finished
    shutil.copytree(out, tmp_path / "data")
    again = run_experiments(["exp2", "exp3"], PLAN, out=tmp_path / "data")
    assert started == []
    assert again["rows"] == finished[0]["rows"]


def test_what_is_missing_is_computed_and_nothing_else(finished, tmp_path, started):
    _, out = finished
    shutil.copytree(out, tmp_path / "data")
    next((tmp_path / "data").glob("work/*/cells/w4_cpu_*_to_bf16_cpu/trial2.safetensors")).unlink()
    run_experiments(["exp2", "exp3"], PLAN, out=tmp_path / "data")
    assert started == ["verifier: bf16 on cpu"]


def test_more_trials_keep_what_there_is(finished, tmp_path, started):
    _, out = finished
    shutil.copytree(out, tmp_path / "data")
    before = next((tmp_path / "data").glob("work/*/traces/bf16_cpu/trial1.trace"))
    stamp = before.stat().st_mtime_ns
    run_experiments(["exp3"], replace(PLAN, trials=3), out=tmp_path / "data")
    assert before.stat().st_mtime_ns == stamp
    assert (tmp_path / "data/raw/exp3/stories260k_quantized_cpu_to_fp_cpu_trial3.json").exists()


def test_one_computer_proves_and_another_verifies(tmp_path, started):
    plan = replace(PLAN, attacks=("w4",), trials=1, verifiers=1)
    first = run_experiments(["exp2"], replace(plan, role="prove", here=(CPU,)), out=tmp_path / "a")
    assert first["rows"] == []
    assert [one["missing"] for one in first["missing"]] == [
        "bf16 on cpu+avx2 verifying bf16 on cpu",
        "traces of bf16 on cpu+avx2",
    ]
    assert {name.partition(":")[0] for name in started} == {"prover"}
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    second = run_experiments(["exp2"], replace(plan, role="verify", here=(OTHER,)), out=tmp_path / "b")
    assert [(row["prover"], row["verifier"]) for row in second["rows"]] == [
        ("bf16 on cpu", "bf16 on cpu+avx2")
    ]
    assert [one["missing"] for one in second["missing"]] == ["traces of bf16 on cpu+avx2"]


def test_a_trace_of_another_request_is_refused(tmp_path, started):
    plan = replace(PLAN, attacks=("w4",), verifiers=1)
    run_experiments(["exp1"], replace(plan, role="prove"), out=tmp_path)
    one, two = (next(tmp_path.glob(f"work/*/traces/bf16_cpu/trial{index}.trace")) for index in (1, 2))
    shutil.copy(two, one)
    with pytest.raises(BitassayError, match=r"trial1\.trace: the prompt tokens are not those"):
        run_experiments(["exp1"], replace(plan, role="verify"), out=tmp_path)


def test_a_truncated_trace_is_named(tmp_path, started):
    plan = replace(PLAN, attacks=("w4",), verifiers=1, trials=1)
    run_experiments(["exp1"], replace(plan, role="prove"), out=tmp_path)
    trace = next(tmp_path.glob("work/*/traces/bf16_cpu/trial1.trace"))
    trace.write_bytes(trace.read_bytes()[:-100])
    with pytest.raises(BitassayError, match=r"trial1\.trace"):
        run_experiments(["exp1"], replace(plan, role="verify"), out=tmp_path)


def test_damaged_cells_are_named(finished, tmp_path, started):
    _, out = finished
    shutil.copytree(out, tmp_path / "data")
    file = next((tmp_path / "data").glob("work/*/cells/bf16_cpu_to_bf16_cpu/trial1.safetensors"))
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(BitassayError, match=r"trial1\.safetensors: damaged"):
        run_experiments(["exp3"], PLAN, out=tmp_path / "data")


def test_damaged_timings_are_named(finished, tmp_path, started):
    """They may come from another computer: a time of nothing would be divided by."""
    _, out = finished
    shutil.copytree(out, tmp_path / "data")
    file = next((tmp_path / "data").glob("work/*/traces/bf16_cpu/trial1.json"))
    write_json(file, {**read_json(file), "seconds": 0})
    with pytest.raises(BitassayError, match=r"trial1\.json: damaged .*greater than 0"):
        run_experiments(["exp2"], PLAN, out=tmp_path / "data")


def test_an_error_in_a_worker_says_who_and_what(tmp_path, started):
    plan = replace(PLAN, quantized=str(tmp_path / "nothing"), attacks=())
    (tmp_path / "nothing").mkdir()
    with pytest.raises(BitassayError, match=r"nothing"):
        run_experiments(["exp3"], plan, out=tmp_path / "data")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trials": 0}, "--trials is 0"),
        ({"tokens": 1}, "--tokens is 1"),
        ({"verifiers": 0}, "--verifiers is 0"),
        ({"precision": "fp8"}, "no precision of the dense model"),
        ({"quantized": "w44"}, "neither a recipe nor a checkpoint"),
        ({"attacks": ("int4",)}, "neither a recipe nor a checkpoint"),
        ({"role": "watch"}, "no role"),
        ({"jobs": 0}, "--jobs is 0"),
        ({"rules": replace(DOCUMENTS, e_w=0.3)}, "e_w 0.3; cells are kept with"),
        ({"trials": 10_000}, "at most 256 trials"),
    ],
)
def test_a_plan_that_means_nothing(change, said, tmp_path, started):
    with pytest.raises(BitassayError, match=said):
        run_experiments(["exp1"], replace(PLAN, **change), out=tmp_path)
    assert started == []


def test_an_unknown_experiment(tmp_path):
    with pytest.raises(BitassayError, match="no experiment is called 'exp6'"):
        run_experiments(["exp6"], PLAN, out=tmp_path)


def test_directions_are_those_of_the_documents():
    """Table of the experiments: who proves, who verifies, on which machines."""
    found = {
        name: [
            (d.prover.name, d.verifiers[0].name, d.label)
            for d in directions(name, replace(PLAN, precision="fp16"))
        ]
        for name in EXPERIMENTS
    }
    assert found == {
        "exp1": [("fp16 on cpu", "fp16 on cpu", "cpu_to_cpu")],
        "exp2": [
            ("fp16 on cpu", "fp16 on cpu+avx2", "cpu_to_cpu+avx2"),
            ("fp16 on cpu+avx2", "fp16 on cpu", "cpu+avx2_to_cpu"),
        ],
        "exp3": [("w4 on cpu", "fp16 on cpu", "quantized_cpu_to_fp_cpu")],
        "exp4": [
            ("w4 on cpu", "fp16 on cpu+avx2", "quantized_cpu_to_fp_cpu+avx2"),
            ("w4 on cpu+avx2", "fp16 on cpu", "quantized_cpu+avx2_to_fp_cpu"),
        ],
        "exp5": [("fp16 on cpu", "w4 on cpu", "fp_cpu_to_quantized_cpu")],
    }
    assert [
        d.label for d in directions("exp2", replace(PLAN, machines=(Machine("cuda:0"), Machine("mps"))))
    ] == [
        "cuda0_to_mps",
        "mps_to_cuda0",
    ]


def test_other_rules_and_bar_change_the_verdict_only(finished, tmp_path, started):
    _, out = finished
    shutil.copytree(out, tmp_path / "data")
    strict = run_experiments(
        ["exp3"], replace(PLAN, rules=PAPER, accept_rate_min=1.0), out=tmp_path / "data"
    )["rows"][0]
    lax = run_experiments(["exp3"], replace(PLAN, accept_rate_min=-1.0), out=tmp_path / "data")["rows"][0]
    assert started == []
    assert (strict["rules"], lax["rules"]) == ("paper", "documents")
    assert set(strict["refused"].values()) == {"2/2"}
    assert set(lax["refused"].values()) == {"0/2"}


@pytest.mark.slow
def test_real_processes_have_their_machines_numerics(tmp_path):
    """One prover and one verifier as they are, each in a process with numerics of its own."""
    plan = replace(
        PLAN, trials=1, verifiers=1, attacks=(), machines=(CPU, Machine("cpu+default+eager+1thread"))
    )
    ours = Work(plan, tmp_path, lambda *_: None)
    prover, verifier = Party("bf16", plan.machines[0]), Party("bf16", plan.machines[1])
    ours.do([(prover, verifier)])
    [[cells]] = ours.statistics(prover, [verifier])
    assert cells.verifier["cpu_capability"] == "DEFAULT"
    assert (cells.verifier["attention"], cells.verifier["threads"]) == ("eager", 1)
    assert json.loads(next(tmp_path.glob("work/*/traces/*/trial1.json")).read_text())["output_tokens"] == 6
