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
    """Bytes; `device` is None without an accelerator."""

    resident: int = 0
    device: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Within the context memory is watched; afterwards the Peak that it yields is complete."""
    process, done, peak = psutil.Process(), threading.Event(), Peak()

    def watch() -> None:
        while not done.wait(PERIOD_S):
            peak.resident = max(peak.resident, process.memory_info().rss)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    peak.resident = process.memory_info().rss
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak.resident = max(peak.resident, process.memory_info().rss)
        if device.type == "cuda":
            peak.device = torch.cuda.max_memory_allocated(device)
