"""All export layouts, by the name that `save` and a folder's card give them.
Those of installed packages are found by entry points in the group `bitassay.layouts`."""

from bitassay.quantization.export import compressed, own
from bitassay.quantization.export.layout import Layout
from bitassay.registry import Registry

# The default where it is exact; for zero points of groups and channels; and the default elsewhere.
STANDARD, GROUPED, OWN = "compressed-tensors", "vllm", "bitassay"
LAYOUTS: Registry[Layout] = Registry(
    "layouts", {STANDARD: compressed.LAYOUT, GROUPED: compressed.GROUPED, OWN: own.LAYOUT}
)
