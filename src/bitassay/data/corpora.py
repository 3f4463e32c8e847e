"""Text to measure on: corpora and prompts, from a local folder, a file of the user, or this package.

`BITASSAY_DATA` names a folder of data sets (searched first); without it the bundled files are used, where the
licence of a text allows that. A result always says which. A user's file is called by its path and, once read,
by the start of its digest, so that an id says what was in it: `notes.jsonl@1a2b3c4d5e6f7a8b`.

A new corpus is one entry of CORPORA. GPTQ (2210.17323) and its successors measure on

    wikitext2-raw   the lines of the raw test set joined by two newlines, blank lines as empty strings
    c4-new          the first 1100 documents of C4's English validation set, joined by a space; 256 windows
    ptb-new         the lines of the Penn Treebank test set (Mikolov's preprocessing), stripped, joined by a
                    space

Where C4's validation set is missing, c4-train-new stands in: 1000 documents of its training set. Its numbers
are not comparable with published ones, nor fair to recipes that were calibrated on C4. c4-train, the same
documents joined by an empty line, is for calibration.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice, zip_longest
from pathlib import Path

from bitassay.errors import BitassayError, MissingError, suggestion
from bitassay.record.files import read_text


@dataclass(frozen=True)
class Corpus:
    """One long text and where it came from; max_windows: how many its protocol reads at most."""

    name: str
    text: str
    source: str
    max_windows: int | None = None


@dataclass(frozen=True)
class CorpusFiles:
    """Paths of a corpus under BITASSAY_DATA, its bundled file, and how its text is made from a file."""

    paths: tuple[str, ...]
    bundled: str | None
    text: Callable[[Path], str]
    max_windows: int | None = None


def _wikitext(path: Path) -> str:
    return "\n\n".join(line if line.strip() else "" for line in io.StringIO(read_text(path)))


def _ptb(path: Path) -> str:
    return " ".join(line.strip() for line in io.StringIO(read_text(path)))


def _c4(path: Path) -> str:
    return " ".join(_field(path, "text", 1100))


def _documents(path: Path) -> str:
    return "\n\n".join(_field(path, "text"))


_C4 = ("c4/c4-validation.00000-of-00008.json.gz", "c4/en/c4-validation.00000-of-00008.json.gz")
_C4_TRAIN = (("c4/c4_en_train_first1000.jsonl.gz",), "c4-train-1000.jsonl.gz")
_WIKITEXT = ("wikitext2/wiki.test.raw.gz", "wikitext2/wiki.test.raw")
CORPORA = {
    "wikitext2-raw": CorpusFiles(_WIKITEXT, "wikitext2-test.raw.gz", _wikitext),
    "c4-new": CorpusFiles(_C4, None, _c4, max_windows=256),
    "c4-train-new": CorpusFiles(*_C4_TRAIN, _c4, max_windows=256),
    "ptb-new": CorpusFiles(("ptb/ptb.test.txt.gz", "ptb/ptb.test.txt"), None, _ptb),
    "c4-train": CorpusFiles(*_C4_TRAIN, _documents),
}
GOLDEN_RATIO = (5**0.5 - 1) / 2
_USER_FILE = re.compile(r"(?P<path>.+\.(?:txt|jsonl)(?:\.gz)?)(?:@(?P<digest>[0-9a-f]{16}))?")


def is_user_file(name: str) -> bool:
    """Return whether a name is a user's file: .txt, .jsonl with a field `text`, or either gzipped."""
    return _USER_FILE.fullmatch(name) is not None


def is_pinned(name: str) -> bool:
    """Return whether this name always means the same text."""
    user_file = _USER_FILE.fullmatch(name)
    return user_file is None or user_file["digest"] is not None


def pinned(name: str) -> str:
    """Return the name of a corpus that always means the text of now: a user's file gets its digest."""
    return name if is_pinned(name) else f"{name}@{_digest(read_text(Path(name)))}"


def _digest(text: str) -> str:
    """Of the text, not of the file: a copy with other line ends, or gzipped, is the same corpus."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _user_corpus(name: str, path: Path, digest: str | None) -> Corpus:
    text = read_text(path)
    now = _digest(text)
    if digest not in (None, now):
        raise BitassayError(
            f"{path}: its digest begins with {now}, {name} means another text",
            f"restore that file, or say {path} alone to take what it holds now",
        )
    if ".jsonl" in path.name:
        text = _documents(path)
    if not text.strip():
        raise BitassayError(f"{path}: the corpus is empty", "another file")
    return Corpus(name, text, f"{path}, sha256 {now}...")


def check_corpus(name: str) -> None:
    """Raise as `corpus` does for an unknown name or a missing file; a bundled text is not read."""
    if user_file := _USER_FILE.fullmatch(name):
        _user_corpus(name, Path(user_file["path"]), user_file["digest"])
    else:
        _locate(name)


def corpus(name: str) -> Corpus:
    """Return the corpus called `name`, or PATH: a .txt file (line ends as LF, no byte order mark), or the
    texts of a .jsonl file joined by an empty line. Raises BitassayError for an unknown name, an empty file,
    or a file that is not what its name says; MissingError for a text that is not here."""
    if user_file := _USER_FILE.fullmatch(name):
        return _user_corpus(name, Path(user_file["path"]), user_file["digest"])
    path, source = _locate(name)
    text = CORPORA[name].text(path)
    if not text.strip():
        raise BitassayError(f"{path}: the corpus is empty", "restore the file, or unset BITASSAY_DATA")
    return Corpus(name, text, source, CORPORA[name].max_windows)


def same_text(first: str, second: str) -> bool:
    """Return whether two corpora are read from the same files."""
    return _files(first) == _files(second)


def _files(name: str) -> tuple[str, ...]:
    user_file = _USER_FILE.fullmatch(name)
    if user_file is None:
        return CORPORA[name].paths
    return (user_file["digest"] or _digest(read_text(Path(name))),)


def bundled_prompts() -> list[str]:
    """Return 800 instructions in a fixed order: the 80 first turns of MT-bench, then 720 from Dolly."""
    return prompts_from(bundled_file("prompts.jsonl.gz")[0])


def prompts_by_domain() -> dict[str, list[str]]:
    """Return all prompts that the package has by domain, none twice: the instructions (`mt_bench`, `dolly`),
    then other languages, lengths and kinds of text."""
    domains: dict[str, dict[str, None]] = {}
    for name in ("prompts.jsonl.gz", "domains.jsonl.gz"):
        path, _ = bundled_file(name)
        for domain, prompt in zip(_field(path, "source"), _field(path, "prompt"), strict=True):
            domains.setdefault(domain, {})[prompt] = None
    return {domain: list(prompts) for domain, prompts in domains.items()}


def calibration_prompts(count: int | None = None) -> list[str]:
    """Return `count` prompts in which all domains have equally many, as far as they go; or all prompts. Fewer
    are the beginning of more. Raises BitassayError for more prompts than there are."""
    rounds = zip_longest(*map(_spread, prompts_by_domain().values()))
    prompts = [prompt for one_each in rounds for prompt in one_each if prompt is not None]
    if count is not None and not 0 < count <= len(prompts):
        raise BitassayError(
            f"--prompts {count}: the package has {len(prompts)}", f"1 to {len(prompts)}, or a file of prompts"
        )
    return prompts[:count]


def _spread(items: list[str]) -> list[str]:
    """The items in an order whose every beginning is spread evenly over the list (the golden ratio's
    multiples, modulo one, do so)."""
    return [items[index] for index in sorted(range(len(items)), key=lambda index: index * GOLDEN_RATIO % 1)]


def read_prompts(count_or_file: str) -> list[str]:
    """Return so many `calibration_prompts`, or the prompts of a file. Raises BitassayError."""
    if count_or_file.isdigit():
        return calibration_prompts(int(count_or_file))
    return prompts_from(Path(count_or_file))


def prompts_from(path: Path) -> list[str]:
    """Return the prompts of a .jsonl file (field `prompt`; may be gzipped) or of a text file, one a line."""
    if ".jsonl" in path.name:
        prompts = _field(path, "prompt")
    else:
        prompts = [line for line in read_text(path).split("\n") if line.strip()]
    if not prompts:
        raise BitassayError(
            f"{path}: no prompts in it", "write one prompt a line, or JSON lines with a field 'prompt'"
        )
    return prompts


def _field(path: Path, name: str, count: int | None = None) -> list[str]:
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
    if name not in CORPORA:
        raise BitassayError(
            f"unknown corpus {name!r}; {suggestion(name, CORPORA)}",
            "one of these, or a file of your own: PATH.txt, or PATH.jsonl with a field 'text'",
        )
    known = CORPORA[name]
    if located := in_data_folder(known.paths):
        return located
    if known.bundled is None:
        raise MissingError(
            f"{name}: its text does not come with this package, and BITASSAY_DATA has none",
            f"set BITASSAY_DATA to a folder with {known.paths[0]}"
            + (", or take c4-train-new" if name == "c4-new" else ""),
        )
    return bundled_file(known.bundled)


def in_data_folder(candidates: tuple[str, ...]) -> tuple[Path, str] | None:
    """Return the first of `candidates` that is a file under BITASSAY_DATA, and how a result names it; None
    where there is none. Raises BitassayError where that folder does not exist."""
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
    """Return a file that this package carries, and how a result names it."""
    return Path(str(files("bitassay") / "data" / "bundled" / name)), f"bundled {name}"
