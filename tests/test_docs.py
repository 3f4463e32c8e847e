"""Source files that documents and docstrings name are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "bitassay"
DOCUMENTS = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
]
SOURCES = sorted(PACKAGE.rglob("*.py"))
NAMED = re.compile(r"`([\w./-]+\.py)`")
# Of transformers and lm-eval.
ELSEWHERE = {
    "models/huggingface.py",
    "conversion_mapping.py",
    "integrations/compressed_tensors.py",
    "modeling_utils.py",
}
NAMES = {
    path.name for folder in ("src", "docs", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")
}


def missing(path: Path) -> set[str]:
    """Return the files that are named and not there. A path is relative to the repository, the package,
    `quantization/` or `tests/`, in code also to what is around the file; a bare name is that of any file."""
    roots = [ROOT, PACKAGE, PACKAGE / "quantization", ROOT / "tests"]
    roots += [] if path.suffix == ".md" else path.parents[:2]
    return {
        name
        for name in set(NAMED.findall(path.read_text(encoding="utf-8"))) - ELSEWHERE
        if (not any((root / name).exists() for root in roots) if "/" in name else name not in NAMES)
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_documents_name_are_there(path):
    assert not missing(path)


def test_files_that_docstrings_name_are_there():
    assert not {(path.name, name) for path in SOURCES for name in missing(path)}


def test_links_between_documents_lead_somewhere():
    links = [
        (path, link)
        for path in DOCUMENTS
        for link in re.findall(r"\]\((?!https?:)([^)#\s]+\.\w+)", path.read_text(encoding="utf-8"))
    ]
    assert len(links) > 20
    assert not [(path.name, link) for path, link in links if not (path.parent / link).exists()]
