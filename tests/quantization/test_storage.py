"""Our own layout: whatever a QuantizedTensor holds comes back as it was, and nothing that was tampered with
does."""

import json
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitassay.engines.load import load
from bitassay.errors import BitassayError, MissingError
from bitassay.quantization.codes import storage
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.codes.tensor import LowRank, QuantizedTensor
from bitassay.quantization.export.card import CARD_FILE, hashed_files, read_card
from bitassay.quantization.export.plan import plan_export
from bitassay.quantization.export.save import save
from bitassay.quantization.pipeline import quantize
from bitassay.quantization.recipe.formats import FORMATS
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.runtime.model import Quantization, bits_per_weight, size_bytes, with_tensors
from bitassay.record.hashing import digest_file
from bitassay.testing.tiny import tiny_model

IDS = torch.arange(3, 60)[None]
Q_PROJ = "model.layers.0.self_attn.q_proj"
SCHEMES = [
    {"format": "binary", "granularity": "g36", "scale": "mse"},
    {"format": "binary", "granularity": "g32", "scale": "mse", "symmetric": False},
    {"format": "fp8_e5m2", "granularity": "tensor"},
    {"format": "ternary", "granularity": "g36", "scale_dtype": "float32"},
    {"format": "int3", "granularity": "g36", "symmetric": False},
    {"format": "int4", "granularity": "channel", "scale_dtype": "bfloat16"},
    {"format": "int2", "granularity": "g32", "offset": 0.5},
    {"format": "int4", "granularity": "g36", "symmetric": False, "zero_point": "free"},
    {"format": "int2", "granularity": "g36", "symmetric": False, "zero_point": "middle"},
    {"format": "int3", "granularity": "adaptive64", "symmetric": False},
    {"format": "int4", "granularity": "g32", "restricted": True},
    {"format": "binary", "granularity": "g32", "symmetric": False, "column_scales": True, "residual": 0.3},
]
FRESH = """
import sys, torch, bitassay
from safetensors.torch import load_file, save_file
ids, out, folder = sys.argv[1:]
with torch.inference_mode():
    tokens = load_file(ids)["ids"]
    found = {kind: bitassay.load(folder, packed=kind == "packed")(tokens).logits for kind in ("fake", "packed")}
save_file({kind: logits.contiguous() for kind, logits in found.items()}, out)
"""


@pytest.fixture(scope="module")
def tiny():
    return tiny_model("llama", num_hidden_layers=1, tie_word_embeddings=True)


def recipe(**weights) -> Recipe:
    return Recipe.model_validate({"name": "test", "weights": weights})


def with_everything(base):
    """A quantization with all that a matrix may have beside its codes, and changed parameters: a gain, and a
    head that is no longer the embedding."""
    plain = recipe(format="binary", granularity="g32", scale="mse")
    second = WeightScheme.model_validate({"format": "ternary", "granularity": "g36"})
    generator = torch.Generator().manual_seed(0)
    tensors = dict(quantize(base, plain).quantization.tensors)
    for place, name in enumerate(sorted(tensors)):
        tensor, weight = tensors[name], base.get_submodule(name).weight
        left = weight - tensor.dequantize()
        if place % 2:
            tensors[name] = tensor = replace(tensor, residual=quantize_tensor(left, second))
        if place % 3:
            shapes = (weight.shape[0], place), (place, weight.shape[1])
            factors = [torch.randn(shape, generator=generator).div(50).half() for shape in shapes]
            tensors[name] = replace(tensor, low_rank=LowRank(*factors))
    head = base.get_output_embeddings().weight
    changed = {
        "model.norm.weight": base.model.norm.weight * 1.5,
        "lm_head.weight": head + torch.randn(head.shape, generator=generator) / 10,
    }
    return with_tensors(base, Quantization(plain, tensors, changed))


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """A finished folder; tests work on copies."""
    folder = tmp_path_factory.mktemp("saved") / "everything"
    save(with_everything(tiny), folder)
    return folder


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def same(ours, theirs) -> bool:
    """Whether two values are equal in every bit, fields of dataclasses included."""
    if isinstance(ours, Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if is_dataclass(ours):
        return all(same(getattr(ours, f.name), getattr(theirs, f.name)) for f in fields(ours))
    return ours == theirs


def forge(folder, tensors=None, card=None):
    """Change a folder as somebody would who knows that the card has digests."""
    path = folder / "model.safetensors"
    if tensors is not None:
        content = load_file(path)
        tensors(content)
        save_file(content, path, metadata={"format": "pt"})
    said = json.loads((folder / CARD_FILE).read_text())
    if card is not None:
        card(said)
    said["files"] = {file.name: digest_file(file) for file in hashed_files(folder)}
    (folder / CARD_FILE).write_text(json.dumps(said))


@pytest.mark.sample(6)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: "-".join(map(str, scheme.values())))
def test_a_scheme_comes_back_to_the_bit(tiny, tmp_path, scheme):
    quantized = quantize(tiny, recipe(**scheme))
    card = save(quantized, tmp_path / "out", layout="bitassay")
    # Which adaptive groups there are stands in the card.
    beside = sum(t.granularity.layout_bits(t.shape[1]) for t in quantized.quantization.tensors.values())
    weights = sum(t.shape[0] * t.shape[1] for t in quantized.quantization.tensors.values())
    assert card.layout == "bitassay"
    assert card.stored_bits_per_weight == pytest.approx(card.bits_per_weight - beside / weights, rel=1e-12)
    fake = load(tmp_path / "out")
    packed = load(tmp_path / "out", packed=True)
    assert same(fake.quantization, quantized.quantization)
    assert torch.equal(logits(fake), logits(quantized))
    assert torch.equal(logits(packed), logits(with_tensors(tiny, quantized.quantization, packed=True)))
    assert bits_per_weight(fake) == bits_per_weight(quantized) == card.bits_per_weight


@pytest.mark.sample(16)
@pytest.mark.parametrize("format", [name for name, fmt in FORMATS.items() if fmt.fixed_group is None])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "g32", "g36"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_expected_is_what_is_stored(format, granularity, symmetric):
    if not symmetric and not FORMATS[format].has_asymmetric:
        pytest.skip("the format is symmetric")
    scheme = WeightScheme(format=format, granularity=granularity, symmetric=symmetric, scale="mse")
    weight = torch.randn(24, 100, generator=torch.Generator().manual_seed(0))
    tensor = quantize_tensor(weight, scheme)
    second = quantize_tensor(weight - tensor.dequantize(), scheme)
    factors = LowRank(torch.randn(24, 3).bfloat16(), torch.randn(3, 100).bfloat16())
    for found in (tensor, replace(tensor, residual=second, low_rank=factors)):
        stored, parts = storage.description(found), storage.stored_tensors(found)
        expected = storage.expected_tensors(stored, (24, 100))
        assert {key: (part.dtype, tuple(part.shape)) for key, part in parts.items()} == expected
        assert storage.planned_bits(stored, (24, 100)) == found.stored_bits
        assert same(storage.read_tensor(parts, stored, (24, 100)), found)


def test_everything_beside_the_codes_comes_back(tiny, saved):
    quantized, card = with_everything(tiny), read_card(saved)
    assert (card.layout, sorted(card.parameters)) == ("bitassay", ["lm_head.weight", "model.norm.weight"])
    fake = load(saved)
    assert torch.equal(logits(fake), logits(quantized))
    assert fake.lm_head.weight is not fake.model.embed_tokens.weight
    assert not fake.config.tie_word_embeddings
    assert same(fake.quantization, quantized.quantization)
    packed = load(saved, packed=True)
    assert torch.equal(logits(packed), logits(with_tensors(tiny, quantized.quantization, packed=True)))


def test_changed_parameters_go_along_in_the_compressed_tensors_layout_too(tiny, tmp_path):
    plain = quantize(tiny, recipe(format="int4", granularity="g32")).quantization
    quantized = with_tensors(tiny, replace(plain, parameters=with_everything(tiny).quantization.parameters))
    assert save(quantized, tmp_path / "out").layout == "compressed-tensors"
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(theirs), logits(quantized))
    assert not torch.equal(logits(quantized), logits(quantize(tiny, plain.recipe)))
    assert torch.equal(logits(load(tmp_path / "out")), logits(quantized))


@pytest.mark.slow
def test_a_fresh_process(tiny, saved, tmp_path):
    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    command = [sys.executable, "-c", FRESH, tmp_path / "ids.safetensors", tmp_path / "out", saved]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    quantized = with_everything(tiny)
    found = load_file(tmp_path / "out")
    assert torch.equal(found["fake"], logits(quantized))
    assert torch.equal(found["packed"], logits(with_tensors(tiny, quantized.quantization, packed=True)))


def test_a_packed_model_saves_the_same_folder(tiny, saved, tmp_path):
    packed = with_tensors(tiny, with_everything(tiny).quantization, packed=True)
    assert save(packed, tmp_path / "out") == read_card(saved)


def test_in_another_dtype_the_weights_are_rounded_once(saved):
    fake = load(saved, dtype="bfloat16")
    for name, tensor in fake.quantization.tensors.items():
        assert torch.equal(fake.get_submodule(name).weight, tensor.dequantize().bfloat16()), name


def test_plain_transformers_refuses_the_folder(saved):
    with pytest.raises(ValueError, match="quant_method"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_codes_of_a_folder_without_a_card_are_not_made_up(copied):
    with pytest.raises(BitassayError, match="holds no codes"):
        load(Path(__file__).parents[2] / "src/bitassay/testing/stories260k", packed=True)
    (copied / CARD_FILE).unlink()
    with pytest.raises(BitassayError, match="transformers cannot load it"):
        load(copied)


def change(key, value):
    return lambda tensors: tensors.update({key: value(tensors.pop(key))})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (change(f"{Q_PROJ}.packed", lambda t: t[:-1]), r"q_proj\.packed is torch.uint8 \[1151\], .* need"),
        (change(f"{Q_PROJ}.packed", lambda t: t.to(torch.int8)), r"q_proj\.packed is torch.int8"),
        (change(f"{Q_PROJ}.scale", lambda t: t.float()), r"q_proj\.scale is torch.float32"),
        (change(f"{Q_PROJ}.scale", lambda t: t.T.contiguous()), r"q_proj\.scale is torch.float16 \[3, 96\]"),
        (change(f"{Q_PROJ}.scale", lambda t: t * torch.inf), r"q_proj\.scale has values that are NaN"),
        (change(f"{Q_PROJ}.residual.packed", lambda t: t | 255), r"q_proj: packed holds bytes that are no"),
        (change(f"{Q_PROJ}.low_rank.a", lambda t: t[:, 1:].contiguous()), r"low_rank\.a is torch.float16"),
        (lambda tensors: tensors.pop(f"{Q_PROJ}.residual.scale"), r"no file holds .*residual\.scale"),
        (lambda tensors: tensors.pop("model.norm.weight"), r"weights are missing, .* model\.norm\.weight"),
        (change("model.norm.weight", lambda t: t[:-1]), r"of another shape .* model\.norm\.weight"),
        (lambda tensors: tensors.update(surprise=torch.ones(1)), r"surprise belongs to nothing"),
        (lambda tensors: tensors.update({f"{Q_PROJ}.mean": torch.ones(96, 3)}), r"q_proj\.mean"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(copied, tensors, message):
    forge(copied, tensors=tensors)
    with pytest.raises(BitassayError, match=f"{copied}.*{message}"):
        load(copied)


def said(key, value):
    return lambda card: card.update({key: value})


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (said("layout", "compressed-tensors"), "schemes: it has no codes of one bit"),
        (said("layout", "other"), "layout"),
        (lambda card: card["matrices"].update({Q_PROJ: 99}), "no such place in schemes"),
        (lambda card: card["matrices"].update({Q_PROJ: -1}), "matrices"),
        (lambda card: card["matrices"].update({"model.norm": 0}), "the model has no matrix model.norm"),
        (lambda card: card["matrices"].pop(Q_PROJ), "weights are missing"),
        (lambda card: card["schemes"][0]["scheme"].update(format="int7"), "unknown format"),
        (lambda card: card["schemes"][0].update(surprise=1), "surprise"),
        (
            lambda card: card["recipe"].update(weights={"format": "int7"}),
            r"recipe\.weights\.format: unknown format",
        ),
        (
            lambda card: card["recipe"].update(calibration={"corpus": "/etc/hosts.txt"}),
            r"recipe\.calibration\.corpus: .* without its digest",
        ),
        (said("parameters", ["model.nothing"]), "the model has no parameter model.nothing"),
        (said("parameters", ["x" * 2000]), "parameters"),
    ],
)
def test_cards_that_do_not_fit_are_refused(copied, card, message):
    forge(copied, card=card)
    with pytest.raises(BitassayError, match=f"{copied}.*{message}"):
        load(copied)


def test_a_configuration_of_another_size_is_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"intermediate_size": 168}))
    forge(copied)
    with pytest.raises(BitassayError, match=r"gate_proj\.packed is .* need"):
        load(copied)


@pytest.mark.parametrize("keep", [0, 7, 1000, -1])
def test_truncated_files_are_refused(copied, keep):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BitassayError, match=r"model\.safetensors: truncated"):
        load(copied)


def test_a_header_that_is_too_large_is_refused(copied):
    path = copied / "model.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(BitassayError, match=r"model\.safetensors: truncated or not a safetensors file"):
        load(copied)


def test_one_changed_bit_is_refused(copied):
    path = copied / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BitassayError, match=r"model\.safetensors: changed since it was saved"):
        load(copied)


def test_a_second_file_of_tensors_is_refused(copied):
    content = load_file(copied / "model.safetensors")
    save_file({f"{Q_PROJ}.packed": content[f"{Q_PROJ}.packed"]}, copied / "other.safetensors")
    forge(copied)
    with pytest.raises(BitassayError, match=r"other\.safetensors: nothing loads this file"):
        load(copied)


def test_a_full_disk_leaves_nothing_behind(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
        with pytest.raises(MissingError, match="1 MB are free"):
            save(with_everything(tiny), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_false_shapes_of_compressed_tensors_are_refused(tiny, tmp_path):
    save(quantize(tiny, recipe(format="int4", granularity="g32")), tmp_path / "out")
    forge(tmp_path / "out", tensors=change(f"{Q_PROJ}.weight_shape", lambda t: torch.tensor([96, 9])))
    with pytest.raises(BitassayError, match=r"weight_shape says \[96, 9\], the model \[96, 96\]"):
        load(tmp_path / "out")
    (tmp_path / "out" / CARD_FILE).unlink()
    with pytest.raises(BitassayError, match=r"weight_shape says \[96, 9\], config.json \[96, 96\]"):
        load(tmp_path / "out")


def test_ternary_codes_of_compressed_tensors_beyond_one_are_refused(tiny, tmp_path):
    save(quantize(tiny, recipe(format="ternary", granularity="g32")), tmp_path / "out")
    forge(tmp_path / "out", tensors=change(f"{Q_PROJ}.weight_packed", lambda t: torch.zeros_like(t)))
    with pytest.raises(BitassayError, match=r"weight_packed holds codes beyond -1 \.\.\. 1"):
        load(tmp_path / "out")


INT4 = {"format": "int4", "granularity": "g32"}


def test_a_rotation_at_run_time_comes_back(tiny, tmp_path):
    rotated = Recipe.model_validate(
        {"name": "rotated", "weights": INT4, "rotation": {"r4": True, "without_hadamard": "blocks"}}
    )
    quantized = quantize(tiny, rotated)
    assert save(quantized, tmp_path / "out").layout == "bitassay"
    for packed in (False, True):
        again = load(tmp_path / "out", packed=packed)
        assert torch.equal(logits(again), logits(with_tensors(tiny, quantized.quantization, packed=packed)))
    with pytest.raises(BitassayError, match="the recipe's rotation"):
        save(quantized, tmp_path / "other", layout="compressed-tensors")


def test_a_folded_rotation_is_plain_weights(tiny, tmp_path):
    rotated = Recipe.model_validate({"name": "rotated", "weights": INT4, "rotation": {}})
    quantized = quantize(tiny, rotated)
    planned = plan_export(tiny, rotated)
    assert save(quantized, tmp_path / "out").layout == planned.layout == "compressed-tensors"
    assert (planned.bits_per_weight, planned.size_bytes) == (
        bits_per_weight(quantized),
        size_bytes(quantized),
    )
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(quantized))
    assert torch.equal(logits(load(tmp_path / "out")), logits(quantized))


def test_low_rank_factors_are_planned_and_come_back(tiny, tmp_path):
    wanted = Recipe.model_validate(
        {
            "name": "low-rank",
            "weights": INT4,
            "low_rank": {"rank": 3, "dtype": "bfloat16"},
            "calibration": {"samples": 2, "tokens": 16},
        }
    )
    planned, quantized = plan_export(tiny, wanted), quantize(tiny, wanted)
    assert save(quantized, tmp_path / "out").layout == planned.layout == "bitassay"
    assert (planned.bits_per_weight, planned.size_bytes) == (
        bits_per_weight(quantized),
        size_bytes(quantized),
    )
    assert torch.equal(logits(load(tmp_path / "out")), logits(quantized))


@pytest.mark.sample(3)
@pytest.mark.parametrize("architecture", ["qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v2", "gpt_oss"])
@pytest.mark.parametrize("some", [True, False])
def test_mixtures_of_experts(tmp_path, architecture, some):
    base = tiny_model(architecture, num_hidden_layers=2)
    overrides = [{"match": "*.experts.*.2", "weights": None}] if some else []
    quantized = quantize(
        base, Recipe.model_validate({"name": "moe", "weights": INT4, "overrides": overrides})
    )
    plainly = not some and architecture != "gpt_oss"  # which has no experts one by one
    chosen = "compressed-tensors" if plainly else "bitassay"
    assert save(quantized, tmp_path / "out").layout == chosen
    if plainly:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(logits(plain), logits(quantized), rtol=0, atol=1e-6)
    attention = "eager" if architecture == "gpt_oss" else "sdpa"
    again, packed = (load(tmp_path / "out", packed=codes, attention=attention) for codes in (False, True))
    assert same(again.quantization, quantized.quantization)
    ours, theirs = quantized.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    torch.testing.assert_close(logits(packed), logits(quantized), rtol=0, atol=1e-6)
    assert save(with_tensors(base, quantized.quantization, packed=True), tmp_path / "packed") == read_card(
        tmp_path / "out"
    )


def test_stored_tensors_cover_every_field(tiny):
    """A new field of QuantizedTensor has to be thought of here too."""
    known = {"scheme", "shape", "packed", "scale", "zero_point", "mean", "residual", "residual_columns"}
    known |= {"column_scale", "low_rank", "multiples", "mean_multiples"}
    assert {field.name for field in fields(QuantizedTensor)} == known
