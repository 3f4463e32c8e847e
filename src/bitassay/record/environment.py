"""The machine and the software that a result came from."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

VERSIONS = ("bitassay", "transformers", "compressed-tensors")


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Return versions, processor, load (runnable processes over 1, 5 and 15 minutes) and the device that was
    used, as JSON values; `cuda` is the GPU's name."""
    used = torch.device(device)
    gpu = used if used.type == "cuda" else None
    return {
        **{name: version(name) for name in VERSIONS},
        "torch": str(torch.__version__),  # names the build (+cpu, +cu130), as the metadata may not
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "device": str(used),
        "cuda": torch.cuda.get_device_name(gpu) if torch.cuda.is_available() else None,
    }


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
