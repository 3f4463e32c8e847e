"""Can this machine do the work? `examine` looks at Python, packages, devices, memory, disk and models, and
says which verbs can run.

What is needed is read from the installed package's own metadata, never from a list kept here. Nothing touches
the network. Heavy packages are imported only to learn whether they import, so that a machine without them
still gets its answer.
"""

import os
import platform
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from bitassay.models.catalogue import CATALOGUE

# `bitassay eval smollm2-135m` peaks at 1.6 GB resident: the default model in float32, the logits of one
# window, the libraries.
MEMORY_BYTES = 2 * 10**9
# The default model in the cache: its GGUF file and the float32 folder made from it.
CACHE_BYTES = 98_000_000 + 542_000_000

# What a verb needs beyond what the command line itself is made of.
_MODEL = ("torch", "transformers", "safetensors", "gguf", "cache folder")
VERBS = {
    "assay": (*_MODEL, "scipy", "compressed-tensors", "matplotlib", "jinja2"),
    "quantize": (*_MODEL, "compressed-tensors"),
    "eval": (*_MODEL, "scipy"),
    "generate": (*_MODEL, "scipy", "matplotlib", "jinja2", "sacrebleu", "rouge-score"),
    "bench": (*_MODEL, "scipy", "psutil", "matplotlib", "jinja2"),
    "prove": _MODEL,
    "verify": (*_MODEL, "scipy"),
    "challenge": ("torch", "cryptography"),
    "open": ("torch", "cryptography"),
    "committee": ("torch", "cryptography", "scipy"),
    "calibrate": (*_MODEL, "scipy"),
    "attack": (*_MODEL, "scipy", "matplotlib", "jinja2"),
    "study": (*_MODEL, "scipy", "matplotlib", "jinja2", "pyyaml"),
    "search": (*_MODEL, "scipy", "matplotlib", "jinja2", "pyyaml", "optuna"),
    "report": ("matplotlib", "jinja2"),
    "models": _MODEL,
    "recipes": ("torch", "pyyaml", "pydantic"),
}

# Extras of the package that a verb cannot do without.
EXTRAS = ("generation", "search")

Status = Literal["ok", "warning", "missing"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what was found, what is needed (empty: nothing), and one thing to do
    where it is not ok."""

    subject: str
    found: str
    needed: str = ""
    status: Status = "ok"
    remedy: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Finding]:
    """Everything that `bitassay doctor` prints, in its order; the last findings say which verbs can run."""
    found = [python(), *packages(), *optional(), *torch_build(), *machine(), *places(), *models()]
    return [*found, *verbs(found)]


def python() -> Finding:
    from packaging.specifiers import SpecifierSet

    needed = metadata.metadata("bitassay")["Requires-Python"]
    version = platform.python_version()
    fits = SpecifierSet(needed).contains(version, prereleases=True)
    return Finding(
        "python", version, needed, "ok" if fits else "missing", "" if fits else f"install Python {needed}"
    )


def packages() -> list[Finding]:
    """Every requirement of the installed package that applies here (extras left out), against what is
    installed."""
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in metadata.requires("bitassay") or ()]
    return [
        package(w.name, w.specifier) for w in wanted if w.marker is None or w.marker.evaluate({"extra": ""})
    ]


def optional() -> list[Finding]:
    """Every requirement of EXTRAS; one that is not met is no defect, but stops a verb."""
    from packaging.requirements import Requirement

    found = []
    for wanted in (Requirement(line) for line in metadata.requires("bitassay") or ()):
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            continue
        for extra in EXTRAS:
            if wanted.marker.evaluate({"extra": extra}):
                one = package(wanted.name, wanted.specifier)
                remedy = f"pip install 'bitassay[{extra}]'"
                found.append(one if one.status == "ok" else replace(one, status="warning", remedy=remedy))
    return found


def package(name: str, specifier: Any) -> Finding:
    """Whether distribution `name` is installed in a version that `specifier` (a packaging SpecifierSet)
    allows."""
    remedy = f'pip install "{name}{specifier}"'
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "not installed", str(specifier), "missing", remedy)
    fits = specifier.contains(version, prereleases=True)
    return Finding(name, version, str(specifier), "ok" if fits else "missing", "" if fits else remedy)


def torch_build() -> list[Finding]:
    """Whether torch imports, what it was built for, and the devices that it sees."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        return [Finding("torch import", f"fails: {error}", "imports", "missing", "install torch again")]
    build = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU only"
    )
    capability = torch.backends.cpu.get_cpu_capability()
    slow = "no vector instructions that torch knows: expect a slow run" if capability == "DEFAULT" else ""
    devices = (
        [_cuda(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return [
        Finding("torch import", f"{build}, {torch.get_num_threads()} threads"),
        Finding("CPU capability", capability, status="warning" if slow else "ok", remedy=slow),
        *devices,
        *([] if devices else [Finding("accelerator", "none: everything runs on the CPU")]),
    ]


def _cuda(index: int) -> Finding:
    import torch

    about = torch.cuda.get_device_properties(index)
    return Finding(
        f"cuda:{index}",
        f"{about.name}, {about.total_memory / 1e9:.1f} GB, compute capability {about.major}.{about.minor}",
    )


def machine() -> list[Finding]:
    """Cores that this process may use, load and memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0]
    busy = "something else is running: timings of `assay` will be noisy" if load > cores / 2 else ""
    return [
        Finding("cores", str(cores)),
        Finding("load", f"{load:.2f}", f"below {cores / 2:g} for timing", "warning" if busy else "ok", busy),
        memory(),
    ]


def memory() -> Finding:
    """Free memory against what the default model takes."""
    needed = f"{MEMORY_BYTES / 1e9:g} GB for smollm2-135m"
    try:
        import psutil
    except ImportError as error:
        return Finding("memory", f"unknown: {error}", needed, "warning", "install psutil")
    now = psutil.virtual_memory()
    short = "close other programs, or expect swapping" if now.available < MEMORY_BYTES else ""
    free = f"{now.available / 1e9:.1f} of {now.total / 1e9:.1f} GB free"
    return Finding("memory", free, needed, "warning" if short else "ok", short)


def places() -> list[Finding]:
    """The cache folder, where models are kept, and the working folder, where runs are written."""
    from bitassay.models.source import cache_folder, is_cached

    needed = 0 if is_cached(CATALOGUE["smollm2-135m"]) else CACHE_BYTES
    cache = place(
        "cache folder",
        cache_folder(),
        needed,
        "set BITASSAY_CACHE to a folder that has room and may be written",
    )
    here = place("working folder", Path.cwd(), 0, "change to a folder that may be written, or give --out")
    # Results can go elsewhere; the cache is needed whatever the options.
    return [
        cache,
        here
        if here.status == "ok"
        else Finding(here.subject, here.found, here.needed, "warning", here.remedy),
    ]


def place(subject: str, folder: Path, needed_bytes: int, remedy: str) -> Finding:
    """Whether files can be written into `folder` (made or not yet) and `needed_bytes` are free there; leaves
    nothing behind."""
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    needed = "writable" + (f", {needed_bytes / 1e9:.2g} GB free" if needed_bytes else "")
    try:
        with tempfile.TemporaryFile(dir=nearest) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except OSError as error:
        return Finding(
            subject, f"{folder}: not writable ({error.strerror or error})", needed, "missing", remedy
        )
    free = shutil.disk_usage(nearest).free
    fits = free >= needed_bytes
    return Finding(
        subject,
        f"{folder}: {free / 1e9:.1f} GB free",
        needed,
        "ok" if fits else "missing",
        "" if fits else remedy,
    )


def models() -> list[Finding]:
    """Which models of the catalogue are here, and whether the default one is."""
    from bitassay.models.source import is_cached

    try:
        here = ", ".join(name for name, entry in CATALOGUE.items() if is_cached(entry))
    except ImportError as error:  # what is cached of the hub is known to the hub's own package
        here = f"unknown: {error}"
    default = is_cached(CATALOGUE["smollm2-135m"])
    remedy = "" if default else "bitassay models pull smollm2-135m"
    return [
        Finding("models here", here),
        Finding(
            "default model",
            "cached" if default else "not fetched yet",
            status="ok" if default else "warning",
            remedy=remedy,
        ),
    ]


def verbs(found: list[Finding]) -> list[Finding]:
    """For every verb, whether nothing that it needs is missing."""
    missing = {finding.subject for finding in found if finding.status == "missing"}
    optional = {finding.subject: finding for finding in found if "bitassay[" in finding.remedy}
    torch_fails = {"torch"} if "torch import" in missing else set()
    rows = []
    for verb, needs in VERBS.items():
        lacks = [need for need in needs if need in missing | torch_fails]
        wants = [need for need in needs if need in optional]
        found_text = f"cannot run: {', '.join(lacks + wants)}" if lacks + wants else "can run"
        status: Status = "missing" if lacks else "warning" if wants else "ok"
        remedy = optional[wants[0]].remedy if wants else ""
        rows.append(Finding(f"verb {verb}", found_text, status=status, remedy=remedy))
    return rows
