"""torchao's models beside ours."""

import pytest
import torch

import bitassay
from bitassay.errors import MissingError
from bitassay.studies import torchao_models
from bitassay.studies.eight_bit.study import both_sides
from bitassay.studies.torchao_models import torchao_model

IDS = torch.arange(5, 60)[None]


@pytest.fixture(autouse=True)
def _little_text(monkeypatch):
    monkeypatch.setattr(torchao_models, "SAMPLES", 4)


@torch.inference_mode()
def distance(model, base):
    """Relative distance of logits."""
    wanted = base(IDS).logits
    return ((model(IDS).logits - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("smoothed", [False, True])
def test_its_int8_is_as_near_as_ours(stories, smoothed):
    pytest.importorskip("torchao")
    before = stories(IDS).logits
    theirs = torchao_model(stories, "int8", smoothed=smoothed)
    ours = bitassay.quantize(stories, both_sides("int8", smoothed, False).recipe)
    assert 0 < distance(theirs, stories) < 0.1
    assert 0.7 < distance(ours, stories) / distance(theirs, stories) < 1.4
    assert torch.equal(stories(IDS).logits, before)


def test_smoothing_changes_its_model(stories):
    pytest.importorskip("torchao")
    plain, smoothed = (torchao_model(stories, "int8", smoothed=s)(IDS).logits for s in (False, True))
    assert not torch.equal(plain, smoothed)


def test_fp8_without_a_device_for_it_says_so(stories):
    pytest.importorskip("torchao")
    if torch.cuda.is_available():
        pytest.skip("there is a device for it")
    with pytest.raises(MissingError, match="Float8 dynamic quantization requires CUDA"):
        torchao_model(stories, "fp8", smoothed=False)


def test_without_torchao(stories, monkeypatch):
    monkeypatch.setattr(torchao_models, "find_spec", lambda _: None)
    with pytest.raises(MissingError, match="torchao is not installed"):
        torchao_model(stories, "int8", smoothed=False)
