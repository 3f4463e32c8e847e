"""Smoothing: the formulas, folds that change nothing, and errors that fall."""

import copy

import pytest
import torch
from pydantic import ValidationError

from bitassay.errors import BitassayError
from bitassay.models.walk import walk
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.inputs.activations import InputRounding, rounded_inputs
from bitassay.quantization.inputs.ranges import collect_ranges
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.recipe.transforms import Smoothing
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.runtime.model import copy_sharing_parameters
from bitassay.quantization.transforms.folding import Fold, find_folds, fold
from bitassay.quantization.transforms.smoothing import (
    awq_scales,
    clipped,
    output_error,
    smooth,
    smoothquant_scales,
)
from bitassay.testing.tiny import tiny_model

TOKENS = torch.randint(3, 500, (3, 40), generator=torch.Generator().manual_seed(0))
W4 = WeightScheme(format="int4", granularity="g32")
DENSE = ["llama", "mistral", "qwen2", "qwen3", "gemma3"]
SMOOTHQUANT = Smoothing(method="smoothquant")
RUN_TIME = Smoothing(method="smoothquant", places=("inputs",))


def model_of(architecture: str, **changes):
    """With norms and biases that are not the trivial ones of a fresh model."""
    model = tiny_model(architecture, **changes)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data = parameter.data + 0.3 * torch.rand(parameter.shape, generator=generator)
    return model


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


def smoothed(model, spec: Smoothing, scheme: WeightScheme | None = W4):
    return smooth(model, spec, collect_ranges(model, TOKENS), lambda _: scheme)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_smoothquant_scales_are_the_papers_formula(alpha):
    x, w = [4.0, 0.25, 9.0], [1.0, 0.25, 0.04]
    got = smoothquant_scales(torch.tensor(x), torch.tensor(w), alpha)
    assert got.tolist() == pytest.approx([a**alpha / b ** (1 - alpha) for a, b in zip(x, w, strict=True)])


def test_at_one_half_inputs_and_weights_end_up_equally_large():
    x, w = randn(50, 8) * torch.logspace(-2, 2, 8), randn(6, 8, seed=1)
    s = smoothquant_scales(x.abs().amax(0), w.abs().amax(0), 0.5)
    torch.testing.assert_close((x / s).abs().amax(0), (w * s).abs().amax(0))


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_smoothquant_scales_are_torchaos(alpha):
    torchao = pytest.importorskip("torchao.prototype.smoothquant")
    x, w = randn(50, 8) * torch.logspace(-2, 2, 8), randn(6, 8, seed=1)
    observer = torchao.SmoothQuantObserver(w, alpha)
    observer(x[:20])
    observer(x[20:])
    theirs, _, _ = observer.calculate_qparams()
    got = smoothquant_scales(x.abs().amax(0), w.abs().amax(0), alpha)
    torch.testing.assert_close(got, theirs, rtol=1e-5, atol=0)


def test_columns_that_are_always_zero_keep_their_scale():
    zero = torch.tensor([0.0, 2.0, 3.0])
    for scales in (smoothquant_scales(zero, zero.flip(0), 0.5), awq_scales(zero, 0.5)):
        assert scales.isfinite().all()
        assert scales[0] == 1
    assert awq_scales(torch.zeros(3), 0.5).tolist() == [1, 1, 1]


def test_awq_scales_are_a_power_of_the_mean_magnitude_centred():
    s = awq_scales(torch.tensor([1.0, 16.0, 4.0]), 0.5)
    assert s.tolist() == pytest.approx([0.5, 2, 1])


@pytest.mark.sample(4)
@pytest.mark.parametrize("architecture", DENSE)
@pytest.mark.parametrize("spec", [SMOOTHQUANT, Smoothing(method="awq", exponents=3)], ids=lambda s: s.method)
def test_what_the_model_computes_stays_the_same(architecture, spec):
    model = model_of(architecture)
    before = logits(model)
    done = smoothed(model, spec)
    change = (logits(model) - before).norm() / before.norm()
    assert change < 2e-5
    # A layer's two norms, values and up; of which gemma3 gives its name to other norms.
    assert len(done.scales) == 4 * 3
    assert done.skipped == {}
    assert spec.method == "awq" or all((scales != 1).any() for scales in done.scales.values())


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # gemma3 norms in fp32
def test_in_fp64_it_stays_the_same_to_the_twelfth_digit(architecture):
    model = model_of(architecture).double()
    before = logits(model)
    smoothed(model, SMOOTHQUANT)
    assert (logits(model) - before).norm() < 1e-12 * before.norm()


@pytest.mark.parametrize("architecture", DENSE)
def test_at_run_time_every_linear_has_scales_of_its_own(architecture):
    model = model_of(architecture)
    before, ranges = logits(model), collect_ranges(model, TOKENS)
    weights = {name: linear.weight.clone() for name, linear in walk(model).linears.items()}
    done = smoothed(model, RUN_TIME)
    assert (logits(model) - before).norm() < 2e-5 * before.norm()
    assert done.scales.keys() == weights.keys()
    after = collect_ranges(model, TOKENS)
    for name, weight in weights.items():
        expected = smoothquant_scales(ranges[name].absmax, weight.abs().amax(0), 0.5)
        torch.testing.assert_close(done.scales[name], expected, rtol=2**-8, atol=0)  # they fit in bf16
        torch.testing.assert_close(
            after[name].absmax, ranges[name].absmax / done.scales[name], rtol=1e-4, atol=1e-6
        )


def test_a_model_that_shares_the_parameters_keeps_them():
    model = model_of("qwen2", tie_word_embeddings=True)
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    before = logits(twin)
    smoothed(model, SMOOTHQUANT)
    assert torch.equal(logits(twin), before)
    assert model.lm_head.weight is model.get_input_embeddings().weight is twin.lm_head.weight
    assert model.model.norm.weight is twin.model.norm.weight


def test_ranges_become_even():
    model = model_of("llama")
    # Columns 3 and 40 of every normed state become outliers; the function is as it was.
    for layer in model.model.layers:
        for norm, readers in (
            (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
            (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
        ):
            norm.weight.data[[3, 40]] *= 60
            for reader in readers:
                reader.weight.data[:, [3, 40]] /= 60
    name = "model.layers.1.mlp.gate_proj"
    weight = walk(model).linears[name].weight
    before = collect_ranges(model, TOKENS)[name].absmax
    smoothed(model, SMOOTHQUANT)
    after = collect_ranges(model, TOKENS)[name].absmax
    assert before.max() / before.median() > 30
    assert after.max() / after.median() < 5
    assert walk(model).linears[name].weight is not weight


def test_scales_are_those_of_all_readers_together():
    model = model_of("llama")
    ranges, found = collect_ranges(model, TOKENS), walk(model).linears
    readers = [f"model.layers.0.self_attn.{k}_proj" for k in "qkv"]
    largest = torch.stack([found[name].weight.abs().amax(0) for name in readers]).amax(0)
    expected = smoothquant_scales(ranges[readers[0]].absmax, largest, 0.7)
    done = smooth(model, Smoothing(method="smoothquant", alpha=0.7), ranges, lambda _: W4)
    got = done.scales["model.layers.0.input_layernorm"]
    torch.testing.assert_close(got, expected, rtol=2**-8, atol=0)  # gains are rounded to bf16
    gain = model.model.layers[0].input_layernorm.weight
    assert torch.equal(gain, gain.bfloat16().float())


def test_query_heads_that_share_a_value_head_share_its_scales():
    where = Fold("values", "v", ("o",), None, sharing=2, width=3)
    columns = torch.arange(12.0)  # four query heads of three columns, two value heads
    assert where.share(columns).tolist() == [3, 4, 5, 9, 10, 11]
    assert where.spread(where.share(columns)).tolist() == [3, 4, 5, 3, 4, 5, 9, 10, 11, 9, 10, 11]
    model = model_of("llama")
    folds, _ = find_folds(model, ("values",))
    assert (folds[0].sharing, folds[0].width) == (2, 24)
    before = logits(model)
    fold(model, folds[0], torch.rand(48, generator=torch.Generator().manual_seed(1)) + 0.5)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_awq_takes_the_exponent_with_the_least_error():
    model = model_of("llama")
    model.model.layers[0].input_layernorm.weight.data[[3, 40]] *= 20
    ranges, found = collect_ranges(model, TOKENS), walk(model).linears
    readers = [f"model.layers.0.self_attn.{k}_proj" for k in "qkv"]
    weights, inputs = [found[name].weight.detach().clone() for name in readers], ranges[readers[0]]

    def error(s: torch.Tensor) -> float:
        rounded = [quantize_tensor(w * s, W4).dequantize() / s - w for w in weights]
        return sum((inputs.sample @ d.T).square().sum().item() for d in rounded)

    errors = [error(awq_scales(inputs.mean_magnitude, step / 10)) for step in range(10)]
    best = min(range(10), key=errors.__getitem__)
    assert best > 0
    done = smooth(model, Smoothing(method="awq", exponents=10), ranges, lambda _: W4)
    expected = awq_scales(inputs.mean_magnitude, best / 10)
    torch.testing.assert_close(done.scales["model.layers.0.input_layernorm"], expected, rtol=2**-8, atol=0)


def test_awq_lowers_a_trained_models_divergence_and_clipping_lowers_it_further(stories):
    scheme = WeightScheme(format="int4", granularity="g32", scale="absmax")
    start = torch.ones(24, 1, dtype=torch.long)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokens = stories.generate(
            start, attention_mask=start, do_sample=True, max_new_tokens=64, min_new_tokens=64
        )

    def kl(spec: Smoothing | None) -> float:
        model = copy_sharing_parameters(stories)
        if spec is not None:
            smooth(model, spec, collect_ranges(model, tokens[:8]), lambda _: scheme)
        for linear in walk(model).linears.values():
            rounded = quantize_tensor(linear.weight, scheme).dequantize()
            linear.weight = torch.nn.Parameter(rounded, requires_grad=False)
        with torch.inference_mode():
            p, q = (m(tokens[8:]).logits.log_softmax(-1) for m in (stories, model))
        return (p.exp() * (p - q)).sum(-1).mean().item()

    awq = kl(Smoothing(method="awq", exponents=6))
    assert awq < 0.95 * kl(None)
    assert kl(Smoothing(method="awq", exponents=6, clip=True)) < 0.95 * awq


@pytest.mark.parametrize("granularity", ["channel", "g32", "g64"])
def test_clipping_takes_the_best_share_of_each_group(granularity):
    scheme = WeightScheme(format="int3", granularity=granularity, scale="absmax")
    weight, inputs = randn(4, 80), randn(30, 80, seed=1)
    weight[:, ::17] *= 4
    got = clipped(weight, inputs, scheme)
    size = {"channel": 80, "g32": 32, "g64": 64}[granularity]
    for row in range(4):
        for start in range(0, 80, size):
            w, x = weight[row : row + 1, start : start + size], inputs[:, start : start + size]
            options = []
            for step in range(11):
                bound = w.abs().max() * (1 - 0.05 * step)
                clamped = w.clamp(-bound, bound)
                one = WeightScheme(format="int3", granularity="channel", scale="absmax")
                difference = quantize_tensor(clamped, one).dequantize() - w
                options.append((output_error(difference, x), step, clamped))
            least = min(options)[0]
            chosen = next(o for o in options if torch.allclose(o[2], got[row, start : start + size][None]))
            assert chosen[0] == pytest.approx(least, rel=1e-4)
    before, after = (
        output_error(quantize_tensor(w, scheme).dequantize() - weight, inputs) for w in (weight, got)
    )
    assert after < before


def test_clip_leaves_queries_and_keys():
    model, plain = model_of("llama"), model_of("llama")
    scheme = WeightScheme(format="int2", granularity="g32", scale="absmax")
    smoothed(plain, Smoothing(method="awq", exponents=1), scheme)
    smoothed(model, Smoothing(method="awq", exponents=1, clip=True), scheme)
    for name, linear in walk(model).linears.items():
        same = torch.equal(linear.weight, walk(plain).linears[name].weight)
        assert same == name.endswith(("q_proj", "k_proj")), name


def test_what_no_fold_reaches_is_recorded_with_its_reason():
    model = model_of("mixtral")
    before = logits(model)
    done = smoothed(model, SMOOTHQUANT)
    assert set(done.scales) == {
        f"model.layers.{i}.{part}" for i in range(3) for part in ("input_layernorm", "self_attn.v_proj")
    }
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-4)
    shared = model_of("qwen2_moe")
    done = smoothed(shared, SMOOTHQUANT)
    name = "model.layers.0.mlp.shared_expert.gate_proj"
    assert "also feeds" in done.skipped[name]
    assert "model.layers.0.mlp.shared_expert.up_proj" in done.scales
    only = smoothed(model_of("llama"), Smoothing(method="smoothquant", places=("norms",)))
    assert only.skipped["model.layers.2.mlp.down_proj"] == "nothing before it can take up a scale"
    assert len(only.skipped) == 6


def test_a_rotation_before_the_down_projection_is_not_folded_through():
    model = model_of("llama")
    down = model.model.layers[1].mlp.down_proj
    down.register_forward_pre_hook(lambda _m, args: (args[0].flip(-1),))
    before = logits(model)
    done = smoothed(model, SMOOTHQUANT)
    assert "rotation at run time" in done.skipped["model.layers.1.mlp.down_proj"]
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-4)


def test_a_model_that_does_something_unknown_is_refused(monkeypatch):
    model = model_of("llama")
    attention = model.model.layers[1].self_attn
    attention.v_proj.register_forward_hook(lambda _m, _args, y: y.tanh())
    ranges = collect_ranges(model, TOKENS)
    with pytest.raises(BitassayError, match="its logits differ"):
        smooth(model, SMOOTHQUANT, ranges, lambda _: W4)
    monkeypatch.setattr("bitassay.quantization.transforms.residual_stream.PROBE_TOLERANCE", 10)
    smooth(model, SMOOTHQUANT, ranges, lambda _: W4)


def test_a_model_in_16_bits_is_refused():
    with pytest.raises(BitassayError, match=r"in torch\.bfloat16"):
        smooth(model_of("llama").bfloat16(), SMOOTHQUANT, {}, lambda _: W4)


def test_int8_inputs_are_nearer_after_smoothing():
    x, w = randn(64, 32), randn(16, 32, seed=1) * 0.1
    x[:, [2, 19]] *= 50
    s = smoothquant_scales(x.abs().amax(0), w.abs().amax(0), 0.5)
    w8 = WeightScheme(format="int8")

    def error(inputs: torch.Tensor, weight: torch.Tensor) -> float:
        y = rounded_inputs(inputs, InputRounding("int8")) @ quantize_tensor(weight, w8).dequantize().T
        return (y - x @ w.T).norm().item()

    assert error(x / s, w * s) < 0.3 * error(x, w)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({}, "Field required"),
        ({"method": "awq", "alpha": 0.8}, "no effect"),
        ({"method": "smoothquant", "clip": True}, "no effect"),
        ({"method": "smoothquant", "alpha": 1.5}, "less than or equal to 1"),
        ({"method": "awq", "places": []}, "nowhere"),
        ({"method": "awq", "places": ["inputs", "norms"]}, "stands alone"),
        ({"method": "awq", "places": ["head"]}, "Input should be"),
    ],
)
def test_a_part_that_makes_no_sense_is_refused(part, says):
    with pytest.raises(ValidationError, match=says):
        Smoothing.model_validate(part)


def test_clipping_needs_to_know_the_groups():
    with pytest.raises(ValidationError, match="adaptive ones are chosen after it"):
        Recipe(
            name="clip",
            weights={"format": "int4", "granularity": "adaptive64"},
            smoothing={"method": "awq", "clip": True},
        )
