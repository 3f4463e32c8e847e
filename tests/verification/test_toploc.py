"""The proof against published ones, against slow arithmetic in plain Python, and on made-up chunks."""

import base64
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitassay.errors import BitassayError
from bitassay.verification.detectors.toploc import (
    BF16_LIMITS,
    NONE_AGREES,
    PRIME,
    SMALLEST_MODULUS,
    ChunkStatistics,
    accepted,
    check_chunks,
    evaluate,
    injective_modulus,
    interpolate,
    largest,
    parse_proof,
    prove_chunks,
    score,
)


def normal(positions, hidden=64, seed=0):
    return torch.randn(positions, hidden, generator=torch.Generator().manual_seed(seed)).bfloat16()


def proof(modulus, *coefficients):
    return np.array([modulus, *coefficients], dtype=">u2").tobytes()


@pytest.mark.parametrize(
    ("published", "size", "numbers"),
    [
        ("/9kbQitnukt1bQ==", 80, {35: 2.890625, 63: 2.390625, 70: -2.171875, 79: -2.671875}),
        ("/9nLuJrxhiVUoA==", 48, {2: -2.375, 6: -1.78125, 35: -2.546875, 44: 2.53125}),
        ("/9m0aNrm5KtBtg==", 48, {3: 2.203125, 8: 2.8125, 19: 2.03125, 47: -2.234375}),
        ("/9mAZNZYMOKvcw==", 48, {3: 2.0, 33: 2.015625, 43: 2.109375, 44: -2.21875}),
    ],
)
def test_proofs_equal_published_ones(published, size, numbers):
    """From the documentation of toploc 0.1.6 (chunks of 16 columns, top 4), to the byte."""
    states = torch.full((size // 16, 16), 0.5, dtype=torch.bfloat16)
    for index, number in numbers.items():
        states.view(-1)[index] = number
    assert prove_chunks(states, top=4) == [base64.b64decode(published)]
    assert check_chunks([base64.b64decode(published)], states, top=4) == [ChunkStatistics(0, 0, 0)]


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(0, PRIME - 1), st.integers(0, PRIME - 1), min_size=1, max_size=40),
    st.integers(0, PRIME - 1),
)
def test_the_polynomial_passes_through_all_points(points, elsewhere):
    x, y = np.array(list(points)), np.array(list(points.values()))
    coefficients = interpolate(x, y)
    assert len(coefficients) == len(x)
    assert coefficients.min() >= 0
    assert coefficients.max() < PRIME
    assert evaluate(coefficients, x).tolist() == y.tolist()
    by_powers = sum(c * pow(elsewhere, power, PRIME) for power, c in enumerate(coefficients.tolist())) % PRIME
    assert evaluate(coefficients, np.array([elsewhere])).tolist() == [by_powers]


def test_interpolation_finds_a_known_polynomial_whatever_the_order_of_its_points():
    known = np.random.default_rng(0).integers(0, PRIME, 128)
    x = np.random.default_rng(1).permutation(PRIME)[:128]
    assert interpolate(x, evaluate(known, x)).tolist() == known.tolist()
    assert interpolate(x[::-1].copy(), evaluate(known, x[::-1])).tolist() == known.tolist()


def test_the_prime_is_one_and_only_nans_lie_beyond_it():
    assert all(PRIME % divisor for divisor in range(2, math.isqrt(PRIME) + 1))
    beyond = torch.arange(PRIME, 2**16).to(torch.int32).to(torch.uint16).view(torch.bfloat16)
    assert beyond.isnan().all()


@pytest.mark.parametrize("positions", [1, 31, 32, 33, 70])
def test_identical_states_show_no_difference(positions):
    states = normal(positions)
    proofs = prove_chunks(states)
    assert [len(one) for one in proofs[:-1]] == [258] * (math.ceil(positions / 32) - 1)
    assert len(proofs[-1]) == (258 if (positions - 1) % 32 else 2 + 2 * 64)  # one row has 64 numbers
    assert check_chunks(proofs, states) == [ChunkStatistics(0, 0, 0)] * len(proofs)
    assert all(map(accepted, check_chunks(proofs, states)))


def test_no_positions_have_no_proofs():
    assert prove_chunks(normal(0)) == []
    assert check_chunks([], normal(0)) == []


def spread(top=8, size=64):
    """One row whose largest numbers are 1 to 1.9 in the first columns and small elsewhere."""
    states = torch.full((1, size), 0.01)
    states[0, :top] = torch.linspace(1, 1.875, top)
    return states.bfloat16()


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (-1.0, ChunkStatistics(0, 0, 0)),  # signs do not count
        (1 + 16 / 128, ChunkStatistics(0, 16 / 8, 0)),
        (2.0, ChunkStatistics(1, 0, 0)),
    ],
)
def test_one_changed_number(own, expected):
    states = spread()
    proofs = prove_chunks(states, top=8)
    states[0, 0] = own
    assert check_chunks(proofs, states, top=8) == [expected]


def test_a_number_that_leaves_the_top_decodes_to_nonsense():
    states = spread()
    proofs = prove_chunks(states, top=8)
    states[0, 0], states[0, 9] = 0.01, 1.0
    (found,) = check_chunks(proofs, states, top=8)
    assert (found.exponent_mismatches, found.mantissa_mean) == (1, 0)


def test_the_median_is_the_middle_one():
    states = spread(top=4)
    proofs = prove_chunks(states, top=4)
    states[0, :4] += torch.tensor([0, 1, 3, 12]) / 128
    assert check_chunks(proofs, states, top=4) == [ChunkStatistics(0, 4, 2)]


def test_where_no_exponent_agrees_nothing_is_accepted():
    states = normal(32)
    (found,) = check_chunks(prove_chunks(states * 4), states)
    assert found == ChunkStatistics(128, NONE_AGREES, NONE_AGREES)
    assert not accepted(found)
    assert not accepted(dataclasses.replace(found, exponent_mismatches=0))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(BF16_LIMITS)])
def test_every_limit_flips_the_decision(field):
    at_the_limits = ChunkStatistics(38, 10, 8)
    assert accepted(at_the_limits)
    beyond = dataclasses.replace(at_the_limits, **{field: getattr(at_the_limits, field) + 1})
    assert not accepted(beyond)
    assert accepted(beyond, dataclasses.replace(BF16_LIMITS, **{field: 100}))


def test_indices_that_collide_get_a_smaller_modulus():
    assert injective_modulus(np.array([5, 70000])) == PRIME
    assert injective_modulus(np.array([5, 5 + PRIME])) == PRIME - 1
    assert injective_modulus(np.array([5, 5 + PRIME, 5 + (PRIME - 1)])) == PRIME - 2
    states = normal(32, 4096)
    states.view(-1)[[100, 100 + PRIME]] = torch.tensor([50.0, -75.0]).bfloat16()
    proofs = prove_chunks(states)
    assert int.from_bytes(proofs[0][:2], "big") < PRIME
    assert check_chunks(proofs, states) == [ChunkStatistics(0, 0, 0)]


def test_indices_that_no_modulus_keeps_apart_are_an_error(monkeypatch):
    monkeypatch.setattr("bitassay.verification.detectors.toploc.SMALLEST_MODULUS", PRIME - 1)
    assert injective_modulus(np.array([5, 5 + PRIME])) == PRIME - 1
    with pytest.raises(BitassayError, match="no modulus"):
        injective_modulus(np.array([5, 5 + PRIME, 6, 6 + (PRIME - 1)]))


def test_of_equal_numbers_the_lowest_indices_are_taken():
    bits = np.array([1, 0x8002, 2, 2, 3], dtype=np.uint16)  # 0x8002 is -2 in these units
    assert sorted(largest(bits, 3)) == [1, 2, 4]
    assert sorted(largest(bits, 9)) == [0, 1, 2, 3, 4]


def test_largest_agrees_with_torch():
    states = normal(32, seed=3)
    bits = states.view(torch.int16).numpy().view(np.uint16).reshape(-1)
    chosen = states.view(-1)[torch.from_numpy(largest(bits, 128))].abs()
    assert chosen.sort().values.equal(states.view(-1).abs().topk(128).values.sort().values)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"", "0 bytes instead of 10"),
        (proof(PRIME, 1, 2, 3), "8 bytes instead of 10"),
        (proof(PRIME, 1, 2, 3, 4, 5), "12 bytes instead of 10"),
        (proof(0, 0, 0, 0, 0), "modulus 0"),
        (proof(SMALLEST_MODULUS - 1, 1, 2, 3, 4), "modulus 32768"),
        (proof(PRIME + 1, 1, 2, 3, 4), "modulus 65498"),
        (proof(PRIME, 1, PRIME, 3, 4), "coefficient 65497"),
    ],
)
def test_a_proof_that_cannot_be_is_a_named_error(bad, message):
    with pytest.raises(BitassayError, match=message):
        parse_proof(bad, 4)
    with pytest.raises(BitassayError, match=f"proof 1 .*{message}"):
        check_chunks([proof(PRIME, 1, 2, 3, 4), bad], normal(33), top=4)


def test_the_smallest_and_largest_proofs_are_read():
    for modulus in (SMALLEST_MODULUS, PRIME):
        assert parse_proof(proof(modulus, 0, PRIME - 1), 2)[1].tolist() == [0, PRIME - 1]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=20))
def test_any_bytes_are_read_or_refused(junk):
    try:
        (found,) = check_chunks([junk], normal(1), top=8)
    except BitassayError:
        return
    assert 0 <= found.exponent_mismatches <= 8


def test_the_number_of_proofs_must_fit():
    proofs = prove_chunks(normal(64))
    for wrong in (proofs[:1], proofs * 2, []):
        with pytest.raises(BitassayError, match="2 chunks"):
            check_chunks(wrong, normal(64))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_states_that_are_not_finite_are_an_error(value):
    states = normal(32)
    proofs = prove_chunks(states)
    states[3, 3] = value
    for act in (lambda: prove_chunks(states), lambda: check_chunks(proofs, states)):
        with pytest.raises(BitassayError, match="NaN or infinity"):
            act()


def test_states_of_other_dtypes_are_rounded_to_bf16():
    states = torch.randn(32, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert prove_chunks(states) == prove_chunks(states.bfloat16())


def test_chunks_do_not_mix():
    states = normal(64)
    proofs = prove_chunks(states)
    states[40:] *= -3
    first, second = check_chunks(proofs, states)
    assert first == ChunkStatistics(0, 0, 0)
    assert second.exponent_mismatches > 38


def noisy(states, relative, seed):
    noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(seed))
    return (states.float() + relative * states.float().norm(dim=-1, keepdim=True) / 8 * noise).bfloat16()


def test_the_score_separates_what_the_limits_do_not():
    states = normal(32 * 8)
    honest = [score(check_chunks(prove_chunks(noisy(states, 0.016, 50 + seed)), states)) for seed in range(8)]
    worse = [check_chunks(prove_chunks(noisy(states, 0.032, 100 + seed)), states) for seed in range(8)]
    assert all(accepted(one) for statistics in worse for one in statistics)
    assert min(map(score, worse)) > max(honest)


def test_the_score_grows_with_either_statistic_and_unreadable_indices_do_not_pay():
    base = ChunkStatistics(3, 1.5, 1)
    assert score([base]) == pytest.approx(math.log(2) + math.log(41 / 38))
    assert score([dataclasses.replace(base, exponent_mismatches=4)]) > score([base])
    assert score([dataclasses.replace(base, mantissa_mean=1.6)]) > score([base])
    assert score([ChunkStatistics(120, 1.0, 1)]) > score([ChunkStatistics(5, 3.0, 3)])
    assert score([base, base]) == score([base])
    assert math.isfinite(score([ChunkStatistics(128, NONE_AGREES, NONE_AGREES)]))
