"""One checkpoint read to several depths, and drafts by its first plane."""

import pytest
import torch

from bitassay.engines.decode import generate
from bitassay.engines.load import load
from bitassay.engines.speculative import speculate
from bitassay.errors import BitassayError
from bitassay.quantization.codes.copies import planes
from bitassay.quantization.export.save import save
from bitassay.quantization.inputs.kv_cache import empty_cache
from bitassay.quantization.pipeline import quantize
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.replication import any_precision
from bitassay.quantization.replication.any_precision import (
    entropy,
    gated,
    gated_logits,
    shuffled,
    with_any_precision,
)
from bitassay.quantization.runtime.model import Quantization, quantization_of, with_tensors

PLANES = Recipe.model_validate(
    {
        "name": "x",
        "weights": {"format": "int3", "granularity": "g32"},
        "replication": {"how": "parallel", "of": "linear", "differ": "residual"},
    }
)
IDS = torch.randint(3, 500, (24,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(stories, tmp_path_factory):
    """Saved and loaded: one checkpoint is enough."""
    folder = tmp_path_factory.mktemp("planes") / "m"
    save(quantize(stories, PLANES), folder)
    return load(folder)


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model(ids[None], use_cache=False).logits[0]


def test_each_depth_is_a_model_of_its_own(stories, model):
    deep, reader = with_any_precision(model)
    assert torch.equal(logits(deep), logits(model))
    tensors = quantization_of(model).tensors
    first = {name: planes(tensor)[0] for name, tensor in tensors.items()}
    coarse = with_tensors(stories, Quantization(PLANES, first))
    with reader.reading(1):
        assert torch.equal(logits(deep), logits(coarse))
    reader.clear()
    logits(deep)
    both = reader.bytes_per_token
    reader.clear()
    with reader.reading(1):
        logits(deep)
    saved = sum(t.stored_bits - first[name].stored_bits for name, t in tensors.items()) / 8
    assert both - reader.bytes_per_token == pytest.approx(saved)
    assert both == reader.all_bytes + reader.other_bytes


def test_chosen_layers_read_to_the_bottom(stories, model):
    deep, reader = with_any_precision(model)
    tensors = quantization_of(model).tensors
    mixed = {
        n: t if n.startswith(("model.layers.0.", "model.layers.4.")) else planes(t)[0]
        for n, t in tensors.items()
    }
    reader.deep_layers = frozenset({0, 4})
    reader.clear()
    with reader.reading(1):
        assert torch.equal(logits(deep), logits(with_tensors(stories, Quantization(PLANES, mixed))))
    assert reader.by_token / reader.tokens == pytest.approx(sum(t.stored_bits for t in mixed.values()) / 8)


@pytest.mark.sample(3)
@pytest.mark.parametrize("piece", [1, 7, 64])
@pytest.mark.parametrize("threshold", [0, 1.5, 3, 99])
def test_a_gated_text_is_what_decoding_token_by_token_gives(model, threshold, piece, monkeypatch):
    monkeypatch.setattr(any_precision, "PIECE", piece)
    deep, reader = with_any_precision(model)
    whole, depth = gated_logits(deep, reader, IDS, threshold)
    cache, unsure, stepwise, depths = empty_cache(deep), True, [], []
    with torch.inference_mode():
        for token in IDS:
            depths.append(2 if unsure else 1)
            with reader.reading(depths[-1]):
                stepwise.append(deep(token.view(1, 1), past_key_values=cache, use_cache=True).logits[0, -1])
            unsure = entropy(stepwise[-1]).item() > threshold
    assert depth.tolist() == depths
    torch.testing.assert_close(torch.stack(stepwise), whole, rtol=1e-4, atol=2e-4)
    if threshold in (0, 99):
        assert set(depths[1:]) == {2 if threshold == 0 else 1}


def test_shuffled_depths_are_the_same_elsewhere():
    depths = torch.tensor([2, 1, 1, 2, 1, 1, 2, 1])
    found = [shuffled(depths, torch.Generator().manual_seed(seed)) for seed in range(40)]
    assert all(one[0] == 2 and one.sum() == depths.sum() for one in found)
    opened = torch.stack(found)[:, 1:].eq(2).float().mean(0)  # each place is as likely as the others
    assert opened.min() > 0.05
    assert opened.max() < 0.6


def test_a_gate_decides_while_it_generates(model):
    deep, reader = with_any_precision(model)
    reader.clear()
    with gated(deep, reader, 1.0):
        text = generate(deep, [IDS.tolist()], max_new_tokens=12)[0].output_ids
    again = torch.tensor([*IDS.tolist(), *text])
    assert reader.all_bytes / 2 < reader.by_token / reader.tokens < reader.all_bytes
    assert reader.depth == 2
    assert torch.equal(logits(deep), logits(model))
    assert len(again) == 36


def test_a_gate_forgets_the_text_before(model):
    """A prompt of a single token reads all planes, whatever was written before it."""
    deep, reader = with_any_precision(model)
    prompt = IDS[:1].tolist()
    with gated(deep, reader, 3.0):
        alone = generate(deep, [prompt], max_new_tokens=12)[0].output_ids
    with gated(deep, reader, 3.0):
        generate(deep, [IDS.tolist()] * 2, max_new_tokens=5)
        assert isinstance(reader.depth, torch.Tensor)
        assert generate(deep, [prompt], max_new_tokens=12)[0].output_ids == alone


@pytest.mark.sample(3)
@pytest.mark.parametrize("drafts", [1, 3, 8])
@pytest.mark.parametrize("tokens", [1, 2, 25])
def test_drafts_change_the_cost_and_not_the_text(model, drafts, tokens):
    deep, reader = with_any_precision(model)
    found = speculate(deep, reader, IDS.tolist(), max_new_tokens=tokens, draft_tokens=drafts)
    assert found.output_ids == generate(model, [IDS.tolist()], max_new_tokens=tokens)[0].output_ids
    assert found.accepted <= found.drafted <= found.checks * drafts
    assert found.accepted + found.checks + 1 >= len(found.output_ids)
    if tokens == 25:
        assert 0 < found.acceptance < 1
        first = sum(planes(t)[0].stored_bits for t in quantization_of(model).tensors.values()) / 8
        spent = found.drafted * (first + reader.other_bytes) + found.checks * (
            reader.all_bytes + reader.other_bytes
        )
        assert found.bytes_per_token == pytest.approx(spent / 24)
        assert found.speed_bound == pytest.approx(found.plain_bytes_per_token / found.bytes_per_token)


def test_models_without_planes_are_refused(stories, model):
    plain = quantize(stories, PLANES.model_copy(update={"replication": None}))
    packed = with_tensors(stories, quantization_of(model), packed=True)
    averaged = quantize(
        stories,
        PLANES.model_copy(update={"replication": PLANES.replication.model_copy(update={"differ": "offset"})}),
    )
    for wrong in (stories, plain, packed, averaged):
        with pytest.raises(BitassayError, match="residual codes"):
            with_any_precision(wrong)
