"""Every option of every verb says what it is for."""

import dataclasses
import importlib
import inspect
import re

import pytest

from bitassay.cli import VERBS, run
from bitassay.cli.parameters import Loading, Revision


def functions():
    for verb in VERBS:
        module = importlib.import_module(f"bitassay.cli.{verb}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and "Args:" in (function.__doc__ or ""):
                yield pytest.param(function, id=f"{verb}-{name}")


@pytest.mark.parametrize("function", functions())
def test_every_parameter_is_described(function):
    """In its docstring; those that verbs share, where they are declared."""
    described = function.__doc__.split("Args:")[1]
    missing = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if f"\n        {name}: " not in described and not isinstance(parameter.default, Revision | Loading)
    ]
    assert not missing


@pytest.mark.parametrize("shared", [Revision, Loading])
def test_every_shared_parameter_is_described(shared):
    described = "".join(map(inspect.getsource, shared.__mro__[:-1]))
    for field in dataclasses.fields(shared):
        assert re.search(rf'\n    {field.name}: [^\n]+\n    """', described), field.name


@pytest.mark.parametrize(
    "verb", ["assay", "quantize", "eval", "prove", "verify", "calibrate", "report", "doctor"]
)
def test_help_shows_the_descriptions(verb, capsys):
    assert run([verb, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "What to print on stdout" in shown or "offline" in shown
