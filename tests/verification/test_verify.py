import dataclasses
import json
import math
from datetime import timedelta
from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch
from scipy import stats

from bitassay.engines.decode import prefill
from bitassay.errors import BitassayError
from bitassay.models.identity import identity
from bitassay.testing.tiny import tiny_model
from bitassay.verification.pooled import mann_whitney_counts, pooled_p_value, pooled_verdict
from bitassay.verification.profile import UNLIKE, HeldOut, write_profile
from bitassay.verification.prove import encode_prompt, prove, prove_many
from bitassay.verification.structure import Reason, Request
from bitassay.verification.trace import Trace
from bitassay.verification.verdict import Verdict
from bitassay.verification.verify import FAR, verify, verify_many

TOKENS = 12


def codes(verdict):
    return {reason.code for reason in verdict.reasons}


def test_honest_runs_pass_at_about_the_calibrated_rate(honest, model, profile):
    verdicts = verify_many(honest, model, profile=profile)
    decided = [verdict for verdict in verdicts if verdict.status != "INCONCLUSIVE"]
    assert len(decided) >= 30
    failed = sum(verdict.status == "FAIL" for verdict in decided)
    assert stats.binom.sf(failed - 1, len(decided), 0.05) > 0.001
    assert pooled_verdict(verdicts).status == "PASS"


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounded_weights_fail_though_they_claim_to_be_the_base(bits, model, prompts, profile, round_weights):
    rounded = round_weights(model, bits)
    verdicts = verify_many(
        prove_many(rounded, prompts[56:76], max_new_tokens=TOKENS, claim=identity(model)),
        model,
        profile=profile,
    )
    assert {verdict.status for verdict in verdicts if verdict.p_value is not None} == {"FAIL"}
    assert pooled_verdict(verdicts).status == "FAIL"


def test_cheap_decoding_with_an_honest_prefill_is_seen_by_the_tokens(model, prompts, profile, round_weights):
    cheap = prove_many(round_weights(model, 2), prompts[56:66], max_new_tokens=TOKENS, claim=identity(model))
    forged = []
    for one in cheap:
        (own,) = prefill(model, [one.header.prompt_ids], [one.header.output_ids], layers=one.header.layers)
        forged.append(Trace(one.header, own.states))
    decided = [
        verdict for verdict in verify_many(forged, model, profile=profile) if verdict.p_value is not None
    ]
    assert len(decided) > 5
    for verdict in decided:
        assert verdict.status == "FAIL"
        assert "tokens-unlikely" in codes(verdict)


def test_honest_tokens_with_states_of_another_model_are_seen_by_the_states_and_what_they_choose(
    trace, model, profile, round_weights
):
    cheap = round_weights(model, 3)
    (other,) = prefill(
        cheap, [trace.header.prompt_ids], [trace.header.output_ids], layers=trace.header.layers
    )
    verdict = verify(Trace(trace.header, other.states), model, profile=profile)
    assert codes(verdict) == {"states-too-far", "tokens-unlikely"}
    of_tokens = [reason.sentence for reason in verdict.reasons if reason.code == "tokens-unlikely"]
    assert all("head-margin" in sentence for sentence in of_tokens), "the verifier's own logits have no doubt"


def test_wrong_prompt_states_alone_fail(trace, model, profile):
    states = {
        layer: torch.cat([rows[: trace.n_prompt] * 1.2, rows[trace.n_prompt :]])
        for layer, rows in trace.states.items()
    }
    verdict = verify(Trace(trace.header, states), model, profile=profile)
    assert verdict.status == "FAIL"
    assert verdict.score is not None
    assert verdict.score.part == "prompt"


def test_alpha_flips_the_verdict(trace, model, profile):
    p_value = verify(trace, model, profile=profile).p_value
    assert p_value is not None
    assert verify(trace, model, profile=profile, alpha=p_value).status == "FAIL"
    assert verify(trace, model, profile=profile, alpha=p_value - 1e-9).status == "PASS"


def test_without_a_valid_profile_nothing_passes(trace, model, profile):
    def doubts(profile, **options):
        verdict = verify(trace, model, profile=profile, **options)
        assert verdict.status == "INCONCLUSIVE"
        assert verdict.p_value is None
        return codes(verdict)

    def changed(**update):
        return profile.model_copy(update=update)

    other = profile.prover.model_copy(update={"cpu_capability": "AVX2"})
    assert doubts(None) == {"no-profile"}
    assert doubts(changed(prover=other)) == {"profile-other-numerics"}
    assert doubts(changed(verifier=other)) == {"profile-other-numerics"}
    assert doubts(changed(model=profile.model.model_copy(update={"weights_digest": "0" * 64}))) == {
        "profile-other-model"
    }
    assert doubts(changed(model=profile.model.model_copy(update={"recipe_id": "0" * 64}))) == {
        "profile-other-model"
    }
    assert doubts(changed(layers=(8,))) == {"profile-other-model"}
    twice = profile.detectors | {"token-flips": profile.detectors["token-flips"] * 2}
    assert doubts(changed(detectors=twice)) == {"profile-other-detector"}
    sampled = profile.sampling.model_copy(update={"sampler": "gumbel-max", "temperature": 1.0})
    assert doubts(changed(sampling=sampled)) == {"profile-other-numerics"}
    assert doubts(profile, now=profile.expires) == {"profile-expired"}
    assert doubts(changed(generated_positions=(TOKENS, 40))) == {"too-few-tokens"}
    assert doubts(changed(generated_positions=(2, TOKENS - 2))) == {"beyond-profile"}
    assert doubts(profile, alpha=0.01) == {"profile-too-small"}
    assert verify(trace, model, profile=profile, now=profile.expires - timedelta(days=1)).status == "PASS"


def of_texts_with(profile, honest_score, unlike, guarantee="average"):
    """The profile as if its honest runs had one score, and their texts noise this unusual."""
    runs = 4 * profile.n
    assert 1 / (runs + 1) <= UNLIKE
    return profile.model_copy(
        update={"scores": ((honest_score,),) * runs, "unlike": ((unlike,),) * runs, "guarantee": guarantee}
    )


def farther(trace, factor):
    """The same claim with generated states that are longer."""
    states = {
        layer: torch.cat([rows[: trace.n_prompt], (rows[trace.n_prompt :].float() * factor).to(rows.dtype)])
        for layer, rows in trace.states.items()
    }
    return Trace(trace.header, states)


def test_a_bad_run_of_a_text_unlike_the_calibration_is_inconclusive(trace, model, profile):
    """The same run fails where the noise of its text is known."""
    moderate = verify(trace, model, profile=of_texts_with(profile, -50.0, 1e6))
    assert moderate.score.value < FAR
    assert (moderate.status, moderate.unlike) == ("FAIL", 1)
    verdict = verify(trace, model, profile=of_texts_with(profile, -50.0, 0.0))
    assert (verdict.status, codes(verdict)) == ("INCONCLUSIVE", {"unlike-calibration"})
    assert verdict.unlike == 1 / (4 * profile.n + 1)
    assert verdict.p_value is None, "it is not pooled, and not counted in a ledger"
    assert (verdict.score, verdict.refusal) == (moderate.score, moderate.refusal)
    assert json.loads(json.dumps(verdict.to_dict(), allow_nan=False))["unlike"] == verdict.unlike


def test_a_run_that_no_text_explains_fails_though_its_text_is_unlike_the_calibration(trace, model, profile):
    far = farther(trace, 1.5)
    verdict = verify(far, model, profile=of_texts_with(profile, 5.0, 0.0))
    assert verdict.score.value >= FAR
    assert (verdict.status, codes(verdict)) == ("FAIL", {"states-too-far"})
    assert verdict.p_value == 1 / (4 * profile.n + 1)


def test_a_good_run_of_a_text_unlike_the_calibration_is_inconclusive(trace, model, profile):
    """What the profile says of such texts is not known, in either direction."""
    assert verify(trace, model, profile=of_texts_with(profile, 5.0, 1e6)).status == "PASS"
    assert codes(verify(trace, model, profile=of_texts_with(profile, 5.0, 0.0))) == {"unlike-calibration"}


def test_a_structural_defect_of_an_unlike_text_fails(trace, model, profile):
    verdict = verify(trace, model, profile=of_texts_with(profile, 5.0, 0.0), expected_nonce="other")
    assert (verdict.status, codes(verdict)) == ("FAIL", {"other-nonce"})


def test_what_is_unlike_is_the_text_not_what_the_host_did(trace, model, profile):
    """A host cannot make its text look unknown, nor known: the states that it shows do not count."""
    one, other = (verify(shown, model, profile=profile) for shown in (trace, farther(trace, 1.5)))
    assert one.unlike == other.unlike
    assert other.score.value > one.score.value


def test_the_guarantee_decides_at_which_alpha_a_run_is_refused(trace, model, profile):
    """136 honest runs, none as bad: p is 1/137 on average, and at most 2.2 % with confidence."""
    for guarantee, expected in (("average", 1 / 137), ("conditional", 1 - 0.05 ** (1 / 136))):
        of_it = of_texts_with(profile, -50.0, 1e6, guarantee)
        verdict = verify(trace, model, profile=of_it)
        assert verdict.refusal == pytest.approx(expected)
        assert verify(trace, model, profile=of_it, alpha=verdict.refusal + 1e-9).status == "FAIL"
        assert verify(trace, model, profile=of_it, alpha=0.01).status == (
            "FAIL" if guarantee == "average" else "INCONCLUSIVE"
        )
    assert codes(verify(trace, model, profile=of_it, alpha=0.01)) == {"profile-too-small"}


def test_a_profile_that_refuses_its_own_held_out_runs_decides_nothing(trace, model, profile):
    def held_out(rejected, n):
        return profile.model_copy(update={"held_out": HeldOut.of(rejected, n)})

    assert verify(trace, model, profile=held_out(1, 11)).status == "PASS", "bad luck explains it"
    verdict = verify(trace, model, profile=held_out(4, 11))
    assert (verdict.status, codes(verdict)) == ("INCONCLUSIVE", {"profile-misfit"})
    assert "refused 4 of 11 held-out honest runs" in verdict.reasons[0].sentence
    far = verify(farther(trace, 1.5), model, profile=held_out(4, 11))
    assert far.status == "INCONCLUSIVE"
    assert verify(trace, model, profile=held_out(4, 11), expected_nonce="other").status == "FAIL"


def test_a_structural_defect_fails_without_a_profile_too_and_still_reports_distances(trace, model):
    claim = trace.header.model.model_copy(update={"weights_digest": "0" * 64})
    other = Trace(trace.header.model_copy(update={"model": claim}), trace.states)
    verdict = verify(other, model)
    assert verdict.status == "FAIL"
    assert codes(verdict) == {"other-weights"}
    assert verdict.hidden_distance is not None
    verdict = verify(other, model, expected_nonce="other")
    assert codes(verdict) == {"other-weights", "other-nonce"}
    assert verdict.hidden_distance is None  # an answer to another request is not worth a prefill


def test_the_profile_in_the_cache_folder_is_found(trace, model, profile):
    path = write_profile(profile)
    try:
        assert verify(trace, model).status == "PASS"
    finally:
        path.unlink()


def test_a_profile_path_may_be_given(trace, model, profile, tmp_path):
    write_profile(profile, tmp_path / "p.json")
    assert verify(trace, model, profile=tmp_path / "p.json").status == "PASS"


def test_batched_and_single_verification_agree(honest, model):
    for one, trace in zip(verify_many(honest[:6], model), honest, strict=False):
        alone = verify(trace, model)
        for layer in trace.header.layers:
            assert max(one.distance(layer), alone.distance(layer)) < 0.05
        assert one.margins == pytest.approx(alone.margins, abs=0.1)
        assert len(one.margins) == trace.n_tokens


def test_requests_are_matched_by_order(honest, model, profile):
    right = [Request(one.header.prompt_ids, one.header.nonce, None, TOKENS) for one in honest[:4]]
    assert all(
        "other-prompt" not in codes(v)
        for v in verify_many(honest[:4], model, profile=profile, requests=right)
    )
    assert all(
        {"other-prompt", "other-nonce"} <= codes(v)
        for v in verify_many(honest[:4], model, profile=profile, requests=right[::-1])
    )


def test_dtype_of_the_prover_may_differ_and_is_named(model, prompts):
    other = tiny_model("llama", num_hidden_layers=17, initializer_range=0.1).to(torch.float16)
    verdict = verify(prove(other, prompts[0], max_new_tokens=TOKENS), model)
    assert verdict.status == "INCONCLUSIVE"
    assert "float16" in verdict.reasons[0].sentence


def test_a_model_that_overflows_is_never_passed(trace, model, profile, round_weights):
    broken = round_weights(model, 8)
    broken.model.layers[16].mlp.down_proj.weight.data.fill_(3e38)
    broken.identity = model.identity
    verdict = verify(trace, broken, profile=profile)
    assert verdict.status == "FAIL"
    assert "nonfinite-mismatch" in codes(verdict)
    assert json.dumps(verdict.to_dict(), allow_nan=False)


def test_verdict_as_text_and_as_json(trace, model, profile):
    verdict = verify(trace, model, profile=profile)
    assert str(verdict).startswith("PASS: states and tokens")
    assert "p-value" in str(verdict)
    content = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert [layer["layer"] for layer in content["layers"]] == [8, 16, 17]
    for layer in content["layers"]:
        for part in ("prompt", "generated"):
            assert {rules: layer["verillm"][part][rules]["rules"] for rules in ("paper", "documents")} == {
                "paper": "paper",
                "documents": "documents",
            }
    assert content["accept_rate"]["documents"] >= content["accept_rate"]["paper"] >= 0
    assert content["hidden_distance"] == pytest.approx(content["layers"][-1]["generated_distance"])
    assert len(content["margins"]) == content["n_tokens"] == TOKENS


def test_accept_rate_of_identical_states_is_one(trace, model):
    (own,) = prefill(model, [trace.header.prompt_ids], [trace.header.output_ids], layers=trace.header.layers)
    verdict = verify(Trace(trace.header, own.states), model)
    assert verdict.accept_rate("paper") == verdict.accept_rate("documents", "prompt") == 1


def test_prove_keeps_token_ids_and_encodes_text(stories):
    assert encode_prompt(stories, [1, 2, 3]) == (1, 2, 3)
    assert encode_prompt(stories, "Once upon") == tuple(stories.tokenizer("Once upon").input_ids)
    trace = prove(stories, "Once upon a time", max_new_tokens=5, nonce="x")
    assert trace.header.nonce == "x"
    assert trace.header.numerics.dtype == "float32"
    assert len(trace.states[5]) == trace.n_prompt + 4


def test_prove_refuses_bad_nonces(stories):
    with pytest.raises(BitassayError, match="nonce"):
        prove(stories, "Once", nonce="a b")
    with pytest.raises(BitassayError, match="2 nonces for 1"):
        prove_many(stories, ["Once"], nonces=["a", "b"])


def test_prove_many_keeps_the_order_of_the_prompts(honest, prompts):
    assert [one.header.prompt_ids for one in honest] == [tuple(prompt) for prompt in prompts[56:]]
    assert [one.header.nonce for one in honest] == [f"n{index}" for index in range(40)]


# --- pooling


@pytest.mark.parametrize(("k", "n"), [(1, 1), (2, 3), (3, 2), (4, 5), (1, 6)])
def test_mann_whitney_counts_equal_brute_force(k, n):
    counts = [0] * (k * n + 1)
    for places in combinations(range(n + k), k):  # where the new scores stand in ascending order
        counts[sum(sum(1 for other in range(place, n + k) if other not in places) for place in places)] += 1
    assert mann_whitney_counts(k, n) == counts
    assert sum(counts) == comb(n + k, k)


def test_pooled_p_value_is_scipys_exact_mann_whitney():
    choose = np.random.default_rng(0)
    for shift in (0, 1):
        honest, new = choose.normal(size=30), choose.normal(size=9) + shift
        p_values = [(1 + (honest >= score).sum()) / 31 for score in new]
        expected = stats.mannwhitneyu(new, honest, alternative="greater", method="exact").pvalue
        assert pooled_p_value(p_values, 30) == pytest.approx(expected)


def test_pooled_p_value_of_one_is_its_own():
    assert pooled_p_value([4 / 31], 30) == pytest.approx(4 / 31)


def test_pooled_false_positive_rate_is_alpha_though_the_calibration_is_shared():
    choose, refused = np.random.default_rng(1), 0
    for _ in range(2000):
        honest, new = choose.exponential(size=19), choose.exponential(size=12)
        refused += pooled_p_value([(1 + (honest >= score).sum()) / 20 for score in new], 19) <= 0.05
    assert 0.035 < refused / 2000 < 0.062


def scored(status, p_value, profile="a", n=19):
    return Verdict(
        status,
        (Reason("states-too-far" if status == "FAIL" else "as-honest", ""),),
        "m",
        8,
        p_value=p_value,
        profile=profile,
        n_calibration=n,
    )


def test_pooled_verdict():
    assert pooled_verdict([scored("PASS", 0.5)] * 5).status == "PASS"
    assert pooled_verdict([scored("FAIL", 0.05)] * 5).status == "FAIL"
    assert pooled_verdict([scored("FAIL", 0.05)] + [scored("PASS", 0.6)] * 9).status == "PASS", (
        "one in ten at alpha .05 is no proof"
    )
    forged = Verdict("FAIL", (Reason("truncated", "cut"),), "m", 0)
    assert pooled_verdict([forged, *[scored("PASS", 1.0)] * 9]).status == "FAIL"
    unknown = Verdict("INCONCLUSIVE", (Reason("no-profile", "none"),), "m", 8)
    assert pooled_verdict([unknown, unknown]).status == "INCONCLUSIVE"
    mixed = pooled_verdict([unknown, scored("PASS", 0.5)])
    assert (mixed.status, mixed.n_pooled, mixed.counts) == ("PASS", 1, {"INCONCLUSIVE": 1, "PASS": 1})
    p_value = pooled_verdict([scored("PASS", 0.1)] * 3).p_value
    assert p_value is not None
    assert pooled_verdict([scored("PASS", 0.1)] * 3, alpha=p_value).status == "FAIL"
    assert pooled_verdict([scored("PASS", 0.1)] * 3, alpha=p_value - 1e-9).status == "PASS"
    with pytest.raises(BitassayError, match="different profiles"):
        pooled_verdict([scored("PASS", 0.5), scored("PASS", 0.5, profile="b")])
    with pytest.raises(BitassayError, match="no verdicts"):
        pooled_verdict([])


def test_traces_of_different_limits_are_pooled_apart():
    verdicts = [
        dataclasses.replace(scored("PASS", p), limit=limit) for p, limit in ((0.1, 8), (0.1, 8), (0.3, 9))
    ]
    p_value = pooled_verdict(verdicts).p_value
    assert p_value == pytest.approx(2 * pooled_p_value([0.1, 0.1], 19))
    assert pooled_verdict(verdicts[1:]).p_value == pytest.approx(0.2)
    assert pooled_verdict([dataclasses.replace(scored("PASS", 0.9), limit=n) for n in (8, 9)]).p_value == 1


def test_a_pool_of_mostly_honest_traces_with_a_third_cheated_fails():
    verdicts = [scored("PASS", p, n=59) for p in np.linspace(0.05, 1, 20).tolist()] + [
        scored("FAIL", 1 / 60, n=59)
    ] * 10
    assert pooled_verdict(verdicts).status == "FAIL"


def test_verdicts_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        scored("PASS", 0.5).status = "FAIL"


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, 1.5])
def test_what_is_no_rate_is_refused_instead_of_the_profiles_taken(honest, model, profile, alpha):
    """0 was the profile's, and with NaN nothing was ever refused."""
    with pytest.raises(BitassayError, match="not between 0 and 1"):
        verify(honest[0], model, profile=profile, alpha=alpha)
