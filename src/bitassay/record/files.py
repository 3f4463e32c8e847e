"""Files that are either whole or absent: written beside their place, then renamed into it.
And text files of users, which come from editors and shells of all kinds: `read_text`. Every error names the
path."""

import codecs
import errno
import gzip
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bitassay.errors import BitassayError, MissingError
from bitassay.record.progress import Progress, silent

YAML_BYTES = 2**20


def explain_os_error(error: OSError, path: Path) -> BitassayError:
    """Return an error that says what went wrong with `path` and what to do about it."""
    why = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space or choose another folder, then run the same command again"
        return MissingError(f"{path}: no space left on the disk", remedy)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return BitassayError(f"{path}: not writable ({why})", "choose a folder that you may write to")
    if error.errno == errno.ENOTEMPTY:
        problem = f"{path}: the folder was filled by another process meanwhile"
        return BitassayError(problem, "choose another folder")
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        problem = f"{path}: a file is where a folder should be, or the reverse ({why})"
        return BitassayError(problem, "choose another path")
    return BitassayError(f"{path}: {why}")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into a BitassayError that names `path`. safetensors wraps a full
    disk in an error of its own, which keeps the number only in its text."""
    try:
        yield
    except OSError as error:
        raise explain_os_error(error, path) from error
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None or type(error).__name__ != "SafetensorError":
            raise
        cause = OSError(int(number[1]), os.strerror(int(number[1])))
        raise explain_os_error(cause, path) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is renamed to `path`, on any failure it is
    removed. Raises BitassayError where the disk is full or the folder cannot be written."""
    path = Path(path)
    temporary = _beside(path)
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            yield temporary
            _sync(temporary)
            os.chmod(temporary, stat.S_IMODE(mode))  # safetensors puts a private file of its own in its place
            os.replace(temporary, path)
    finally:
        # A folder that could not be made or entered is an error already under way: this must not hide it.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def link_or_copy(source: Path, path: Path) -> None:
    """Give a finished file another place, without a second copy of it where the disk can do that."""
    temporary = _beside(path)
    try:
        with explained(path):
            path.unlink(missing_ok=True)
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)
                _sync(temporary)
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder as `atomic_file` does a file; `path` may be an empty folder already."""
    path = Path(path)
    temporary = _beside(path)
    try:
        with explained(path):
            if path.is_dir() and any(path.iterdir()):
                remedy = "choose another folder or remove this one first"
                raise BitassayError(f"{path}: the folder is not empty", remedy)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
            if path.is_dir():
                path.rmdir()
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(path: Path, progress: Progress = silent) -> Iterator[None]:
    """Keep other processes out of what is being made at `path`; wait for one that is making it."""
    from filelock import FileLock, Timeout

    path = Path(path)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress(f"waiting for another process to finish {path}")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _beside(path: Path) -> Path:
    """A name in `path`'s folder that nobody has, chosen before anything is made under it: a Ctrl-C between
    the making and the noting of a name would leave a file that nobody removes."""
    return path.parent / f".{path.name}.{secrets.token_hex(8)}"


def _sync(path: Path) -> None:
    """Bring a file's content to the disk: a rename may get there first, and a power cut between the two would
    leave a complete name on half a file."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file, completely or not at all."""
    with atomic_file(Path(path)) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, completely or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON. Raises ValueError for a number that is not finite."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def check_folder(path: Path | None) -> None:
    """Raise BitassayError for a folder that could not be made or written into; for None nothing."""
    if path is None:
        return
    if path.exists() and not path.is_dir():
        raise BitassayError(f"{path}: a file is where a folder should be", "choose another path")
    _check_writable(path, path)


def check_place(path: Path) -> None:
    """Raise BitassayError for a file that could not be written."""
    if path.is_dir():
        raise BitassayError(f"{path}: a folder is where a file should be", "choose another path")
    _check_writable(path, path.parent)


def _check_writable(path: Path, folder: Path) -> None:
    """Leaves nothing behind: of folders that are to be made, the nearest that there is counts."""
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
    with explained(path):
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=nearest):
            pass


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, gunzipped where its name ends in .gz, as `decode_text` does."""
    try:
        data = path.read_bytes()
        return decode_text(gzip.decompress(data) if path.suffix == ".gz" else data, path)
    except OSError as error:
        raise BitassayError(f"{path}: {error.strerror or error}", "check the path") from error
    except (EOFError, zlib.error) as error:
        raise BitassayError(f"{path}: truncated or not gzip ({error})", "restore the file") from error


# UTF-32's mark begins with UTF-16's, so it stands first.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def decode_text(data: bytes, path: Path) -> str:
    """Return UTF-8 as text, the same wherever it was written: without a byte order mark, and with every line
    end (CR LF, CR) as LF. Raises BitassayError that names `path` where the bytes are no such text."""
    remedy = "save the file as UTF-8 text"
    for mark, encoding in _OTHER_MARKS.items():
        if data.startswith(mark):
            raise BitassayError(f"{path}: {encoding} text, not UTF-8", remedy)
    if b"\0" in data:
        raise BitassayError(f"{path}: not text (it has zero bytes, as binary files and UTF-16 do)", remedy)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BitassayError(f"{path}: not UTF-8 text ({error})", remedy) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, *, limit_bytes: int = 64 * 2**20) -> Any:
    """Return the value of a JSON file that may come from anyone: its size is checked first, and an object may
    not have a key twice, since two readers would take two different values."""
    path = Path(path)
    if not path.exists():
        raise BitassayError(f"{path}: no such file")
    with explained(path):
        if (size := path.stat().st_size) > limit_bytes:
            raise BitassayError(
                f"{path}: {size} bytes, more than the {limit_bytes} that such a file may have"
            )
        data = path.read_bytes()
    try:
        return json.loads(decode_text(data, path), object_pairs_hook=_with_unique_keys)
    except BitassayError as error:
        why = error.problem.removeprefix(f"{path}: ")
        raise BitassayError(f"{path}: not a JSON file ({why})", error.remedy) from error
    except (ValueError, RecursionError) as error:
        remedy = "write it again with the command that made it"
        raise BitassayError(f"{path}: not a JSON file ({error})", remedy) from error


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("an object has a key twice")
    return fields


def read_yaml(path: Path) -> Any:
    """Return the value of a YAML file that may come from anyone: at most YAML_BYTES are read."""
    import yaml

    try:
        with path.open("rb") as file:
            raw = file.read(YAML_BYTES + 1)
    except OSError as error:
        raise BitassayError(f"{path}: {error.strerror or error}", "check the path") from error
    if len(raw) > YAML_BYTES:
        raise BitassayError(f"{path}: more than the {YAML_BYTES} bytes that such a file may have")
    text = decode_text(raw, path)
    try:
        return yaml.safe_load(text)
    # PyYAML lets the last four out of values that do not fit their tag: 2020-13-01, `!!int ''`, `!!bool x`.
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        why = " ".join(str(getattr(error, "problem", None) or error).split())
        raise BitassayError(f"{path}: not valid YAML ({why:.200}{where})", "mend the file") from error
