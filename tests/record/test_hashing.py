"""Digests: equal for equal content, different for anything else."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitassay.record.hashing import canonical_json, digest_file, digest_json, digest_tensors

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_the_order_of_keys_does_not_matter(value):
    assert digest_json(value) == digest_json(dict(reversed(value.items())))


def test_canonical_json_is_fixed():
    assert canonical_json({"b": [1, 2.5], "a": "ä"}) == '{"a":"ä","b":[1,2.5]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("inf"))


def test_digest_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert digest_file(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_digest_of_tensors_is_written_down():
    """The definition in the module's text, by hand."""
    sha = hashlib.sha256(
        b"bitassay weights 1\0"
        + b"a\0torch.int8\0(2, 1)\0"
        + bytes([1, 2])
        + b"b\0torch.float32\0()\0"
        + bytes([0, 0, 0x80, 0x3F])
    )
    assert (
        digest_tensors([("a", torch.tensor([[1], [2]], dtype=torch.int8)), ("b", torch.tensor(1.0))])
        == sha.hexdigest()
    )


def test_digest_of_tensors_sees_everything_but_the_memory_layout():
    weight = torch.arange(12, dtype=torch.float32).view(3, 4)
    digest = digest_tensors([("a", weight)])
    assert digest_tensors([("a", weight.T.contiguous().T)]) == digest
    for name, changed in (
        ("b", weight),
        ("a", weight.view(4, 3)),
        ("a", weight.bfloat16()),
        ("a", weight.view(torch.int32)),
        ("a", -weight),
    ):
        assert digest_tensors([(name, changed)]) != digest


def test_tensors_must_come_in_order():
    one = torch.ones(1)
    with pytest.raises(AssertionError, match="out of order"):
        digest_tensors([("b", one), ("a", one)])
    with pytest.raises(AssertionError, match="out of order"):
        digest_tensors([("a", one), ("a", one)])
