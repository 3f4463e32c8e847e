"""The notebooks run as they are, on the results that are stored beside them."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_there_is_one_for_each_family_without_outputs():
    assert [path.stem for path in NOTEBOOKS] == ["int8-fp8", "replication", "verification"]
    for path in NOTEBOOKS:
        assert not any(cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": FOLDER}}).execute()
    printed = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert {"stream", "execute_result"} <= {output.output_type for output in printed}
    assert not any(output.get("name") == "stderr" and "Traceback" in output.text for output in printed)
