"""What is timed, and how one model is timed.
A workload is `batch` prompts of `prompt_tokens` tokens read at once, then `new_tokens` greedy steps.

The first time that a process sees a workload it runs it once without the clock: that warms caches up, makes
the kernels' own arrangements of the codes, and shows how much memory the workload takes.

A workload that cannot be run is skipped with the reason: it has more tokens than the model has positions, or
needs more memory than is free, by an estimate or because the attempt failed.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.bench.roofline import Matrices, machine_limits, matrices_of, product_dtype
from bitassay.bench.timing import Times, time_once
from bitassay.data.corpora import corpus
from bitassay.errors import BitassayError
from bitassay.models.identity import tokenizer
from bitassay.models.positions import context_length
from bitassay.models.walk import decoder_layers
from bitassay.quantization.inputs.kv_cache import token_bytes
from bitassay.quantization.runtime.model import (
    bits_per_weight,
    cache_slots,
    parameter_count,
    quantization_of,
    size_bytes,
)
from bitassay.record.environment import environment

TEXT_LETTERS = 200_000
PERIOD_S = 0.002  # between two looks at the memory; a shorter peak may be missed


@dataclass(frozen=True)
class Workload:
    """A line of the table. kind: `batch`, of short prompts, or `context`, of one long prompt."""

    kind: str
    batch: int
    prompt_tokens: int
    new_tokens: int

    @property
    def name(self) -> str:
        """Return a name that no other workload has."""
        return f"{self.kind}-{self.batch}x{self.prompt_tokens}+{self.new_tokens}"


@dataclass
class Peak:
    """The device's peak is None without an accelerator."""

    peak_resident_bytes: int = 0
    peak_device_bytes: int | None = None


class ModelTimer:
    """Times a model in this process."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.matrices: Matrices = matrices_of(model)
        self._ids: Int[Tensor, " tokens"] | None = None
        self._peaks: dict[Workload, Peak] = {}

    def facts(self) -> dict[str, Any]:
        """Return what is known of the model without running it."""
        done = quantization_of(self.model)
        return {
            "recipe_id": done.recipe.recipe_id if done else None,
            "parameters": parameter_count(self.model),
            "bits_per_weight": bits_per_weight(self.model),
            "checkpoint_bytes": size_bytes(self.model),
            "weight_bytes_per_token": self.matrices.token_bytes,
            "kv_bytes_per_token": self.cache_token_bytes(),
            "resident_bytes": resident_bytes(_family()),
            "device": self.device.type,
            "dtype": str(self.model.dtype)[6:],
            "product_dtype": product_dtype(self.model),
            "context_length": context_length(self.model),
            "environment": environment(self.device),
        }

    @property
    def device(self) -> torch.device:
        """Return where the model runs."""
        return self.model.device

    def limits(self) -> dict[str, Any]:
        """Measure the limits of the model's device now."""
        return machine_limits(self.device)

    def time(self, prompts: Int[Tensor, "batch tokens"], new_tokens: int) -> Times:
        """Run prompts once."""
        return time_once(self.model, prompts, new_tokens)

    def measure(self, workload: Workload) -> dict[str, Any]:
        """Return the times of a workload, or `{"skipped": why}`."""
        if why := self.impossible(workload):
            return {"skipped": why}
        prompts = self.prompts(workload)
        try:
            if workload not in self._peaks:
                with peak_memory(self.device) as peak:
                    self.time(prompts, workload.new_tokens)
                self._peaks[workload] = peak
            times = self.time(prompts, workload.new_tokens)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return {"skipped": "out of memory"}
        return {**asdict(times), **asdict(self._peaks[workload]), "costs": self._costs(workload, times)}

    def _costs(self, workload: Workload, times: Times) -> dict[str, Any]:
        total = workload.prompt_tokens + workload.new_tokens
        context = workload.prompt_tokens + workload.new_tokens // 2  # in the middle of the decode steps
        cost = {
            "prefill": self.matrices.prefill(workload.batch, workload.prompt_tokens),
            "decode": self.matrices.decode(workload.batch, context, times.cache_bytes * context / total),
        }
        return {name: phase._asdict() for name, phase in cost.items()}

    def impossible(self, workload: Workload) -> str:
        """Return why a workload cannot be run; empty where it may be tried."""
        total, limit = workload.prompt_tokens + workload.new_tokens, context_length(self.model)
        if limit is not None and total > limit:
            return f"the model has {limit} positions"
        if self.device.type != "cpu":
            return ""  # tried: what a device has free says little about what an allocator can reuse
        needed, free = self.needed_bytes(workload), psutil.virtual_memory().available
        return f"needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free" if needed > free else ""

    def needed_bytes(self, workload: Workload) -> int:
        """Return about how many bytes a workload takes besides the weights: its cache, and the widest
        activations of a prefill."""
        text = self.model.config.get_text_config(decoder=True)
        wide = 6 * text.hidden_size + 4 * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
        prompt = workload.batch * workload.prompt_tokens
        cache = (self.cache_token_bytes() or 0) * (prompt + workload.batch * workload.new_tokens)
        return 2 * cache + prompt * wide * self.model.dtype.itemsize

    def cache_token_bytes(self) -> int | None:
        """Return the bytes of a token in the cache; None where it holds something else than a
        key and a value a head."""
        try:
            spec = getattr(self.model, "kv_cache", None)
            size = token_bytes(self.model.config, spec)
            size = size * cache_slots(self.model) // len(decoder_layers(self.model))
        except BitassayError:
            return None
        return size if spec is not None else size * self.model.dtype.itemsize // 2

    def prompts(self, workload: Workload) -> Int[Tensor, "batch tokens"]:
        """Return text of WikiText-2, repeated if it is too short."""
        if self._ids is None:
            text = corpus("wikitext2-raw").text[:TEXT_LETTERS]
            self._ids = torch.tensor(tokenizer(self.model)(text, verbose=False).input_ids)
        count = workload.batch * workload.prompt_tokens
        ids = self._ids.repeat(-(-count // len(self._ids)))[:count]
        return ids.view(workload.batch, workload.prompt_tokens)


def _family() -> list[psutil.Process]:
    """This process and its children: an engine may run in one."""
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def resident_bytes(processes: Iterable[psutil.Process]) -> int:
    """Return the resident bytes of processes, those that have ended left out."""
    total = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed; torch's CPU allocator says so in a RuntimeError's text alone."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "DefaultCPUAllocator" in str(error) or "can't allocate memory" in str(error)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Watch the memory of this process and its children within the context: samples, since a process's own
    high-water mark cannot be reset everywhere. Afterwards the Peak that it yields is complete."""
    processes, done, peak = _family(), threading.Event(), Peak()

    def look() -> None:
        peak.peak_resident_bytes = max(peak.peak_resident_bytes, resident_bytes(processes))

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
