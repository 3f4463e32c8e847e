"""Quantizing and measuring a model that is read a layer at a time, beside the same model loaded."""

import random
import re
import signal
import subprocess
import sys

import pytest
import torch

from bitassay.engines.load import load
from bitassay.errors import BitassayError
from bitassay.evaluation.quality import score_windows
from bitassay.models.opened import weights_of
from bitassay.quantization import pipeline
from bitassay.quantization.export.plan import LOADED, OPENED, choose_way, plan_export
from bitassay.quantization.export.save import reload_difference, save
from bitassay.quantization.pipeline import quantize, quantize_cached
from bitassay.quantization.recipe.recipe import Recipe, find_recipe
from bitassay.quantization.recipe.solvers import Tune
from bitassay.quantization.solvers import descent, kept, layers
from bitassay.quantization.work import KeptTensors
from bitassay.studies.checkpoint import work_bytes
from bitassay.testing.architectures import save_tiny

TOKENS = torch.arange(3, 27)[None] * 7 % 400 + 3


def recipe_name(recipe):
    return getattr(recipe, "name", recipe)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


KINDS = ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("mixtral", "gpt2"))]


@pytest.fixture(params=KINDS)
def folder(tmp_path, request):
    return save_tiny(request.param, tmp_path / "model")


CALIBRATED = Recipe.model_validate(
    {
        "name": "calibrated",
        "weights": {"format": "int3", "granularity": "g32", "symmetric": False},
        "calibration": {"samples": 10, "tokens": 16},
        "gptq": {},
        "learned": {"steps": 2},
    }
)


TUNED = CALIBRATED.model_copy(
    update={"name": "tuned", "tune": Tune(steps=18, codes=0.05, scales=0.01, norms=0.01)}
)


WEIGHTS = {"format": "int4", "granularity": "g32", "symmetric": False}
TEXT = {"samples": 10, "tokens": 16}


def changed_first(**parts):
    return Recipe.model_validate({"name": "-".join(parts) or "plain", "weights": WEIGHTS, **parts})


ROTATED = changed_first(
    rotation={"kind": "refined", "rounds": 2, "r4": True, "without_hadamard": "blocks"}, calibration=TEXT
)
ROTATED_AND_TUNED = changed_first(rotation={}, calibration=TEXT, gptq={}, tune={"steps": 2})
ONLINE = changed_first(rotation={"r1": "online", "r2": False, "layers": [1], "kind": "orthogonal"})
SMOOTHED = changed_first(
    smoothing={"method": "smoothquant"}, activations={"scale": "learned"}, calibration=TEXT, kv_cache={}
)
AT_RUN_TIME = changed_first(
    smoothing={"method": "smoothquant", "places": ["inputs"]}, activations={}, calibration=TEXT
)
AWQ = changed_first(smoothing={"method": "awq", "clip": True, "exponents": 3}, calibration=TEXT)
RANGES = changed_first(activations={"scale": "moving_average"}, calibration=TEXT)
LOOPED = changed_first(replication={"copies": 2, "layers": [1]})
BLOCK = changed_first(replication={"copies": 2, "of": "block", "layers": [0, 1]})
WRITTEN = changed_first(calibration=TEXT, gptq={}, tune={"steps": 2, "generated": 3})
RESIDUAL = changed_first(
    replication={"copies": 2, "how": "parallel", "of": "linear", "differ": "residual"},
    calibration=TEXT,
    gptq={},
)
FAST = ["w4", CALIBRATED, TUNED, ROTATED, SMOOTHED, BLOCK, WRITTEN]
SLOW = ["fp8", ROTATED_AND_TUNED, ONLINE, AT_RUN_TIME, AWQ, RANGES, LOOPED, RESIDUAL]


@pytest.mark.parametrize(
    "recipe", [*FAST, *(pytest.param(recipe, marks=pytest.mark.slow) for recipe in SLOW)], ids=recipe_name
)
def test_a_layer_at_a_time_gives_the_same_folder(folder, tmp_path, recipe):
    try:
        loaded = quantize(load(folder), recipe)
    except BitassayError as error:  # such as GPT-2, which has no RMSNorm
        with pytest.raises(BitassayError, match=re.escape(error.problem)):
            quantize(load(folder, opened=True), recipe, work=tmp_path / "work")
        return
    opened = quantize(load(folder, opened=True), recipe, work=tmp_path / "work")
    assert isinstance(opened.quantization.tensors, KeptTensors)
    save(loaded, tmp_path / "loaded")
    save(opened, tmp_path / "opened")
    assert files(tmp_path / "loaded") == files(tmp_path / "opened")
    assert reload_difference(opened, tmp_path / "opened", TOKENS) == 0
    reopened = load(tmp_path / "opened", opened=True)
    assert not weights_of(reopened).held
    with torch.inference_mode():
        assert torch.equal(reopened(TOKENS, use_cache=False).logits, loaded(TOKENS, use_cache=False).logits)


def test_weights_in_16_bits_are_rotated_in_fp32_and_read_as_before(tmp_path):
    folder = save_tiny("llama", tmp_path / "model", tie_word_embeddings=True)  # in fp32
    recipe = changed_first(rotation={})
    loaded = quantize(load(folder, dtype="bfloat16"), recipe)
    opened = quantize(load(folder, dtype="bfloat16", opened=True), recipe, work=tmp_path / "work")
    assert opened.quantization.parameters.keys() == loaded.quantization.parameters.keys()
    assert "lm_head.weight" in loaded.quantization.parameters
    for name, value in loaded.quantization.parameters.items():
        assert torch.equal(opened.quantization.parameters[name], value)
    save(loaded, tmp_path / "loaded")
    save(opened, tmp_path / "opened")
    assert files(tmp_path / "loaded") == files(tmp_path / "opened")


def test_recipes_of_the_same_codes_share_their_layers_files(tmp_path, monkeypatch):
    folder = save_tiny("llama", tmp_path / "model")
    monkeypatch.setenv("BITASSAY_CACHE", str(tmp_path / "cache"))
    plain, rounded = changed_first(), changed_first(kv_cache={}, activations={})
    made = quantize_cached(load(folder, opened=True), rounded)
    with torch.inference_mode():
        wanted = quantize(load(folder), rounded)(TOKENS, use_cache=False).logits
        assert torch.equal(made(TOKENS, use_cache=False).logits, wanted)
    layers = sorted((tmp_path / "cache" / "quantized").glob("*/parts/layer-0000.safetensors"))
    assert [path.stat().st_nlink for path in layers] == [2, 2]
    assert quantize_cached(load(folder, opened=True), plain).quantization.recipe == plain


def test_evaluation_gives_the_same_scores(folder, tmp_path):
    windows = torch.arange(5 * 24).view(5, 24) * 13 % 400 + 3
    base, opened = load(folder), load(folder, opened=True)
    recipes = {"w4": "w4", "fp8": "fp8", "block": BLOCK}
    if base.config.model_type == "gpt2":  # whose layers have no self_attn to give several slots
        del recipes["block"]
    wanted = score_windows(base, {name: quantize(base, recipe) for name, recipe in recipes.items()}, windows)
    candidates = {name: quantize(opened, recipe, work=tmp_path / name) for name, recipe in recipes.items()}
    found = score_windows(opened, candidates, windows, skip=[1])
    wanted = {index: scores for index, scores in wanted if index != 1}
    for index, scores in found:
        for name, tokens in wanted.pop(index).items():
            assert all(torch.equal(a, b) for a, b in zip(tokens, scores[name], strict=True))
    assert not wanted


def test_an_interrupted_command_goes_on_after_its_last_finished_layer(tmp_path, monkeypatch):
    folder = save_tiny("llama", tmp_path / "model", num_hidden_layers=3)
    calls = []

    def counted(weight, scheme, name, old=pipeline.quantize_tensor):
        calls.append(name)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return old(weight, scheme, name)

    monkeypatch.setattr(pipeline, "quantize_tensor", counted)
    with pytest.raises(KeyboardInterrupt):
        quantize(load(folder, opened=True), "w4", work=tmp_path / "work")
    first = set(calls[:7])
    made = quantize(load(folder, opened=True), "w4", work=tmp_path / "work")
    assert len(calls) == 10 + 14
    assert first.isdisjoint(calls[10:])
    again = quantize(load(folder), "w4", work=tmp_path / "other")
    for name, tensor in again.quantization.tensors.items():
        assert torch.equal(made.quantization.tensors[name].packed, tensor.packed)


@pytest.mark.slow
def test_calibration_goes_on_after_its_last_finished_layer(tmp_path, monkeypatch):
    folder = save_tiny("llama", tmp_path / "model", num_hidden_layers=3)
    written, original = [], layers.write_part

    def stopping(place, name, *parts):
        original(place, name, *parts)
        written.append(name)
        if written == ["layer-0000"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(layers, "write_part", stopping)
    with pytest.raises(KeyboardInterrupt):
        quantize(load(folder, opened=True), CALIBRATED, work=tmp_path / "work")
    made = quantize(load(folder, opened=True), CALIBRATED, work=tmp_path / "work")
    assert written == ["layer-0000", "layer-0001", "layer-0002"]
    for name, tensor in quantize(load(folder), CALIBRATED).quantization.tensors.items():
        assert torch.equal(made.quantization.tensors[name].packed, tensor.packed)


@pytest.mark.parametrize(
    "first", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["opened", "loaded"]
)
def test_tuning_goes_on_from_the_state_that_is_kept(tmp_path, monkeypatch, first):
    folder = save_tiny("llama", tmp_path / "model")
    monkeypatch.setattr(kept, "KEEP_STEPS", 5)
    moved, original = [], descent.Adam.move

    def stopping(adam, parameter):
        if adam.mean[parameter].dtype == torch.bfloat16:  # tune's
            moved.append(adam.step)
            if len(moved) == first_run:
                raise KeyboardInterrupt
        original(adam, parameter)

    a_step = 14 * 2 + 5  # of each matrix codes and scales, and gains
    first_run = 12 * a_step + 20
    monkeypatch.setattr(descent.Adam, "move", stopping)
    with pytest.raises(KeyboardInterrupt):
        quantize(load(folder, opened=first), TUNED, work=tmp_path / "work")
    held = sum(path.stat().st_size for path in (tmp_path / "work" / "parts").iterdir())
    told = work_bytes(load(folder), TUNED, LOADED)
    assert 0.5 * told < held < told  # one of two states, so far
    assert work_bytes(load(folder), TUNED, OPENED) > told
    assert work_bytes(load(folder), find_recipe("w4"), LOADED) == 0
    made = quantize(load(folder, opened=True), TUNED, work=tmp_path / "work")
    assert moved[first_run] == 10
    assert len(moved) == first_run + 8 * a_step
    for name, tensor in quantize(load(folder), TUNED).quantization.tensors.items():
        assert torch.equal(made.quantization.tensors[name].packed, tensor.packed)
        assert torch.equal(made.quantization.tensors[name].scale, tensor.scale)
    assert not [path for path in (tmp_path / "work" / "parts").iterdir() if path.name.startswith("tune-")]


# Quantizes an opened model, and dies at the event of that number: a tensor goes to its file, or a part is written.
KILLED = """
import itertools, os, signal, sys
from bitassay.engines.load import load
from bitassay.quantization.pipeline import quantize
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.solvers import kept, shelf
from bitassay.record.run import RunFolder

folder, work, recipe, last = sys.argv[1:]
events, kept.KEEP_STEPS = itertools.count(), 5

def counted(owner, name):
    original = getattr(owner, name)
    def method(*arguments, **named):
        if next(events) == int(last):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)
    setattr(owner, name, method)

counted(shelf.Shelf, "_put")
counted(RunFolder, "write_tensors")
quantize(load(folder, opened=True), Recipe.model_validate_json(recipe), work=work)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_three_times_gives_the_same_result(tmp_path):
    folder, seed = save_tiny("llama", tmp_path / "model"), random.randrange(10**6)
    draw = random.Random(seed)

    def run(last):
        words = [sys.executable, "-c", KILLED, folder, tmp_path / "work", TUNED.model_dump_json(), str(last)]
        return subprocess.run(words, capture_output=True, text=True, timeout=300)

    for events in (12, 1700, 1500):  # of 3451: among the layers, and within tuning
        done = run(draw.randrange(events))
        assert done.returncode == -signal.SIGKILL, (seed, done.stderr)
    made = quantize(load(folder, opened=True), TUNED, work=tmp_path / "work").quantization
    wanted = quantize(load(folder), TUNED).quantization
    for name, tensor in wanted.tensors.items():
        assert torch.equal(made.tensors[name].packed, tensor.packed), seed
        assert torch.equal(made.tensors[name].scale, tensor.scale), seed
    assert all(torch.equal(made.parameters[name], value) for name, value in wanted.parameters.items()), seed


def test_a_recipe_that_needs_all_layers_is_refused(tmp_path):
    opened = load(save_tiny("llama", tmp_path / "model"), opened=True)
    fitted = changed_first(replication={"coefficients": "fitted"})
    mixed = changed_first(mixed={"bits": 3.5})
    for recipe, why in (
        (mixed, "mixed"),
        (fitted, "replication with fitted coefficients"),
    ):
        with pytest.raises(BitassayError, match=f"{why} needs the whole model in memory"):
            quantize(opened, recipe, work=tmp_path / why)


def test_the_first_way_that_fits_is_chosen_and_a_budget_that_none_keeps_is_refused(stories):
    ways = {LOADED: 10 * 10**9, OPENED: 2_010_000_000}
    assert choose_way(ways, 10**10, "it") == (LOADED, 10**10)
    assert choose_way(ways, 10**10 - 1, "it") == (OPENED, 2_010_000_000)
    with pytest.raises(
        BitassayError, match=r"it takes 2\.0 GB of memory \(a layer at a time\), and 1\.0 GB"
    ) as error:
        choose_way(ways, 10**9, "it", ", or less")
    assert error.value.remedy == "--memory 2.1GB, or less"
    assert plan_export(stories, changed_first(mixed={"bits": 3.5})).opened_memory_bytes is None
    assert plan_export(stories, find_recipe("w8a8")).opened_memory_bytes is not None
