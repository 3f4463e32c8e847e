"""Which files of a folder hold the model's weights: those that transformers loads, and no others.

    model.safetensors              where it is there
    model.safetensors.index.json   else, the shards that its `weight_map` names
    transformers_weights           in config.json: another file, or index, to be used instead

(`_get_resolved_checkpoint_files` in transformers' `modeling_utils.py`.) What is hashed, checked and counted
is what these files hold, so that a model's identity is that of the weights that run. A folder in which it is
open which weights those are is refused, by the name of the file: two files with one tensor, an index that
does not fit its shards, two sets of weights, an adapter. A file beside them that nothing loads is no part of
the model; `stray_files` names it. `consolidated*.safetensors` is the same model in Mistral's own layout.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from bitassay.errors import BitassayError
from bitassay.record.files import read_json, write_json

if TYPE_CHECKING:
    import torch

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
OTHER_LAYOUT = "consolidated*.safetensors"
SHARD_BYTES = 50 * 10**9
READ_BYTES = 2**22  # of a tensor that is cast while it is read
CHECKED_VALUES = 2**22  # that are looked at together
AGAIN = "download or save the model again"
# torch.distributed's own checkpoints: where a folder has one, transformers loads nothing else.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def weight_files(folder: Path) -> list[Path]:
    """Return the files whose tensors are the model. Raises BitassayError for none or several answers."""
    for path in sorted(folder.glob("*.safetensors")):
        if _DISTRIBUTED.fullmatch(path.name):
            raise BitassayError(
                f"{path}: a part of a distributed checkpoint, which transformers loads instead of {WEIGHTS}",
                "save the model as a whole: model.save_pretrained(folder)",
            )
    if (folder / ADAPTER).is_file():
        raise BitassayError(
            f"{folder / ADAPTER}: an adapter, which is added to the weights only where peft is installed",
            "save the merged model (model.merge_and_unload()), or remove the adapter's files",
        )
    if (chosen := _named_in_config(folder)) is not None:
        return [chosen] if chosen.suffix == ".safetensors" else _shards(chosen)
    single, index = folder / WEIGHTS, folder / INDEX
    if not single.is_file() and index.is_file():
        return _shards(index)
    if not single.is_file():
        others = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:4])
        why = (
            f"no {WEIGHTS} and no {INDEX}, which transformers loads, only {others}"
            if others
            else "no .safetensors file (pickled .bin checkpoints are not read)"
        )
        raise BitassayError(f"{folder}: {why}", "model.save_pretrained(folder) writes it")
    if index.is_file() and set(_weight_map(index).values()) != {WEIGHTS}:
        raise BitassayError(
            f"{folder}: two sets of weights: {WEIGHTS}, and the shards that {INDEX} names",
            "remove the one that is not the model, or save the model into an empty folder",
        )
    return [single]


def stray_files(folder: Path) -> list[Path]:
    """Return the safetensors files that are no part of the model."""
    known = {*weight_files(folder), *folder.glob(OTHER_LAYOUT)}
    return sorted(set(folder.glob("*.safetensors")) - known)


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file, as the file's header describes it."""

    file: Path
    key: str
    header_dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int

    @property
    def dtype(self) -> "torch.dtype | None":
        """What torch calls the dtype; None where it does not know it."""
        from transformers.modeling_utils import str_to_torch_dtype

        return str_to_torch_dtype.get(self.header_dtype)

    def read(self, dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """Return the tensor, in memory of its own: a mapped file would count as a whole. dtype: cast to it,
        READ_BYTES at a time, so that the stored values are never there beside what they become."""
        import torch

        if self.dtype is None:
            with safe_open(self.file, framework="pt") as file:
                return file.get_tensor(self.key).to(dtype=dtype)
        cast = dtype is not None and dtype != self.dtype
        values = torch.empty(self.shape, dtype=dtype if cast else self.dtype)
        flat = values.view(-1)
        data = torch.empty(READ_BYTES, dtype=torch.uint8) if cast else flat.view(torch.uint8)
        with open(self.file, "rb") as stream:
            stream.seek(self.start)
            for start in range(0, self.size_bytes, max(1, len(data))):
                part = data[: self.size_bytes - start]
                if stream.readinto(part.numpy()) != len(part):  # type: ignore[arg-type]
                    raise BitassayError(f"{self.file}: truncated at {self.key}", AGAIN)
                if cast:
                    read = part.view(self.dtype)
                    first = start // self.dtype.itemsize
                    flat[first : first + len(read)] = read
        return values


def stored_tensors(folder: Path) -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield all tensors of the model's files by name, in the order of the names, read one at a time."""
    for name, entry in sorted(check_files(folder).items()):
        yield name, entry.read()


def stored_bytes(folder: Path) -> int:
    """Return the bytes of the model's files."""
    return sum(path.stat().st_size for path in weight_files(folder))


def stored_bits(folder: Path) -> dict[str, int]:
    """Return the bits of each module that the files hold as codes: all its tensors together but for a bias.
    Modules whose weight is a plain number a parameter are left out."""
    bits: dict[str, int] = {}
    plain: set[str] = set()
    for name, entry in check_files(folder).items():
        (module, _, part), dtype = name.rpartition("."), entry.dtype
        size = 1 if dtype is None else dtype.itemsize
        if part == "weight" and dtype is not None and dtype.is_floating_point and size > 1:
            plain.add(module)
        elif part != "bias":
            bits[module] = bits.get(module, 0) + 8 * size * math.prod(entry.shape)
    return {module: count for module, count in bits.items() if module not in plain}


def check_files(folder: Path) -> dict[str, Entry]:
    """Return each tensor of the model by name, by the files' headers. Raises BitassayError for a file that is
    truncated, malformed or missing, a tensor in two files, and an index that says something else."""
    where: dict[str, Entry] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="np") as file:
                names = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise BitassayError(
                f"{path}: truncated or not a safetensors file ({error})", "download or save it again"
            ) from error
        headers, data = _header(path)
        for name in names:
            if name in where:
                raise BitassayError(
                    f"{path}: the tensor {name} is in {where[name].file.name} too",
                    "remove the file that is not the model's, or save the model into an empty folder",
                )
            kind, shape, (start, stop) = (headers[name][k] for k in ("dtype", "shape", "data_offsets"))
            where[name] = Entry(path, name, kind, tuple(shape), data + start, stop - start)
    index = _named_in_config(folder) or folder / INDEX
    for name, file in _weight_map(index).items() if index.suffix == ".json" and index.is_file() else ():
        if name not in where or where[name].file.name != file:
            location = f"it is in {where[name].file.name}" if name in where else "it is not there"
            raise BitassayError(f"{index}: says that {name} is in {file}, but {location}", AGAIN)
    return where


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file, which was checked, says of its tensors, and where their bytes begin."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def _named_in_config(folder: Path) -> Path | None:
    config = folder / "config.json"
    name = read_object(config, missing={}).get("transformers_weights")
    if name is None:
        return None
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise BitassayError(f"{config}: transformers_weights is {name!r:.80}, no such file")
    return _inside(config, name)


def read_object(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a JSON object, or return `missing` where the file is. Raises BitassayError for other content."""
    if missing is not None and not path.is_file():
        return missing
    content = read_json(path)
    if not isinstance(content, dict):
        raise BitassayError(f"{path}: not an object", AGAIN)
    return content


def _shards(index: Path) -> list[Path]:
    return sorted({_inside(index, name) for name in _weight_map(index).values()})


def _weight_map(index: Path) -> dict[str, str]:
    files = read_object(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise BitassayError(f"{index}: no weight_map of tensors and files", AGAIN)
    return files


def _inside(owner: Path, name: str) -> Path:
    """The file `name` beside `owner`, which names it. Raises BitassayError for any other place or none."""
    path = owner.parent / name
    if Path(name).name != name or path.suffix not in (".safetensors", ".json"):
        raise BitassayError(
            f"{owner}: names {name!r:.80}, which is no safetensors file of its own folder", AGAIN
        )
    if not path.is_file():
        raise BitassayError(f"{path}: {owner.name} names this file, and it is missing", AGAIN)
    return path


def check_keys(report: Any, folder: Path) -> None:
    """Refuse a model whose weights are not the checkpoint's: transformers makes up weights that are missing
    or of another shape, and drops layers that the configuration does not mention. `report` is what
    `from_pretrained` returns as loading info."""
    unused = [key for key in report.get("unexpected_keys", ()) if ".layers." in key]
    defects = {
        "missing": sorted(report.get("missing_keys", ())),
        "of another shape than config.json says": sorted(key[0] for key in report.get("mismatched_keys", ())),
        "of layers that config.json does not have": sorted(unused),
    }
    for defect, keys in defects.items():
        if keys:
            raise BitassayError(f"{folder}: {len(keys)} weights are {defect}, the first is {keys[0]}", AGAIN)


def write_weights(
    folder: Path,
    expected: "Mapping[str, tuple[torch.dtype, tuple[int, ...]]]",
    tensors: "Iterable[tuple[str, torch.Tensor]]",
) -> None:
    """Write a model's tensors one by one into safetensors files of at most SHARD_BYTES each, as transformers
    names them. expected: dtype and shape of each, from which the files' headers are made beforehand."""
    import torch
    from transformers.modeling_utils import str_to_torch_dtype

    names = {dtype: name for name, dtype in reversed(str_to_torch_dtype.items())}
    shards: list[dict[str, Any]] = [{}]
    stop = 0
    for name, (dtype, shape) in sorted(expected.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        size = math.prod(shape) * dtype.itemsize
        if stop and stop + size > SHARD_BYTES:
            shards.append({})
            stop = 0
        shards[-1][name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [stop, stop + size]}
        stop += size
    where: dict[str, tuple[Path, int]] = {}
    for number, shard in enumerate(shards, start=1):
        one = len(shards) == 1
        path = folder / (WEIGHTS if one else f"model-{number:05}-of-{len(shards):05}.safetensors")
        header = json.dumps({"__metadata__": {"format": "pt"}, **shard}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        with open(path, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + max(e["data_offsets"][1] for e in shard.values()))
        start = 8 + len(header)
        where |= {name: (path, start + entry["data_offsets"][0]) for name, entry in shard.items()}
    if len(shards) > 1:
        total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in expected.values())
        index = {name: path.name for name, (path, _) in where.items()}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    left = set(where)
    for name, tensor in tensors:
        assert (tensor.dtype, tuple(tensor.shape)) == tuple(expected[name]), name
        path, start = where[name]
        with open(path, "r+b") as file:
            file.seek(start)
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        left.remove(name)
    assert not left, sorted(left)[:3]


def check_finite(parameters: "Iterable[tuple[str, torch.Tensor]]", where: str | Path) -> None:
    """Raise BitassayError for weights with NaN or infinity, naming the first tensor that has one."""
    for name, parameter in parameters:
        flat = parameter.reshape(-1).split(CHECKED_VALUES) if parameter.is_floating_point() else ()
        if all(part.float().sum().isfinite() for part in flat):
            continue
        if bad := int((~parameter.isfinite()).sum()):
            raise BitassayError(
                f"{where}: {name} has {bad} values that are NaN or infinite",
                "restore the checkpoint from its source",
            )
