"""What made a result: the versions of packages, and a digest of this package's own code.
The digest changes from version to version and, in a checkout, between them."""

from importlib.metadata import version
from pathlib import Path

from bitassay.record.hashing import digest_json

ROOT = Path(__file__).parents[1]
SHOWING = ("cli", "report")  # they show results and make none


def source_digest(*folders: str) -> str:
    """Return the digest of the Python files below these folders of the package."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return digest_json({path.relative_to(ROOT).as_posix(): path.read_text() for path in paths})


def versions(*packages: str) -> dict[str, str]:
    """Return the version of this package, with its code's digest, and of others."""
    making = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
    code = source_digest(*(name for name in making if name not in SHOWING))
    return {"bitassay": f"{version('bitassay')}+{code[:12]}", **{name: version(name) for name in packages}}
