"""`bitassay recipes`: the shipped recipes."""

from typing import Annotated

from cyclopts import App, Parameter

from bitassay.cli.checks import check_words
from bitassay.cli.options import Output
from bitassay.report.tables import Column

recipes = App(name="recipes", help="List the shipped recipes or print one.")


@recipes.command(name="list")
def list_(*, output: Output = Output()) -> int:
    """List the recipes that come with the package."""
    from bitassay.quantization.recipe.recipe import shipped_recipes

    rows = [
        {
            "name": name,
            "weights": " ".join(
                (w.format, w.granularity, "symmetric" if w.symmetric else "asymmetric", w.scale)
                if (w := recipe.weights)
                else ("left",)
            ),
            "parts": ", ".join(recipe.parts),
            "overrides": len(recipe.overrides),
            "recipe_id": recipe.recipe_id,
            "description": recipe.description,
        }
        for name, recipe in shipped_recipes().items()
    ]
    short_id = Column("recipe_id", "id", lambda digest: digest[:12], align="left")
    output.emit((rows, ["name", "weights", "parts", "overrides", short_id, "description"]))
    return 0


@recipes.command
def show(recipe: Annotated[str, Parameter(help="A shipped recipe or a YAML file.")]) -> int:
    """Print RECIPE as YAML with every default written out. The output is a valid recipe file."""
    check_words(recipes=[recipe])
    import yaml

    from bitassay.quantization.recipe.recipe import find_recipe

    fields = find_recipe(recipe).model_dump(mode="json")
    print(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True), end="")
    return 0
