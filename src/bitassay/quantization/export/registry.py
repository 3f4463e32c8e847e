"""All export layouts, by the name that `save` and a folder's card give them.
Those of installed packages are found by entry points in the group `bitassay.layouts`."""

from bitassay.quantization.export import compressed, own
from bitassay.quantization.export.layout import Layout
from bitassay.registry import Registry

STANDARD, OWN = "compressed-tensors", "bitassay"  # the default where it is exact, and the default elsewhere
LAYOUTS: Registry[Layout] = Registry("layouts", {STANDARD: compressed.LAYOUT, OWN: own.LAYOUT})
