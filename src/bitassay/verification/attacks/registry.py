"""All attacks by name: this package's own, then those of entry points in the group `bitassay.attacks`."""

from bitassay.registry import Registry
from bitassay.verification.attacks import forgeries, hosts, steering  # noqa: F401 these list their attacks
from bitassay.verification.attacks.attack import LISTED, Attack

ATTACKS: Registry[Attack] = Registry("attacks", LISTED)
