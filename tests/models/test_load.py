"""Loading: what comes attached, and that no defect of a checkpoint passes for a model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitassay.engines.check import PROBE, check
from bitassay.engines.load import load
from bitassay.errors import BitassayError
from bitassay.models.identity import identity, tokenizer
from bitassay.models.options import as_dtype
from bitassay.models.weights import stored_tensors
from bitassay.record.hashing import digest_tensors
from bitassay.testing.tiny import tiny_model

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_a_loaded_model_is_ready_for_inference(folder):
    model = load(folder, dtype="bfloat16")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (
        tokenizer(model).decode(tokenizer(model)("Once upon a time").input_ids, skip_special_tokens=True)
        == "Once upon a time"
    )
    assert identity(model).name == "model"


def test_the_digest_is_of_the_stored_weights_and_survives_sharding(folder, tmp_path, stories):
    stories.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    (tmp_path / "sharded" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    one, many = (load(f, dtype=d) for f, d in ((folder, "float32"), (tmp_path / "sharded", "bfloat16")))
    assert identity(one).weights_digest == identity(many).weights_digest


def test_the_digest_notices_one_bit(folder):
    before = digest_tensors(stored_tensors(folder))
    change_weights(folder, lambda weights: weights[Q_PROJ].view(torch.int32)[3, 5].bitwise_xor_(1))
    assert digest_tensors(stored_tensors(folder)) != before


def test_the_tokenizer_digest_notices_the_vocabulary(folder, stories):
    assert identity(load(folder)).tokenizer_digest == identity(stories).tokenizer_digest
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text + "\n")
    assert identity(load(folder)).tokenizer_digest != identity(stories).tokenizer_digest


@pytest.mark.parametrize("keep", [0, 7, 1000, 500_000, -1])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BitassayError, match=r"model\.safetensors: truncated or not a safetensors file"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(folder, value):
    def spoil(weights):
        weights[Q_PROJ][3, 5] = value

    change_weights(folder, spoil)
    with pytest.raises(BitassayError, match=rf"{Q_PROJ} has 1 values that are NaN or infinite"):
        load(folder)


def test_infinities_that_cancel_are_found(folder):
    def spoil(weights):
        weights[Q_PROJ][0, :2] = torch.tensor([float("inf"), float("-inf")])

    change_weights(folder, spoil)
    with pytest.raises(BitassayError, match="2 values"):
        load(folder)


def test_large_finite_weights_are_no_defect(folder):
    """Their sum overflows, they do not."""

    def enlarge(weights):
        weights[Q_PROJ][:] = 3e38

    change_weights(folder, enlarge)
    load(folder)


def test_a_missing_weight(folder):
    change_weights(folder, lambda weights: weights.pop(Q_PROJ))
    with pytest.raises(BitassayError, match=rf"1 weights are missing, the first is {Q_PROJ}"):
        load(folder)


def test_a_weight_of_another_shape(folder):
    change_weights(folder, lambda weights: weights.update({Q_PROJ: torch.zeros(8, 64)}))
    with pytest.raises(BitassayError, match=rf"of another shape .* the first is {Q_PROJ}"):
        load(folder)


@pytest.mark.parametrize("layers", [3, 0, -1])
def test_a_config_that_drops_layers(folder, layers):
    change_config(folder, num_hidden_layers=layers)
    with pytest.raises(BitassayError, match=r"weights are of layers that config\.json does not have"):
        load(folder)


def test_a_missing_shard(folder, stories):
    (folder / "model.safetensors").unlink()
    stories.save_pretrained(folder, max_shard_size="300KB")
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(BitassayError, match=lost.name):
        load(folder)


@pytest.mark.parametrize("text", ["{broken", "", "{}", "[1]", "\x00"])
def test_a_broken_config(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(BitassayError, match=r"config\.json: (not a|model_type is None)"):
        load(folder)


@pytest.mark.parametrize(
    "values",
    [{"model_type": "lamma"}, {"hidden_act": "zap"}, {"hidden_size": "x"}, {"num_attention_heads": 0}],
)
def test_a_config_that_makes_no_sense(folder, values):
    change_config(folder, **values)
    with pytest.raises(BitassayError, match=str(folder)):
        load(folder)


def test_a_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{broken")
    with pytest.raises(BitassayError, match="transformers cannot load the tokenizer"):
        load(folder)


def test_unknown_dtype():
    with pytest.raises(BitassayError, match=r"unknown dtype 'bfloat'; the nearest are 'bfloat16'"):
        as_dtype("bfloat")


def test_a_model_from_elsewhere_has_no_identity():
    model = tiny_model("llama")
    del model.identity, model.tokenizer
    with pytest.raises(BitassayError, match="no identity"):
        identity(model)
    with pytest.raises(BitassayError, match="no tokenizer"):
        tokenizer(model)


def test_check_says_what_a_model_is(folder):
    found = check(folder)
    assert (
        found["layers"],
        found["hidden_size"],
        found["heads"],
        found["key_value_heads"],
        found["vocabulary"],
    ) == (
        5,
        64,
        8,
        4,
        512,
    )
    assert (found["linears"], found["experts"], found["routers"], found["parameters"]) == (35, 0, 0, 260_032)
    assert found["weights_sha256"] == digest_tensors(stored_tensors(folder))


def test_check_runs_the_model(folder):
    """Finite weights, infinite logits: only a forward pass shows it."""

    def enlarge(weights):
        weights["model.norm.weight"][:] = 1e38
        weights["model.embed_tokens.weight"] *= 1000

    change_weights(folder, enlarge)
    with pytest.raises(BitassayError, match="logits are NaN or infinite"):
        check(folder)


def test_check_refuses_a_tokenizer_of_another_model(folder, stories):
    content = json.loads((folder / "tokenizer.json").read_text())
    used = stories.tokenizer.tokenize(PROBE)[0]
    content["model"]["vocab"][used] = 600
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(BitassayError, match=r"tokens up to 600, but the model knows 512"):
        check(folder)
