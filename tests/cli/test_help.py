"""Every option of every verb says what it is for."""

import inspect

import pytest
from cyclopts import App
from docstring_parser import parse

from bitassay.cli import VERBS, application, run


def commands(app, words=()):
    """Every command that computes, with the words that call it."""
    subcommands = [name for name in app if not name.startswith("-")]
    if app.default_command is not None or not subcommands:
        yield pytest.param(app, id=" ".join(words))
    for name in subcommands:
        yield from commands(app[name], (*words, name))


@pytest.mark.parametrize(
    "command", [each for verb in VERBS for each in commands(application()[verb], (verb,))]
)
def test_every_option_is_described(command: App):
    every = command.assemble_argument_collection(parse_docstring=True)
    options = [option for option in every if not option.children]  # a group of options has children
    assert not [option.names for option in options if not option.parameter.help]


@pytest.mark.parametrize(
    "command", [each for verb in VERBS for each in commands(application()[verb], (verb,))]
)
def test_no_description_of_a_docstring_is_hidden_by_that_of_a_type(command: App):
    if command.default_command is None:
        return
    entries = parse(inspect.getdoc(command.default_command) or "").params
    said = {entry.arg_name: " ".join(entry.description.split()) for entry in entries}
    every = command.assemble_argument_collection(parse_docstring=True)
    shown = {option.field_info.name: " ".join((option.parameter.help or "").split()) for option in every}
    assert {name: shown[name] for name in said} == said


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_the_long_description(verb, capsys):
    """The summary of the list of verbs does not replace the docstring of the function."""
    assert run([verb, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    said = " ".join(application()[verb].help.split())
    assert said[:60].replace("`", "") in shown
    assert "What to print on stdout" in shown or verb in (
        "report",
        "models",
        "recipes",
        "study",
        "committee",
        "receipts",
        "serve",
    )
