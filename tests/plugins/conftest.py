"""The example plug-in, as if it had been installed."""

import tomllib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "example_plugin"


@pytest.fixture
def example_plugin(tmp_path, monkeypatch):
    """Put the package and its metadata on the path, as `pip install` would."""
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / f"example_plugin-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(groups))
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(tmp_path))
