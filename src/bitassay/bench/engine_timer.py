"""Time a model that another engine runs, by that engine's own clock: `EngineTimer`.

What is counted is what the engine reads: the bytes of the tensors of the GGUF file or of the folder, of
floats at most as many as the engine's dtype has (vLLM converts float32 to bfloat16 when it loads). In which
dtype an engine multiplies it does not say, so that a prefill has no bound and a decode step that of memory
alone. Memory is that of this process and of those that the engine starts; files that it maps are part of it.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from gguf import GGUFReader
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.bench.roofline import Matrices, matrices_of
from bitassay.bench.timing import Times
from bitassay.bench.workload import ModelTimer, Workload
from bitassay.engines.engine import engine_name, engine_of
from bitassay.errors import BitassayError
from bitassay.models.identity import identity
from bitassay.models.options import DTYPES
from bitassay.models.walk import module_name
from bitassay.models.weights import check_files, stored_bytes
from bitassay.quantization.inputs.kv_cache import token_bytes
from bitassay.quantization.runtime.model import bits_per_weight

GGUF_ENDS = ("token_embd.", "output.")  # the embedding, the output head
GGUF_EXPERTS, EXPERTS, GGUF_LAYERS = "_exps.", ".experts.", "blk."


@runtime_checkable
class TimedEngine(Protocol):
    """An engine that can be timed: what `Engine` may have besides. path: the GGUF file or the folder that it
    reads."""

    path: Path

    def impossible(self, batch: int, prompt_tokens: int, new_tokens: int) -> str:
        """Return why such prompts cannot be timed; empty where they can."""
        ...

    def time(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
        """Return the seconds in which prompts of one length are read together, up to the first tokens, and in
        which they are continued greedily by `new_tokens` more."""
        ...


def check_timed(kind: type[Any], name: str) -> None:
    """Raise BitassayError for an engine that cannot be timed."""
    if not (hasattr(kind, "time") and hasattr(kind, "impossible")):
        raise BitassayError(
            f"the engine {name} says no times", "an engine with the methods of TimedEngine: llama.cpp, vllm"
        )


class EngineTimer(ModelTimer):
    """Times a model that was loaded for another engine than transformers. Raises BitassayError for an engine
    that cannot be timed."""

    def __init__(self, model: PreTrainedModel):
        engine = engine_of(model)
        check_timed(type(engine), engine_name(model))
        self.engine = cast(TimedEngine, engine)
        self.numerics = engine.numerics()
        super().__init__(model)
        self.matrices = stored_matrices(model, self.engine.path, DTYPES[self.numerics["dtype"]])

    @property
    def device(self) -> torch.device:
        return torch.device(self.numerics["device"])

    def facts(self) -> dict[str, Any]:
        path = self.engine.path
        folder = path.is_dir()
        return super().facts() | {
            "recipe_id": identity(self.model).recipe_id,
            "bits_per_weight": bits_per_weight(self.model) if folder else _gguf_bits(path),
            "checkpoint_bytes": stored_bytes(path) if folder else path.stat().st_size,
            "dtype": self.numerics["dtype"],
            "product_dtype": None,
            "engine": self.numerics["engine"],
            "engine_version": self.numerics["engine_version"],
        }

    def time(self, prompts: Int[Tensor, "batch tokens"], new_tokens: int) -> Times:
        read_s, decode_s = self.engine.time(prompts.tolist(), new_tokens)
        tokens = prompts.shape[0] * (prompts.shape[1] + new_tokens)
        return Times(read_s, decode_s, (self.cache_token_bytes() or 0) * tokens)

    def impossible(self, workload: Workload) -> str:
        if why := super().impossible(workload):
            return why
        return self.engine.impossible(workload.batch, workload.prompt_tokens, workload.new_tokens)

    def needed_bytes(self, workload: Workload) -> int:
        """Return about how many bytes a workload takes besides the weights: its cache."""
        tokens = workload.batch * (workload.prompt_tokens + workload.new_tokens)
        return 2 * (self.cache_token_bytes() or 0) * tokens

    def cache_token_bytes(self) -> int | None:
        try:
            size = token_bytes(self.model.config, None)
        except BitassayError:
            return None
        cache = DTYPES.get(self.numerics["kv_dtype"])  # None: one byte, such as fp8
        return size * (1 if cache is None else cache.itemsize) // 2


def stored_matrices(model: PreTrainedModel, path: Path, dtype: torch.dtype) -> Matrices:
    """Return the weights of a hosted model with the bytes that a GGUF file or a folder has of them, of the
    float tensors of a folder at most as many as in `dtype`."""
    found = replace(matrices_of(model), body_bytes=0.0, expert_bytes=0.0, head_bytes=0.0)
    head = embedding = 0.0
    for name, size in _folder_sizes(model, path, dtype) if path.is_dir() else _gguf_sizes(path):
        if name == "embedding":
            embedding += size
        elif name == "head":
            head += size
        elif name == "expert":
            found.expert_bytes += size
        else:
            found.body_bytes += size
    found.head_bytes = head or embedding  # tied
    return found


def _gguf_sizes(path: Path) -> Iterator[tuple[str, float]]:
    for tensor in GGUFReader(path).tensors:
        ends = [end for end in GGUF_ENDS if tensor.name.startswith(end)]
        part = {"token_embd.": "embedding", "output.": "head"}[ends[0]] if ends else "body"
        yield ("expert" if GGUF_EXPERTS in tensor.name else part), float(tensor.n_bytes)


def _gguf_bits(path: Path) -> float:
    """The bits of a weight of the layers' matrices."""
    layers = [t for t in GGUFReader(path).tensors if t.name.startswith(GGUF_LAYERS) and len(t.shape) > 1]
    return 8 * sum(int(t.n_bytes) for t in layers) / sum(int(t.n_elements) for t in layers)


def _folder_sizes(model: PreTrainedModel, path: Path, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = {f"{module_name(model, embedding)}.": "embedding"}
    if head is not None:
        ends[f"{module_name(model, head)}."] = "head"
    for name, entry in check_files(path).items():
        known, size = entry.dtype, entry.size_bytes
        if known is not None and known.is_floating_point:
            size = size * min(known.itemsize, dtype.itemsize) / known.itemsize
        part = next((what for prefix, what in ends.items() if name.startswith(prefix)), "body")
        yield ("expert" if EXPERTS in name else part), float(size)
