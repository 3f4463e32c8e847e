"""The most memory that this process held while something ran: sampled, since a process's own high-water mark
cannot be reset everywhere. A peak shorter than PERIOD_S may be missed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

PERIOD_S = 0.002


@dataclass
class Peak:
    """The device's peak is None without an accelerator."""

    peak_resident_bytes: int = 0
    peak_device_bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Watch memory within the context; afterwards the Peak that it yields is complete."""
    process, done, peak = psutil.Process(), threading.Event(), Peak()

    def look() -> None:
        peak.peak_resident_bytes = max(peak.peak_resident_bytes, process.memory_info().rss)

    def watch() -> None:
        while not done.wait(PERIOD_S):
            look()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    look()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        look()
        if device.type == "cuda":
            peak.peak_device_bytes = torch.cuda.max_memory_allocated(device)
