"""What the tests of receipts, openings and committees share."""

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bitassay.verification.container import TraceError
from bitassay.verification.receipts.receipt import SIGNED

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
SIGNER = KEY.public_key().public_bytes_raw()
BEACON = bytes(range(100, 132))


def codes(verdict):
    return {reason.code for reason in verdict.reasons}


def refused(code, call, *arguments):
    with pytest.raises(TraceError) as raised:
        call(*arguments)
    assert raised.value.code == code


def signed(receipt, key=KEY, **header):
    """A receipt as a host that lies would sign it: the claims changed, the signature right."""
    public = key.public_key().public_bytes_raw()
    changed = replace(receipt, header=receipt.header.model_copy(update=header), key=public)
    return replace(changed, signature=key.sign(SIGNED + changed.commitment))
