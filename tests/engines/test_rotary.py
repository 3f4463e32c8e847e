import pytest
import torch

from bitassay.engines.rotary import rotary_base_times, rotary_frequencies
from bitassay.testing.architectures import tiny_architecture
from bitassay.testing.tiny import tiny_model


def test_a_rotary_base_is_larger_for_a_while():
    llama = tiny_model("llama")
    rotary, config = llama.model.rotary_emb, llama.config
    before, base = rotary.inv_freq.clone(), config.rope_parameters["rope_theta"]
    with rotary_base_times(llama, 1.01):
        size = 2 * len(before)
        expected = (1.01 * base) ** -(torch.arange(0, size, 2) / size)
        assert torch.allclose(rotary.inv_freq, expected, rtol=1e-5)
        assert not torch.allclose(rotary.inv_freq, before, rtol=1e-5)
    assert torch.equal(rotary.inv_freq, before)


@pytest.mark.parametrize(("kind", "count"), [("gpt2", 0), ("llama", 1), ("gemma3_text", 1)])
def test_all_frequencies_that_a_model_computes_with_are_found(kind, count):
    model = tiny_architecture(kind)
    assert len(rotary_frequencies(model)) == count
    tokens = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11]])
    before = model(tokens).logits
    with rotary_base_times(model, 2.0):
        assert torch.equal(model(tokens).logits, before) == (count == 0)
    assert torch.equal(model(tokens).logits, before)
