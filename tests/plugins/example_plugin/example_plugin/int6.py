"""A number format: integers of six bits, four codes to three bytes.

Installed, the entry point `int6` makes it a format of weights: `weights: {format: int6, granularity: g64}`.
"""

from bitassay.quantization.recipe.formats import NumberFormat

INT6 = NumberFormat("int6", "integer", 6)
