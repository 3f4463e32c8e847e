"""Plain matrices in block types, with the gguf package's own rounding beside ours."""

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from bitassay.errors import BitassayError
from bitassay.quantization.export.gguf_round import (
    SEARCHED,
    TYPES,
    bits_of_type,
    check_type,
    fitted,
    fitting,
    rounded,
)

WEIGHT = torch.randn(48, 512, generator=torch.Generator().manual_seed(0)) / 20
# The relative error of Gaussian weights, at most; least squares on the levels of each type.
ERRORS = {"Q8_0": 0.0055, "Q6_K": 0.018, "Q5_0": 0.041, "Q4_0": 0.082, "IQ4_NL": 0.075, "Q2_0": 0.36,
          "Q4_K": 0.0705, "Q2_K": 0.261, "Q4_1": 0.075, "TQ2_0": 0.45, "IQ4_XS": 0.074}  # fmt: skip


def error(decoded: torch.Tensor, weight=WEIGHT) -> float:
    return ((decoded - weight).norm() / weight.norm()).item()


@pytest.mark.parametrize("name", ERRORS)
def test_the_error_of_each_type(name):
    blocks = rounded(WEIGHT, name)
    assert blocks.kind.name == name
    assert blocks.data.size * 8 == bits_of_type(name, 512) * WEIGHT.numel()
    back = torch.from_numpy(gguf.dequantize(blocks.data, blocks.kind).copy())
    assert error(back) <= ERRORS[name]
    if name in ("Q8_0", "Q5_0", "Q4_0"):
        theirs = gguf.dequantize(gguf.quantize(WEIGHT.numpy(), Kind[name]), Kind[name])
        assert error(back) <= error(torch.from_numpy(theirs)) * 1.0001
    again = rounded(back, name)  # what is on the grid stays there
    near = 5e-3 if name not in SEARCHED else 0.1 * ERRORS[name]
    assert error(torch.from_numpy(gguf.dequantize(again.data, again.kind).copy()), back) < near


def test_the_largest_magnitude_is_on_the_outermost_level():
    levels = torch.arange(-8.0, 8)
    d, places = fitted(torch.tensor([[0.1, 0.8, -0.3, 0.05], [0.1, -0.8, 0.3, 0.0]]), levels)
    assert (d[0] < 0 < d[1]).all()
    assert places[0, 1] == places[1, 1] == 0
    d, places = fitted(torch.zeros(1, 4), levels)
    assert (d == 0).all()
    assert (levels[places.long()] == 0).all()


def test_rows_that_blocks_do_not_divide_take_another_type():
    assert fitting("Q6_K", 512) == "Q6_K"
    assert fitting("Q6_K", 576) == fitting("Q4_K", 576) == fitting("Q2_0", 96) == "Q8_0"
    assert fitting("Q8_0", 100) == "F16"
    assert [bits_of_type(name, 512) for name in ("F32", "BF16", "Q6_K")] == [32, 16, 6.5625]


def test_an_unknown_type_is_refused():
    with pytest.raises(BitassayError, match="no type 'Q9_0' for embeddings"):
        check_type("Q9_0")
    assert len(TYPES) == 19
