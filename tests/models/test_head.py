"""The head on the last positions: what the model says there, without a copy of the head."""

import pytest
import torch

from bitassay.models.head import last_positions
from bitassay.testing.tiny import stories260k, tiny_model


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("count", [1, 3])
def test_logits_of_the_last_positions(architecture, count):
    model = tiny_model(architecture)
    ids = torch.arange(10).reshape(2, 5)
    last = last_positions(count, model.device)
    with torch.inference_mode():
        assert torch.allclose(
            model(ids, logits_to_keep=last).logits, model(ids).logits[:, -count:], atol=1e-6
        )


@pytest.mark.parametrize(("last", "times"), [(1, 1), (last_positions(1, torch.device("cpu")), 0)])
def test_the_head_is_not_repeated_for_each_sequence(last, times):
    """A number makes torch do so: with that gone, this module can go."""
    model = stories260k()  # loaded: its weights want no gradients
    with torch.inference_mode(), torch.profiler.profile(record_shapes=True) as found:
        model(torch.arange(10).reshape(2, 5), logits_to_keep=last)
    vocabulary, hidden = model.get_output_embeddings().weight.shape
    products = [event.input_shapes for event in found.events() if event.name == "aten::bmm"]
    assert sum([2, hidden, vocabulary] in shapes for shapes in products) == times
