"""Numerics are tried before they are used; what cannot be computed here is left out by name, or replaced."""

import json
import os
import sys

import pytest

from bitassay.errors import MissingError
from bitassay.report.pages import write_report
from bitassay.studies import machines, probe
from bitassay.studies.attacks.study import VARIANTS, AttackPlan, attack, runnable
from bitassay.studies.machines import LeftOut, Machine, first_that_runs, other_machines, probe_here
from bitassay.studies.verillm.experiments import planned, run_experiments
from bitassay.studies.verillm.work import ExperimentPlan, make_plan
from bitassay.verification.scores import runs_needed

PACKING = "pack_vnni2 is only supported when avx512 is supported"
CPU, AVX2 = Machine("cpu"), Machine("cpu+avx2")
really = pytest.mark.usefixtures("really_tried")


def amx(machine, dtype):
    """What a CPU with AMX says: fused attention in 16 bits needs AVX-512 there."""
    lost = {"avx2", "default"} & {*machine.options} and machine.attention != "eager"
    return PACKING if lost and dtype in ("bfloat16", "float16") else ""


def broken(*lost):
    """Machines with any of these options, or of that name, cannot compute."""
    return lambda machine, dtype: "broken" if {machine.name, *machine.options} & {*lost} else ""


@pytest.fixture
def avx512(monkeypatch):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")


@really
def test_this_machine_computes():
    for dtype in ("float32", "bfloat16"):
        assert machines.probe_machine(CPU, dtype) == ""


@really
def test_a_process_of_its_own_is_told_its_instructions(monkeypatch):
    """The real path of vector instructions: a process that says what it was told, as an error does."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setattr(machines, "PROBE", "workers:says_its_instructions")
    machines._probe_in_process.cache_clear()
    assert machines.probe_machine(Machine("cpu+avx2+eager"), "bfloat16") == "avx2 cpu bfloat16 eager"
    monkeypatch.setattr(machines, "PROBE", "workers:dies")
    machines._probe_in_process.cache_clear()
    assert machines.probe_machine(AVX2, "bfloat16") == "cpu+avx2: its process was killed by signal 9"
    machines._probe_in_process.cache_clear()


@really
def test_what_torch_raises_is_the_reason_in_one_line(monkeypatch):
    def packing(*_, **__):
        raise RuntimeError(PACKING + "\nException raised from pack at somewhere.cpp:1")

    monkeypatch.setattr(probe.F, "scaled_dot_product_attention", packing)
    assert probe_here(CPU, "bfloat16") == PACKING
    assert probe_here(Machine("cpu+eager"), "bfloat16") == ""


@really
def test_results_that_are_not_finite_are_a_reason(monkeypatch):
    monkeypatch.setattr(probe.F, "scaled_dot_product_attention", lambda q, k, v, **_: q / 0)
    assert probe_here(CPU, "float32") == "its results are not finite"


def test_the_first_that_runs_stands_in_for_those_before_it():
    found, failed = first_that_runs([AVX2, Machine("cpu+avx2+eager"), CPU], "bfloat16", amx)
    assert found == Machine("cpu+avx2+eager")
    assert failed == (LeftOut("cpu+avx2", PACKING, "cpu+avx2+eager"),)
    found, failed = first_that_runs([AVX2, CPU], "bfloat16", broken("cpu", "avx2"))
    assert (found, [one.instead for one in failed]) == (None, [None, None])


@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT", "SVE256"])
def test_other_numerics_are_never_the_first(monkeypatch, capability):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    for first in (CPU, Machine("cpu+eager")):
        others = other_machines(first)
        assert first not in others
        assert others or first.attention == "eager"


def test_defaults_take_what_runs(avx512):
    assert [m.name for m in make_plan("m", [], probe=broken()).machines] == ["cpu", "cpu+avx2"]
    plan = make_plan("m", [], probe=amx)
    assert [m.name for m in plan.machines] == ["cpu", "cpu+avx2+eager"]
    assert plan.left_out == (LeftOut("cpu+avx2", PACKING, "cpu+avx2+eager"),)


def test_a_verifier_that_cannot_run_is_left_out_by_name(avx512):
    """Verifiers of cpu+avx2 differ in attention, too; those with sdpa cannot run."""
    plan = ExperimentPlan("m", (CPU, AVX2), verifiers=4)
    plan, wanted, impossible = planned(["exp1", "exp2"], plan, amx)
    assert {one.numerics for one in plan.left_out} == {"cpu+avx2", "cpu+avx2+1thread"}
    assert [one.label for one in wanted] == ["cpu_to_cpu", "cpu_to_cpu+avx2"]
    assert {party.machine.attention for party in wanted[1].verifiers} == {"eager"}
    assert [one["direction"] for one in impossible] == ["cpu+avx2_to_cpu"]
    assert PACKING in impossible[0]["missing"]
    with pytest.raises(MissingError, match=r"exp4 needs cpu.avx2, which cannot run here: broken"):
        planned(["exp4"], ExperimentPlan("m", (CPU, AVX2)), broken("avx2"))


def test_machines_of_other_computers_are_not_tried():
    plan = ExperimentPlan("m", (CPU, Machine("cuda:7")), here=(CPU,))
    found, wanted, impossible = planned(["exp2"], plan, broken("cuda:7"))
    assert (len(wanted), impossible, found.left_out) == (2, [], ())


def test_the_rest_of_a_study_goes_on(tmp_path, started, avx512):
    """exp2 on what stands in, with its numerics in the run and on the page."""
    plan = make_plan(
        "stories260k", [], probe=amx, tokens=4, prompt_tokens=8, trials=1, verifiers=3, attacks=()
    )
    said = []
    run = run_experiments(
        ["exp1", "exp2"], plan, out=tmp_path, probe=amx, progress=lambda what, *_: said.append(what)
    )
    assert {row["prover"] for row in run["rows"]} == {"bf16 on cpu", "bf16 on cpu+avx2+eager"}
    assert run["left_out"] == [{"numerics": "cpu+avx2", "problem": PACKING, "instead": "cpu+avx2+eager"}]
    assert f"cpu+avx2 cannot run here ({PACKING}): cpu+avx2+eager stands in" in said
    write_report(run, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f"cpu+avx2 cannot run here ({PACKING}): cpu+avx2+eager stands in" in page


def test_attack_leaves_numerics_out_by_name(avx512):
    plan, other, failed = runnable(AttackPlan(), amx)
    assert plan.variants == tuple(VARIANTS)
    assert other == Machine("cpu+avx2+eager")
    assert [str(one) for one in failed] == [
        f"isa: cpu+avx2 cannot run here ({PACKING}): cpu+avx2+eager stands in"
    ]
    plan, other, failed = runnable(AttackPlan(), broken("avx2", "default", "eager"))
    assert set(VARIANTS) - set(plan.variants) == {"isa", "eager", "sampled-eager"}
    assert other is None
    assert {one.numerics.partition(":")[0] for one in failed} == {"isa", "eager", "sampled-eager"}
    with pytest.raises(MissingError, match="bfloat16 cannot be computed here: broken"):
        runnable(AttackPlan(), broken("cpu"))


def test_an_attack_goes_on_without_what_cannot_run(tmp_path):
    needed = runs_needed(0.2)
    plan = AttackPlan(
        sequences=max(10, 2 * needed),
        tokens=4,
        alpha=0.2,
        attacks=("int2",),
        variants=("same", "eager", "isa"),
    )
    run, folder = attack("stories260k", plan, out=tmp_path / "run", probe=broken("eager", "avx2", "default"))
    assert set(run["numerics_pooled"]) == {"same"}
    kept = json.loads((folder / "run.json").read_text())["left_out"]
    assert {one["numerics"].partition(":")[0] for one in kept} == {"eager", "isa"}
    write_report(run, folder / "report.html")
    assert "eager: cpu+eager cannot run here (broken): left out" in (folder / "report.html").read_text()
