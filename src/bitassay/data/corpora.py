"""Text to measure on: corpora and prompts, from a local folder or from what this package carries.

`BITASSAY_DATA` names a folder of data sets (searched first); without it the bundled files are used, where the
licence of a text lets it be carried. A result always says which.

A file of one's own is a corpus too, called by its path and, once it has been looked at, by the start of its
digest: `notes.jsonl@1a2b3c4d5e6f7a8b`. So the id of whatever used it says what was in it.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path

from bitassay.errors import BitassayError, MissingError, suggestion
from bitassay.record.files import read_text


@dataclass(frozen=True)
class CorpusFiles:
    """Where a corpus lies: paths searched under BITASSAY_DATA, the bundled file (None: it may not be
    carried), and how its text is made from the file."""

    paths: tuple[str, ...]
    bundled: str | None
    text: Callable[[Path], str]
    max_windows: int | None = None


C4_DOCUMENTS = 1100
C4_TRAIN = ("c4/c4_en_train_first1000.jsonl.gz",)
CORPORA = {
    "wikitext2-raw": CorpusFiles(
        ("wikitext2/wiki.test.raw.gz", "wikitext2/wiki.test.raw"),
        "wikitext2-test.raw.gz",
        lambda path: "\n\n".join(line if line.strip() else "" for line in _lines(path)),
    ),
    "c4-new": CorpusFiles(
        ("c4/c4-validation.00000-of-00008.json.gz", "c4/en/c4-validation.00000-of-00008.json.gz"),
        None,
        lambda path: " ".join(_field(path, "text", C4_DOCUMENTS)),
        max_windows=256,
    ),
    "c4-train-new": CorpusFiles(
        C4_TRAIN,
        "c4-train-1000.jsonl.gz",
        lambda path: " ".join(_field(path, "text", C4_DOCUMENTS)),
        max_windows=256,
    ),
    "ptb-new": CorpusFiles(
        ("ptb/ptb.test.txt.gz", "ptb/ptb.test.txt"),
        None,
        lambda path: " ".join(line.strip() for line in _lines(path)),
    ),
    "c4-train": CorpusFiles(
        C4_TRAIN, "c4-train-1000.jsonl.gz", lambda path: "\n\n".join(_field(path, "text"))
    ),
}
_OWN = re.compile(r"(?P<path>.+\.(?:txt|jsonl)(?:\.gz)?)(?:@(?P<digest>[0-9a-f]{16}))?")


@dataclass(frozen=True)
class Corpus:
    """One long text and where it came from; max_windows: how many its protocol reads at most."""

    name: str
    text: str
    source: str
    max_windows: int | None = None


def is_own(name: str) -> bool:
    """Whether a corpus of this name is a file of one's own: .txt, or .jsonl with a field `text`, or either
    gzipped."""
    return _OWN.fullmatch(name) is not None


def is_pinned(name: str) -> bool:
    """Whether this name means one text."""
    own = _OWN.fullmatch(name)
    return own is None or own["digest"] is not None


def pinned(name: str) -> str:
    """The name of a corpus with what is in it: a file of one's own gets the start of its digest, others have
    one text. Raises BitassayError where there is no such file."""
    return name if is_pinned(name) else f"{name}@{_digest(read_text(Path(name)))}"


def _digest(text: str) -> str:
    """Of the text, not of the file: a copy with other line ends, or gzipped, is the same corpus."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _own_corpus(name: str, path: Path, digest: str | None) -> Corpus:
    text = read_text(path)
    found = _digest(text)
    if digest not in (None, found):
        raise BitassayError(
            f"{path}: its digest begins with {found}, {name} means another text",
            f"restore that file, or say {path} alone to take what it holds now",
        )
    if ".jsonl" in path.name:
        text = "\n\n".join(_field(path, "text"))
    if not text.strip():
        raise BitassayError(f"{path}: the corpus is empty", "another file")
    return Corpus(name, text, f"{path}, sha256 {found}...")


def check_corpus(name: str) -> None:
    """Raises as `corpus` does for a name, and where its file is not here, without reading a whole text that
    comes with the package."""
    if own := _OWN.fullmatch(name):
        _own_corpus(name, Path(own["path"]), own["digest"])
    else:
        _locate(_known(name))


def _known(name: str) -> str:
    if name not in CORPORA:
        raise BitassayError(
            f"unknown corpus {name!r}; {suggestion(name, CORPORA)}",
            "one of these, or a file of your own: PATH.txt, or PATH.jsonl with a field 'text'",
        )
    return name


def corpus(name: str) -> Corpus:
    """The corpus called `name`, joined as its protocol wants. Raises BitassayError for an unknown name, an
    empty file, or a file of one's own that is not what its name says, MissingError for a text that neither
    BITASSAY_DATA nor the package has.

    wikitext2-raw   the lines of the raw test set joined by two newlines, blank lines as empty strings. That
                    is how the data set's rows are joined in GPTQ's evaluation, which the published WikiText-2
                    perplexities of quantized models follow.
    c4-new          the first 1100 documents of C4's English validation set (its first file), joined by a
                    space: GPTQ's `c4-new`, of which 256 windows are read.
    c4-train-new    the same of the training set, of which 1000 documents are at hand: a stand-in where the
                    validation set is not, never comparable with published numbers, and not for recipes that
                    were calibrated on C4.
    ptb-new         the lines of the Penn Treebank test set (Mikolov's preprocessing), stripped, joined by a
                    space: GPTQ's `ptb-new`.
    c4-train        the documents of c4-train-new joined by an empty line; for calibration, never for
                    measuring.
    PATH            a file of one's own: .txt as it is (line ends as LF, no byte order mark), the texts of
                    .jsonl joined by an empty line.
    """
    if own := _OWN.fullmatch(name):
        return _own_corpus(name, Path(own["path"]), own["digest"])
    path, source = _locate(_known(name))
    text = CORPORA[name].text(path)
    if not text.strip():
        raise BitassayError(f"{path}: the corpus is empty", "restore the file, or unset BITASSAY_DATA")
    return Corpus(name, text, source, CORPORA[name].max_windows)


def same_text(first: str, second: str) -> bool:
    """Whether two corpora are read from the same files: what is calibrated on one is flattered by the
    other."""
    return _files(first) == _files(second)


def _files(name: str) -> tuple[str, ...]:
    own = _OWN.fullmatch(name)
    return CORPORA[name].paths if own is None else (own["digest"] or _digest(read_text(Path(name))),)


def bundled_prompts() -> list[str]:
    """800 instructions in a fixed order: the 80 first turns of MT-bench, then 720 from Dolly."""
    return prompts_from(bundled_file("prompts.jsonl.gz")[0])


def chosen_prompts(count_or_file: str) -> list[str]:
    """Return so many bundled prompts, evenly spaced, or the prompts of a file. Raises BitassayError."""
    if not count_or_file.isdigit():
        return prompts_from(Path(count_or_file))
    bundled, count = bundled_prompts(), int(count_or_file)
    if not 0 < count <= len(bundled):
        raise BitassayError(
            f"--prompts {count}: the package has {len(bundled)}", f"1 to {len(bundled)}, or a file of prompts"
        )
    return [bundled[index * len(bundled) // count] for index in range(count)]


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


def _lines(path: Path) -> io.StringIO:
    """Lines with their ends, split at line feeds alone, unlike str.splitlines."""
    return io.StringIO(read_text(path))


def _field(path: Path, name: str, count: int | None = None) -> list[str]:
    """The field `name` of every JSON line of a file, or of the first `count`."""
    values = []
    filled = ((n, line) for n, line in enumerate(read_text(path).split("\n"), 1) if line.strip())
    for number, line in islice(filled, count):
        try:
            value = json.loads(line)[name]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise BitassayError(f"{path}:{number}: not a JSON object with a field {name!r}") from error
        if not isinstance(value, str) or not value:
            raise BitassayError(f"{path}:{number}: the {name} is empty or not a string")
        values.append(value)
    return values


def _locate(name: str) -> tuple[Path, str]:
    known = CORPORA[name]
    if found := in_data_folder(known.paths):
        return found
    if known.bundled is None:
        raise MissingError(
            f"{name}: its text does not come with this package, and BITASSAY_DATA has none",
            f"set BITASSAY_DATA to a folder with {known.paths[0]}"
            + (", or take c4-train-new" if name == "c4-new" else ""),
        )
    return bundled_file(known.bundled)


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
