"""Types and shapes are checked in the tests, at every call of the package's functions and dataclasses."""

from functools import partial

import pytest
import torch
from jaxtyping import TypeCheckError

from bitassay.data.windows import Protocol
from bitassay.quantization.codes.adaptive import column_errors
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.record.hashing import digest_file

ERRORS = partial(column_errors, torch.ones(4, 8), WeightScheme(format="int4"))


@pytest.mark.parametrize(
    "call",
    [
        partial(digest_file, "a string where a path belongs"),
        partial(Protocol, windows=2.5),
        partial(ERRORS, torch.ones(7)),  # one importance for each of 8 columns
        partial(ERRORS, torch.ones(8, dtype=torch.int64)),
    ],
)
def test_a_wrong_argument_is_refused(call):
    with pytest.raises(TypeCheckError):
        call()


def test_sizes_belong_to_one_call():
    assert ERRORS(torch.ones(8)).shape == (8,)
    assert column_errors(torch.ones(2, 16), WeightScheme(format="int4"), torch.ones(16)).shape == (16,)
