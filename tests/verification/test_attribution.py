"""Posteriors against scipy, "none of these" against its promise, and suspects of the tiny model."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from bitassay.engines.sampling import GREEDY, Sampler
from bitassay.errors import BitassayError
from bitassay.models.identity import identity
from bitassay.quantization.pipeline import quantize
from bitassay.verification.attribution import (
    HONEST,
    NONE,
    SMALLEST_SD,
    Gaussian,
    Library,
    attribute,
    fit_library,
)
from bitassay.verification.calibrate import calibrate, chosen_attacks
from bitassay.verification.profile import read_profile, write_profile
from bitassay.verification.prove import prove_many
from bitassay.verification.verify import verify_many

TOKENS = 12
CENTRES = {HONEST: (0.0, 0.0, 0.0), "int8": (4.0, 0.0, 0.0), "fp8": (6.0, 5.0, 0.0)}


def runs(rng, count, lengths=(8, 16)):
    """Of three kinds, correlated, with a spread that shrinks with the length."""
    mix = np.array([[1.0, 0.6, 0.0], [0.0, 0.8, 0.0], [0.0, 0.0, 1.0]])
    return {
        name: {n: centre + rng.normal(size=(count, 3)) @ mix * math.sqrt(8 / n) for n in lengths}
        for name, centre in CENTRES.items()
    }


@pytest.fixture(scope="module")
def library():
    rng = np.random.default_rng(0)
    return fit_library(runs(rng, 40), runs(rng, 60), 0.05)


@pytest.fixture(scope="module")
def suspected(model, prompts):
    return calibrate(
        model,
        model,
        prompts[:56],
        max_new_tokens=TOKENS,
        min_positions=6,
        alpha=0.05,
        guarantee="average",
        suspects=("int2", "kv4"),
        suspect_runs=32,
    )


def test_the_posterior_is_bayes_rule_with_scipys_densities(library):
    for x in np.random.default_rng(1).normal(size=(5, 3)) * 4:
        found = library.attribute(x, 16)
        densities = {
            name: stats.multivariate_normal(several[1].mean, several[1].covariance).pdf(x)
            for name, several in library.kinds.items()
        }
        total = sum(densities.values())
        assert found.posterior == pytest.approx({name: one / total for name, one in densities.items()})
        assert found.probability == max(found.posterior.values())
        assert found.length == 16


def test_a_gaussian_is_drawn_to_its_diagonal_and_never_thin():
    values = np.random.default_rng(2).normal(size=(10, 2)) * (1, 0)
    values[:, 1] = values[:, 0] / 2
    C, S = np.array(Gaussian.fitted(values).covariance), np.cov(values, rowvar=False)
    floor = SMALLEST_SD**2
    assert np.diag(C) == pytest.approx(np.diag(S) + floor)
    assert C[0, 1] == C[1, 0] == pytest.approx(S[0, 1] * 10 / 12)
    assert np.array(Gaussian.fitted(np.ones((3, 2))).covariance) == pytest.approx(floor * np.eye(2))


def test_new_runs_are_called_what_they_are_and_rarely_none(library):
    rng, counts = np.random.default_rng(5), {}
    for name, by_length in runs(rng, 300).items():
        called = [library.attribute(x, 16).best for x in by_length[16]]
        assert called.count(name) > 250
        counts[name] = called.count(NONE)
    assert 0 < sum(counts.values()) / 900 < 0.12, "about alpha, 0.05, from 180 held-out runs"


def test_what_is_far_from_every_kind_is_none_of_these(library):
    far = library.attribute(np.array([0.0, 40.0, 0.0]), 8)
    assert far.best == NONE
    assert far.distance > far.plausible
    assert max(far.posterior.values()) > 0.99, "among the known kinds one always fits best"
    assert far.probability == max(far.posterior.values())
    assert str(far) == NONE
    centre = library.attribute(np.array(CENTRES["int8"]), 8)
    assert (centre.best, str(centre)[:6]) == ("int8", "int8 (")


def test_the_limit_of_the_plausible_is_the_held_out_quantile():
    kinds = {name: Gaussian(mean=(at,), covariance=((1.0,),)) for name, at in ((HONEST, 0.0), ("int8", 9.0))}
    assert attribute(np.array([1.5]), kinds, 1.5**2, 8).best == HONEST
    assert attribute(np.array([1.5]), kinds, 1.5**2 - 1e-9, 8).best == NONE
    spread = {name: {8: np.array([[at - 1.0], [at + 1.0]])} for name, at in ((HONEST, 0.0), ("int8", 90.0))}
    seen = {name: {8: at + np.arange(1.0, 11)[:, None]} for name, at in ((HONEST, 0.0), ("int8", 90.0))}
    variance = 2 + SMALLEST_SD**2
    for alpha, farthest in ((0.05, 10), (0.2, 9), (0.01, 10)):  # of 20 values: the 20th, the 17th, the last
        assert fit_library(spread, seen, alpha).plausible == pytest.approx((farthest**2 / variance,))


def test_confusion_counts_held_out_runs_at_the_last_length(library):
    assert set(library.confusion) == set(CENTRES)
    for name, called in library.confusion.items():
        assert set(called) == {*CENTRES, NONE}
        assert sum(called.values()) == 60
        assert called[name] >= 50
    swapped = runs(np.random.default_rng(3), 40)
    swapped["int8"], swapped["fp8"] = swapped["fp8"], swapped["int8"]
    wrong = fit_library(runs(np.random.default_rng(0), 40), swapped, 0.05).confusion
    assert wrong["int8"]["fp8"] >= 30


def test_runs_are_cut_to_a_length_that_the_library_has(library):
    assert [library.length(n) for n in (7, 8, 15, 16, 99)] == [None, 8, 8, 16, 16]


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("lengths", [16, 8], "not ascending"),
        ("lengths", [8], "for each length"),
        ("lengths", [], "lengths"),
        ("plausible", [1.0], "for each length"),
        ("plausible", [1.0, math.nan], "plausible"),
        ("plausible", [0.0, 1.0], "plausible"),
        ("kinds", {}, "kinds"),
        ("confusion", {}, "confusion of other kinds"),
        ("note", "unknown", "note"),
    ],
)
def test_a_damaged_library_is_refused(library, field, value, match):
    content = library.model_dump(mode="json")
    Library.model_validate(content)
    with pytest.raises(ValueError, match=match):
        Library.model_validate(content | {field: value})


def test_a_damaged_gaussian_or_kind_is_refused(library):
    for covariance in ([[1.0]], [[1, 2], [2, 1]], [[1, 1], [0, 1]], [[1, 0], [0]], [[math.nan, 0], [0, 1]]):
        with pytest.raises(ValueError, match="covariance"):
            Gaussian.model_validate({"mean": [0, 0], "covariance": covariance})
    content = library.model_dump(mode="json")
    for name in ("\x1b[31m", "A", "", NONE, "x" * 65):
        kinds = content["kinds"] | {name: content["kinds"]["int8"]}
        confusion = content["confusion"] | {name: {}}
        with pytest.raises(ValueError, match="kinds"):
            Library.model_validate(content | {"kinds": kinds, "confusion": confusion})
    only = {"int8": content["kinds"]["int8"], "fp8": content["kinds"]["fp8"]}
    with pytest.raises(ValueError, match="honest"):
        Library.model_validate(content | {"kinds": only, "confusion": {"int8": {}, "fp8": {}}})


def test_a_library_of_other_statistics_is_refused(profile, library, tmp_path):
    content = profile.model_dump(mode="json") | {"library": library.model_dump(mode="json")}
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(BitassayError, match="library is of other statistics"):
        read_profile(tmp_path / "p.json")


# --- suspects of the tiny model


def test_suspects_are_named_and_the_profile_is_written_with_them(suspected, tmp_path):
    assert set(suspected.library.kinds) == {HONEST, "int2", "kv4"}
    assert suspected.library.dimensions == 7
    assert read_profile(write_profile(suspected, tmp_path / "p.json")) == suspected
    right = sum(called[name] for name, called in suspected.library.confusion.items())
    assert right >= 0.8 * sum(sum(called.values()) for called in suspected.library.confusion.values())


def test_a_failing_verdict_names_its_kind(model, prompts, suspected, honest):
    cheap = prove_many(quantize(model, "w2"), prompts[60:80], max_new_tokens=TOKENS, claim=identity(model))
    verdicts = [one for one in verify_many(cheap, model, profile=suspected) if one.attribution]
    assert len(verdicts) >= 10
    named = [one.attribution.best for one in verdicts]
    assert named.count("int2") >= 0.7 * len(named)
    first = next(one for one in verdicts if one.attribution.best == "int2")
    assert "fits best: int2 (" in str(first)
    content = json.loads(json.dumps(first.to_dict(), allow_nan=False))["attribution"]
    assert sum(content["posterior"].values()) == pytest.approx(1)
    passed = [one for one in verify_many(honest, model, profile=suspected) if one.status == "PASS"]
    assert {one.attribution.best for one in passed} <= {HONEST, NONE}
    assert "fits best" not in str(passed[0])


def test_a_kind_that_no_suspect_is_like_is_none_of_these(model, prompts, suspected, round_weights):
    """The same 2 bits, but with one scale a row, which is much coarser than the recipe's groups."""
    coarse = prove_many(round_weights(model, 2), prompts[60:80], max_new_tokens=TOKENS, claim=identity(model))
    named = [one.attribution.best for one in verify_many(coarse, model, profile=suspected) if one.attribution]
    assert named.count(NONE) >= 0.7 * len(named)


def test_attribution_decides_nothing(honest, model, suspected):
    """The same runs with a library that calls everything INT2."""
    int2 = suspected.library.kinds["int2"]
    kinds = suspected.library.kinds | {HONEST: int2, "int2": suspected.library.kinds[HONEST]}
    swapped = suspected.model_copy(update={"library": suspected.library.model_copy(update={"kinds": kinds})})
    one, other = (verify_many(honest[:20], model, profile=profile) for profile in (suspected, swapped))
    assert [verdict.status for verdict in one] == [verdict.status for verdict in other]
    assert "int2" in {verdict.attribution.best for verdict in other if verdict.attribution}


def test_what_cannot_be_a_suspect():
    assert [one.name for one in chosen_attacks(["int8", "fp8", "int8"], GREEDY, 16)] == ["int8", "fp8"]
    assert chosen_attacks([], GREEDY, 0) == []
    for name, sampler, count, match in (
        ("int9", GREEDY, 48, "no such attack; the nearest are 'int8'"),
        ("replayed", GREEDY, 48, "exact checks catch it"),
        ("seed", GREEDY, 48, "greedy runs do not tell"),
        ("int8", GREEDY, 15, "15 runs of each suspect are too few"),
    ):
        with pytest.raises(BitassayError, match=match):
            chosen_attacks([name], sampler, count)
    assert chosen_attacks(["temperature"], Sampler(1.0), 16)
