"""`bitassay quantize`, as a user types it."""

import json
import shutil

import pytest
from gguf import GGUFReader

from bitassay.cli import run
from bitassay.engines.load import load
from bitassay.quantization.export.registry import LAYOUTS
from bitassay.quantization.recipe.recipe import find_recipe
from bitassay.studies.checkpoint import vllm_widths
from bitassay.testing.tiny import tiny_model


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def quantize(out, *options, recipe="w4"):
    return run(["quantize", "stories260k", "--recipe", str(recipe), "--out", str(out), *options])


def row(capsys):
    return json.loads(capsys.readouterr().out)["rows"][0]


def test_writes_a_folder_and_one_row(out, capsys):
    assert quantize(out, "--format", "json") == 0
    found = row(capsys)
    assert list(found) == [
        "recipe",
        "layout",
        "bits_per_weight",
        "size_bytes",
        "file_bytes",
        "seconds",
        "max_logits_difference",
    ]
    assert found["recipe"] == "w4"
    assert 4 < found["bits_per_weight"] < 5
    assert found["file_bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert found["seconds"] > 0
    assert found["max_logits_difference"] == 0
    assert load(out).identity.recipe_name == "w4"


def test_sixteen_bit_scales_and_weights_of_another_dtype_differ_and_say_so(out, capsys):
    assert quantize(out, "--dtype", "bfloat16", "--format", "json") == 0
    assert 0 < row(capsys)["max_logits_difference"] < 1


def test_no_check_leaves_the_difference_out(out, capsys):
    assert quantize(out, "--no-check", "--format", "csv") == 0
    header, line = capsys.readouterr().out.splitlines()
    assert dict(zip(header.split(","), line.split(","), strict=True))["max_logits_difference"] == ""


def test_the_same_command_again_says_that_it_is_done(out, capsys):
    assert quantize(out, "--no-check", "--format", "json") == 0
    first = row(capsys)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert quantize(out, "--no-check", "--format", "json") == 0
    captured = capsys.readouterr()
    assert "finished before" in captured.err
    again = json.loads(captured.out)["rows"][0]
    assert {key: again[key] for key in ("recipe", "bits_per_weight", "size_bytes", "file_bytes")} == {
        key: first[key] for key in ("recipe", "bits_per_weight", "size_bytes", "file_bytes")
    }
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_another_recipe_or_dtype_in_the_same_folder_is_refused(out, capsys):
    assert quantize(out, "--no-check") == 0
    assert quantize(out, "--no-check", recipe="w8") == 2
    assert (
        "holds stories260k quantized by w4 in float32, not stories260k by w8 in float32"
        in capsys.readouterr().err
    )
    assert quantize(out, "--no-check", "--dtype", "float16") == 2
    assert "in float16" in capsys.readouterr().err


def test_a_damaged_folder_is_not_called_finished(out, capsys):
    assert quantize(out, "--no-check") == 0
    with open(out / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert quantize(out, "--no-check") == 2
    assert "changed since it was saved" in capsys.readouterr().err


def test_a_folder_with_something_else_is_refused(out, capsys):
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    assert quantize(out) == 2
    assert "holds something else" in capsys.readouterr().err
    assert (out / "mine.txt").read_text() == "keep me"


def test_a_file_in_the_way_is_refused(out, capsys):
    out.write_text("a file")
    assert quantize(out) == 2
    assert "a file is where a folder should be" in capsys.readouterr().err


@pytest.mark.sample(5)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("recipe", ["w8", "w3", "fp8", "w1.58", "w1"])
def test_dry_run_plans_what_the_run_then_writes(out, capsys, recipe, dtype):
    assert quantize(out, "--dry-run", "--dtype", dtype, "--format", "json", recipe=recipe) == 0
    planned = row(capsys)
    assert not out.exists()
    assert planned["planned_seconds"] > 0
    assert quantize(out, "--no-check", "--dtype", dtype, "--format", "json", recipe=recipe) == 0
    written = row(capsys)
    for exact in ("recipe", "layout", "bits_per_weight", "size_bytes"):
        assert planned[exact] == written[exact]
    # The configuration grows, and safetensors names its tensors.
    assert abs(planned["file_bytes"] - written["file_bytes"]) < 20_000
    assert planned["memory_bytes"] > 2 * planned["file_bytes"]


def test_a_dry_run_needs_no_place_to_write_to(out, capsys):
    dry = ["quantize", "stories260k", "--dry-run", "--format", "json", "--recipe", "w8"]
    assert run(dry) == 0
    without = row(capsys) | {"planned_seconds": 0}
    assert run([*dry, "--out", str(out)]) == 0
    assert row(capsys) | {"planned_seconds": 0} == without
    assert run([*dry, "--for", "vllm"]) == 0
    assert row(capsys)["layout"] == "vllm"
    assert run([*dry, "--layout", "bitassay"]) == 0
    assert row(capsys)["layout"] == "bitassay"
    assert run([*dry[:-1], "w1"]) == 0
    assert "the folder: " in capsys.readouterr().err
    assert run([*dry, "--for", "llama.cpp"]) == 2
    assert "add --gguf FILE" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_refused_before_any_work(out, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    assert quantize(out) == 3
    captured = capsys.readouterr()
    assert "0 MB are free" in captured.err
    assert "quantizing" not in captured.err
    assert not out.exists()


@pytest.mark.parametrize(("recipe", "layout"), [("w4", "compressed-tensors"), ("w1", "bitassay")])
def test_the_layout_that_holds_the_recipe_is_chosen_and_said(out, capsys, recipe, layout):
    assert quantize(out, "--format", "json", recipe=recipe) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)["rows"][0]
    assert (found["layout"], found["max_logits_difference"]) == (layout, 0)
    assert f"({layout} layout)" in captured.err


def test_a_layout_may_be_asked_for(out, capsys):
    assert quantize(out, "--layout", "bitassay", "--format", "json") == 0
    assert row(capsys)["layout"] == "bitassay"
    assert quantize(out, "--layout", "compressed-tensors") == 2
    assert "holds the bitassay layout" in capsys.readouterr().err


def test_so_may_the_layout_of_a_plug_in(out, capsys, monkeypatch):
    monkeypatch.setitem(LAYOUTS._items, "mine", LAYOUTS["bitassay"])
    assert quantize(out, "--layout", "mine", "--format", "json") == 0
    assert row(capsys)["layout"] == "mine"
    assert json.loads((out / "bitassay.json").read_text())["layout"] == "mine"


def test_what_the_format_cannot_hold_is_refused_before_any_work(out, capsys):
    assert quantize(out, "--layout", "compressed-tensors", recipe="w1") == 2
    captured = capsys.readouterr()
    assert "cannot hold model.layers.0.self_attn.q_proj in binary exactly" in captured.err
    assert "quantizing" not in captured.err
    assert not out.exists()


def test_a_recipe_that_quantizes_nothing_is_refused(out, capsys, tmp_path):
    nothing = tmp_path / "nothing.yaml"
    nothing.write_text("name: nothing\nweights: null\n")
    assert quantize(out, recipe=nothing) == 2
    assert not out.exists()


def test_a_gguf_file_beside_the_folder_or_alone(out, capsys, tmp_path):
    path = tmp_path / "w4.gguf"
    assert quantize(out, "--gguf", str(path), "--format", "json", recipe="w4") == 0
    captured = capsys.readouterr()
    folder, file = json.loads(captured.out)["rows"]
    assert (folder["layout"], file["layout"]) == ("compressed-tensors", "gguf")
    assert file["file_bytes"] == path.stat().st_size
    assert folder["max_logits_difference"] == 0 < file["max_logits_difference"] < 0.3
    assert "w4.gguf: int4 g64 -> Q4_1: " in captured.err
    command = ["quantize", "stories260k", "--recipe", "w4", "--gguf"]
    assert run([*command, str(tmp_path / "alone.gguf"), "--no-check"]) == 0
    assert (tmp_path / "alone.gguf").read_bytes() == path.read_bytes()


def test_a_finished_folder_is_not_quantized_again_for_a_gguf_file(out, capsys, tmp_path):
    assert quantize(out, "--no-check") == 0
    assert quantize(out, "--gguf", str(tmp_path / "later.gguf"), "--no-check") == 0
    captured = capsys.readouterr()
    assert "finished before" in captured.err
    assert captured.err.count("quantizing by w4: 35/35") == 1
    assert quantize(out, "--gguf", str(tmp_path / "later.gguf"), "--no-check") == 0
    assert capsys.readouterr().err.count("finished before") == 2
    assert quantize(tmp_path / "other", "--gguf", str(tmp_path / "later.gguf"), recipe="w8") == 2
    assert "later.gguf: holds something else" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_nowhere_to_write_to_is_refused(capsys):
    assert run(["quantize", "stories260k", "--recipe", "w4"]) == 2
    assert "--out FOLDER, --gguf FILE" in capsys.readouterr().err


def test_a_gguf_of_what_llama_cpp_does_not_do_is_refused_before_any_work(capsys, tmp_path):
    base = tiny_model("mixtral", num_hidden_layers=1)
    base.save_pretrained(tmp_path / "experts")
    base.tokenizer.save_pretrained(tmp_path / "experts")
    assert (
        run(["quantize", str(tmp_path / "experts"), "--recipe", "w4", "--gguf", str(tmp_path / "x.gguf")])
        == 2
    )
    captured = capsys.readouterr()
    assert "mixtral family" in captured.err
    assert "quantizing" not in captured.err


CALIBRATED = """
name: calibrated
weights: {format: int4, granularity: g32, scale: absmax}
gptq: {}
calibration: {samples: 2, tokens: 16}
"""


@pytest.mark.slow
def test_what_a_calibrated_recipe_made_is_kept_in_the_cache(out, tmp_path, monkeypatch):
    monkeypatch.setenv("BITASSAY_CACHE", str(tmp_path / "cache"))
    recipe = tmp_path / "calibrated.yaml"
    recipe.write_text(CALIBRATED)
    with monkeypatch.context() as patched:
        patched.setattr("bitassay.quantization.export.save.save", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize(out, recipe=recipe)
    (kept,) = (path for path in (tmp_path / "cache/quantized").iterdir() if path.is_dir())
    assert {path.name for path in (kept / "parts").iterdir()} == {
        "inputs.json", "passes.json", "result.json", "result.safetensors",
    }  # fmt: skip
    monkeypatch.setattr("bitassay.quantization.solvers.layers.quantize_layers", lambda *_: 1 / 0)
    assert quantize(out, "--no-check", recipe=recipe) == 0
    with pytest.raises(ZeroDivisionError):
        quantize(tmp_path / "other", "--no-check", "--work", str(tmp_path / "work"), recipe=recipe)


def test_analyze_writes_a_table_a_heat_map_and_a_page(out, capsys):
    assert quantize(out, "--analyze", "--samples", "1", "--format", "json", recipe="w8") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert len(found["layers"]) == 5
    assert len(found["matrices"]) == 35
    assert found["text"]["samples"] == 1
    assert {"run.json", "report.html", "heat-map.png"} <= {path.name for path in out.iterdir()}
    assert quantize(out, "--analyze", "--samples", "1", recipe="w8") == 0
    assert "KL, only this" in capsys.readouterr().out
    assert quantize(out, "--analyze", "--gguf", str(out / "x.gguf")) == 2
    assert "--analyze writes no model" in capsys.readouterr().err
    for words in (["--samples", "4"], ["--each-matrix"]):
        assert quantize(out / "model", *words) == 2
        assert "--samples and --each-matrix belong to --analyze" in capsys.readouterr().err


def test_what_an_engine_will_not_load_is_refused_before_any_work(out, capsys, tmp_path):
    file = str(tmp_path / "x.gguf")
    for words, recipe, why in (
        (["--for", "vllm"], "w4", "groups of 64 do not divide its 172 columns, which vLLM needs"),
        (["--for", "transformers"], "w1", "transformers would not load it"),
        (["--for", "llama.cpp", "--gguf", file], "fp8", "llama.cpp has no type for model.layers.0"),
        (["--for", "llama.cpp"], "w4", "llama.cpp reads nothing that would be written"),
        (["--for", "vllm", "--layout", "vllm"], "w4", "--for chooses the layout"),
        (["--embeddings", "Q8_0"], "w4", "--embeddings is of the GGUF file"),
    ):
        assert quantize(out, *words, recipe=recipe) == 2
        captured = capsys.readouterr()
        assert why in captured.err
        assert "quantizing" not in captured.err
    assert not out.exists()
    assert quantize(out, "--for", "transformers", "--format", "json", recipe="w4") == 0
    assert row(capsys)["layout"] == "compressed-tensors"


def test_widths_for_which_vllm_has_few_kernels_are_named(stories):
    expected = {"w4": [], "w3": [3], "w8": [8], "portable-1.58bit": [2], "portable-2bit": [2], "fp8": []}
    assert {name: vllm_widths(stories, find_recipe(name)) for name in expected} == expected


def test_the_base_model_as_a_gguf_file(capsys, tmp_path):
    path = tmp_path / "base.gguf"
    command = ["quantize", "stories260k", "--gguf", str(path), "--format", "json"]
    assert run([*command, "--embeddings", "Q8_0"]) == 0
    found = json.loads(capsys.readouterr().out)["rows"][0]
    assert (found["recipe"], found["layout"], found["bits_per_weight"]) == ("base", "gguf", 16)
    assert 0 < found["max_logits_difference"] < 0.2
    assert run(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert run([*command, "--out", str(tmp_path / "folder")]) == 2
    assert "only as a GGUF file" in capsys.readouterr().err
    assert run([*command, "--embeddings", "Q9_0"]) == 2
    assert "no type 'Q9_0' for embeddings" in capsys.readouterr().err


def test_the_types_of_a_given_gguf_file(capsys, tmp_path):
    given, path = str(tmp_path / "given.gguf"), tmp_path / "ours.gguf"
    command = ["quantize", "stories260k", "--no-check", "--format", "json", "--recipe"]
    assert run([*command, "w8", "--gguf", given]) == 0
    assert run([*command, "w4", "--gguf", str(path), "--like", given]) == 0
    assert run([*command, "w4", "--gguf", str(path), "--like", given]) == 0
    captured = capsys.readouterr()
    assert "ours.gguf: int8 g32 -> Q8_0: 30 matrices" in captured.err
    assert captured.err.count("finished before") == 1
    kinds = [[(t.name, t.tensor_type, t.n_bytes) for t in GGUFReader(p).tensors] for p in (given, path)]
    assert kinds[0] == kinds[1]
    assert run([*command, "w4", "--out", str(tmp_path / "folder"), "--like", given]) == 2
    assert "--like is of the GGUF file alone" in capsys.readouterr().err
