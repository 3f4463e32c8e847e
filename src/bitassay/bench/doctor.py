"""Check this machine: Python, packages, devices, memory, disk and models, and which verbs can run.

Requirements are read from the installed package's metadata, and nothing touches the network. Heavy packages
are imported only to learn whether they import.
"""

import os
import platform
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from bitassay.models.catalogue import CATALOGUE

# `bitassay eval smollm2-135m` peaks at 1.6 GB resident: the default model in float32, the logits of one
# window, the libraries.
MEMORY_BYTES = 2 * 10**9
# The default model in the cache: its GGUF file and the float32 folder made from it.
CACHE_BYTES = 98_000_000 + 542_000_000

# Verbs that run without most packages, and what they need. All others need every requirement.
LIGHT_VERBS = {"report": {"matplotlib", "jinja2"}, "recipes": {"torch", "torch import", "pyyaml"}}
# Extras of the package that a verb cannot do without.
EXTRAS = {"generate": "generation", "search": "search"}

Status = Literal["ok", "warning", "missing"]


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: what was found, what is needed (empty: nothing), and one thing to do where
    it is not ok."""

    subject: str
    found: str
    needed: str = ""
    status: Status = "ok"
    remedy: str = ""


def examine(verbs: Iterable[str]) -> list[Finding]:
    """Return all findings; the last say which of `verbs` can run."""
    findings = [_python(), *_packages(), *_torch(), *machine(), *_folders(), *_models()]
    return [*findings, *(verb_finding(verb, findings) for verb in verbs)]


def _python() -> Finding:
    needed, version = metadata.metadata("bitassay")["Requires-Python"], platform.python_version()
    fits = SpecifierSet(needed).contains(version, prereleases=True)
    return Finding(
        "python", version, needed, "ok" if fits else "missing", "" if fits else f"install Python {needed}"
    )


def _packages() -> list[Finding]:
    """Every requirement that applies here, and those of EXTRAS, which stop only a verb."""
    findings = []
    for wanted in map(Requirement, metadata.requires("bitassay") or ()):
        finding = package(wanted)
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            findings.append(finding)
            continue
        for extra in EXTRAS.values():
            if wanted.marker.evaluate({"extra": extra}):
                if finding.status != "ok":
                    remedy = f"pip install 'bitassay[{extra}]'"
                    finding = replace(finding, status="warning", remedy=remedy)
                findings.append(finding)
    return findings


def package(wanted: Requirement) -> Finding:
    """Return whether a requirement is installed in a version that it allows."""
    needed, remedy = str(wanted.specifier), f'pip install "{wanted.name}{wanted.specifier}"'
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return Finding(wanted.name, "not installed", needed, "missing", remedy)
    if wanted.specifier.contains(version, prereleases=True):
        return Finding(wanted.name, version, needed)
    return Finding(wanted.name, version, needed, "missing", remedy)


def _torch() -> list[Finding]:
    """Whether torch imports, what it was built for, and the devices that it sees."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        return [Finding("torch import", f"fails: {error}", "imports", "missing", "install torch again")]
    cuda, rocm = torch.version.cuda, torch.version.hip
    build = f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else "CPU only"
    capability = torch.backends.cpu.get_cpu_capability()
    slow = "no vector instructions that torch knows: expect a slow run" if capability == "DEFAULT" else ""
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        memory = f"{about.total_memory / 1e9:.1f} GB"
        capable = f"compute capability {about.major}.{about.minor}"
        devices.append(Finding(f"cuda:{index}", f"{about.name}, {memory}, {capable}"))
    return [
        Finding("torch import", f"{build}, {torch.get_num_threads()} threads"),
        Finding("CPU capability", capability, status="warning" if slow else "ok", remedy=slow),
        *(devices or [Finding("accelerator", "none: everything runs on the CPU")]),
    ]


def machine() -> list[Finding]:
    """Return cores that this process may use, load, and free memory against what the default model takes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0]
    busy = "something else is running: timings of `assay` will be noisy" if load > cores / 2 else ""
    needed = f"{MEMORY_BYTES / 1e9:g} GB for smollm2-135m"
    try:
        import psutil
    except ImportError as error:
        memory = Finding("memory", f"unknown: {error}", needed, "warning", "install psutil")
    else:
        now = psutil.virtual_memory()
        short = "close other programs, or expect swapping" if now.available < MEMORY_BYTES else ""
        free = f"{now.available / 1e9:.1f} of {now.total / 1e9:.1f} GB free"
        memory = Finding("memory", free, needed, "warning" if short else "ok", short)
    return [
        Finding("cores", str(cores)),
        Finding("load", f"{load:.2f}", f"below {cores / 2:g} for timing", "warning" if busy else "ok", busy),
        memory,
    ]


def _folders() -> list[Finding]:
    """The cache folder, where models are kept, and the working folder, where runs are written."""
    from bitassay.models.source import cache_folder, is_cached

    needed = 0 if is_cached(CATALOGUE["smollm2-135m"]) else CACHE_BYTES
    remedy = "set BITASSAY_CACHE to a folder that has room and may be written"
    cache = writable("cache folder", cache_folder(), needed, remedy)
    remedy = "change to a folder that may be written, or give --out"
    working = writable("working folder", Path.cwd(), 0, remedy)
    # Results can go elsewhere; the cache is needed whatever the options.
    return [cache, working if working.status == "ok" else replace(working, status="warning")]


def writable(subject: str, folder: Path, needed_bytes: int, remedy: str) -> Finding:
    """Return whether files can be written into a folder that may not exist yet; leaves nothing behind."""
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    needed = "writable" + (f", {needed_bytes / 1e9:.2g} GB free" if needed_bytes else "")
    try:
        with tempfile.TemporaryFile(dir=nearest) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except OSError as error:
        state = f"{folder}: not writable ({error.strerror or error})"
        return Finding(subject, state, needed, "missing", remedy)
    free = shutil.disk_usage(nearest).free
    state = f"{folder}: {free / 1e9:.1f} GB free"
    if free < needed_bytes:
        return Finding(subject, state, needed, "missing", remedy)
    return Finding(subject, state, needed)


def _models() -> list[Finding]:
    """Which models of the catalogue are here, and whether the default one is."""
    from bitassay.models.source import is_cached

    try:
        here = ", ".join(name for name, entry in CATALOGUE.items() if is_cached(entry))
    except ImportError as error:  # the hub's own package knows what is cached of the hub
        here = f"unknown: {error}"
    default = Finding("default model", "cached")
    if not is_cached(CATALOGUE["smollm2-135m"]):
        remedy = "bitassay models pull smollm2-135m"
        default = Finding("default model", "not fetched yet", status="warning", remedy=remedy)
    return [Finding("models here", here), default]


def verb_finding(verb: str, findings: list[Finding]) -> Finding:
    """Return whether nothing that a verb needs is missing."""
    missing = [finding.subject for finding in findings if finding.status == "missing"]
    lacks = [subject for subject in missing if subject in LIGHT_VERBS.get(verb, missing)]
    extra = f"bitassay[{EXTRAS.get(verb)}]"
    wants = [finding for finding in findings if extra in finding.remedy]
    names = lacks + [finding.subject for finding in wants]
    state = f"cannot run: {', '.join(names)}" if names else "can run"
    status: Status = "missing" if lacks else "warning" if wants else "ok"
    return Finding(f"verb {verb}", state, status=status, remedy=wants[0].remedy if wants else "")
