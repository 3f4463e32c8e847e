import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitassay.engines.load import load
from bitassay.errors import BitassayError
from bitassay.models.lockstep import Forward, in_step
from bitassay.models.opened import is_opened, present, weights_of
from bitassay.models.weights import Entry
from bitassay.testing.architectures import architectures, save_tiny

TOKENS = torch.arange(3, 27)[None] * 7 % 400 + 3
# Renamed and joined experts, transposed matrices, keys handed from layer to layer, a tied head.
KINDS = ["llama", "mixtral", "gpt2", "gemma3n_text", "qwen2"]
# They look at weights before these are used, or have no single list of layers.
NOT_OPENED = ["llama4", "llama4_text", "gemma4", "reformer", "hrm_text"]


def logits(model):
    with torch.inference_mode():
        return model(TOKENS, use_cache=False).logits


def counted(read, old=Entry.read):
    return lambda entry, *dtype: read.append(entry.key) or old(entry, *dtype)


def is_empty(model):
    weights = weights_of(model)
    return not weights.held and all(weights.empty[name] is value for name, value in model.named_parameters())


@pytest.fixture
def folder(tmp_path):
    return save_tiny("llama", tmp_path / "model")


@pytest.mark.parametrize("kind", KINDS)
def test_an_opened_model_computes_what_the_loaded_one_does_and_keeps_nothing(kind, tmp_path):
    folder = save_tiny(kind, tmp_path)
    opened = load(folder, opened=True)
    assert is_opened(opened)
    assert is_empty(opened)
    assert torch.equal(logits(opened), logits(load(folder)))
    assert is_empty(opened)


def test_a_model_that_fits_is_loaded(folder):
    assert not is_opened(load(folder, memory=10**9))
    assert not is_opened(load(folder))
    assert is_opened(load(folder, memory=1000))


def test_what_is_present_is_read_once_and_forgotten_by_the_last_who_needs_it(folder, monkeypatch):
    opened, name = load(folder, opened=True), "model.layers.1"
    read = []
    monkeypatch.setattr(Entry, "read", counted(read))
    weight = f"{name}.mlp.up_proj.weight"
    with present(opened, name):
        with present(opened, f"{name}.mlp"):
            assert not opened.get_parameter(weight).is_meta
        assert torch.equal(opened.get_parameter(weight), load_file(folder / "model.safetensors")[weight])
        assert opened.model.layers[0].mlp.up_proj.weight.is_meta
        assert sorted(read) == sorted(key for key in weights_of(opened).empty if key.startswith(f"{name}."))
    assert is_empty(opened)


def test_weights_are_forgotten_where_a_forward_fails(folder, monkeypatch):
    opened = load(folder, opened=True)

    def fail(*_, **__):
        raise RuntimeError("no")

    monkeypatch.setattr(opened.model.layers[1].mlp, "forward", fail)
    with pytest.raises(RuntimeError, match="no"):
        logits(opened)
    assert is_empty(opened)


def changed(folder, change):
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_missing_weight_is_refused_before_any_is_read(folder):
    changed(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        BitassayError, match=r"1 weights are missing, the first is model\.layers\.1\.mlp\.up_proj"
    ):
        load(folder, opened=True)


@pytest.mark.parametrize(
    ("value", "why"), [(torch.full((96, 64), torch.nan), "NaN"), (torch.zeros(4, 64), "another shape")]
)
def test_a_wrong_weight_is_refused_when_it_is_read(folder, value, why):
    changed(folder, lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": value}))
    opened = load(folder, opened=True)
    with present(opened, "model.layers.0"), pytest.raises(BitassayError, match=why):
        logits(opened)


def test_a_model_that_looks_at_weights_before_they_are_used_is_refused(tmp_path):
    with pytest.raises(BitassayError, match="looks at weights before they are used"):
        logits(load(save_tiny("llama4_text", tmp_path), opened=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(architectures()) - set(KINDS)))
def test_every_architecture_computes_the_same_or_is_refused(kind, tmp_path):
    folder = save_tiny(kind, tmp_path)
    try:
        wanted = logits(load(folder))
    except BitassayError:
        return
    try:
        assert torch.equal(logits(load(folder, opened=True)), wanted)
    except (BitassayError, RuntimeError):
        assert kind in NOT_OPENED


def test_forwards_in_step_read_each_layer_once(folder, monkeypatch):
    opened, loaded = load(folder, opened=True), load(folder)
    rows = [(TOKENS + place) % 400 for place in range(3)]
    models = [opened, loaded, opened]
    forwards = [Forward(m, lambda m=m, row=row: m(row).logits) for m, row in zip(models, rows, strict=True)]
    with torch.no_grad():
        wanted = [loaded(row).logits for row in rows]
        read = []
        monkeypatch.setattr(Entry, "read", counted(read))
        for found, expected in zip(in_step(forwards), wanted, strict=True):
            assert torch.equal(found, expected)
    assert sorted(read) == sorted(weights_of(opened).entries)
    assert is_empty(opened)


def test_what_was_yielded_is_not_kept(folder):
    opened = load(folder, opened=True)
    results = in_step([Forward(opened, lambda: logits(opened)) for _ in range(3)])
    for result in results:
        known = weakref.ref(result)
        del result
        assert known() is None


def test_an_error_in_one_forward_ends_them_all(folder):
    opened = load(folder, opened=True)

    def fail():
        opened(TOKENS)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        list(in_step([Forward(opened, lambda: opened(TOKENS)), Forward(opened, fail)]))
    assert is_empty(opened)
    forwards = in_step([Forward(opened, lambda: opened(TOKENS)) for _ in range(3)])
    next(forwards)
    forwards.close()
    assert is_empty(opened)
