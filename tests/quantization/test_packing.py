import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitassay.quantization.codes.packing import PACKINGS, pack, unpack

WIDTHS = sorted(PACKINGS)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(WIDTHS), st.integers(0, 70), st.integers(0, 2**31))
def test_unpack_inverts_pack(bits, count, seed):
    codes = torch.randint(0, PACKINGS[bits].base, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == PACKINGS[bits].packed_bytes(count)
    assert unpack(packed, bits, count).tolist() == codes.tolist()


@pytest.mark.parametrize(("bits", "codes", "expected"), [
    (8, [7, 255], [7, 255]),
    (4, [1, 2, 15], [0x21, 0x0F]),
    (2, [1, 2, 3, 0, 1], [0b00111001, 1]),
    (1, [1, 0, 0, 0, 0, 0, 0, 1, 1], [0b10000001, 1]),
    (3, [1, 2, 3, 4, 5, 6, 7, 0], [0o1 | 0o2 << 3 | (0o3 & 3) << 6, (0o3 >> 2) | 4 << 1 | 5 << 4 | (6 & 1) << 7, (6 >> 1) | 7 << 2]),
    (1.6, [2, 1, 0, 2, 1, 2], [2 + 3 + 2 * 27 + 81, 2]),
])  # fmt: skip
def test_the_first_code_is_in_the_lowest_place(bits, codes, expected):
    assert pack(torch.tensor(codes), bits).tolist() == expected


@pytest.mark.parametrize(
    ("bits", "bytes_of_1000"), [(8, 1000), (4, 500), (3, 375), (2, 250), (1.6, 200), (1, 125)]
)
def test_nothing_is_wasted(bits, bytes_of_1000):
    assert pack(torch.zeros(1000, dtype=torch.int64), bits).numel() == bytes_of_1000
