"""Groups of a study of replication, for small studies of the tests."""

from bitassay.quantization.recipe.recipe import Recipe
from bitassay.studies.replication.study import CONTENT, Group

PRESETS = CONTENT["presets"]
W2 = PRESETS["w2"] | {"scale": "absmax"}  # which is quick
EVEN = PRESETS["even"] | {"scale": "absmax"}
MESHED = PRESETS["meshed"]


def group(name, weights, copies=None, **parts):
    """A group of a recipe that is called like it."""
    replication = {} if copies is None else {"replication": copies}
    return Group(name, Recipe.model_validate({"name": name, "weights": weights, **parts, **replication}))


def average(differ, **how):
    """Parallel copies of linears, averaged."""
    return {"how": "parallel", "of": "linear", "differ": differ, **how}
