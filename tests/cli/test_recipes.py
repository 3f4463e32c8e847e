"""`bitassay recipes`."""

import json

import pytest

from bitassay.quantization.recipe.recipe import find_recipe, shipped_recipes


def test_list_has_every_shipped_recipe(bitassay):
    rows = json.loads(bitassay("recipes", "list", "--format", "json").out)["rows"]
    assert [row["name"] for row in rows] == list(shipped_recipes())
    assert all(row["recipe_id"] == find_recipe(row["name"]).recipe_id for row in rows)


def test_list_as_a_table_says_what_a_recipe_does(bitassay):
    line = next(line for line in bitassay("recipes", "list").out.splitlines() if line.startswith("w4 "))
    assert line.split()[1:4] == ["int4", "g64", "asymmetric"]


@pytest.mark.parametrize("name", shipped_recipes())
def test_what_show_prints_is_the_recipe_again(bitassay, tmp_path, name):
    done = bitassay("recipes", "show", name)
    assert done.status == 0
    (tmp_path / "again.yaml").write_text(done.out)
    assert find_recipe(tmp_path / "again.yaml") == find_recipe(name)


def test_overrides_survive_show(bitassay, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\ndescription: ä\nweights: null\noverrides:\n"
        '- {match: "*.down_proj", weights: {format: int8}}\n- {match: "*.layers.0.*", weights: null}\n'
    )
    (tmp_path / "again.yaml").write_text(bitassay("recipes", "show", str(path)).out)
    assert find_recipe(tmp_path / "again.yaml") == find_recipe(path)


def test_show_of_a_file_with_a_defect(bitassay, tmp_path):
    (tmp_path / "bad.yaml").write_text("name: bad\nweights: {format: int7}\n")
    done = bitassay("recipes", "show", str(tmp_path / "bad.yaml"))
    assert (done.status, done.out) == (2, "")
    assert "weights.format" in done.err
    assert "'int4'" in done.err
