"""Encoder-decoders and encoders are refused from their configuration, before any weight is read."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from bitassay.cli import run
from bitassay.engines.load import load
from bitassay.errors import BitassayError
from bitassay.models.config import NOT_CAUSAL, check_causal

TWO_PARTS = [
    kind
    for kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    if kind != "encoder-decoder" and CONFIG_MAPPING[kind]().is_encoder_decoder
]


def folder_of(tmp_path, **config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"never.read": torch.zeros(1)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("kind", TWO_PARTS)
def test_encoder_decoders_in_one_line(tmp_path, kind):
    folder = folder_of(tmp_path, **CONFIG_MAPPING[kind]().to_dict())
    with pytest.raises(BitassayError) as error:
        load(folder)
    assert f"{kind} is an encoder-decoder" in error.value.problem
    assert "\n" not in error.value.problem


def test_there_are_many():
    assert {"t5", "bart", "mbart", "pegasus", "marian"} <= set(TWO_PARTS)


def test_an_encoder(tmp_path):
    folder = folder_of(tmp_path, model_type="bert", architectures=["BertForMaskedLM"])
    with pytest.raises(BitassayError, match="bert is an encoder here"):
        load(folder)


def test_the_same_encoder_as_a_decoder():
    config = CONFIG_MAPPING["bert"](is_decoder=True, architectures=["BertLMHeadModel"])
    check_causal(config, "here")


@pytest.mark.parametrize("kind", ["vit", "clip", "emu3_text_model"])
def test_no_language_model(tmp_path, kind):
    with pytest.raises(BitassayError, match=f"no causal language model of type {kind}"):
        load(folder_of(tmp_path, model_type=kind))


@pytest.mark.parametrize("kind", ["xlnet", "cpmant"])
def test_what_sees_later_tokens(tmp_path, kind):
    with pytest.raises(BitassayError, match="depends on what comes after"):
        load(folder_of(tmp_path, model_type=kind))


@pytest.mark.slow
def test_every_other_type_that_transformers_lists_is_let_through():
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config = AutoConfig.for_model(kind) if kind != "gemma4_assistant" else None
        if config is None or config.is_encoder_decoder or config.model_type != kind or kind in NOT_CAUSAL:
            continue
        check_causal(config, "here")


@pytest.mark.parametrize(
    "verb",
    [["quantize", "--recipe", "w8", "--out", "OUT"], ["eval"], ["prove", "--prompt", "a", "--out", "OUT"]],
)
def test_verbs(tmp_path, capfd, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    folder = folder_of(tmp_path, model_type="t5", is_encoder_decoder=True)
    words = [str(tmp_path / "out") if word == "OUT" else word for word in verb[1:]]
    assert run([verb[0], str(folder), *words], debug=False) == 2
    said = capfd.readouterr().err
    assert "t5 is an encoder-decoder" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
