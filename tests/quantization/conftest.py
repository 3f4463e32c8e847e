"""What tests of written folders share."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of the folder that a test file has `saved`."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))
