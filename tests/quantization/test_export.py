"""A saved folder, loaded by plain transformers, is the model that was saved, to the bit in fp32."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitassay
from bitassay.data.corpora import corpus
from bitassay.engines.load import load
from bitassay.errors import BitassayError, MissingError
from bitassay.models.walk import matrices
from bitassay.quantization.codes import storage as own
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.export.card import CARD_BYTES, CARD_FILE, read_card
from bitassay.quantization.export.compressed import weight_args
from bitassay.quantization.export.plan import plan_export
from bitassay.quantization.export.registry import LAYOUTS
from bitassay.quantization.export.save import save
from bitassay.quantization.pipeline import quantize
from bitassay.quantization.recipe.formats import FORMATS
from bitassay.quantization.recipe.recipe import Recipe, find_recipe
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.runtime.model import bits_per_weight
from bitassay.testing.tiny import tiny_model

IDS = torch.arange(3, 60)[None]
GRANULARITIES = (
    "tensor",
    "channel",
    "g32",
    "g36",
)  # 36 divides neither 96 nor 160, the sizes of the tiny models
EXPRESSIBLE = [
    (format, granularity, symmetric)
    for format in ("int8", "int4", "int3", "int2", "fp8_e4m3", "ternary")
    for granularity in GRANULARITIES
    for symmetric in ((True, False) if FORMATS[format].has_asymmetric else (True,))
]
FRESH = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
ids, out, *folders = sys.argv[1:]
tokens = load_file(ids)["ids"]
with torch.inference_mode():
    load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    save_file({folder: load(folder)(tokens).logits.contiguous() for folder in folders}, out)
assert not [name for name in sys.modules if name.startswith("bitassay")]
"""


def recipe(overrides=(), **weights) -> Recipe:
    """Scales are absmax unless asked otherwise: searching them takes long and they are stored the same."""
    return Recipe.model_validate(
        {"name": "test", "weights": {"scale": "absmax"} | weights, "overrides": list(overrides)}
    )


def quick(name: str) -> Recipe:
    """A shipped recipe without the search."""
    shipped = find_recipe(name)
    assert shipped.weights is not None
    return shipped.model_copy(update={"weights": shipped.weights.model_copy(update={"scale": "absmax"})})


@pytest.fixture(scope="module")
def tiny():
    return tiny_model("llama", num_hidden_layers=1, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def saved(stories, tmp_path_factory):
    """A finished folder; tests work on copies."""
    folder = tmp_path_factory.mktemp("saved") / "w4"
    save(quantize(stories, quick("w4")), folder)
    return folder


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def fresh_logits(folders, ids, tmp_path) -> list[torch.Tensor]:
    """Logits of each folder from a new process that knows transformers alone."""
    from safetensors.torch import save_file

    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    out = tmp_path / "logits.safetensors"
    command = [sys.executable, "-c", FRESH, str(tmp_path / "ids.safetensors"), str(out), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = load_file(out)
    return [found[str(folder)] for folder in folders]


@pytest.mark.sample(10)
@pytest.mark.parametrize(("format", "granularity", "symmetric"), EXPRESSIBLE)
def test_round_trip_is_exact(tiny, tmp_path, format, granularity, symmetric):
    quantized = quantize(tiny, recipe(format=format, granularity=granularity, symmetric=symmetric))
    save(quantized, tmp_path / "plain", layout="compressed-tensors")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.dtype == torch.float32
    assert torch.equal(logits(plain), logits(quantized))
    card = save(quantized, tmp_path / "out")
    engines = not symmetric and granularity in ("channel", "g32")
    assert card.layout == ("vllm" if engines else "compressed-tensors")
    half = load(tmp_path / "out", dtype=torch.bfloat16)
    for name, tensor in quantized.quantization.tensors.items():
        expected = tensor.dequantize()
        assert torch.equal(plain.get_submodule(name).weight, expected), name
        assert torch.equal(half.get_submodule(name).weight, expected.bfloat16()), name
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.model.rotary_emb.inv_freq, tiny.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    "architecture", ["qwen2", "qwen3", "gemma3", "mistral", "qwen2_moe", "qwen3_moe", "mixtral"]
)
def test_architectures(tmp_path, architecture):
    base = tiny_model(architecture, num_hidden_layers=1)
    experts = (
        [{"match": "*.experts.*", "weights": None}]
        if architecture in ("qwen2_moe", "qwen3_moe", "mixtral")
        else []
    )
    quantized = quantize(base, recipe(experts, format="int4", granularity="g32", symmetric=False))
    save(quantized, tmp_path / "out", layout="compressed-tensors")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # Not to the bit: the sum over experts may be taken in another order.
    torch.testing.assert_close(logits(plain), logits(quantized), rtol=0, atol=1e-6)
    ours, theirs = quantized.state_dict(), load(tmp_path / "out").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_fresh_process(stories, saved, tmp_path):
    ids = torch.randint(3, 500, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = quantize(stories, quick("w4"))(ids).logits
    assert torch.equal(fresh_logits([saved], ids, tmp_path)[0], expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_are_exact_where_the_scales_have_the_models_dtype(tiny, tmp_path, dtype):
    base = tiny_model("llama", num_hidden_layers=1, tie_word_embeddings=True).to(getattr(torch, dtype))
    quantized = quantize(base, recipe(format="int3", granularity="g32", symmetric=False, scale_dtype=dtype))
    save(quantized, tmp_path / "out", layout="compressed-tensors")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == base.dtype
    logits(plain)  # decodes the weights
    for name in quantized.quantization.tensors:
        assert torch.equal(plain.get_submodule(name).weight, quantized.get_submodule(name).weight), name


def test_fp16_scales_in_a_bf16_model_cost_one_rounding(tmp_path):
    base = tiny_model("llama", num_hidden_layers=1).bfloat16()
    quantized = quantize(base, recipe(format="int4", granularity="g32"))
    save(quantized, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    logits(plain)
    for name in quantized.quantization.tensors:
        ours, theirs = (
            quantized.get_submodule(name).weight.double(),
            plain.get_submodule(name).weight.double(),
        )
        assert ((ours - theirs).abs() <= ours.abs() * 2**-7).all()


def test_overrides_become_groups_and_ignored_modules(tmp_path):
    base = tiny_model("llama", num_hidden_layers=2)
    overrides = [
        {"match": "model.layers.0.*", "weights": None},
        {"match": "*.down_proj", "weights": {"format": "fp8_e4m3", "granularity": "channel"}},
        {"match": "*.o_proj", "weights": {"format": "int8", "granularity": "channel", "symmetric": False}},
    ]
    quantized = quantize(base, recipe(overrides, format="int2", granularity="g32", symmetric=False))
    save(quantized, tmp_path / "out", layout="compressed-tensors")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(plain), logits(quantized))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    targets = [group["targets"] for group in config["config_groups"].values()]
    assert targets[0] == ["Linear"]
    assert sorted(targets[1:]) == [["model.layers.1.mlp.down_proj"], ["model.layers.1.self_attn.o_proj"]]
    assert config["format"] == "mixed-precision"
    assert "lm_head" in config["ignore"]
    assert len([name for name in config["ignore"] if name.startswith("model.layers.0.")]) == 7


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_stay_as_they_were_tied(tmp_path, tied):
    quantized = quantize(tiny_model("llama", num_hidden_layers=1, tie_word_embeddings=tied), "w8")
    save(quantized, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118 (not a dict)
    reloaded = load(tmp_path / "out")
    assert (reloaded.lm_head.weight is reloaded.model.embed_tokens.weight) is tied


def test_packed_and_fake_models_give_the_same_files(stories, saved, tmp_path):
    card = save(quantize(stories, quick("w4"), packed=True), tmp_path / "out")
    assert card == read_card(saved)


def test_standard_layouts_where_there_is_one():
    def args(**scheme):
        return weight_args(WeightScheme.model_validate(scheme), (96, 160))

    assert args(format="int4", granularity="g32").strategy == "group"
    assert args(format="int4", granularity="g32").group_size == 32
    assert args(format="int8", granularity="channel").strategy == "channel"
    assert args(format="fp8_e4m3", granularity="tensor").strategy == "tensor"
    assert args(format="int4", granularity="g32", symmetric=False).block_structure == [1, 32]
    assert args(format="int4", granularity="g64").block_structure == [1, 64]
    whole = WeightScheme(format="int4", granularity="g32", symmetric=False)
    assert weight_args(whole, (96, 160), grouped=True).group_size == 32
    assert weight_args(whole, (96, 24), grouped=True).strategy == "channel"
    assert weight_args(whole.with_granularity("g64"), (96, 160), grouped=True).block_structure == [1, 64]


def test_a_registered_layout_is_written_and_read(stories, tmp_path, monkeypatch):
    quantized, folder, ids = quantize(stories, quick("w4")), tmp_path / "out", torch.arange(3, 60)[None]
    with pytest.raises(BitassayError, match="layouts: no 'ours'"):
        save(quantized, folder, layout="ours")
    with monkeypatch.context() as patched:
        patched.setitem(LAYOUTS._items, "ours", LAYOUTS["bitassay"])
        assert save(quantized, folder, layout="ours").layout == "ours"
        with torch.inference_mode():
            assert torch.equal(load(folder)(ids).logits, quantized(ids).logits)
    with pytest.raises(BitassayError, match=r"bitassay\.json: layout: no 'ours'; there are"):
        load(folder)


def test_the_card_says_what_the_folder_is(stories, saved):
    card, w4 = read_card(saved), quick("w4")
    assert card is not None
    assert (card.recipe.recipe_id, card.recipe.name, card.dtype) == (w4.recipe_id, "w4", "float32")
    assert (card.base.name, card.base.weights_digest) == ("stories260k", stories.identity.weights_digest)
    assert card.bits_per_weight == bits_per_weight(quantize(stories, quick("w4")))
    loaded = bitassay.load(saved)
    assert (loaded.identity.recipe_id, loaded.identity.recipe_name) == (w4.recipe_id, "w4")
    assert not hasattr(loaded.config, "quantization_config")


def test_the_rest_goes_along(stories, saved, tmp_path):
    text = "Once upon a time"
    assert AutoTokenizer.from_pretrained(saved)(text).input_ids == stories.tokenizer(text).input_ids
    assert (saved / "generation_config.json").is_file()
    loaded = load(saved)
    loaded.tokenizer.save_pretrained(tmp_path / "dense")
    loaded.save_pretrained(tmp_path / "dense")  # dense weights are ordinary ones: they can be saved again
    assert torch.equal(logits(load(tmp_path / "dense")), logits(loaded))


@pytest.mark.sample(12)
@pytest.mark.parametrize("format", [name for name, fmt in FORMATS.items() if fmt.fixed_group is None])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_planned_bits_are_the_stored_ones(format, granularity, symmetric):
    if not symmetric and not FORMATS[format].has_asymmetric:
        pytest.skip("the format is symmetric")
    scheme = WeightScheme(format=format, granularity=granularity, symmetric=symmetric, scale="mse")
    weight = torch.randn(24, 100, generator=torch.Generator().manual_seed(0))
    assert (
        own.planned_bits(own.Stored(scheme=scheme), (24, 100)) == quantize_tensor(weight, scheme).stored_bits
    )


@pytest.mark.parametrize("format", ["fp8_e5m2", "binary"])
def test_what_the_format_cannot_say_is_refused(tiny, tmp_path, format):
    with pytest.raises(BitassayError, match=r"cannot hold model.layers.0.self_attn.q_proj in"):
        save(
            quantize(tiny, recipe(format=format, scale="mse")), tmp_path / "out", layout="compressed-tensors"
        )
    assert not list(tmp_path.iterdir())


def test_refusals_leave_nothing_behind(tiny, tmp_path, monkeypatch):
    with pytest.raises(BitassayError, match="not quantized"):
        save(tiny, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
        with pytest.raises(MissingError, match="1 MB are free"):
            save(quantize(tiny, "w8"), tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    with pytest.raises(BitassayError, match="not empty"):
        save(quantize(tiny, "w8"), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_a_changed_weight_is_refused(copied):
    path = copied / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BitassayError, match=r"model\.safetensors: changed since it was saved"):
        load(copied)


def test_a_changed_configuration_is_refused(copied):
    path = copied / "config.json"
    path.write_text(path.read_text().replace('"num_bits": 4', '"num_bits": 3'))
    with pytest.raises(BitassayError, match=r"config\.json: changed since it was saved"):
        load(copied)


def test_truncated_missing_and_added_files_are_refused(copied):
    path = copied / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(BitassayError, match="truncated"):
        load(copied)
    path.rename(copied / "other.safetensors")
    (copied / "other.safetensors").write_bytes(content)
    with pytest.raises(BitassayError, match=r"no model\.safetensors .*only other\.safetensors"):
        load(copied)
    path.write_bytes(content)
    with pytest.raises(BitassayError, match=r"other\.safetensors: this file is not one that was saved"):
        load(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"files": {"model.safetensors": "abc"}}, "files"),
        ({"bits_per_weight": -1}, "bits_per_weight"),
        ({"base": {"name": "x" * 2000}}, "base"),
        ({"surprise": 1}, "there is no field 'surprise'"),
    ],
)
def test_a_malformed_card_is_refused(copied, change, message):
    path = copied / CARD_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BitassayError, match=rf"bitassay\.json: {message}"):
        load(copied)


def test_a_card_that_is_no_json_or_too_large_is_refused(copied):
    (copied / CARD_FILE).write_text("{")
    with pytest.raises(BitassayError, match="not a JSON file"):
        load(copied)
    (copied / CARD_FILE).write_text(" " * (CARD_BYTES + 1))
    with pytest.raises(BitassayError, match="bytes, more than"):
        load(copied)


def test_the_recipes_id_is_computed_not_believed(copied):
    path = copied / CARD_FILE
    card = json.loads(path.read_text())
    card["recipe"]["weights"]["granularity"] = "g32"
    path.write_text(json.dumps(card))
    assert load(copied).identity.recipe_id != quick("w4").recipe_id


def w8a8(format="int8", **activations) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "w8a8",
            "weights": {"format": format, "granularity": "channel", "scale": "absmax"},
            "activations": {"format": format} | activations,
            "calibration": {"samples": 4, "tokens": 32},
        }
    )


W8A8 = {
    "dynamic": w8a8(),
    "asymmetric": w8a8(symmetric=False),
    "static": w8a8(scale="absmax"),
    "static-asymmetric": w8a8(scale="percentile", percentile=99.0, symmetric=False),
    "fp8": w8a8("fp8_e4m3"),
    "fp8-static": w8a8("fp8_e4m3", scale="absmax"),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", W8A8)
def test_rounded_inputs_go_to_engines_where_that_is_asked_for(kind, stories, tmp_path):
    quantized, folder = quantize(stories, W8A8[kind]), tmp_path / "w8a8"
    card = save(quantized, folder, layout="compressed-tensors")
    said = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert said["format"] == ("float-quantized" if "fp8" in kind else "int-quantized")
    assert said["input_activations"]["dynamic"] == ("static" not in kind)
    assert said["input_activations"]["symmetric"] == ("asymmetric" not in kind)
    stored = {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}
    weight = stored["model.layers.0.self_attn.q_proj.weight"]
    assert weight.dtype == (torch.float8_e4m3fn if "fp8" in kind else torch.int8)
    assert ("model.layers.0.self_attn.q_proj.input_scale" in stored) == ("static" in kind)
    assert plan_export(stories, W8A8[kind], "compressed-tensors").tensor_bytes == sum(
        tensor.nbytes for tensor in stored.values()
    )
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        wanted = quantized(ids).logits
        assert torch.equal(load(folder).eval()(ids).logits, wanted)  # the card says how ours are rounded
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
        plain = quantize(stories, Recipe.model_validate({**W8A8[kind].model_dump(), "activations": None}))
        unrounded = plain(ids).logits
        (folder / CARD_FILE).unlink()
        assert torch.equal(load(folder)(ids).logits, theirs)  # what another tool wrote is run as it says
    assert card.layout == "compressed-tensors"
    apart, rounding = (theirs - wanted).norm(), (unrounded - wanted).norm()
    share = 0.05 if "static" in kind else 1.5  # one grid for all is the same there, a token's may not be
    assert apart < share * rounding
    assert (theirs - unrounded).norm() > rounding / 2  # inputs are rounded there too


def test_rounded_inputs_that_engines_do_not_know(stories, tmp_path):
    for activations, why in (
        ({"format": "int16"}, "engines know inputs of 4 and 8 bits and e4m3, not int16"),
        ({"format": "fp8_e5m2"}, "not fp8_e5m2"),
        ({"outliers": {"sigma": 6}}, "no columns in 16 bits"),
        ({"scale_factor": 0.9}, "no factor on the scale of each token"),
    ):
        made = Recipe.model_validate(
            {**W8A8["dynamic"].model_dump(exclude_none=True), "activations": activations}
        )
        with pytest.raises(BitassayError, match=why):
            plan_export(stories, made, "compressed-tensors")
    assert plan_export(stories, W8A8["dynamic"]).layout == "bitassay"


def test_inputs_that_the_card_and_the_files_say_differently(stories, tmp_path):
    folder = tmp_path / "static"
    save(quantize(stories, W8A8["static"]), folder, layout="compressed-tensors")
    path = folder / CARD_FILE
    card = json.loads(path.read_text())
    card["inputs"]["model.layers.0.self_attn.q_proj"]["scale"] *= 2
    path.write_text(json.dumps(card))
    with pytest.raises(BitassayError, match=r"differ in the inputs of model\.layers\.0\.self_attn\.q_proj"):
        load(folder)


def test_what_another_tool_rounds_beside_weights_and_inputs_is_refused(stories, tmp_path):
    folder = tmp_path / "w8a8"
    save(quantize(stories, W8A8["dynamic"]), folder, layout="compressed-tensors")
    (folder / CARD_FILE).unlink()
    with pytest.raises(BitassayError, match="the model is quantized already"):
        quantize(load(folder), quick("w4"))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rounded = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True}
    said = config["quantization_config"]
    path.write_text(json.dumps(config | {"quantization_config": said | {"kv_cache_scheme": rounded}}))
    with pytest.raises(BitassayError, match="quantizes the KV cache too"):
        load(folder)
    by_token = rounded | {"strategy": "token", "dynamic": True}
    said["config_groups"]["group_0"]["output_activations"] = by_token
    path.write_text(json.dumps(config))
    with pytest.raises(BitassayError, match="quantizes what leaves a linear"):
        load(folder)


@pytest.mark.slow
@pytest.mark.real
def test_smollm2_in_a_fresh_process(tmp_path, record_property):
    base = bitassay.load("smollm2-135m")
    ids = base.tokenizer(corpus("wikitext2-raw").text[:4000], return_tensors="pt").input_ids[:, :512]
    assert ids.shape == (1, 512)
    expected, folders = {}, []
    for name in ("w8", "fp8", "w4", "w3", "w2"):
        quantized = quantize(base, quick(name))
        with torch.inference_mode():
            expected[name] = quantized(ids).logits
        save(quantized, tmp_path / name, layout="compressed-tensors")
        folders.append(tmp_path / name)
    for (name, ours), theirs in zip(expected.items(), fresh_logits(folders, ids, tmp_path), strict=True):
        difference = (ours - theirs).abs().max().item()
        print(f"{name}: perplexity {perplexity(ours, ids):.4f}, largest logits difference {difference}")
        record_property(name, difference)
        assert perplexity(theirs, ids) == perplexity(ours, ids), name
        assert difference == 0, name


def perplexity(logits, ids) -> float:
    return torch.nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:]).exp().item()


def test_the_memory_of_calibration_grows_with_its_text(stories):
    def memory(samples, **parts):
        recipe = Recipe(
            name="m", weights={"format": "int4"}, calibration={"samples": samples, "tokens": 512}, **parts
        )
        return plan_export(stories, recipe).memory_bytes

    state = 4 * 512 * stories.config.hidden_size
    # Of each sample what enters the layer and, where it runs as a whole, what it puts out.
    assert memory(256, gptq={}) - memory(128, gptq={}) == 128 * 2 * state
    assert memory(256, gptq={}, learned={}) - memory(128, gptq={}, learned={}) == 128 * 3 * state
    weights = sum(w.numel() for w in matrices(stories).values())
    assert memory(256, gptq={}, tune={}) - memory(256, gptq={}) == 4 * weights  # from which tuning goes on
    assert memory(128) == memory(64)  # nothing looks at it
