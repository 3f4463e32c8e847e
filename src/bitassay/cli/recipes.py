"""`bitassay recipes`: the shipped recipes."""

from cyclopts import App

from bitassay.cli.output import Format, emit
from bitassay.report.tables import Column

recipes = App(name="recipes", help="List the shipped recipes or print one.")

_COLUMNS = (
    Column("name", "name", align="left"),
    Column("weights", "weights", align="left"),
    Column("parts", "parts", align="left"),
    Column("overrides", "overrides"),
    Column("recipe_id", "id", lambda digest: digest[:12], align="left"),
    Column("description", "description", align="left"),
)


@recipes.command(name="list")
def list_(*, format: Format = "table") -> int:
    """The recipes that come with the package.

    Args:
        format: What to print on stdout.
    """
    from bitassay.quantization.recipe.recipe import PARTS, shipped_recipes

    rows = [
        {
            "name": name,
            "weights": " ".join(
                (w.format, w.granularity, "symmetric" if w.symmetric else "asymmetric", w.scale)
                if (w := recipe.weights)
                else ("left",)
            ),
            "parts": ", ".join(part for part in PARTS if getattr(recipe, part) is not None),
            "overrides": len(recipe.overrides),
            "recipe_id": recipe.recipe_id,
            "description": recipe.description,
        }
        for name, recipe in shipped_recipes().items()
    ]
    emit(rows, _COLUMNS, format)
    return 0


@recipes.command
def show(recipe: str) -> int:
    """Print RECIPE as YAML with every default spelled out; saved to a file, it is a recipe again.

    Args:
        recipe: A shipped recipe or a YAML file.
    """
    from bitassay.cli.checks import check_words

    check_words(recipes=[recipe])
    import yaml

    from bitassay.quantization.recipe.recipe import find_recipe

    found = find_recipe(recipe).model_dump(mode="json")
    print(yaml.safe_dump(found, sort_keys=False, allow_unicode=True), end="")
    return 0
