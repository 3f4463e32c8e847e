"""The job: rounds over workloads by models that take turns, each in a process of its own."""

import copy
import json
import mmap
import time

import pytest
import torch
from transformers import AutoConfig

import bitassay
from bitassay import cli
from bitassay.bench import workload as workload_module
from bitassay.bench.models import BenchPlan, bench, measure_rounds, summarise
from bitassay.bench.timing import time_once
from bitassay.bench.worker import ProcessTimer, TimedModel, model_timer
from bitassay.bench.workload import ModelTimer, Workload, is_out_of_memory, peak_memory
from bitassay.errors import BitassayError
from bitassay.models.source import resolve
from bitassay.quantization.inputs.kv_cache import token_bytes
from bitassay.quantization.recipe.recipe import Recipe, find_recipe
from bitassay.record.run import RunFolder
from workers import in_process

SHORT = Workload("batch", 2, 12, 3)
LONG = Workload("context", 1, 600, 3)


class Scripted:
    """A runner whose times are made up."""

    def __init__(self, name, log, seconds):
        self.name, self.log, self.seconds = name, log, seconds

    def facts(self):
        return {"environment": {"threads": 1, "cores": 1}, "dtype": "bfloat16", "product_dtype": "bfloat16"}

    def limits(self):
        self.log.append("limits")
        return {"bandwidth": 100.0, "peaks": {"bfloat16": 1000.0}}

    def measure(self, workload):
        self.log.append(self.name)
        if workload is LONG:
            return {"skipped": "too long"}
        cost = {"bytes": 50.0, "flop": 100.0}
        return {
            "first_token_s": self.seconds,
            "decode_s": self.seconds * 3,
            "cache_bytes": 64,
            "peak_resident_bytes": 10,
            "peak_device_bytes": None,
            "costs": {"prefill": cost, "decode": cost},
        }


def rounds_of(tmp_path, log, repeats=2, workloads=(SHORT, LONG)):
    folder = RunFolder(tmp_path / "run", {"kind": "test"})
    runners = {"base": Scripted("base", log, 2.0), "w4": Scripted("w4", log, 1.0)}
    return measure_rounds(list(runners), runners.__getitem__, workloads, repeats, folder)


def test_models_take_turns_and_what_is_done_is_not_done_again(tmp_path):
    log = []
    first = rounds_of(tmp_path, log)
    assert log == ["limits", "base", "w4", "base", "w4", "limits", "w4", "base", "w4", "base"]
    assert json.loads(json.dumps(rounds_of(tmp_path, log))) == json.loads(json.dumps(first))
    assert len(log) == 10
    (tmp_path / "run" / "parts" / f"round-01-{SHORT.name}.json").unlink()
    rounds_of(tmp_path, log)
    assert log[10:] == ["w4", "base"]


def test_rows_are_made_of_rounds(tmp_path):
    run = summarise(*rounds_of(tmp_path, []), (SHORT, LONG))
    base, quantized = run["rows"][:2]
    assert (base["ttft_s"], base["prefill_tok_s"], base["prefill_samples_s"]) == (2.0, 12.0, 1.0)
    assert base["decode_tok_s"] == pytest.approx(2 * 3 / 6)
    assert (quantized["prefill_ratio"], quantized["decode_ratio"]) == (pytest.approx(2), pytest.approx(2))
    assert "decode_ratio" not in base
    assert quantized["decode_share_of_bound"] == 0.5  # 50 bytes at 100 a second, in one second a step
    assert base["decode_share_of_bound"] == 0.25
    assert [row["skipped"] for row in run["rows"][2:]] == ["too long"] * 2
    assert run["machine"]["bandwidth"] == 100


def test_a_peak_that_is_not_known_gives_no_share(tmp_path):
    facts, rounds = rounds_of(tmp_path, [])
    facts["w4"]["product_dtype"] = "float16"
    row = summarise(facts, rounds, (SHORT,))["rows"][1]
    assert row["prefill_share_of_bound"] is None
    assert row["decode_share_of_bound"] == 0.5


def test_a_cell_by_a_real_model(stories):
    model = bitassay.quantize(stories, "w4", packed=True)
    found = ModelTimer(model).measure(SHORT)
    assert found["cache_bytes"] == 2 * token_bytes(stories.config, None) * 2 * (12 + 3)  # fp32
    assert found["first_token_s"] > 0
    assert found["peak_resident_bytes"] > 10**7
    assert found["costs"]["prefill"]["flop"] > found["costs"]["decode"]["flop"]


def test_each_cell_is_warmed_up_once(stories, monkeypatch):
    calls = []
    monkeypatch.setattr(workload_module, "time_once", lambda *a: calls.append(a[2]) or time_once(*a))
    runner = ModelTimer(stories)
    for _ in range(2):
        runner.measure(SHORT)
    assert len(calls) == 3


def test_a_rounded_cache_is_timed_packed(stories):
    recipe = Recipe.model_validate({"name": "kv", "weights": None, "kv_cache": {"format": "int8"}})
    model = bitassay.quantize(stories, recipe, packed=True)
    runner = ModelTimer(model)
    spec = recipe.kv_cache
    assert runner.facts()["kv_bytes_per_token"] == token_bytes(stories.config, spec)
    assert runner.measure(SHORT)["cache_bytes"] == 2 * 15 * token_bytes(stories.config, spec)


def test_what_does_not_fit_is_skipped_and_says_why(stories, monkeypatch):
    runner = ModelTimer(stories)
    assert runner.measure(LONG) == {"skipped": "the model has 512 positions"}
    monkeypatch.setattr(ModelTimer, "needed_bytes", lambda *_: 10**15)
    assert runner.measure(SHORT)["skipped"].startswith("needs about 1000000.0 GB")


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_only_a_want_of_memory_is_skipped(stories, monkeypatch, error, known):
    assert is_out_of_memory(error) == known

    def fails(*_):
        raise error

    monkeypatch.setattr(workload_module, "time_once", fails)
    if known:
        assert ModelTimer(stories).measure(SHORT) == {"skipped": "out of memory"}
    else:
        with pytest.raises(RuntimeError, match="shapes"):
            ModelTimer(stories).measure(SHORT)


def test_the_peak_of_what_is_freed_again():
    with peak_memory(torch.device("cpu")) as small:
        time.sleep(0.01)
    with (
        peak_memory(torch.device("cpu")) as large,
        mmap.mmap(-1, 200 * 2**20) as held,
    ):  # a heap may reuse pages it holds
        torch.frombuffer(held, dtype=torch.uint8).fill_(1)
        time.sleep(0.5)  # a busy machine samples seldom
    assert large.peak_resident_bytes - small.peak_resident_bytes > 100 * 2**20
    assert large.peak_device_bytes is None


LIMITS = {"bandwidth": 1e9, "peaks": {"float32": 1e9, "bfloat16": 1e9}}


def test_the_whole_job_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    started = in_process(monkeypatch)
    monkeypatch.setattr(workload_module, "machine_limits", lambda _: LIMITS)
    options = {"batches": (1, 2), "contexts": (600,), "prompt_tokens": 8, "new_tokens": 2, "repeats": 2}
    run, folder = bench("stories260k", ["w4"], out=tmp_path / "b", **options)
    assert json.loads((folder / "run.json").read_text()) == json.loads(json.dumps(run))
    assert [(row["model"], row["batch"], row["prompt_tokens"]) for row in run["rows"]] == [
        (model, batch, tokens) for batch, tokens in ((1, 8), (2, 8), (1, 600)) for model in ("base", "w4")
    ]
    assert run["rows"][1]["decode_ratio"] > 0
    assert run["rows"][-1]["skipped"] == "the model has 512 positions"
    assert [one["bits_per_weight"] > 16 - 1e-9 for one in run["models"]] == [True, False]
    (folder / "run.json").unlink()
    del started[:]
    again, _ = bench("stories260k", ["w4"], out=tmp_path / "b", **options)
    assert started == []
    assert json.loads(json.dumps(again["rows"])) == json.loads(json.dumps(run["rows"]))
    with pytest.raises(BitassayError, match="repeats"):
        bench("stories260k", ["w4"], out=tmp_path / "b", **options | {"repeats": 3})


def test_a_quantized_folder_runs_on_its_codes(tmp_path):
    assert cli.run(["quantize", "stories260k", "--recipe", "w8", "--out", str(tmp_path / "w8")]) == 0
    facts = model_timer(TimedModel(str(tmp_path / "w8"))).facts()
    assert (
        facts["bits_per_weight"]
        == model_timer(TimedModel("stories260k", find_recipe("w8"))).facts()["bits_per_weight"]
    )


@pytest.mark.slow
def test_a_process_of_its_own(tmp_path):
    said = []
    timer = ProcessTimer(
        "w8", TimedModel("stories260k", find_recipe("w8")), tmp_path / "00.log", lambda *a: said.append(a)
    )
    try:
        assert timer.facts()["bits_per_weight"] < 9
        assert timer.measure(SHORT)["cache_bytes"] == 2 * 15 * token_bytes(
            AutoConfig.from_pretrained(resolve("stories260k").folder), None
        )
        assert timer.measure(LONG) == {"skipped": "the model has 512 positions"}
    finally:
        timer.stop()
    assert said
    assert all(what.startswith("w8: ") for what, *_ in said)
    nowhere = ProcessTimer("x", TimedModel("nowhere"), tmp_path / "01.log")
    with pytest.raises(BitassayError, match="x: no model is called 'nowhere'"):
        nowhere.facts()
    nowhere.stop()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batches": (0,)}, "is 0"),
        ({"repeats": 0}, "is 0"),
        ({"batches": (), "contexts": ()}, "nothing to time"),
        ({"dtype": "bf17"}, "unknown dtype 'bf17'"),
        ({"candidates": ("base",)}, "two rows would be called 'base'"),
    ],
)
def test_bad_plans(options, match):
    with pytest.raises(BitassayError, match=match):
        BenchPlan("stories260k", **options)


def test_cells_are_batches_and_contexts():
    plan = BenchPlan("m", batches=(1, 4), contexts=(64,), prompt_tokens=8, new_tokens=2)
    assert plan.workloads == [
        Workload("batch", 1, 8, 2),
        Workload("batch", 4, 8, 2),
        Workload("context", 1, 64, 2),
    ]
    assert len({workload.name for workload in plan.workloads}) == 3


def test_a_slower_model_is_slower(stories):
    slowed = copy.deepcopy(stories)
    slowed.register_forward_pre_hook(lambda *_: time.sleep(0.03))
    found = ModelTimer(slowed).measure(SHORT)
    assert found["first_token_s"] >= 0.03
    assert found["decode_s"] >= 3 * 0.03
