import json
import math
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch

from bitassay.errors import BitassayError
from bitassay.testing.tiny import tiny_model
from bitassay.verification.calibrate import (
    calibrate,
    check_enough,
    chosen_detectors,
    fit_by_length,
    fit_lengths,
    scores_by_length,
    split,
)
from bitassay.verification.detectors.detector import Series
from bitassay.verification.detectors.registry import DECIDING, DETECTORS
from bitassay.verification.detectors.token_difr import OFFSET
from bitassay.verification.numerics import numerics
from bitassay.verification.observe import Observation, observe
from bitassay.verification.profile import (
    Profile,
    Score,
    find_profile,
    profile_path,
    read_profile,
    write_profile,
)
from bitassay.verification.prove import prove_many
from bitassay.verification.scores import Fit, Statistic, fit, runs_needed, standardise, statistics
from bitassay.verification.structure import Request

STATES_SD, TOKENS_SD = (DETECTORS[name].smallest_sd for name in DECIDING)


def observation(generated, prompt=(-9.0, -9.0), margins=(0.0,) * 10):
    """Of layers 8 and 16; generated: by layer one number, or one a position."""
    rows = [row if isinstance(row, tuple) else (row,) * (len(margins) - 1) for row in generated]
    distances = tuple(Series(row, (before,)) for row, before in zip(rows, prompt, strict=True))
    series = {"distance": distances, "token-difr": (Series(margins),)}
    return Observation(len(margins), (), len(margins) - 1, (8, 16), series)


def prefix(run, n):
    return observation(
        [series.values[:n] for series in run.series["distance"]],
        [series.prompt[0] for series in run.series["distance"]],
        run.series["token-difr"][0].values[: n + 1],
    )


def scored(run, layers, tokens):
    fits = {"distance": list(layers.values()), "token-difr": [tokens]}
    return Score.of(standardise(statistics(run, DECIDING), fits, run.positions), (8, 16))


def fit_values(lengths, values, detector="distance"):
    """values: those of all runs at each of the lengths."""
    runs = {
        n: [[Statistic(detector, 0, "generated", value)] for value in several]
        for n, several in zip(lengths, values, strict=True)
    }
    return fit(runs)[detector][0]


def constant(mean, sd):
    return Fit(lengths=(8,), mean=(mean,), sd=(sd,))


FITS = {8: constant(-4.0, 0.5), 16: constant(-3.0, 0.25)}
TOKENS = constant(math.log(OFFSET), 0.5)


def test_score_is_the_largest_standardised_statistic():
    assert scored(observation((-4.0, -3.0)), FITS, TOKENS).value == 0
    assert scored(observation((-3.0, -3.0)), FITS, TOKENS).value == 2
    far = scored(observation((-4.0, -2.0)), FITS, TOKENS)
    assert (far.value, far.states) == (4, 4)
    assert scored(observation((-5.0, -4.0)), FITS, TOKENS).states < 0, (
        "nearer than usual is no evidence against a run"
    )
    far_prompt = scored(observation((-4.0, -3.0), prompt=(-9.0, -1.0)), FITS, TOKENS)
    assert (far_prompt.value, far_prompt.layer, far_prompt.part) == (8, 16, "prompt")
    assert set(far_prompt.to_dict()) == {"value", "states", "tokens", "layer", "part"}
    tokens = scored(observation((-4.0, -3.0), margins=(OFFSET * (math.e - 1),) * 10), FITS, TOKENS)
    assert tokens.tokens == pytest.approx(2)
    assert tokens.value == tokens.tokens > tokens.states


def test_p_value_counts_honest_scores_at_least_as_bad(profile):
    four = profile.model_copy(update={"scores": ((0.0,), (1.0,), (2.0,), (3.0,))})
    assert [four.p_value(score, 11) for score in (-1.0, 0.0, 1.5, 3.0, 99.0)] == [1, 1, 0.6, 0.4, 0.2]


def test_a_score_is_ranked_among_honest_runs_cut_at_the_same_limit(profile):
    """Positions 6 to 11: a run of 8, one of 6 and one of 11."""
    scores = ((5.0, 6.0, 7.0), (1.0,), (0.0, 1.0, 2.0, 3.0, 4.0, 9.0))
    three = profile.model_copy(update={"scores": scores})
    assert three.honest_scores(6) == [5, 1, 0]
    assert three.honest_scores(7) == [6, 1, 1]
    assert three.honest_scores(10) == [7, 1, 4]
    assert three.honest_scores(11) == three.honest_scores(99) == [7, 1, 9]
    assert (three.p_value(6.5, 6), three.p_value(6.5, 11)) == (0.25, 0.75)


def test_conformal_threshold_keeps_alpha_whatever_the_distribution(profile):
    """5,000 honest worlds with a heavy-tailed score: the share refused is at most alpha, and not far
    below."""
    choose, alpha, refused = np.random.default_rng(0), 0.1, 0
    for _ in range(5000):
        scores = choose.standard_cauchy(20)
        world = profile.model_copy(update={"scores": tuple((score,) for score in scores[1:])})
        refused += world.p_value(scores[0], 11) <= alpha
    assert 0.08 < refused / 5000 < 0.115


@pytest.mark.parametrize(("alpha", "needed"), [(0.05, 19), (0.01, 99), (0.1, 9), (0.001, 999), (0.3, 3)])
def test_runs_needed(alpha, needed):
    assert runs_needed(alpha) == needed
    assert 1 / (needed + 1) <= alpha < 1 / needed


def test_too_few_runs_are_refused_with_the_number_needed(model, prompts):
    check_enough(198, 0.01)
    with pytest.raises(BitassayError, match=r"197 honest runs are too few for alpha 0\.01, which needs 198"):
        check_enough(197, 0.01)
    with pytest.raises(BitassayError, match="needs 38"):
        calibrate(model, model, prompts[:37], alpha=0.05)
    with pytest.raises(BitassayError, match="needs 198"):
        calibrate(model, model, prompts[:38])
    with pytest.raises(BitassayError, match="with 8 or more generated positions"):
        calibrate(model, model, prompts[:38], max_new_tokens=2, alpha=0.05)
    with pytest.raises(BitassayError, match="alpha"):
        check_enough(1000, 0.0)


def test_split_is_a_quarter_half_and_quarter_without_overlap():
    runs = [observation((float(index), 0.0)) for index in range(43)]
    parts = split(runs)
    assert [len(part) for part in parts] == [10, 23, 10]
    assert [run for part in parts for run in part] == runs


def test_fit_is_mean_and_standard_deviation_with_a_floor():
    curve = fit_values([4, 8], [[1.0, 3.0], [1.0, 1.0]], "token-difr")
    assert curve == Fit(lengths=(4, 8), mean=(2.0, 1.0), sd=(math.sqrt(2), TOKENS_SD))


def test_a_fit_is_linear_in_log_n_and_constant_beyond():
    curve = Fit(lengths=(8, 32), mean=(1.0, 3.0), sd=(0.5, 0.1))
    assert curve.at(8) == (1, 0.5)
    assert curve.at(16) == pytest.approx((2, 0.3))
    assert curve.at(2) == curve.at(8)
    assert curve.at(99) == curve.at(32) == (3, 0.1)
    assert curve.standardised(2.6, 16) == pytest.approx(2)


def test_statistics_are_standardised_for_the_generated_positions_of_the_run():
    """10 output tokens are 9 generated positions, of which prompt states and tokens are judged too."""
    curve = Fit(lengths=(8, 9, 10), mean=(50.0, 1.0, 50.0), sd=(9.0, 2.0, 9.0))
    tokens = Fit(lengths=(8, 9, 10), mean=(50.0, math.log(OFFSET) - 6, 50.0), sd=(9.0, 3.0, 9.0))
    found = scored(observation((3.0, 1.0), prompt=(-1.0, 0.0)), {8: curve, 16: curve}, tokens)
    assert (found.states, found.tokens) == (1, pytest.approx(2))


def test_lengths_are_half_octaves_up_to_what_enough_runs_reach():
    assert fit_lengths([31] * 8, 8) == [8, 11, 16, 23, 31]
    assert fit_lengths([31] * 7 + [20] + [8] * 50, 8) == [8, 11, 16, 20]
    assert fit_lengths([8] * 8, 8) == [8]
    assert fit_lengths([11] * 9, 6) == [6, 8, 11]


# --- length


def test_each_length_is_fitted_to_the_runs_that_reach_it():
    runs = [
        observation((v, v), margins=(0.0,) * (n + 1)) for n, v in ((16, -4.0), (8, -1.0)) for _ in range(8)
    ]
    fits = fit_by_length(runs, DECIDING, 8)
    (first, second), (tokens,) = fits["distance"], fits["token-difr"]
    assert first == second
    assert first.lengths == tokens.lengths == (8, 11, 16)
    assert first.mean == (-2.5, -4, -4)
    assert first.sd == pytest.approx((1.5 * (16 / 15) ** 0.5, STATES_SD, STATES_SD))
    assert (tokens.mean[2], tokens.sd[2]) == (pytest.approx(math.log(OFFSET)), TOKENS_SD)


def synthetic(rng, most, farther=0.0):
    """A run of at most `most` generated positions: its own offset, noise by position, and rare margins; one
    in five ends by itself. farther: than honest states, in nats."""
    n = most if rng.random() < 0.8 else int(rng.integers(8, most + 1))
    layers = []
    for _ in (8, 16):
        logs = -4 + farther + 0.05 * rng.normal() + 0.4 * rng.normal(size=n)
        layers.append(tuple(logs.tolist()))
    margins = rng.exponential(0.3, n + 1) * (rng.random(n + 1) < 0.05)
    return observation(layers, (-6.0, -6.0), tuple(margins.tolist()))


@pytest.fixture(scope="module")
def by_length(profile):
    """A profile of synthetic runs of 8 to 48 generated positions, and one that ignores their lengths."""
    rng = np.random.default_rng(0)
    fitted, conformal = ([synthetic(rng, 48) for _ in range(count)] for count in (100, 199))
    curves, flat = fit_by_length(fitted, DECIDING, 8), fit({8: [statistics(run, DECIDING) for run in fitted]})
    return [
        profile.model_copy(
            update={
                "layers": dict(zip((8, 16), fits["distance"], strict=True)),
                "tokens": fits["token-difr"][0],
                "scores": tuple(scores_by_length(run, fits, 8)[-shown:] for run in conformal),
                "generated_positions": (8, 48),
            }
        )
        for fits, shown in ((curves, 99), (flat, 1))
    ]


def refused(profile, rng, limit, alpha, farther=0.0, runs=600):
    cut = (prefix(synthetic(rng, 48, farther), limit) for _ in range(runs))
    return np.mean([profile.p_value(profile.score(one).value, limit) <= alpha for one in cut])


@pytest.mark.sample(1)
@pytest.mark.parametrize("limit", [8, 13, 24, 48])
def test_honest_runs_of_every_length_are_accused_at_alpha(by_length, limit):
    """199 honest scores give alpha to within 0.015; the binomial adds 0.009."""
    profile, _ = by_length
    found = refused(profile, np.random.default_rng(limit), limit, 0.05)
    assert 0.01 < found < 0.05 + 2.5 * math.hypot(0.015, 0.009)


def test_one_fit_for_all_lengths_accuses_short_honest_runs(by_length):
    """What the lengths are for."""
    _, flat = by_length
    short, long = (refused(flat, np.random.default_rng(1), limit, 0.05) for limit in (8, 48))
    assert short > 0.2
    assert long < 0.09


def test_long_dishonest_runs_are_seen_better_than_short_ones(by_length):
    profile, _ = by_length
    short, long = (refused(profile, np.random.default_rng(2), limit, 0.05, 0.2, 200) for limit in (8, 48))
    assert 0.1 < short < 0.6
    assert long > short + 0.2


def test_a_run_cut_short_is_the_run_of_a_shorter_request(model, prompts, profile):
    """Up to what batches of other lengths do to bf16."""
    long, short = (prove_many(model, prompts[:6], max_new_tokens=n, nonces=["n"] * 6) for n in (12, 8))
    pairs = [observe(runs, model, [Request()] * 6, DECIDING) for runs in (long, short)]
    for all_of_it, cut in zip(*pairs, strict=True):
        for a, b in zip(statistics(all_of_it, DECIDING, 7, 8), statistics(cut, DECIDING), strict=True):
            assert a[:3] == b[:3]
            assert a.value == pytest.approx(b.value, abs=0.2)
        assert statistics(all_of_it, DECIDING, 99, 99) == statistics(all_of_it, DECIDING)


def test_scores_of_all_lengths_are_those_of_runs_cut_there(by_length):
    profile, _ = by_length
    run = prefix(synthetic(np.random.default_rng(9), 20), 12)
    scores = scores_by_length(run, profile.fits, 8)
    assert len(scores) == run.positions - 7
    assert scores[-1] == profile.score(run).value
    assert scores[1] == profile.score(prefix(run, 9)).value


def test_exact_checks_are_no_detector_that_a_profile_adds():
    assert chosen_detectors(["toploc", "distance", "toploc"]) == ["toploc"]
    with pytest.raises(BitassayError, match="always decide"):
        chosen_detectors(["structure"])
    with pytest.raises(BitassayError, match="nearest are 'toploc'"):
        chosen_detectors(["toplok"])


def test_a_profile_says_what_it_was_made_from(profile, model):
    assert profile.n == 28
    assert profile.held_out.n == 14
    assert (
        profile.held_out.interval[0] <= profile.held_out.false_positive_rate <= profile.held_out.interval[1]
    )
    assert profile.prover == profile.verifier == numerics(model)
    assert profile.generated_positions == (6, 11)
    assert set(profile.layers) == {8, 16, 17}
    assert profile.expires - profile.created == timedelta(days=90)
    assert not profile.expired()
    assert profile.expired(profile.expires)
    assert not profile.expired(profile.expires - timedelta(seconds=1))


def test_prover_and_verifier_must_be_the_same_model(model, prompts):
    other = tiny_model("llama", num_hidden_layers=17)
    other.identity = other.identity.with_recipe("0" * 64, "w4")
    with pytest.raises(BitassayError, match="not the same model"):
        calibrate(other, model, prompts, alpha=0.05)


def test_profiles_are_written_read_and_found(profile, model, tmp_path):
    assert read_profile(write_profile(profile, tmp_path / "p.json")) == profile
    key = (profile.model, profile.prover, profile.verifier, profile.sampling)
    assert find_profile(*key) is None
    path = write_profile(profile)
    try:
        assert path == profile_path(profile.key)
        assert find_profile(*key) == profile
        other = profile.verifier.model_copy(update={"threads": profile.verifier.threads + 1})
        assert find_profile(profile.model, profile.prover, other, profile.sampling) is None
    finally:
        path.unlink()


def test_an_old_profile_is_named_with_the_remedy(profile, tmp_path):
    old = profile.model_dump(mode="json") | {"schema_version": 1, "scores": [0.0, 1.0]}
    (tmp_path / "p.json").write_text(json.dumps(old))
    with pytest.raises(BitassayError, match=r"p\.json: a profile of version 1; this reads 2") as error:
        read_profile(tmp_path / "p.json")
    assert error.value.remedy == "bitassay calibrate MODEL"
    (tmp_path / "p.json").write_bytes(b"[" + b"0," * 2**25 + b"0]")
    with pytest.raises(BitassayError, match="more than the"):
        read_profile(tmp_path / "p.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scores", [2.0, 1.0]),
        ("scores", []),
        ("scores", [[]]),
        ("scores", [[1e999]]),
        ("scores", [[0.0] * 7]),
        ("layers", {}),
        ("layers", {"8": {"lengths": [6], "mean": [0], "sd": [0]}}),
        ("layers", {"8": {"lengths": [6], "mean": [math.nan], "sd": [1]}}),
        ("layers", {"8": {"lengths": [6], "mean": [0, 1], "sd": [1]}}),
        ("layers", {"8": {"lengths": [6, 6], "mean": [0, 1], "sd": [1, 1]}}),
        ("layers", {"8": {"lengths": [], "mean": [], "sd": []}}),
        ("layers", {"8": {"lengths": list(range(1, 66)), "mean": [0] * 65, "sd": [1] * 65}}),
        ("layers", {"8": {"lengths": [6], "mean": [0], "sd": [1], "note": 1}}),
        ("alpha", 0),
        ("alpha", 1),
        ("generated_positions", [9, 3]),
        ("expires", "2026-01-01T00:00:00"),
        ("expires", "soon"),
        ("schema_version", 1),
        ("prompts_digest", "x" * 65),
        ("held_out", {"n": 0, "rejected": 0, "interval": [0, 1]}),
        ("held_out", {"n": 9, "rejected": 1, "interval": [math.nan, 1]}),
        ("library", {}),
        ("note", "unknown"),
    ],
)
def test_a_damaged_profile_is_refused_and_named(profile, tmp_path, field, value):
    content = profile.model_dump(mode="json") | {field: value}
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(BitassayError, match=r"p\.json"):
        read_profile(tmp_path / "p.json")


def test_a_profile_in_the_past_is_expired(profile):
    assert isinstance(profile, Profile)
    assert profile.expired(datetime.now(UTC) + timedelta(days=91))


def test_thread_count_is_part_of_the_numerics(model):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert numerics(model).threads == 2
        assert (numerics(model).dtype, numerics(model).attention, numerics(model).device) == (
            "bfloat16",
            "sdpa",
            "cpu",
        )
    finally:
        torch.set_num_threads(before)
