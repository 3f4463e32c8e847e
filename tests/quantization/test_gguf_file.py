"""A GGUF file of ours, read by transformers' loader and by ours, is the model that was written."""

import subprocess
import sys

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from bitassay.engines.load import load
from bitassay.errors import BitassayError, MissingError
from bitassay.models.gguf_model import sources_of
from bitassay.models.opened import weights_of
from bitassay.quantization.export import save as export
from bitassay.quantization.export.gguf_file import write_gguf
from bitassay.quantization.export.gguf_like import recipe_like, types_of
from bitassay.quantization.export.gguf_plan import check_llama_cpp, plan_gguf
from bitassay.quantization.export.gguf_reload import reload_difference, written_before
from bitassay.quantization.export.gguf_schemes import MINIMUM
from bitassay.quantization.pipeline import quantize
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.runtime.model import Quantization, with_tensors
from bitassay.testing.architectures import save_tiny
from bitassay.testing.tiny import tiny_model

IDS = torch.arange(3, 60)[None]
FRESH = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
ids, out, file = map(Path, sys.argv[1:])
model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
with torch.inference_mode():
    save_file({"logits": model(load_file(ids)["ids"]).logits.contiguous()}, out)
assert not [name for name in sys.modules if name.startswith("bitassay")]
"""


def recipe(**weights) -> Recipe:
    return Recipe.model_validate(
        {"name": "test", "weights": {"granularity": "g32", "scale": "mse"} | weights}
    )


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Dequantized files go into a folder of the test's own."""
    monkeypatch.setenv("BITASSAY_CACHE", str(tmp_path / "cache"))


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def half_embedded(model):
    """The model with an embedding and a head that fp16 holds exactly, so that the matrices decide alone."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight.data = module.weight.data.half().float()
    return model


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_architectures_come_back_exactly(tmp_path, architecture, tied):
    # transformers' GGUF loader takes qwen3's heads to be 128 wide, as those of all published ones are.
    size = {"head_dim": 128} if architecture == "qwen3" else {}
    base = half_embedded(tiny_model(architecture, num_hidden_layers=2, tie_word_embeddings=tied, **size))
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    quantized = quantize(base, recipe(format="int4"))
    written = write_gguf(quantized, tmp_path / "w4.gguf")
    assert dict(written.stored_as) == {"int4 g32 -> Q4_0": 14}
    assert (written.bits_per_weight, written.relative_error) == (4.5, 0)
    again = load(tmp_path / "w4.gguf")
    ours, theirs = quantized.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert torch.equal(logits(again), logits(quantized))


@pytest.mark.parametrize("packed", [False, True])
def test_mixed_schemes_and_changed_parameters(tmp_path, packed):
    base = half_embedded(tiny_model("llama", num_hidden_layers=1, tie_word_embeddings=True))
    overrides = [
        {"match": "*.down_proj", "weights": {"format": "int8", "granularity": "g32"}},
        {"match": "*.up_proj", "weights": {"format": "int4", "granularity": "g32", "symmetric": False}},
        {"match": "*.gate_proj", "weights": {"format": "fp8_e4m3", "granularity": "channel"}},
        {"match": "*.k_proj", "weights": {"format": "ternary", "granularity": "g36"}},
        {"match": "*.v_proj", "weights": None},
    ]
    mixed = recipe(format="binary").model_copy(
        update={
            "overrides": Recipe.model_validate(
                {"name": "o", "weights": None, "overrides": overrides}
            ).overrides
        }
    )
    changed = {
        "model.norm.weight": base.model.norm.weight * 1.5,
        "lm_head.weight": base.lm_head.weight.flip(0).half().float(),
    }
    tensors = quantize(base, mixed).quantization.tensors
    quantized = with_tensors(base, Quantization(mixed, tensors, changed), packed=packed)
    written = write_gguf(quantized, tmp_path / "mixed.gguf")
    assert dict(written.stored_as) == {
        "binary g32 -> Q4_0": 2,
        "int8 g32 -> Q8_0": 1,
        "int4 g32 -> Q4_1": 1,
        "fp8_e4m3 channel -> F16": 1,
        "ternary g36 -> F16": 1,
    }
    assert 0 < written.relative_error < 1e-3
    again = load(tmp_path / "mixed.gguf")
    assert torch.equal(again.lm_head.weight, changed["lm_head.weight"])
    assert torch.equal(again.model.norm.weight, changed["model.norm.weight"])
    for name in ("o_proj", "q_proj"):
        tensor = tensors[f"model.layers.0.self_attn.{name}"]
        assert torch.equal(
            again.get_submodule(f"model.layers.0.self_attn.{name}").weight, tensor.dequantize()
        )
    torch.testing.assert_close(logits(again), logits(quantized), rtol=0, atol=2e-3)
    assert not torch.equal(logits(again), logits(quantized))


def test_a_fresh_process_that_knows_transformers_alone(stories, tmp_path):
    base = half_embedded(tiny_model("llama", num_hidden_layers=1))
    quantized = quantize(base, recipe(format="int2", symmetric=False))
    write_gguf(quantized, tmp_path / "w2.gguf")
    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    command = [
        sys.executable,
        "-c",
        FRESH,
        tmp_path / "ids.safetensors",
        tmp_path / "out",
        tmp_path / "w2.gguf",
    ]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "out")["logits"], logits(quantized))


def test_a_model_that_is_not_quantized_is_written_in_16_bits(tmp_path):
    base = tiny_model("qwen2", num_hidden_layers=1).bfloat16()
    written = write_gguf(base, tmp_path / "base.gguf")
    assert not written.stored_as
    kinds = {tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "base.gguf").tensors}
    assert kinds == {"BF16", "F32"}
    again = load(tmp_path / "base.gguf")
    for name, parameter in base.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter.float()), name


MIRRORED = {"symmetric": False, "zero_point": "mirrored"}
GRIDS = {
    "Q2_0": {"format": "int2", "granularity": "g64"} | MIRRORED,
    "Q4_0": {"format": "int4", "granularity": "g32"} | MIRRORED,
    "Q1_0": {"format": "binary", "granularity": "g128"},
    "TQ1_0": {"format": "ternary", "granularity": "g256"},
}


@pytest.mark.parametrize("kind", GRIDS)
def test_types_of_few_bits_come_back_exactly(tmp_path, kind):
    size = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
    base = half_embedded(tiny_model("llama", **size))
    made = recipe(**GRIDS[kind])
    quantized = quantize(base, made)
    planned = plan_gguf(base, made)
    written = write_gguf(quantized, tmp_path / "few.gguf")
    scheme = f"{GRIDS[kind]['format']} {GRIDS[kind]['granularity']}"
    assert dict(written.stored_as) == dict(planned.stored_as) == {f"{scheme} -> {kind}": 7}
    assert written.bits_per_weight == planned.bits_per_weight
    assert written.relative_error == 0
    stored = sum(tensor.n_bytes for tensor in GGUFReader(tmp_path / "few.gguf").tensors)
    assert planned.tensor_bytes == stored
    again = load(tmp_path / "few.gguf")
    for name, value in quantized.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert torch.equal(logits(again), logits(quantized))


@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "F32"])
def test_embeddings_and_head_in_a_type_of_their_own(tmp_path, name):
    base = tiny_model("llama", hidden_size=256, head_dim=64, num_hidden_layers=1)
    write_gguf(base, tmp_path / "base.gguf", embeddings=name)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "base.gguf").tensors}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == name
    assert kinds["blk.0.attn_q.weight"] == "F16"
    again = load(tmp_path / "base.gguf")
    given, back = base.lm_head.weight, again.lm_head.weight
    assert (back - given).norm() <= 0.02 * given.norm()
    assert torch.equal(back, given) is (name == "F32")


G32 = {"granularity": "g32"}


def like(path, base, name="w4"):
    types = types_of(path)
    made = recipe_like(recipe(format="int4").model_copy(update={"name": name}), types, base)
    return types, made


def test_the_types_of_another_file(tmp_path):
    """The same types and bytes for every tensor, and weights that lie nearer to the base model's."""
    size = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
    base = tiny_model("llama", **size)
    names = dict.fromkeys([name for name, _ in base.named_parameters()])
    given = {
        "o_proj": "Q4_K",
        "up_proj": "Q2_K",
        "gate_proj": "Q5_1",
        "q_proj": "Q8_0",
        "k_proj": "TQ2_0",
        "lm_head": "Q4_1",
        "v_proj": "F16",
        "down_proj": "Q2_0",
        "embed_tokens": "Q5_0",
    }
    kinds = {}
    for name in names:
        theirs = sources_of(name, "llama", 1)[0]
        kinds[theirs] = Kind[next((k for part, k in given.items() if part in name), "Q4_0")]
        kinds[theirs] = Kind.F32 if "norm" in name else kinds[theirs]
    absmax = {"q_proj": {"format": "int8"}, "k_proj": {"format": "ternary", "granularity": "g256"},
              "v_proj": None, "down_proj": {"format": "int2", "granularity": "g64"},
              "o_proj": {"format": "q4_k"}, "up_proj": {"format": "q2_k"}, "gate_proj": {"format": "int5"} | MINIMUM}  # fmt: skip
    overrides = [
        {"match": f"*.{part}", "weights": fields and ({} if "_k" in fields["format"] else G32) | fields}
        for part, fields in absmax.items()
    ]
    made = Recipe.model_validate(
        {"name": "o", "weights": {"format": "int4", "granularity": "g32"}, "overrides": overrides}
    )
    write_gguf(quantize(base, made), tmp_path / "given.gguf", kinds=kinds)
    types, wanted = like(tmp_path / "given.gguf", base)
    assert {name: kind for name, (kind, _) in types.items()} == kinds
    write_gguf(quantize(base, wanted), tmp_path / "ours.gguf", kinds=kinds)
    ours, theirs = (GGUFReader(tmp_path / name).tensors for name in ("ours.gguf", "given.gguf"))
    assert [(t.name, t.tensor_type, t.n_bytes) for t in ours] == [
        (t.name, t.tensor_type, t.n_bytes) for t in theirs
    ]
    near, far = load(tmp_path / "ours.gguf"), load(tmp_path / "given.gguf")
    for part in ("self_attn.q_proj", "mlp.down_proj"):
        weight = base.get_submodule(f"model.layers.0.{part}").weight
        errors = [(m.get_submodule(f"model.layers.0.{part}").weight - weight).norm() for m in (near, far)]
        assert errors[0] < errors[1], part


def test_files_that_cannot_be_followed(tmp_path):
    base = tiny_model("llama", num_hidden_layers=1)
    write_gguf(base, tmp_path / "plain.gguf")
    with pytest.raises(BitassayError, match="no quantized matrix"):
        like(tmp_path / "plain.gguf", base)
    types = types_of(tmp_path / "plain.gguf")
    shape = types["blk.0.attn_q.weight"][1]
    with pytest.raises(BitassayError, match=r"no grid here for IQ2_S \(1 matrices\)"):
        recipe_like(recipe(format="int4"), types | {"blk.0.attn_q.weight": (Kind.IQ2_S, shape)}, base)
    quantized = types | {"blk.0.attn_q.weight": (Kind.Q4_0, shape)}
    with pytest.raises(BitassayError, match="embedding or the head is in IQ3_S"):
        recipe_like(recipe(format="int4"), quantized | {"output.weight": (Kind.IQ3_S, (512, 96))}, base)
    with pytest.raises(BitassayError, match=r"of another model: blk\.0\.attn_k\.bias"):
        like(tmp_path / "plain.gguf", tiny_model("qwen2", num_hidden_layers=1))
    (tmp_path / "rubbish.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(BitassayError, match="cannot be read as GGUF"):
        types_of(tmp_path / "rubbish.gguf")


def test_a_file_of_more_bits_than_its_recipe_says_so(tmp_path):
    base = tiny_model("llama", num_hidden_layers=1)
    written = write_gguf(quantize(base, recipe(format="int2")), tmp_path / "wide.gguf")
    (note,) = [note for note in written.notes if "bits a weight" in note]
    assert note.startswith("4.50 bits a weight in this file, 2.50 in the recipe")
    equal = write_gguf(quantize(base, recipe(format="int4")), tmp_path / "equal.gguf")
    assert not [note for note in equal.notes if "bits a weight" in note]


def test_what_llama_cpp_has_no_type_for_is_known_beforehand():
    base = tiny_model("llama", num_hidden_layers=1)
    check_llama_cpp(plan_gguf(base, recipe(format="int4")))
    with pytest.raises(BitassayError, match=r"llama\.cpp has no type for .* in fp8_e4m3 channel"):
        check_llama_cpp(plan_gguf(base, recipe(format="fp8_e4m3", granularity="channel")))


def test_the_tokenizer_goes_along(stories, tmp_path):
    write_gguf(stories, tmp_path / "stories.gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="stories.gguf")
    for text in ("Once upon a time, there was a little girl.", "é and 17 — bytes"):
        assert theirs(text).input_ids == stories.tokenizer(text).input_ids


def test_a_gguf_base_hands_down_its_tokenizer(stories, tmp_path):
    write_gguf(stories, tmp_path / "base.gguf")
    base = load(tmp_path / "base.gguf")
    assert base.identity.source.gguf == tmp_path / "base.gguf"
    write_gguf(quantize(base, recipe(format="int8")), tmp_path / "w8.gguf")
    ours, theirs = (GGUFReader(tmp_path / name).fields for name in ("w8.gguf", "base.gguf"))
    handed_down = [key for key in theirs if key.startswith("tokenizer.")]
    assert len(handed_down) > 5
    for key in handed_down:
        assert ours[key].contents() == theirs[key].contents(), key
        assert ours[key].types == theirs[key].types, key


def test_the_file_says_where_it_comes_from(stories, tmp_path):
    quantized = quantize(stories, recipe(format="int8"))
    write_gguf(quantized, tmp_path / "w8.gguf")
    known = quantized.identity
    assert written_before(tmp_path / "w8.gguf") == (known.recipe_id, known.weights_digest, "")
    write_gguf(stories, tmp_path / "base.gguf")
    assert written_before(tmp_path / "base.gguf") is None
    (tmp_path / "rubbish.gguf").write_bytes(b"GGUF" + bytes(100))
    assert written_before(tmp_path / "rubbish.gguf") is None


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("mixtral", {}, "mixtral family"),
        ("mistral", {"sliding_window": 64}, "sliding windows"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "stretched",
        ),
    ],
)
def test_what_llama_cpp_would_run_as_another_model_is_refused(tmp_path, architecture, changes, message):
    base = tiny_model(architecture, num_hidden_layers=1, **changes)
    with pytest.raises(BitassayError, match=message):
        write_gguf(base, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*"))


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tmp_path):
    base = tiny_model("llama", num_hidden_layers=1)
    base.tokenizer = None
    with pytest.raises(BitassayError, match="no tokenizer"):
        write_gguf(base, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_file_in_the_way_and_a_full_disk(stories, tmp_path, monkeypatch):
    (tmp_path / "mine.gguf").write_text("keep me")
    with pytest.raises(BitassayError, match="exists already"):
        write_gguf(stories, tmp_path / "mine.gguf")
    assert (tmp_path / "mine.gguf").read_text() == "keep me"
    usage = export.shutil._ntuple_diskusage(10**9, 10**9, 10**5)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MissingError, match="0 MB are free"):
        write_gguf(stories, tmp_path / "deep" / "out.gguf")
    assert not (tmp_path / "deep").exists()


def test_a_truncated_file_is_refused(stories, tmp_path):
    path = tmp_path / "stories.gguf"
    write_gguf(stories, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BitassayError, match=r"stories\.gguf: cannot be read as GGUF"):
        load(path)


TYPES = {"format": "int4", "granularity": "g32", "symmetric": False, "scale": "mse"}
STREAMED = {
    "as it is": None,
    "rotated": {"weights": TYPES, "rotation": {}},
    "solved": {
        "weights": {"format": "int8", "granularity": "g32"},
        "calibration": {"samples": 2, "tokens": 16},
        "gptq": {},
    },
}


@pytest.mark.parametrize("case", STREAMED)
def test_an_opened_model_gives_the_same_file(tmp_path, case):
    folder = save_tiny("llama", tmp_path / "model")
    files = {}
    for opened in (False, True):
        model = load(folder, opened=opened)
        if (parts := STREAMED[case]) is not None:
            spec = Recipe.model_validate({"name": case, **parts})
            model = quantize(model, spec, work=tmp_path / f"work-{opened}")
        files[opened] = tmp_path / f"{opened}.gguf"
        write_gguf(model, files[opened], embeddings=None if parts is None else "Q8_0")
        assert weights_of(model) is None or weights_of(model).holds.total() == 0
        assert reload_difference(model, files[opened], IDS) <= (1e-3 if parts is None else 0.3)
    assert files[True].read_bytes() == files[False].read_bytes()
    assert {path.name for path in tmp_path.iterdir() if ".gguf" in path.name} == {"True.gguf", "False.gguf"}
    other = load(save_tiny("llama", tmp_path / "other", seed=3), opened=True)
    assert reload_difference(other, files[True], IDS) > 1e-2
