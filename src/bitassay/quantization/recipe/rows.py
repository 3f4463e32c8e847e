"""Rows that a type's runs of 256 weights do not divide take another format of llama.cpp: `fitted`.

Such a matrix takes the smallest type of no fewer bits with runs of 32. llama.cpp does likewise, with Q5_0 in
place of Q4_K and Q5_1 of Q5_K:

    q2_k, q3_k, q4_k    int4 in groups of 32 with signed scales, Q4_0
    q5_k                int5 likewise, Q5_0
    q6_k                int8 in groups of 32, Q8_0
    iq4_xs              iq4_nl
"""

from collections import Counter
from collections.abc import Mapping
from fnmatch import filter as matching

from bitassay.quantization.recipe.formats import RUN
from bitassay.quantization.recipe.recipe import Override, Recipe
from bitassay.quantization.recipe.weights import WeightScheme

_MIRRORED = {"granularity": "g32", "symmetric": False, "zero_point": "mirrored", "scale": "mse"}
_FOUR = WeightScheme.model_validate({"format": "int4"} | _MIRRORED)
INSTEAD = {
    "q2_k": _FOUR,
    "q3_k": _FOUR,
    "q4_k": _FOUR,
    "q5_k": WeightScheme.model_validate({"format": "int5"} | _MIRRORED),
    "q6_k": WeightScheme(format="int8", granularity="g32", scale="mse"),
    "iq4_xs": WeightScheme(format="iq4_nl"),
}


def fitted(recipe: Recipe, columns: Mapping[str, int]) -> Recipe:
    """Return the recipe with overrides for the matrices, of so many `columns` by their names, that cannot
    have the K type which it names for them; the recipe itself where there are none."""
    schemes = {name: recipe.scheme_for(name) for name in columns}
    changed = {
        name: INSTEAD[scheme.format]
        for name, scheme in schemes.items()
        if scheme is not None and scheme.number_format.levels is not None and columns[name] % RUN
    }
    if not changed:
        return recipe
    overrides: dict[str, WeightScheme] = {}
    for name, scheme in changed.items():
        pattern = f"*.{name.rpartition('.')[2]}"
        alike = all(changed.get(other) == scheme for other in matching(columns, pattern))
        overrides[pattern if alike else name] = scheme
    first = tuple(Override(match=match, weights=scheme) for match, scheme in overrides.items())
    return recipe.model_copy(update={"overrides": (*first, *recipe.overrides)})


def changes(recipe: Recipe, other: Recipe, columns: Mapping[str, int]) -> list[str]:
    """Say which matrices have another format in `other`, a line for each pair of formats."""
    pairs: Counter[tuple[str, str]] = Counter()
    for name in columns:
        before, after = recipe.scheme_for(name), other.scheme_for(name)
        if before is not None and after is not None and before != after:
            pairs[before.format, f"{after.format} {after.granularity}"] += 1
    return [
        f"{count} matrices have rows that {RUN} does not divide, as {before} needs: {after} instead"
        for (before, after), count in pairs.items()
    ]
