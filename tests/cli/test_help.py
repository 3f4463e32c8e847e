"""Every option of every verb says what it is for."""

import importlib
import inspect

import pytest

from bitassay.cli import VERBS, run


def functions():
    for verb in VERBS:
        module = importlib.import_module(f"bitassay.cli.{verb}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and "Args:" in (function.__doc__ or ""):
                yield pytest.param(function, id=f"{verb}-{name}")


@pytest.mark.parametrize("function", functions())
def test_every_parameter_is_described(function):
    described = function.__doc__.split("Args:")[1]
    missing = [
        name for name in inspect.signature(function).parameters if f"\n        {name}: " not in described
    ]
    assert not missing


@pytest.mark.parametrize(
    "verb", ["assay", "quantize", "eval", "prove", "verify", "calibrate", "report", "doctor"]
)
def test_help_shows_the_descriptions(verb, capsys):
    assert run([verb, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "What to print on stdout" in shown or "offline" in shown
