"""The cache in few bits: bytes there and back, the same model however it is run, and its size."""

import pytest
import torch
from pydantic import ValidationError
from transformers import DynamicCache

from bitassay.engines.decode import generate, prefill
from bitassay.errors import BitassayError
from bitassay.quantization.inputs.kv_cache import (
    PackedCache,
    decode,
    empty_cache,
    encode,
    packed_bytes,
    round_cache,
    rounded,
    token_bytes,
)
from bitassay.quantization.recipe.inputs import KvCache
from bitassay.testing.tiny import tiny_model

IDS = torch.randint(3, 500, (2, 23), generator=torch.Generator().manual_seed(0))
SPECS = {
    "int8": KvCache(),
    "int4": KvCache(format="int4"),
    "int4-g8": KvCache(format="int4", granularity="g8", scale_dtype="float16"),
    "asymmetric": KvCache(format="int4", symmetric=False),
    "asymmetric-g16": KvCache(format="int8", granularity="g16", symmetric=False, scale_dtype="float32"),
    "fp8": KvCache(format="fp8_e4m3"),
}
DENSE = ["llama", "mistral", "qwen2", "qwen3", "gemma3"]


def vectors(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 3 + 1


def rounding(architecture: str, spec: KvCache, **changes):
    model = tiny_model(architecture, **changes)
    round_cache(model, spec)
    return model


def logits(model, ids=IDS, **options) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, **options).logits


@pytest.mark.sample(10)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("width", [1, 24, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_what_was_rounded(spec, width, dtype):
    x = vectors(2, 3, 5, width).to(dtype)
    packed = encode(x, spec)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, 5, packed_bytes(spec, width))
    read = decode(packed, width, spec, dtype)
    assert read.dtype == dtype
    assert torch.equal(read, rounded(x, spec))
    assert torch.equal(decode(packed[:, 1:, ::2], width, spec, dtype), read[:, 1:, ::2])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 16])
def test_each_group_is_rounded_on_a_scale_of_its_own(bits, symmetric, group):
    x = vectors(2, 3, 48) * torch.logspace(-3, 3, 6).view(2, 3, 1)
    granularity = "head" if group is None else f"g{group}"
    spec = KvCache(format=f"int{bits}", granularity=granularity, symmetric=symmetric, scale_dtype="float32")
    for got, exact in zip(rounded(x, spec).view(-1, group or 48), x.view(-1, group or 48), strict=True):
        if symmetric:
            scale = exact.abs().max() / (2 ** (bits - 1) - 1)
            expected = (exact / scale).round() * scale
        else:
            low, high = exact.min().clamp(max=0), exact.max().clamp(min=0)
            scale = (high - low) / (2**bits - 1)
            zero = (-low / scale).round()
            expected = (((exact / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_zeros_stay_and_nan_is_not_hidden(spec):
    x = torch.zeros(2, 24)
    assert not decode(encode(x, spec), 24, spec, x.dtype).any()
    for bad in (torch.nan, torch.inf):
        x[1, 3] = bad
        read = decode(encode(x, spec), 24, spec, x.dtype)
        assert read[1, 3].isnan()
        assert not read[0].any()


@pytest.mark.parametrize("architecture", DENSE)
@pytest.mark.parametrize("name", ["int8", "asymmetric-g16"])
def test_one_forward_reads_what_a_packed_cache_gives(architecture, name):
    spec = SPECS[name]
    plain, model = tiny_model(architecture), rounding(architecture, spec)
    whole = logits(model)
    assert not torch.allclose(whole, logits(plain), atol=1e-6)
    for cache in (PackedCache(model.config, spec), DynamicCache(config=model.config)):
        stepwise = [logits(model, IDS[:, :19], past_key_values=cache)]
        stepwise += [logits(model, IDS[:, t : t + 1], past_key_values=cache) for t in range(19, 23)]
        torch.testing.assert_close(torch.cat(stepwise, 1), whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model, use_cache=False), whole)
    # A packed cache rounds by itself, on a model without hooks as well.
    torch.testing.assert_close(
        logits(plain, past_key_values=PackedCache(plain.config, spec)), whole, rtol=0, atol=0
    )


def test_nothing_is_rounded_twice():
    spec = SPECS["asymmetric-g16"]
    plain, model = tiny_model("llama").bfloat16(), rounding("llama", spec).bfloat16()
    once = logits(plain, past_key_values=PackedCache(plain.config, spec))
    assert torch.equal(logits(model, past_key_values=PackedCache(plain.config, spec)), once)
    assert torch.equal(logits(model), once)


@pytest.mark.parametrize("architecture", ["deepseek_v2", "qwen2_moe", "mixtral"])
def test_other_architectures_round_too(architecture):
    try:
        plain = tiny_model(architecture)
    except BitassayError:
        pytest.skip(f"no tiny {architecture}")
    model = rounding(architecture, SPECS["int4"])
    assert not torch.allclose(logits(model), logits(plain), atol=1e-6)


def test_sliding_windows_are_the_caches_own_business():
    changes = {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3}
    model = rounding("gemma3", SPECS["int8"], **changes)
    cache = empty_cache(model)
    stepwise = torch.cat([logits(model, IDS[:, t : t + 1], past_key_values=cache) for t in range(12)], 1)
    torch.testing.assert_close(stepwise, logits(model)[:, :12], rtol=1e-4, atol=1e-4)
    assert cache.layers[0].keys.shape[-2] == 7


def test_finer_grids_are_nearer():
    exact = logits(tiny_model("llama"))
    errors = [(logits(rounding("llama", SPECS[name])) - exact).norm() for name in ("int8", "int4-g8", "int4")]
    assert errors[0] < errors[1] / 3
    assert errors[1] < errors[2]


def test_generate_uses_it_and_prefill_agrees():
    model = rounding("llama", SPECS["int4"])
    assert isinstance(empty_cache(model), PackedCache)
    assert not isinstance(empty_cache(tiny_model("llama")), PackedCache)
    prompts = [[5, 9, 11, 30, 12], [7, 8, 200]]
    made = generate(model, prompts, max_new_tokens=12, layers=(2, 3))
    outputs = [list(g.output_ids) for g in made]
    checked = prefill(model, prompts, outputs, layers=(2, 3))
    for generation, again in zip(made, checked, strict=True):
        assert list(generation.output_ids) == again.logits.argmax(-1).tolist()
        for layer in (2, 3):
            torch.testing.assert_close(generation.states[layer], again.states[layer], rtol=1e-3, atol=1e-3)
    exact = prefill(tiny_model("llama"), prompts, outputs, layers=(3,))
    assert not torch.allclose(exact[0].states[3], made[0].states[3], atol=1e-3)


def test_transformers_own_generate_works():
    model = rounding("llama", SPECS["int4"])
    prompt = IDS[:1, :6]
    ours = generate(model, [prompt[0].tolist()], max_new_tokens=8)[0].output_ids
    theirs = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, 6:].tolist()
    assert list(ours) == theirs[: len(ours)]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_bytes_of_a_token_are_what_the_cache_holds(spec):
    model = rounding("llama", spec)
    cache = empty_cache(model)
    logits(model, past_key_values=cache)
    assert isinstance(cache, PackedCache)
    assert cache.stored_bytes == IDS.numel() * token_bytes(model.config, spec)
    dense = DynamicCache(config=model.config)
    logits(tiny_model("llama").bfloat16(), past_key_values=dense)
    held = sum(part.numel() * part.element_size() for keys, values, _ in dense for part in (keys, values))
    assert held == IDS.numel() * token_bytes(model.config, None)


def test_packed_bytes_counted_by_hand():
    assert packed_bytes(KvCache(), 64) == 64 + 2
    assert packed_bytes(KvCache(format="int4"), 64) == 32 + 2
    assert packed_bytes(KvCache(format="int4", symmetric=False), 64) == 32 + 2 + 1
    assert packed_bytes(KvCache(format="int4", granularity="g32", scale_dtype="float32"), 80) == 40 + 3 * 4


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"format": "int2"}, "Input should be"),
        ({"format": "fp8_e4m3", "symmetric": False}, "zero point"),
        ({"granularity": "channel"}, "granularity of a cache"),
        ({"granularity": "rows"}, "unknown granularity"),
        ({"bits": 4}, "Extra inputs"),
    ],
)
def test_what_makes_no_sense_is_refused(part, says):
    with pytest.raises((ValidationError, BitassayError), match=says):
        KvCache.model_validate(part)


def test_layers_without_attention_are_refused():
    model = tiny_model("llama")
    del model.model.layers[1].self_attn
    with pytest.raises(BitassayError, match="layer 1 has no self_attn"):
        round_cache(model, KvCache())
