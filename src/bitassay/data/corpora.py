"""Text to measure on: corpora and prompts, from a local folder or from what this package carries.

`BITASSAY_DATA` names a folder of data sets (searched first); without it the bundled files are used. A result
always says which.
"""

import gzip
import io
import json
import os
import zlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from bitassay.errors import BitassayError, nearest

# name -> (paths searched under BITASSAY_DATA, bundled file)
CORPORA = {
    "wikitext2-raw": (("wikitext2/wiki.test.raw.gz", "wikitext2/wiki.test.raw"), "wikitext2-test.raw.gz"),
    "c4-train": (("c4/c4_en_train_first1000.jsonl.gz",), "c4-train-1000.jsonl.gz"),
}


@dataclass(frozen=True)
class Corpus:
    """One long text and where it came from."""

    name: str
    text: str
    source: str


def corpus(name: str) -> Corpus:
    """The corpus called `name`, joined as its protocol wants. Raises BitassayError for an unknown name or an
    empty file.

    wikitext2-raw: the lines of the raw test set joined by two newlines, blank lines as empty strings. That is
    how the data set's rows are joined in GPTQ's evaluation, which the published WikiText-2 perplexities of
    quantized models follow. c4-train: the first 1000 documents of C4's English training set, joined by an
    empty line; for calibration, never for measuring.
    """
    if name not in CORPORA:
        raise BitassayError(f"unknown corpus {name!r}; the nearest are {nearest(name, CORPORA)}")
    path, source = _locate(*CORPORA[name])
    if ".jsonl" in path.name:
        text = "\n\n".join(_field(path, "text"))
    else:
        lines = io.StringIO(read_text(path))  # splits at \n alone, unlike str.splitlines
        text = "\n\n".join(line if line.strip() else "" for line in lines)
    if not text.strip():
        raise BitassayError(f"{path}: the corpus is empty", "restore the file, or unset BITASSAY_DATA")
    return Corpus(name, text, source)


def bundled_prompts() -> list[str]:
    """800 instructions in a fixed order: the 80 first turns of MT-bench, then 720 from Dolly."""
    return prompts_from(bundled_file("prompts.jsonl.gz")[0])


def prompts_from(path: Path) -> list[str]:
    """Prompts from a `.jsonl` file (field `prompt`; may be gzipped) or a text file with one prompt a line."""
    if ".jsonl" in path.name:
        lines = _field(path, "prompt")
    else:
        lines = [line for line in read_text(path).split("\n") if line.strip()]
    if not lines:
        raise BitassayError(
            f"{path}: no prompts in it", "write one prompt a line, or JSON lines with a field 'prompt'"
        )
    return lines


def _field(path: Path, name: str) -> list[str]:
    """The field `name` of every JSON line of a file."""
    values = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)[name]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise BitassayError(f"{path}:{number}: not a JSON object with a field {name!r}") from error
        if not isinstance(value, str) or not value:
            raise BitassayError(f"{path}:{number}: the {name} is empty or not a string")
        values.append(value)
    return values


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, gunzipped where its name ends in .gz; a BitassayError names the file and the
    defect."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except OSError as error:
        raise BitassayError(f"{path}: {error.strerror or error}", "check the path") from error
    except (EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BitassayError(f"{path}: truncated or not UTF-8 text ({error})", "restore the file") from error


def _locate(candidates: tuple[str, ...], bundled: str) -> tuple[Path, str]:
    return in_data_folder(candidates) or bundled_file(bundled)


def in_data_folder(candidates: tuple[str, ...]) -> tuple[Path, str] | None:
    """The first of `candidates` that is a file under BITASSAY_DATA, and what a result says of it; None where
    there is none. Raises BitassayError where that folder does not exist."""
    root = os.environ.get("BITASSAY_DATA")
    if not root:
        return None
    if not Path(root).is_dir():
        raise BitassayError(
            f"BITASSAY_DATA={root}: no such folder", "point it at a folder of data sets, or unset it"
        )
    for candidate in candidates:
        if (path := Path(root) / candidate).is_file():
            return path, f"BITASSAY_DATA {candidate}"
    return None


def bundled_file(name: str) -> tuple[Path, str]:
    """A file that this package carries, and what a result says of it."""
    return Path(str(files("bitassay") / "data" / "bundled" / name)), f"bundled {name}"
