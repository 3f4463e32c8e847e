"""The Python API as a user meets it: names, signatures, help, types; and that importing it costs nothing."""

import copy
import inspect
import json
import pickle
import pydoc
import subprocess
import sys
from importlib.resources import files

import pytest

import bitassay
from bitassay.engines.load import load
from bitassay.evaluation.quality import evaluate
from bitassay.quantization.pipeline import quantize
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.verification.prove import prove
from bitassay.verification.verify import verify

FUNCTIONS = {"load": load, "quantize": quantize, "evaluate": evaluate, "prove": prove, "verify": verify}


def test_names():
    assert sorted(bitassay.__all__) == sorted([*FUNCTIONS, "Recipe"])
    assert [name for name in dir(bitassay) if not name.startswith("_")] == sorted(bitassay.__all__)
    assert bitassay.Recipe is Recipe
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        bitassay.quantise  # noqa: B018


def test_importing_and_listing_imports_nothing_heavy():
    script = "import bitassay, sys; dir(bitassay); print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_shows_what_it_is(name):
    found, function = getattr(bitassay, name), FUNCTIONS[name]
    assert callable(found)
    assert inspect.signature(found) == inspect.signature(function)
    assert inspect.getdoc(function).split("\n")[0] in inspect.getdoc(found)
    shown = pydoc.render_doc(found, renderer=pydoc.plaintext)
    assert f"{name}(" in shown
    assert all(parameter in shown for parameter in inspect.signature(function).parameters)
    assert inspect.getdoc(function).split(".")[0].split("\n")[0] in shown


@pytest.mark.parametrize("name", [*FUNCTIONS, "Recipe"])
def test_a_public_name_can_be_pickled_and_copied(name):
    found = getattr(bitassay, name)
    assert pickle.loads(pickle.dumps(found)) is found  # noqa: S301
    assert copy.deepcopy(found) is found


def test_the_folders_behind_the_functions_stay_importable():
    import bitassay.evaluation.quality
    import bitassay.verification.verify as verification

    assert callable(bitassay.evaluate)
    assert bitassay.evaluation.quality.evaluate is evaluate
    assert verification.verify is verify
    names = {}
    exec("from bitassay import *", names)
    assert {*FUNCTIONS, "Recipe"} <= set(names)


@pytest.mark.slow
def test_a_type_checker_knows_the_names(tmp_path):
    assert (files("bitassay") / "py.typed").is_file()
    user = tmp_path / "user.py"
    user.write_text("""
import bitassay
from bitassay import Recipe

base = bitassay.load("stories260k")
reveal_type(bitassay.quantize(base, recipe=Recipe(name="mine", weights=None)))
reveal_type(bitassay.evaluate(base))
reveal_type(bitassay.prove(base, "x"))
bitassay.quantize(base, recipes="w4")
bitassay.Recipes
""")
    (tmp_path / "pyrightconfig.json").write_text(
        json.dumps({"pythonVersion": "3.11", "extraPaths": [str(files("bitassay").joinpath(".."))]})
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pyright",
            "--outputjson",
            "--pythonpath",
            sys.executable,
            "-p",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
    )
    said = json.loads(done.stdout)["generalDiagnostics"]
    revealed = [one["message"] for one in said if one["severity"] == "information"]
    errors = [(one["range"]["start"]["line"], one["message"]) for one in said if one["severity"] == "error"]
    assert [text.split('"')[-2] for text in revealed] == ["PreTrainedModel", "Evaluation", "Trace"]
    assert {line for line, _ in errors} == {8, 9}, errors
    assert any('"recipes"' in text for _, text in errors)
    assert any('"Recipes"' in text for _, text in errors)
