"""Run the command line in this process: exit status, stdout, stderr."""

from types import SimpleNamespace

import pytest

from bitassay import cli


@pytest.fixture
def bitassay(capsys):
    """Call it with the words of a command line."""

    def call(*words, debug=False):
        capsys.readouterr()
        status = cli.run(list(words), debug)
        said = capsys.readouterr()
        return SimpleNamespace(status=status, out=said.out, err=said.err)

    return call
