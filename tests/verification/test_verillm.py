"""The vectorised statistics against a loop in plain Python that reads bits with `struct`, and against
hand-made cells."""

import dataclasses
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitassay.errors import BitassayError
from bitassay.verification.detectors.verillm import (
    DOCUMENTS,
    PAPER,
    RULE_SETS,
    accept_rate,
    accepted,
    cell_statistics,
    summary,
)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUT = {"fp16": ("<e", "<H", 5, 10), "bf16": None, "fp32": ("<f", "<I", 8, 23)}
SPECIAL = [
    0.0,
    -0.0,
    1.0,
    1.9921875,
    2.0,
    -2.0,
    1e-40,
    -1e-40,
    6e-8,
    65504.0,
    3e38,
    math.inf,
    -math.inf,
    math.nan,
]


def fields(value, format):
    """Sign, exponent and mantissa of a Python float that `format` holds exactly. A bf16 is the upper half of
    an fp32."""
    if format == "bf16":
        bits = struct.unpack("<I", struct.pack("<f", value))[0] >> 16
        return bits >> 15, (bits >> 7) & 0xFF, bits & 0x7F
    pack, unpack, exponent_bits, mantissa_bits = LAYOUT[format]
    bits = struct.unpack(unpack, struct.pack(pack, value))[0]
    sign = bits >> (exponent_bits + mantissa_bits)
    return sign, (bits >> mantissa_bits) & (2**exponent_bits - 1), bits & (2**mantissa_bits - 1)


def oracle(xs, ys, format, e_m, e_w):
    size = {"fp16": 1024, "bf16": 128, "fp32": 2**23}[format]
    compared = exponents = wraps = same = small = signs = 0
    total = absolute = 0.0
    refused = False
    for x, y in zip(xs, ys, strict=True):
        if not (math.isfinite(x) and math.isfinite(y)):
            refused |= not ((math.isnan(x) and math.isnan(y)) or x == y)
            continue
        compared += 1
        total += x - y
        absolute += abs(x - y)
        (sx, ex, mx), (sy, ey, my) = fields(x, format), fields(y, format)
        opposite = sx != sy and x != 0 and y != 0
        signs += opposite
        if ex != ey:
            exponents += 1
            wraps += abs(mx - my) / size > e_m
        else:
            same += 1
            small += abs(mx - my) / size < e_w and not opposite
    return {
        "Pe": exponents / compared if compared else math.nan,
        "Pm": wraps / exponents if exponents else math.nan,
        "Pw": small / same if same else 0.0,
        "mean_epsilon": total / compared if compared else math.nan,
        "mean_absolute": absolute / compared if compared else math.nan,
        "compared": compared,
        "sign_mismatches": signs,
        "refused": refused,
    }


numbers = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32), st.floats(-4, 4, width=16))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(numbers, numbers, st.booleans()), min_size=1, max_size=12),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from([(0.75, 0.05), (0.1, 0.5), (0.0, 1.0)]),
)
def test_statistics_equal_a_loop_over_bits(triples, format, thresholds):
    """Every third number or so is made near its partner, for otherwise exponents hardly ever agree."""
    xs = torch.tensor([x for x, _, _ in triples], dtype=torch.float32)
    ys = torch.tensor(
        [x * 1.01 if near and math.isfinite(x) else y for x, y, near in triples], dtype=torch.float32
    )
    rules = dataclasses.replace(PAPER, e_m=thresholds[0], e_w=thresholds[1])
    cells = cell_statistics(xs[None], ys[None], rules, format)
    expected = oracle(xs.to(DTYPES[format]).tolist(), ys.to(DTYPES[format]).tolist(), format, *thresholds)
    rounding = 0 if math.isnan(expected["mean_absolute"]) else 1e-12 * expected["mean_absolute"]
    for name, value in expected.items():
        assert getattr(cells, name).item() == pytest.approx(value, rel=1e-12, abs=rounding, nan_ok=True), name


def test_cells_do_not_mix():
    x, y = torch.randn(5, 64), torch.randn(5, 64)
    together = cell_statistics(x, y, PAPER, "bf16")
    for row in range(5):
        alone = cell_statistics(x[row : row + 1], y[row : row + 1], PAPER, "bf16")
        assert together.Pe[row] == alone.Pe[0]
        assert together.Pw[row] == alone.Pw[0]


def cell(pairs, format="bf16", rules=PAPER):
    x, y = torch.tensor([[x for x, _ in pairs]]), torch.tensor([[y for _, y in pairs]])
    return cell_statistics(x, y, rules, format)


def is_accepted(pairs, rules=PAPER):
    return bool(accepted(cell(pairs, rules=rules), rules))


def near_power_of_two(share_wrapping):
    """Of 100 pairs four differ in the exponent; this share of the four wraps around, the others jump by half
    a mantissa."""
    wrapping = round(4 * share_wrapping)
    return [(1.9921875, 2.0)] * wrapping + [(1.5, 2.0)] * (4 - wrapping) + [(1.0, 1.0)] * 96


@pytest.mark.parametrize("rules", RULE_SETS.values(), ids=RULE_SETS)
def test_every_threshold_flips_the_verdict(rules):
    assert is_accepted([(1.0, 1.0)] * 100, rules)
    assert is_accepted([(1.9921875, 2.0)] * 4 + [(1.0, 1.0)] * 96, rules)
    assert not is_accepted([(1.9921875, 2.0)] * 5 + [(1.0, 1.0)] * 95, rules), "Pe = .05 is not below .05"
    for pairs, Pm in ((near_power_of_two(1.0), 1.0), (near_power_of_two(0.75), 0.75)):
        balanced = [(a, b) if i % 2 else (b, a) for i, (a, b) in enumerate(pairs)]  # keeps the mean near 0
        assert cell(balanced).Pm.item() == Pm
        assert is_accepted(balanced, rules) == (Pm > 0.75)
    limit = round(rules.min_Pw * 100)
    far = [(1.0, 1.25), (1.25, 1.0)]
    for small, holds in ((limit + 2, True), (limit, False)):
        pairs = [(1.0, 1.0)] * small + far * ((100 - small) // 2)
        assert cell(pairs).Pw.item() == pytest.approx(small / 100)
        assert is_accepted(pairs, rules) == holds
    shifted = [(1.0, 1.0)] * 92 + [(16.5, 16.0)] * 8  # d = 4 / 128, below e_w
    assert cell(shifted).mean_epsilon.item() == pytest.approx(0.04)
    assert not is_accepted(shifted, rules)
    assert not is_accepted([(y, x) for x, y in shifted], rules), "a negative mean counts as well"
    assert is_accepted(shifted, dataclasses.replace(rules, max_mean=0.05))


def test_paper_is_stricter_than_documents_in_Pw_alone():
    assert dataclasses.replace(PAPER, name="documents", min_Pw=0.5) == DOCUMENTS
    pairs = [(1.0, 1.0)] * 70 + [(1.0, 1.25), (1.25, 1.0)] * 15
    assert not is_accepted(pairs, PAPER)
    assert is_accepted(pairs, DOCUMENTS)


def test_e_m_and_e_w_are_strict():
    assert cell([(1.0, 3.5)]).Pm.item() == 0  # d = 96 / 128 = e_m
    assert cell([(1.0, 3.515625)]).Pm.item() == 1  # d = 97 / 128
    assert cell([(1.0, 1.046875)]).Pw.item() == 1  # d = 6 / 128 < .05
    assert cell([(1.0, 1.0546875)]).Pw.item() == 0  # d = 7 / 128
    assert cell([(1.0, 1.0546875)], rules=dataclasses.replace(PAPER, e_w=7 / 128)).Pw.item() == 0


def test_zeros_subnormals_and_signs():
    assert cell([(0.0, -0.0)]).Pw.item() == 1
    assert cell([(0.0, -0.0)]).sign_mismatches.item() == 0
    assert cell([(0.0, 1.0)]).Pe.item() == 1
    assert cell([(0.0, 1e-40)]).Pe.item() == 0  # a subnormal has the exponent field of zero
    assert cell([(1.0, -1.0)]).Pw.item() == 0
    assert cell([(1.0, -1.0)]).sign_mismatches.item() == 1


@pytest.mark.parametrize(
    ("x", "y"), [(math.nan, 1.0), (1.0, math.inf), (math.inf, -math.inf), (math.nan, math.inf)]
)
def test_nonfinite_on_one_side_refuses_the_cell(x, y):
    pairs = [(1.0, 1.0)] * 99
    assert is_accepted(pairs)
    for pair in ((x, y), (y, x)):
        assert cell([*pairs, pair]).refused.item()
        assert not is_accepted([*pairs, pair])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_on_both_sides_is_left_out_and_nothing_left_is_never_accepted(value):
    assert is_accepted([(1.0, 1.0), (value, value)])
    assert not is_accepted([(value, value)])


def test_empty_C_fails():
    wide_open = dataclasses.replace(PAPER, max_Pe=2.0, max_mean=math.inf)
    assert cell([(1.9921875, 2.0)]).Pw.item() == 0
    assert not is_accepted([(1.9921875, 2.0)], wide_open)


def test_rounding_to_the_format_is_to_nearest_even():
    assert cell([(1.0 + 2**-8, 1.0)], "bf16").mean_epsilon.item() == 0  # half way: down to even
    assert cell([(1.0 + 3 * 2**-8, 1.0)], "bf16").mean_epsilon.item() == 2**-6  # half way: up to even
    assert cell([(1.0 + 2**-8, 1.0)], "fp32").mean_epsilon.item() == 2**-8


def test_shapes_that_differ_are_an_error_and_never_a_rate():
    with pytest.raises(BitassayError, match="shape"):
        cell_statistics(torch.ones(2, 4), torch.ones(2, 5), PAPER, "bf16")
    with pytest.raises(BitassayError, match="bf16"):
        cell_statistics(torch.ones(2, 4), torch.ones(2, 4), PAPER, "bf61")


def test_accept_rate_is_the_share_of_cells():
    x = torch.ones(4, 64)
    y = x.clone()
    y[0] *= -1
    cells = cell_statistics(x, y, PAPER, "fp16")
    assert accept_rate(cells, PAPER) == 0.75
    assert summary(cells, PAPER)["accept_rate"] == 0.75
    assert (summary(cells, PAPER)["e_m"], summary(cells, PAPER)["e_w"], summary(cells, PAPER)["rules"]) == (
        0.75,
        0.05,
        "paper",
    )
    assert accept_rate(cell_statistics(x[:0], y[:0], PAPER, "fp16"), PAPER) == 0
