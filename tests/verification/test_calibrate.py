import json
import math
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch
from scipy import stats

from bitassay.errors import BitassayError
from bitassay.testing.tiny import tiny_model
from bitassay.verification.calibrate import (
    calibrate,
    check_enough,
    chosen_detectors,
    fitting,
    scores_by_length,
)
from bitassay.verification.detectors.detector import Series
from bitassay.verification.detectors.registry import (
    BY_LAYER,
    DECIDING,
    DETECTORS,
    HEAD,
    ROTARY,
    SEGMENTS,
    STATES,
)
from bitassay.verification.detectors.token_difr import OFFSET
from bitassay.verification.fitting import fit, fit_by_length, fit_lengths, split
from bitassay.verification.numerics import numerics
from bitassay.verification.observe import Observation, observe
from bitassay.verification.profile import (
    HeldOut,
    Profile,
    Score,
    find_profile,
    profile_path,
    read_profile,
    write_profile,
)
from bitassay.verification.prove import prove_many
from bitassay.verification.scores import (
    Fit,
    Statistic,
    guaranteed_p_value,
    runs_needed,
    standardise,
    statistics,
)
from bitassay.verification.structure import Request

STATES_SD, TOKENS_SD = (DETECTORS[name].smallest_sd for name in (STATES, "token-difr"))


def observation(generated, prompt=(-9.0, -9.0), margins=(0.0,) * 10, flips=None, units=None):
    """Of layers 8 and 16; generated: by layer one number, or one a position. flips and units: of each token,
    as near ties would give (default: there is none)."""
    rows = [row if isinstance(row, tuple) else (row,) * (len(margins) - 1) for row in generated]
    distances = tuple(Series(row, (before,)) for row, before in zip(rows, prompt, strict=True))
    tokens = {"token-difr": margins, "token-flips": flips, "token-outlier": units, HEAD: None}
    none = (0.0,) * len(margins)
    series = {STATES: distances, SEGMENTS: distances, ROTARY: (Series(none[1:]),)}
    series |= {name: (Series(values or none),) for name, values in tokens.items()}
    return Observation(len(margins), (), len(margins) - 1, (8, 16), series)


def prefix(run, n):
    return observation(
        [series.values[:n] for series in run.series[STATES]],
        [series.prompt[0] for series in run.series[STATES]],
        *(run.series[name][0].values[: n + 1] for name in ("token-difr", "token-flips", "token-outlier")),
    )


def scored(run, layers, tokens):
    """By states and margins: the other detectors are 50 standard deviations below what honest runs are."""
    never = [constant(50.0, 1.0)]
    fits = {
        STATES: list(layers.values()),
        SEGMENTS: never * len(layers),
        ROTARY: never,
        HEAD: never,
        "token-difr": [tokens],
        "token-flips": never,
        "token-outlier": never,
    }
    return Score.of(standardise(statistics(run, DECIDING), fits, run.positions), (8, 16))


def fit_values(lengths, values, detector=STATES):
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
    assert (far.value, far.detectors[STATES]) == (4, 4)
    assert scored(observation((-5.0, -4.0)), FITS, TOKENS).detectors[STATES] < 0, (
        "nearer than usual is no evidence against a run"
    )
    far_prompt = scored(observation((-4.0, -3.0), prompt=(-9.0, -1.0)), FITS, TOKENS)
    assert (far_prompt.value, far_prompt.layer, far_prompt.part) == (8, 16, "prompt")
    assert set(asdict(far_prompt)) == {"value", "detectors", "layer", "part"}
    assert set(far_prompt.detectors) == set(DECIDING)
    tokens = scored(observation((-4.0, -3.0), margins=(OFFSET * (math.e - 1),) * 10), FITS, TOKENS)
    assert tokens.detectors["token-difr"] == pytest.approx(2)
    assert tokens.value == tokens.detectors["token-difr"] > tokens.detectors[STATES]


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


@pytest.mark.parametrize(("alpha", "needed"), [(0.05, 59), (0.01, 299), (0.1, 29), (0.001, 2995), (0.3, 9)])
def test_runs_needed_for_the_rate_of_this_profile(alpha, needed):
    """With one run fewer, even a run that is worse than all honest ones is not refused."""
    assert runs_needed(alpha, "conditional") == needed
    assert guaranteed_p_value(1.0, [0.0] * needed) <= alpha < guaranteed_p_value(1.0, [0.0] * (needed - 1))
    assert (1 - alpha) ** needed <= 0.05 < (1 - alpha) ** (needed - 1)


@pytest.mark.parametrize("n", [1, 58, 59, 299, 1000])
def test_a_guaranteed_p_value_is_the_largest_rate_that_such_ranks_speak_for(n):
    """At a rate of p, as few worse runs as were seen have a probability of 5 %."""
    for worse in sorted({0, n // 100, n // 10, n - 1}):
        honest = [1.0] * worse + [0.0] * (n - worse)
        assert stats.binom.cdf(worse, n, guaranteed_p_value(1.0, honest)) == pytest.approx(0.05)
    assert guaranteed_p_value(0.0, [0.0] * n) == 1


@pytest.mark.parametrize("n", [299, 600])
def test_the_guarantees_are_of_a_profile_and_of_the_average_over_profiles(profile, n):
    """4,000 profiles of uniform scores, whose true rate is what lies beyond the smallest score refused."""
    choose, alpha, broken, mean = np.random.default_rng(n), 0.01, {}, {}
    for guarantee, runs in (("conditional", n), ("average", 99)):
        world = profile.model_copy(update={"guarantee": guarantee})
        rates = []
        for _ in range(4000):
            scores = np.sort(choose.random(runs))[::-1].tolist()
            worlds = world.model_copy(update={"scores": tuple((score,) for score in scores)})
            refused = 0  # a score just above the (k + 1)-th largest has k honest ones that are as bad
            while worlds.refusal(math.nextafter(scores[refused], 2), 11) <= alpha:
                refused += 1
            rates.append(1 - scores[refused - 1] if refused else 0.0)
        broken[guarantee], mean[guarantee] = np.mean(np.array(rates) > alpha), np.mean(rates)
    assert broken["conditional"] <= 0.05 + 3 * (0.05 * 0.95 / 4000) ** 0.5
    assert mean["conditional"] > 0.2 * alpha, "what refuses nobody keeps every promise"
    assert broken["average"] > 0.3
    assert mean["average"] == pytest.approx(alpha, rel=0.06)


def test_too_few_runs_are_refused_with_the_number_needed(model, prompts):
    check_enough(501, 0.01, "conditional")
    with pytest.raises(BitassayError, match=r"500 honest runs are too few for alpha 0\.01, which needs 501"):
        check_enough(500, 0.01, "conditional")
    check_enough(167, 0.01, "average")
    with pytest.raises(BitassayError, match=r"166 honest runs are too few for alpha 0\.01, which needs 167"):
        check_enough(166, 0.01, "average")
    with pytest.raises(BitassayError, match="needs 35"):
        calibrate(model, model, prompts[:34], alpha=0.05, guarantee="average")
    with pytest.raises(BitassayError, match="needs 101"):
        calibrate(model, model, prompts[:35], alpha=0.05)
    with pytest.raises(BitassayError, match="needs 501"):
        calibrate(model, model, prompts[:38])
    with pytest.raises(BitassayError, match="with 8 or more generated positions"):
        calibrate(model, model, prompts[:38], max_new_tokens=2, alpha=0.05, guarantee="average")
    with pytest.raises(BitassayError, match="alpha"):
        check_enough(1000, 0.0, "average")


@pytest.mark.parametrize("guarantee", ["average", "conditional"])
def test_as_many_runs_as_are_asked_for_decide(guarantee):
    """After the split, and with any number of runs more."""
    for alpha in (0.5, 0.2, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01, 0.005):
        with pytest.raises(BitassayError) as error:
            check_enough(0, alpha, guarantee)
        needed = int(str(error.value).split("needs ")[1].split()[0].rstrip(";:,."))
        for runs in range(needed, needed + 40):
            fitted, conformal, held_out = split([Observation(9)] * runs)
            assert len(conformal) >= runs_needed(alpha, guarantee), (alpha, runs)
            assert min(len(fitted), len(held_out)) >= 8


def test_a_prompt_counts_once_and_one_that_does_not_fit_is_left_out(model, prompts):
    """The context has 512 positions; the last token of a run has no position of its own."""
    ids = [tuple(prompt) for prompt in prompts[:3]]
    fits, too_long = [3] * (512 - 11), [3] * (512 - 10)
    found = fitting([*prompts[:3], too_long, prompts[1], ids[0], fits], model, 12)
    assert found == [*ids, tuple(fits)]
    with pytest.raises(BitassayError, match=r"34 honest runs \(of 57 prompts; repeated and too long ones"):
        calibrate(
            model,
            model,
            [*prompts[:34], *prompts[:22], too_long],
            max_new_tokens=12,
            alpha=0.05,
            guarantee="average",
        )


def test_repeated_and_long_prompts_do_not_change_a_profile(model, prompts):
    """The same text twice is one honest run, not two that agree."""
    plain, more = (
        calibrate(
            model,
            model,
            chosen,
            max_new_tokens=12,
            min_positions=6,
            alpha=0.05,
            guarantee="average",
        )
        for chosen in (prompts[:40], [*prompts[:40], *prompts[:9], [3] * 600])
    )
    assert plain.model_dump(exclude={"created", "expires"}) == more.model_dump(exclude={"created", "expires"})


def test_split_is_a_fifth_three_fifths_and_a_fifth_without_overlap():
    runs = [observation((float(index), 0.0)) for index in range(53)]
    parts = split(runs)
    assert [len(part) for part in parts] == [10, 33, 10]
    assert [len(part) for part in split(runs[:35])] == [8, 19, 8]
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
    assert (found.detectors[STATES], found.detectors["token-difr"]) == (1, pytest.approx(2))


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
    (first, second), (tokens,) = fits[STATES], fits["token-difr"]
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
    chance = rng.uniform(0, 0.5, n + 1) * (rng.random(n + 1) < 0.2)  # of near ties
    flipped = rng.random(n + 1) < chance
    units = flipped * rng.uniform(0, 3, n + 1)
    tokens = (margins, flipped - chance, units)
    return observation(layers, (-6.0, -6.0), *(tuple(values.tolist()) for values in tokens))


@pytest.fixture(scope="module")
def by_length(profile):
    """A profile of synthetic runs of 8 to 48 generated positions, and one that ignores their lengths."""
    rng = np.random.default_rng(0)
    fitted, conformal = ([synthetic(rng, 48) for _ in range(count)] for count in (100, 199))
    curves, flat = fit_by_length(fitted, DECIDING, 8), fit({8: [statistics(run, DECIDING) for run in fitted]})
    return [
        profile.model_copy(
            update={
                "layers": (8, 16),
                "detectors": fits,
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
    assert chosen_detectors(["toploc", STATES, "distance", "toploc"]) == ["toploc", "distance"]
    with pytest.raises(BitassayError, match="always decide"):
        chosen_detectors(["structure"])
    with pytest.raises(BitassayError, match="verifier's own states alone"):
        chosen_detectors(["rounding"])
    with pytest.raises(BitassayError, match="nearest are 'toploc'"):
        chosen_detectors(["toplok"])


def test_a_profile_says_what_it_was_made_from(profile, model):
    assert profile.n == 34
    assert profile.held_out.n == 11
    assert profile.guarantee == "average"
    assert set(profile.detectors) == set(DECIDING)
    assert (
        profile.held_out.interval[0] <= profile.held_out.false_positive_rate <= profile.held_out.interval[1]
    )
    assert profile.prover == profile.verifier == numerics(model)
    assert profile.generated_positions == (6, 11)
    assert profile.layers == (8, 16, 17)
    assert len(profile.control) == len(profile.detectors[STATES]) == 3
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
    for version in (1, 2, 3):
        old = profile.model_dump(mode="json") | {"schema_version": version, "scores": [0.0, 1.0]}
        (tmp_path / "p.json").write_text(json.dumps(old))
        with pytest.raises(
            BitassayError, match=rf"p\.json: a profile of version {version}; this reads 4"
        ) as error:
            read_profile(tmp_path / "p.json")
        assert error.value.remedy == "bitassay calibrate MODEL"
    (tmp_path / "p.json").write_bytes(b"[" + b"0," * 2**25 + b"0]")
    with pytest.raises(BitassayError, match="more than the"):
        read_profile(tmp_path / "p.json")


def fits_of_states(**curve):
    """The fits of a profile's detectors, of which `curve` is a part of each layer's."""
    good = {"lengths": [6], "mean": [0], "sd": [1]}
    return {name: [good] for name in DECIDING} | {name: [good | curve] * 3 for name in BY_LAYER}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scores", [2.0, 1.0]),
        ("scores", []),
        ("scores", [[]]),
        ("scores", [[1e999]]),
        ("scores", [[0.0] * 7]),
        ("layers", []),
        ("layers", [8, 17]),
        ("layers", [17, 8, 16]),
        ("layers", [8, 8, 17]),
        ("layers", {"8": 1}),
        ("control", []),
        ("control", [{"lengths": [6], "mean": [0], "sd": [1]}] * 2),
        ("detectors", {}),
        ("detectors", {STATES: fits_of_states()[STATES]}),
        ("detectors", fits_of_states() | {STATES: fits_of_states()[STATES][:2]}),
        ("detectors", fits_of_states() | {"No Name": fits_of_states()[STATES]}),
        ("detectors", fits_of_states(sd=[0])),
        ("detectors", fits_of_states(mean=[math.nan])),
        ("detectors", fits_of_states(mean=[0, 1])),
        ("detectors", fits_of_states(lengths=[6, 6], mean=[0, 1], sd=[1, 1])),
        ("detectors", fits_of_states(lengths=[], mean=[], sd=[])),
        ("detectors", fits_of_states(lengths=list(range(1, 66)), mean=[0] * 65, sd=[1] * 65)),
        ("detectors", fits_of_states(note=1)),
        ("unlike", []),
        ("unlike", [[0.0]]),
        ("guarantee", "none"),
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
    content = profile.model_dump(mode="json") | {"detectors": fits_of_states()}
    (tmp_path / "p.json").write_text(json.dumps(content))
    assert read_profile(tmp_path / "p.json").n == profile.n, "what the damage is done to is read"
    (tmp_path / "p.json").write_text(json.dumps(content | {field: value}))
    with pytest.raises(BitassayError, match=r"p\.json"):
        read_profile(tmp_path / "p.json")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"scores": [[1e308]] * 34}, "scores"),
        ({"scores": [[-1e308]] * 34}, "scores"),
        ({"unlike": [[1e308]] * 34}, "unlike"),
        ({"created": "2099-01-01T00:00:00Z", "expires": "2099-02-01T00:00:00Z"}, "created in the future"),
        (
            {"created": "2026-03-01T00:00:00Z", "expires": "2026-02-01T00:00:00Z"},
            "expires before it was created",
        ),
        ({"created": "2026-01-01T00:00:00Z", "expires": "2028-01-01T00:00:00Z"}, "more than 400 days after"),
        (
            {"held_out": {"n": 11, "rejected": 5, "interval": [0.0, 0.2849141]}},
            "held_out.*not that of its counts",
        ),
        ({"held_out": {"n": 11, "rejected": 12, "interval": [0.0, 1.0]}}, "held_out"),
        ({"held_out": {"n": 11, "rejected": 0, "interval": [0.2849141, 0.0]}}, "held_out"),
    ],
)
def test_a_forged_profile_is_refused_and_the_field_is_named(profile, tmp_path, change, named):
    content = profile.model_dump(mode="json")
    shown = [run[:1] for run in content["scores"]]
    content |= {"scores": shown, "unlike": shown, "held_out": HeldOut.of(0, 11).model_dump(mode="json")}
    (tmp_path / "p.json").write_text(json.dumps(content))
    assert read_profile(tmp_path / "p.json").n == 34, "what the forgery is made of is read"
    (tmp_path / "p.json").write_text(json.dumps(content | change))
    with pytest.raises(BitassayError, match=rf"p\.json: not a profile: .*{named}"):
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


def test_a_run_that_ended_early_ranks_as_among_runs_as_short(profile):
    three = profile.model_copy(update={"scores": ((9.0, 5.0, 1.0), (8.0, 1.5), (2.0, 4.0, 3.0))})
    low = three.generated_positions[0]
    assert three.honest_scores(low) == [9, 8, 2]
    assert three.honest_scores(low + 2) == [1, 1.5, 3]
    for score, ranked in ((1.0, 1.0), (2.5, 1.5), (6.0, 1.5), (8.5, 3.0), (9.5, 9.5), (math.inf, math.inf)):
        assert three.ranked(score, low + 2, low) == ranked
        assert three.p_value(ranked, low + 2) == max(three.p_value(score, low), three.p_value(score, low + 2))
        assert three.ranked(score, low + 2, low + 2) == score, "not ended early"
