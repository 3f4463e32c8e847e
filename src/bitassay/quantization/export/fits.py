"""Whether recipes fit a model, from names, shapes and files alone: before any weight is read."""

from collections.abc import Sequence

from bitassay.data.corpora import check_corpus
from bitassay.errors import BitassayError
from bitassay.models.empty import without_weights
from bitassay.models.positions import context_length
from bitassay.models.source import resolve
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.runtime.model import check_recipe
from bitassay.record.progress import Progress, silent


def check_fit(
    model: str,
    recipes: Sequence[Recipe] = (),
    *,
    tokens: int = 0,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> None:
    """Raise BitassayError where a recipe names what the model does not have, where the model has no
    positions for so many `tokens`, or is no causal LM; MissingError where the text of a calibration is not
    here. The model is fetched where it is not here."""
    empty = without_weights(resolve(model, progress), trust_remote_code=trust_remote_code)
    limit = context_length(empty)
    if limit is not None and tokens > limit:
        raise BitassayError(
            f"{model}: {tokens} tokens do not fit its {limit} positions", "ask for fewer tokens"
        )
    for recipe in recipes:
        check_recipe(empty, recipe)
        if recipe.is_calibrated:
            check_corpus((recipe.text).corpus)
