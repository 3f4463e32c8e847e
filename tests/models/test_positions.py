"""Which lengths a model reads alike, and how many tokens it reads."""

from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bitassay.data.windows import Protocol
from bitassay.errors import BitassayError
from bitassay.models.positions import context_length, frequencies, model_windows, positions_of
from bitassay.testing.tiny import tiny_model
from kinds import SHORT, tiny_kind

PARAMETERS = {"long": {"rope_type": "longrope", "original_max_position_embeddings": SHORT}, "plain": {}}


def lengths_that_differ(model, up_to=SHORT + 4):
    known = [frequencies(model, length) for length in range(1, up_to)]
    return [length for length, (a, b) in enumerate(pairwise(known), 1) if a != b]


def frequencies_of(model, length):
    """What the rotary module really uses."""
    rotary = model.get_decoder().rotary_emb
    rotary(torch.zeros(1), torch.arange(length)[None])
    return rotary.inv_freq.clone()


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_frequencies_are_equal_where_the_model_s_are(name):
    model = tiny_kind(name)
    lengths = (1, 5, SHORT - 1, SHORT, SHORT + 1, SHORT + 2, 90)
    for a in lengths:
        for b in lengths:
            alike = torch.equal(frequencies_of(model, a), frequencies_of(model, b))
            assert (frequencies(model, a) == frequencies(model, b)) == alike


def test_where_frequencies_change():
    assert lengths_that_differ(tiny_kind("longrope")) == [SHORT]
    assert lengths_that_differ(tiny_kind("dynamic")) == [SHORT, SHORT + 1, SHORT + 2]
    assert lengths_that_differ(tiny_model("llama")) == []
    assert lengths_that_differ(tiny_model("gemma3")) == []  # a rotary embedding for each kind of layer


def test_one_kind_of_layer_is_enough():
    model = tiny_model("gemma3")
    full = dict(PARAMETERS["long"], rope_theta=1e4, short_factor=[1.0] * 12, long_factor=[2.0] * 12)
    model.config.rope_parameters["full_attention"] = full
    assert lengths_that_differ(model) == [SHORT]


def test_what_was_read_before_has_no_effect():
    model, tokens = tiny_kind("dynamic"), torch.arange(5, 5 + SHORT)[None]
    with torch.no_grad():
        first = model(tokens).logits
        model(torch.arange(5, 105)[None])
        assert torch.equal(model(tokens).logits, first)


def test_context_lengths():
    assert context_length(tiny_model("llama")) == 512
    assert context_length(tiny_kind("dynamic")) == 4 * SHORT  # as many as its factor makes of them
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    roberta = AutoConfig.for_model("roberta", max_position_embeddings=34, is_decoder=True, **sizes)
    model = AutoModelForCausalLM.from_config(roberta)
    assert context_length(model) == 32  # its positions begin behind the padding token's
    with torch.no_grad():
        model(torch.full((1, 32), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, 33), 5))
    assert positions_of(AutoConfig.for_model("xlnet")) is None  # says -1
    assert positions_of(AutoConfig.for_model("gpt2", n_positions=96)) == 96
    assert positions_of(AutoConfig.for_model("mpt", max_seq_len=96)) == 96


def test_windows_of_more_tokens_than_the_model_reads_are_refused(stories, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a cat. " * 200)
    assert model_windows(stories, Protocol(str(text), 512, windows=1))[0].shape == (1, 512)
    with pytest.raises(BitassayError, match=r"513 tokens, and the model reads 512") as error:
        model_windows(stories, Protocol(window_tokens=513, windows=1))
    assert "--window 512" in error.value.remedy
    with pytest.raises(BitassayError):
        model_windows(stories, Protocol())
