"""The scheme of each block type of llama.cpp: the grid that solvers work on where a type is asked for."""

from gguf import GGMLQuantizationType as Kind

from bitassay.models.gguf_types import Q1_0, Q2_0
from bitassay.quantization.recipe.weights import WeightScheme

MIRRORED = {"symmetric": False, "zero_point": "mirrored", "scale": "mse"}
MINIMUM = MIRRORED | {"zero_point": "minimum"}
OWN = (Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_NL, Kind.IQ4_XS)
SCHEMES: dict[Kind, WeightScheme] = {
    kind: WeightScheme.model_validate(fields)
    for kind, fields in {
        Q1_0: {"format": "binary", "granularity": "g128"},
        Kind.TQ1_0: {"format": "ternary", "granularity": "g256"},
        Kind.TQ2_0: {"format": "ternary", "granularity": "g256"},
        Q2_0: {"format": "int2", "granularity": "g64"} | MIRRORED,
        Kind.Q4_0: {"format": "int4", "granularity": "g32"} | MIRRORED,
        Kind.Q4_1: {"format": "int4", "granularity": "g32"} | MINIMUM,
        Kind.Q5_1: {"format": "int5", "granularity": "g32"} | MINIMUM,
        Kind.Q5_0: {"format": "int5", "granularity": "g32"} | MIRRORED,
        Kind.Q8_0: {"format": "int8", "granularity": "g32", "scale": "mse"},
        **{kind: {"format": kind.name.lower()} for kind in OWN},
    }.items()
}
