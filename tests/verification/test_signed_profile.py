"""A profile that somebody else vouches for."""

import json

import pytest

from bitassay.errors import BitassayError
from bitassay.verification.profile import read_profile, signed, write_profile
from verification.receipts import KEY, OTHER_KEY, SIGNER


@pytest.fixture
def path(profile, tmp_path):
    return write_profile(signed(profile, KEY), tmp_path / "signed.json")


def altered(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))
    return path


def test_it_is_read_and_says_who_signed(path, profile):
    back = read_profile(path, SIGNER)
    assert back.signature.key == SIGNER.hex()
    assert back.digest == profile.digest, "ledgers of the unsigned profile go on"
    assert read_profile(path) == back


def test_another_signer_and_no_signature_are_refused(path, profile, tmp_path):
    other = OTHER_KEY.public_key().public_bytes_raw()
    with pytest.raises(BitassayError, match=r"signed\.json: the profile is signed by"):
        read_profile(path, other)
    plain = write_profile(profile, tmp_path / "plain.json")
    assert read_profile(plain).signature is None
    with pytest.raises(BitassayError, match=r"plain\.json: the profile is not signed"):
        read_profile(plain, SIGNER)


@pytest.mark.parametrize("signer", [None, SIGNER])
def test_whatever_was_altered_after_signing_is_refused(path, profile, signer):
    scores = [[value - 1 for value in run] for run in profile.model_dump(mode="json")["scores"]]
    with pytest.raises(BitassayError, match="the signature is not of this profile"):
        read_profile(altered(path, scores=scores), signer)


def test_a_signature_of_another_profile_is_refused(path, profile):
    longer = signed(profile.model_copy(update={"alpha": 0.04}), KEY).signature.model_dump()
    with pytest.raises(BitassayError, match="the signature is not of this profile"):
        read_profile(altered(path, signature=longer))


@pytest.mark.parametrize(
    "signature",
    [{}, {"key": "00" * 32}, {"key": "zz" * 32, "value": "00" * 64}, {"key": SIGNER.hex(), "value": "00"}, 3],
)
def test_what_is_no_signature_is_no_profile(path, signature):
    with pytest.raises(BitassayError, match="not a profile: signature"):
        read_profile(altered(path, signature=signature))


@pytest.mark.parametrize("key", ["01" + "00" * 31, "00" * 32])
def test_a_key_that_anybody_can_sign_for_is_refused(path, key):
    """R the neutral point and S 0: such a signature holds for every message under a key of small order."""
    value = "01" + "00" * 63
    with pytest.raises(BitassayError, match="not of prime order"):
        read_profile(altered(path, signature={"key": key, "value": value}))
