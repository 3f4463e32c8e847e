"""K types: every number of both levels in its range, no worse than their simple choice, exact as stored."""

import gguf
import pytest
import torch
from pydantic import ValidationError

from bitassay.engines.load import load
from bitassay.errors import BitassayError
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.codes.rounding import nearest
from bitassay.quantization.codes.storage import (
    description,
    expected_tensors,
    planned_bits,
    read_tensor,
    stored_tensors,
)
from bitassay.quantization.codes.two_levels import two_level_grid
from bitassay.quantization.export.compressed import obstacle
from bitassay.quantization.export.gguf_blocks import as_blocks, bits_of
from bitassay.quantization.export.gguf_file import write_gguf
from bitassay.quantization.export.save import save
from bitassay.quantization.pipeline import quantize
from bitassay.quantization.recipe.formats import FORMATS
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.recipe.rows import fitted
from bitassay.quantization.recipe.solvers import Gptq
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.runtime.kernels import packed_product
from bitassay.quantization.runtime.model import bits_per_weight, check_recipe
from bitassay.quantization.solvers.gptq import gptq
from bitassay.testing.tiny import tiny_model

TYPES = [name for name, fmt in FORMATS.items() if fmt.levels is not None]
BITS = {"q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625, "iq4_xs": 4.25}
# The relative error of Gaussian weights, at most; ggml's own rounding without importances has the second.
ERRORS = {
    "q2_k": (0.261, 0.297),
    "q3_k": (0.144, 0.151),
    "q4_k": (0.0705, 0.072),
    "q5_k": (0.0348, 0.0361),
    "q6_k": (0.0168, 0.0177),
    "iq4_xs": (0.0740, 0.0770),
}


def matrix(rows=24, columns=512, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / 20


def awkward():
    """Rows that a search may stumble over: zeros, constants, one sign, one large weight, very small or large."""
    w = matrix(12)
    w[0], w[1, :256], w[2, :16], w[3], w[4] = 0, 0, 0, 0.3, -0.3
    w[5, :32], w[6], w[7], w[8, 40] = 0.2, w[6].abs(), -w[7].abs(), 5
    w[9], w[10] = w[9] * 1e-6, w[10] * 1e5
    return w


def relative(back, weight):
    return ((back - weight).norm() / weight.norm()).item()


def test_all_k_types_are_here():
    assert set(BITS) == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_the_error_and_the_bits_of_each_type(name):
    weight, scheme = matrix(64), WeightScheme(format=name)
    tensor = quantize_tensor(weight, scheme)
    assert relative(tensor.dequantize(), weight) <= ERRORS[name][0] < ERRORS[name][1]
    assert tensor.stored_bits == planned_bits(description(tensor), (64, 512)) == BITS[name] * weight.numel()
    again = quantize_tensor(tensor.dequantize(), scheme)
    assert relative(again.dequantize(), tensor.dequantize()) < 0.3 * ERRORS[name][0]


@pytest.mark.parametrize("name", TYPES)
def test_blocks_hold_every_weight_exactly(name):
    weight = awkward()
    tensor = quantize_tensor(weight, WeightScheme(format=name))
    back, blocks = tensor.dequantize(), as_blocks(tensor)
    assert blocks.kind.name == name.upper()
    assert blocks.data.size * 8 == bits_of(blocks.kind) * weight.numel()
    assert torch.equal(torch.from_numpy(gguf.dequantize(blocks.data, blocks.kind).copy()), back)
    assert back[0].abs().max() <= 2**-24  # a table has no zero
    assert back[1, :256].abs().max() <= 2**-24
    for row in (1, 2, 3, 4, 5, 6, 7, 10):
        assert relative(back[row], weight[row]) <= 1.3 * ERRORS[name][0], row
    assert relative(back[8], weight[8]) < 0.12
    assert (back[9] - weight[9]).abs().max() < 3e-7  # of the size of fp16's smallest numbers


@pytest.mark.parametrize("name", TYPES)
def test_the_numbers_of_both_levels(name):
    """d and e of fp16, whole a and b in their ranges, and the formula."""
    tensor = quantize_tensor(awkward(), WeightScheme(format=name))
    levels, (rows, columns) = tensor.format.levels, tensor.shape
    assert tensor.scale.dtype == torch.float16
    assert tensor.scale.shape == (rows, columns // 256)
    a, (low, high) = tensor.scale_multiples(), levels.scale_range
    assert a.shape == (rows, columns // levels.group)
    assert ((a >= low) & (a <= high) & (a != 0)).all()
    wide = tensor.scale.float().repeat_interleave(256, 1)
    weight = wide * a.repeat_interleave(levels.group, 1) * tensor.codes()
    if levels.minima:
        b = tensor.mean_multiples_of_groups().repeat_interleave(levels.group, 1)
        assert ((b >= 0) & (b <= high)).all()
        assert (tensor.mean >= 0).all()
        weight = weight - tensor.mean.float().repeat_interleave(256, 1) * b
    assert torch.equal(tensor.dequantize(), weight)


@pytest.mark.parametrize("name", TYPES)
def test_rows_and_runs_do_not_depend_on_each_other(name):
    weight, scheme = matrix(6), WeightScheme(format=name)
    together = quantize_tensor(weight, scheme).dequantize()
    apart = quantize_tensor(weight[2:3, 256:].contiguous(), scheme).dequantize()
    assert torch.equal(together[2:3, 256:], apart)


@pytest.mark.parametrize("name", ["q2_k", "q3_k"])
def test_importances_move_the_error_to_where_it_matters_less(name):
    weight, scheme = matrix(), WeightScheme(format=name)
    importance = torch.rand(512, generator=torch.Generator().manual_seed(1)) ** 4
    importance[300:400] = 0
    lost = [
        ((quantize_tensor(weight, scheme, importance=h).dequantize() - weight) ** 2 * importance).sum()
        for h in (None, importance)
    ]
    assert lost[1] < 0.85 * lost[0]


def test_both_levels_are_searched():
    """The error of the grid is below that of the scales rounded to whole multiples once."""
    fmt, groups = FORMATS["q4_k"], matrix(16).view(-1, 32)
    scale = (groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)) / 15
    minimum, h = -groups.amin(1, keepdim=True), torch.ones_like(groups)
    found = two_level_grid(groups, h, scale, minimum, fmt)
    d, e = (part.view(-1, 8).amax(1).repeat_interleave(8)[:, None] / 63 for part in (scale, minimum))
    simple = found._replace(scale=d * (scale / d).round(), mean=-e * (minimum / e).round())
    errors = [(nearest(groups, grid)[1] - groups).square().sum() for grid in (found, simple)]
    assert errors[0] < 0.82 * errors[1]


@pytest.mark.parametrize("name", TYPES)
def test_what_is_stored_is_read_again(name):
    tensor = quantize_tensor(matrix(4), WeightScheme(format=name))
    stored, parts = description(tensor), stored_tensors(tensor)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in parts.items()} == expected_tensors(stored, (4, 512))
    assert torch.equal(read_tensor(parts, stored, (4, 512)).dequantize(), tensor.dequantize())
    assert obstacle(stored) == "it has one level of scales"


def test_the_kernel_of_a_few_rows_computes_with_minima():
    weight, x = matrix(32), torch.randn(3, 512, generator=torch.Generator().manual_seed(2)).bfloat16()
    tensor = quantize_tensor(weight, WeightScheme(format="q4_k"))
    product = packed_product(tensor)
    wanted = x.float() @ tensor.dequantize().T
    assert (product(x).float() - wanted).norm() < 0.01 * wanted.norm()


def test_what_a_scheme_cannot_change():
    for change in ({"granularity": "g64"}, {"symmetric": True}, {"scale": "absmax"}, {"zero_point": "free"}):
        for name in ("q4_k", "iq4_nl")[: 1 if "symmetric" in change else 2]:
            with pytest.raises(ValidationError, match=name):
                WeightScheme.model_validate({"format": name} | change)
    with pytest.raises(ValidationError, match="no common step"):
        WeightScheme(format="iq4_nl", rounding="feedback")
    assert WeightScheme.model_validate(WeightScheme(format="q4_k").model_dump()).granularity == "g32"


def test_rows_that_runs_do_not_divide():
    with pytest.raises(BitassayError, match="q4_k is of rows of whole runs of 256 weights, not of 384"):
        quantize_tensor(matrix(2, 384), WeightScheme(format="q4_k"))
    columns = {"0.q": 512, "1.q": 512, "0.down": 384, "1.down": 384, "0.k": 384, "1.k": 512, "0.o": 384}
    recipe = Recipe.model_validate(
        {"name": "t", "weights": {"format": "q5_k"}, "overrides": [{"match": "*.o", "weights": None}]}
    )
    other = fitted(recipe, columns)
    formats = {name: (s := other.scheme_for(name)) and (s.format, s.granularity) for name in columns}
    assert formats == dict.fromkeys(("0.q", "1.q", "1.k"), ("q5_k", "g32")) | dict.fromkeys(
        ("0.down", "1.down", "0.k"), ("int5", "g32")
    ) | {"0.o": None}
    assert fitted(recipe, {"0.q": 512}) is recipe
    assert fitted(other, columns) is other


def test_a_model_with_odd_rows_takes_the_next_type():
    """hidden 96, so that all rows but those of down_proj are no whole runs."""
    model, said = tiny_model("llama", num_hidden_layers=1, intermediate_size=256), []
    recipe = Recipe.model_validate({"name": "t", "weights": {"format": "q3_k"}})
    made = quantize(model, recipe, progress=lambda what, *_: said.append(what)).quantization
    kinds = {name.rpartition(".")[2]: as_blocks(tensor).kind.name for name, tensor in made.tensors.items()}
    assert kinds == dict.fromkeys(kinds, "Q4_0") | {"down_proj": "Q3_K"}
    assert said[0] == "6 matrices have rows that 256 does not divide, as q3_k needs: int4 g32 instead"
    mixed = {"weights": {"format": "q3_k"}, "mixed": {"bits": 3, "formats": ["q2_k", "q4_k"]}}
    with pytest.raises(BitassayError, match=r"mixed may choose q2_k, which rows of 96 weights"):
        check_recipe(model, Recipe.model_validate({"name": "t"} | mixed))


def test_solved_learned_saved_and_loaded(tmp_path):
    """Every solver on K types: a work folder, a folder and a GGUF file hold the same weights to the bit."""
    size = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
    base = tiny_model("llama", **size)
    recipe = Recipe.model_validate(
        {
            "name": "t",
            "weights": {"format": "q2_k"},
            "overrides": [
                {"match": f"*.{part}_proj", "weights": {"format": name}}
                for part, name in (("v", "q3_k"), ("o", "iq4_nl"), ("k", "iq4_xs"))
            ],
            "calibration": {"samples": 4, "tokens": 32},
            "gptq": {},
            "learned": {"steps": 3},
            "tune": {"steps": 2},
        }
    )
    made = quantize(base, recipe, work=tmp_path / "work")
    again = quantize(base, recipe, work=tmp_path / "work")
    save(made, tmp_path / "folder")
    file = write_gguf(made, tmp_path / "file.gguf", embeddings="F32")
    kinds = {"q3_k g16 -> Q3_K", "iq4_nl g32 -> IQ4_NL", "iq4_xs g32 -> IQ4_XS"}
    assert file.stored_as == dict.fromkeys(kinds, 1) | {"q2_k g16 -> Q2_K": 4}
    assert file.relative_error == 0
    assert file.bits_per_weight == bits_per_weight(made)
    tokens = torch.arange(3, 40)[None]
    wanted = made(tokens).logits
    folder, gguf_file = load(tmp_path / "folder"), load(tmp_path / "file.gguf")
    for other in (again, folder, gguf_file):
        assert torch.equal(other(tokens).logits, wanted)
    for name, tensor in made.quantization.tensors.items():
        assert torch.equal(gguf_file.get_submodule(name).weight, tensor.dequantize())


@pytest.mark.parametrize("order", ["activation", "natural"])
@pytest.mark.parametrize("name", ["q2_k", "q3_k", "iq4_nl"])
def test_gptq_leaves_less_of_the_output(name, order):
    generator = torch.Generator().manual_seed(0)
    weight, scheme = matrix(24), WeightScheme(format=name)
    mixing = torch.randn(512, 512, generator=generator) / 512**0.5 + torch.eye(512)
    x = torch.randn(2000, 512, generator=generator) @ mixing * torch.rand(512, generator=generator)
    hessian = (x.T @ x).double()
    importance = hessian.diagonal().float()
    solved = gptq(weight, hessian, [scheme], Gptq(order=order)).tensor()
    rounded = quantize_tensor(weight, scheme, importance=importance)
    lost = [((t.dequantize() - weight) @ x.T).square().sum() for t in (solved, rounded)]
    assert lost[0] < 0.8 * lost[1]
    blocks = as_blocks(solved)
    assert torch.equal(torch.from_numpy(gguf.dequantize(blocks.data, blocks.kind)), solved.dequantize())
