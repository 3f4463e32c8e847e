"""What a model can be asked, whoever runs it: the protocol `Engine`, and the engines by name.

`ENGINES` has the engines of this package and those that installed packages add by entry points of the group
`bitassay.engines`. Generation, proofs, verification and evaluation ask `engine_of(model)`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.engines import decode, llamacpp, vllm
from bitassay.engines.decode import Generation, Prefill, States, TokenIds
from bitassay.engines.prompts import encode_prompt
from bitassay.engines.sampling import GREEDY, Sampler
from bitassay.engines.scores import token_logprobs
from bitassay.models.options import attention_of
from bitassay.registry import Registry


@runtime_checkable
class Engine(Protocol):
    """A model that a program runs. Prompts and outputs are token ids; `encode` makes them of text."""

    def __init__(self, model: Any) -> None: ...

    def encode(self, prompt: str | TokenIds) -> tuple[int, ...]:
        """Return the token ids of a prompt: text as one user message in the chat template."""
        ...

    def generate(
        self,
        prompts: Sequence[TokenIds],
        *,
        max_new_tokens: int,
        sampler: Sampler = GREEDY,
        nonces: Sequence[str] | None = None,
        layers: Sequence[int] = (),
    ) -> list[Generation]:
        """Continue each prompt; the states after `layers` (counted from 1) come along."""
        ...

    def prefill(
        self,
        prompts: Sequence[TokenIds],
        outputs: Sequence[TokenIds],
        *,
        layers: Sequence[int] = (),
        claimed: Sequence[States] | None = None,
    ) -> list[Prefill]:
        """Read each prompt with its output: states after `layers`, and the logits behind each token. claimed:
        states of each text by layer, from which the layers behind it go on (a replay)."""
        ...

    def logprobs(self, prompts: Sequence[TokenIds], outputs: Sequence[TokenIds]) -> list[Tensor]:
        """Return the log-probability, in nats, of each token of each output, in float64."""
        ...

    def numerics(self) -> dict[str, Any]:
        """Describe what decides the last bits of a forward besides the weights: dtypes of weights and cache,
        attention, device, threads, versions. What `Numerics` lets out may be left out."""
        ...


class TransformersEngine:
    """A model of transformers, run by this package (`decode.py`)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def encode(self, prompt: str | TokenIds) -> tuple[int, ...]:
        return encode_prompt(self.model, prompt)

    def generate(self, prompts: Sequence[TokenIds], **options: Any) -> list[Generation]:
        return decode.generate(self.model, prompts, **options)

    def prefill(
        self, prompts: Sequence[TokenIds], outputs: Sequence[TokenIds], **options: Any
    ) -> list[Prefill]:
        return decode.prefill(self.model, prompts, outputs, **options)

    def logprobs(self, prompts: Sequence[TokenIds], outputs: Sequence[TokenIds]) -> list[Tensor]:
        pairs = zip(self.prefill(prompts, outputs), outputs, strict=True)
        return [token_logprobs(read.logits, output) for read, output in pairs]

    def numerics(self) -> dict[str, Any]:
        dtype, cache = str(self.model.dtype).removeprefix("torch."), getattr(self.model, "kv_cache", None)
        return {
            "dtype": dtype,
            "kv_dtype": dtype if cache is None else cache.label,
            "attention": attention_of(self.model),
            "device": self.model.device.type,
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            **(gpu_numerics(self.model.device) if self.model.device.type == "cuda" else {}),
        }


def gpu_numerics(device: torch.device) -> dict[str, str]:
    """Describe a CUDA device: its model, and the version of its driver where the system says it."""
    found = {"gpu": torch.cuda.get_device_name(device)}
    about = Path("/proc/driver/nvidia/version")
    if about.is_file() and (version := re.search(r"Kernel Module\D.*?(\d+\.[\d.]+)", about.read_text())):
        found["driver"] = version[1]
    return found


TRANSFORMERS = "transformers"
ENGINES: Registry[type[Engine]] = Registry(
    "engines",
    {
        TRANSFORMERS: TransformersEngine,
        llamacpp.NAME: llamacpp.LlamaCppEngine,
        vllm.NAME: vllm.VllmEngine,
    },
)


def engine_of(model: PreTrainedModel) -> Engine:
    """Return the engine that runs a loaded model: the one that it was loaded for, else transformers."""
    return getattr(model, "engine", None) or ENGINES[TRANSFORMERS](model)


def engine_name(model: PreTrainedModel) -> str:
    """Return the name of the engine that runs a model."""
    return getattr(model, "engine_name", TRANSFORMERS)
