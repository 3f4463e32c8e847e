"""A run with another configuration fails by name; what was written before configurations were bound is still
read, and says so."""

import json
import shutil
from dataclasses import replace

import pytest

import bitassay
from bitassay.engines.load import load
from bitassay.models.identity import identity
from bitassay.models.source import resolve
from bitassay.quantization.pipeline import quantize
from bitassay.quantization.recipe.inputs import KvCache
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.record.hashing import canonical_json
from bitassay.verification.numerics import numerics
from bitassay.verification.profile import find_profile, read_profile, write_profile
from bitassay.verification.prove import prove
from bitassay.verification.receipts.keys import private_key
from bitassay.verification.receipts.receipt import commit, encode, read_receipt, write_receipt
from bitassay.verification.trace import ModelClaim, read_trace, write_trace

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def told(stories):
    return prove(stories, PROMPT, max_new_tokens=8)


def other(tmp_path, name, **values):
    """stories260k with other values in one of its files."""
    folder = tmp_path / "other"
    shutil.copytree(resolve("stories260k").folder, folder)
    said = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(said | values))
    return load(folder)


def without_configuration(trace):
    model = trace.header.model.model_copy(update={"config_digest": None})
    return replace(trace, header=trace.header.model_copy(update={"model": model}))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}),
        ("config.json", {"rms_norm_eps": 1e-6}),
        ("generation_config.json", {"eos_token_id": [2, 13]}),
        ("generation_config.json", {"temperature": 0.3}),
        ("tokenizer_config.json", {"chat_template": "{{ messages[0].content }}"}),
        ("tokenizer_config.json", {"add_bos_token": False}),
    ],
)
def test_a_host_with_other_settings_fails_by_name(stories, tmp_path, name, values):
    host = other(tmp_path, name, **values)
    assert identity(host).weights_digest == identity(stories).weights_digest
    verdict = bitassay.verify(prove(host, PROMPT, max_new_tokens=8), stories)
    assert verdict.status == "FAIL"
    assert "other-configuration" in {reason.code for reason in verdict.reasons}
    assert "config.json" in str(verdict)


def test_a_trace_from_before_is_read_and_judged(stories, told, tmp_path):
    old = without_configuration(told)
    assert "config_digest" not in canonical_json(old.header.model_dump(mode="json"))
    write_trace(tmp_path / "old.trace", old)
    assert read_trace(tmp_path / "old.trace").header == old.header
    verdict = bitassay.verify(read_trace(tmp_path / "old.trace"), stories)
    assert {reason.code for reason in verdict.reasons} == {"no-profile"}


def test_a_receipt_from_before_keeps_its_signature(told, tmp_path):
    old, new = (commit(one, private_key(tmp_path / "key")) for one in (without_configuration(told), told))
    write_receipt(tmp_path / "old", old)
    assert read_receipt(tmp_path / "old") == old
    assert len(json.loads(encode(old))[1]) == 4
    assert len(json.loads(encode(new))[1]) == 5
    assert old.commitment != new.commitment


def test_a_profile_from_before_still_decides_and_the_verdict_says_what_was_not_bound(
    trace, model, profile, tmp_path, monkeypatch
):
    monkeypatch.setenv("BITASSAY_CACHE", str(tmp_path))
    known, here, sampling = profile.model, numerics(model), trace.header.sampling
    assert known == ModelClaim.of(identity(model))
    old = profile.model_copy(update={"model": known.model_copy(update={"config_digest": None})})
    assert "config_digest" not in write_profile(old).read_text()
    assert read_profile(write_profile(old)) == old
    assert find_profile(known, here, here, sampling) == old
    write_profile(profile)
    assert find_profile(known, here, here, sampling) == profile
    for one in (old, profile):
        verdict = bitassay.verify(trace, model, profile=one)
        assert verdict.status == "PASS"
        assert "configuration" not in str(verdict)
    for one, status in ((old, "PASS"), (profile, "INCONCLUSIVE")):  # a host may not leave it out
        verdict = bitassay.verify(without_configuration(trace), model, profile=one)
        assert verdict.status == status
        assert "does not say with which configuration" in str(verdict)
    another = profile.model_copy(update={"model": known.model_copy(update={"config_digest": "0" * 64})})
    verdict = bitassay.verify(trace, model, profile=another)
    assert {reason.code for reason in verdict.reasons} == {"profile-other-model"}


def test_numerics_name_the_cache_as_it_is_kept(stories):
    assert numerics(stories).kv_dtype == "float32"
    spec = KvCache(format="int4", granularity="g8", symmetric=False)
    recipe = Recipe.model_validate(
        {"name": "x", "weights": {"format": "int8"}, "kv_cache": spec.model_dump()}
    )
    assert numerics(quantize(stories, recipe)).kv_dtype == "int4/g8/asymmetric/bfloat16"
    assert numerics(load("stories260k", attention="eager")).attention == "eager"
