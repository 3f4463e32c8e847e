"""Scales of inputs at run time: a saved model has them again, and only what knows of them reads it."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitassay
from bitassay.errors import BitassayError
from bitassay.quantization.export.card import CARD_FILE
from bitassay.quantization.export.gguf_file import write_gguf
from bitassay.quantization.export.plan import plan_export
from bitassay.quantization.export.save import save
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.record.files import read_json, write_json
from bitassay.record.hashing import digest_file

IDS = torch.arange(3, 60)[None]
W8 = {"format": "int8", "granularity": "channel", "scale": "absmax"}
TEXT = {"samples": 4, "tokens": 32}


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def believe(path) -> None:
    """As if the card had been written for this file."""
    card = read_json(path.parent / CARD_FILE)
    card["files"][path.name] = digest_file(path)
    write_json(path.parent / CARD_FILE, card)


def divided(**parts) -> Recipe:
    """Every linear divides what it reads at run time."""
    smoothing = {"method": "smoothquant", "places": ["inputs"]}
    fields = {"name": "divided", "weights": W8, "activations": {}, "calibration": TEXT}
    return Recipe.model_validate(fields | {"smoothing": smoothing} | parts)


@pytest.mark.sample(1)
@pytest.mark.parametrize("parts", [{}, {"gptq": {}}, {"tune": {"steps": 1}}, {"replication": {}}], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_inputs_divided_at_run_time_come_back(packed, parts, stories, tmp_path):
    model = bitassay.quantize(stories, divided(**parts), packed=packed)
    card = save(model, tmp_path / "out")
    again = bitassay.load(tmp_path / "out", packed=packed)
    assert torch.equal(logits(again), logits(model))
    assert card.layout == "bitassay"
    plan = plan_export(stories, divided(**parts))
    assert (plan.size_bytes, plan.bits_per_weight) == (card.size_bytes, card.bits_per_weight)


def test_inputs_divided_at_run_time_go_to_no_other_tool(stories, tmp_path):
    model = bitassay.quantize(stories, divided())
    for write in (
        lambda: save(model, tmp_path / "out", layout="compressed-tensors"),
        lambda: write_gguf(model, tmp_path / "out.gguf"),
    ):
        with pytest.raises(BitassayError, match="divide inputs at run time"):
            write()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: found.clear(), "no file holds"),
        (lambda found: found.update({k: v[:-1].clone() for k, v in found.items()}), "need torch.float32"),
        (lambda found: next(iter(found.values())).fill_(0), "above zero"),
        (lambda found: next(iter(found.values())).fill_(float("nan")), "above zero"),
    ],
)
def test_scales_of_inputs_that_do_not_fit_are_refused(change, says, stories, tmp_path):
    save(bitassay.quantize(stories, divided()), folder := tmp_path / "out")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    scales = {name: value for name, value in tensors.items() if name.endswith(".input_scales")}
    rest = {name: value for name, value in tensors.items() if name not in scales}
    change(scales)
    save_file(rest | scales, path, metadata={"format": "pt"})
    believe(path)
    with pytest.raises(BitassayError, match=says):
        bitassay.load(folder)
