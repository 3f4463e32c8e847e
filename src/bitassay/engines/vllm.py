"""The engine vLLM: a folder, run by vLLM's Python API in a process of its own (`vllm_worker.py`).

vLLM pins versions of torch and transformers that are not this package's, so it usually lives in another
environment: BITASSAY_VLLM_PYTHON names its interpreter. Without it, vLLM is looked for in this one. Texts are
read and continued one after the other, eagerly and without a prefix cache, in the dtype that vLLM chooses
for the checkpoint. Tokens are chosen here, from vLLM's logits. What is measured is the model in vLLM, not
what its server adds: batches of several requests, compiled graphs and cached prefixes round otherwise.
"""

import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.engines.decode import Generation, Prefill, TokenIds, end_tokens
from bitassay.engines.one_by_one import OneByOneEngine, Until
from bitassay.engines.sampling import Draw, Sampler
from bitassay.engines.vllm_worker import receive, send
from bitassay.errors import BitassayError, MissingError
from bitassay.models.identity import identity
from bitassay.models.options import DTYPES
from bitassay.models.positions import context_length
from bitassay.models.walk import decoder_layers

NAME = "vllm"
PYTHON = "BITASSAY_VLLM_PYTHON"
WORKER = Path(__file__).with_name("vllm_worker.py")
POSITIONS = 4096  # of a context, at most: vLLM reserves its cache when it starts
# One process, no network; on the CPU 1 GB of cache, no binding to cores, and products of 4-bit codes whose
# inputs are not rounded. What the user has set stays.
VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_INT4_W4A8": "0",
}


def interpreter() -> str:
    """Return the Python that has vLLM. Raises MissingError where there is none."""
    if named := os.environ.get(PYTHON):
        if not Path(named).is_file():
            raise MissingError(f"{PYTHON}={named}: no such file", "the path of a Python that has vLLM")
        return named
    if find_spec(NAME) is None:
        raise MissingError(
            "the engine vllm needs vLLM, which is not in this environment",
            f"install it into an environment of its own, and set {PYTHON} to its python (docs/engines.md)",
        )
    return sys.executable


class VllmEngine(OneByOneEngine):
    """A folder in vLLM. `model` has its identity and tokenizer, and needs no weights. Raises BitassayError
    for a folder that vLLM does not load, with what it said; MissingError without vLLM."""

    title = "vLLM"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.path = identity(model).source.folder
        self.positions = positions = min(context_length(model) or POSITIONS, POSITIONS)
        self.process = _Process(interpreter())
        weakref.finalize(self, self.process.end)
        layers = len(decoder_layers(model))
        job = {"folder": str(self.path.absolute()), "dtype": "auto", "positions": positions, "layers": layers}
        self.about, _ = self.process.ask(job)
        if self.about["dtype"] not in DTYPES:
            raise BitassayError(
                f"{self.path}: vLLM computes in {self.about['dtype']}, which is not known here"
            )

    @staticmethod
    def check_installed() -> None:
        """Raise MissingError without vLLM."""
        interpreter()

    @property
    def longest_text(self) -> int:
        """Return how many tokens vLLM reads at most: it always makes one more."""
        return self.positions - 1

    def continued(
        self,
        prompt: TokenIds,
        nonce: str,
        max_new_tokens: int,
        sampler: Sampler,
        layers: Sequence[int],
        until: Until,
    ) -> Generation:
        ends, output = sorted(end_tokens(self.model)), list[int]()
        job = {"kind": "generate", "ids": list(prompt), "tokens": max_new_tokens, "ends": ends}
        said, arrays = self.process.ask(job | {"layers": list(layers)})
        while said["kind"] == "step":
            output += sampler.choose(arrays["logits"], [Draw(nonce, len(output))]).tolist()
            said, arrays = self.process.ask({"token": output[-1], "last": until(output)})
        return Generation(tuple(output), self._states(arrays, layers))

    def read(self, text: TokenIds, outputs: int, layers: Sequence[int]) -> Prefill:
        job = {"kind": "prefill", "ids": list(text), "outputs": outputs, "layers": list(layers)}
        _, arrays = self.process.ask(job)
        return Prefill(self._states(arrays, layers), arrays["logits"])

    def check(self, texts: Sequence[TokenIds], more: int, layers: Sequence[int]) -> None:
        """Raise BitassayError as the base class does, and for what this vLLM cannot hold or show."""
        super().check(texts, more, layers)
        if layers and self.about["layers"] != len(decoder_layers(self.model)):
            raise BitassayError("vLLM's model of this architecture has no list of layers to read states of")
        longest = max(map(len, texts)) + more
        if longest > self.positions:
            raise BitassayError(
                f"{longest} tokens; vLLM was started for {self.positions}", "shorter texts or windows"
            )

    def impossible(self, batch: int, prompt_tokens: int, new_tokens: int) -> str:
        """Return why such prompts cannot be timed; empty where they can."""
        limits = [
            (batch, self.about["texts"], "texts at once"),
            (batch * prompt_tokens, self.about["batch_tokens"], "tokens at once"),
            (prompt_tokens + new_tokens + 1, self.positions, "tokens of a text"),
            (batch * (prompt_tokens + new_tokens), self.about["cache_tokens"], "tokens in the cache"),
        ]
        for count, most, what in limits:
            if most is not None and count > most:
                return f"vLLM was started for {most} {what}"
        return ""

    def time(self, prompts: Sequence[TokenIds], new_tokens: int) -> tuple[float, float]:
        """Return the seconds in which prompts of one length are read together, up to the first tokens, and in
        which they are continued greedily by `new_tokens` more; by the worker's clock."""
        job = {"kind": "time", "prompts": [list(prompt) for prompt in prompts], "tokens": new_tokens}
        said, _ = self.process.ask(job)
        return said["read_s"], said["decode_s"]

    def numerics(self) -> dict[str, Any]:
        about = self.about
        return {
            "dtype": about["dtype"],
            "kv_dtype": about["dtype"] if about["kv_dtype"] == "auto" else about["kv_dtype"],
            **{name: about[name] for name in ("attention", "device", "threads", "cpu_capability", "torch")},
            "transformers": transformers.__version__,
            "engine": NAME,
            "engine_version": about["version"],
        }

    def _states(self, arrays: dict[str, Tensor], layers: Sequence[int]) -> dict[int, Tensor]:
        """States in vLLM's dtype, in which they were computed."""
        dtype = DTYPES[self.about["dtype"]]
        return {layer: arrays[f"layer.{layer}"].to(dtype) for layer in layers}


class _Process:
    """The worker, and what it said on its own."""

    def __init__(self, python: str):
        here, theirs = os.pipe(), os.pipe()  # what the worker reads, what it writes
        self.said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (kept)
        environment = {**VARIABLES, **os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        environment.pop("PYTHONPATH", None)  # of this environment
        self.process = subprocess.Popen(
            # As text: the folder of a script would be searched for modules, and this file is called vllm.
            [python, "-c", WORKER.read_text(encoding="utf-8"), str(here[0]), str(theirs[1])],
            pass_fds=(here[0], theirs[1]),
            stdin=subprocess.DEVNULL,
            stdout=self.said,
            stderr=self.said,
            env=environment,
            cwd=os.path.abspath(os.sep),
        )
        os.close(here[0])
        os.close(theirs[1])
        self.writer, self.reader = os.fdopen(here[1], "wb"), os.fdopen(theirs[0], "rb")

    def ask(self, message: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Send a message and return the answer. Raises BitassayError for an error of the worker,
        or its end."""
        try:
            send(self.writer, message)
            said, arrays = receive(self.reader)
        except (EOFError, BrokenPipeError) as error:
            raise BitassayError(
                f"vLLM ended with status {self.process.wait()}: {self._last_words()}"
            ) from error
        if said["kind"] == "error":
            why, hint = " ".join(said["problem"].split()), self._last_words(errors=True)
            raise BitassayError(f"vLLM: {why:.400}" + (f" ({hint})" if hint and hint not in why else ""))
        return said, arrays

    def end(self) -> None:
        """End the worker."""
        for stream in (self.writer, self.reader):
            with suppress(OSError):
                stream.close()
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()
        self.said.close()

    def _last_words(self, errors: bool = False) -> str:
        """The first error that the worker printed; else its last line, where not only `errors` count."""
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").splitlines()
        found = [line.strip() for line in lines if "Error:" in line and "Engine core" not in line]
        if found or errors:
            return "".join(found[:1])[-300:]
        return "".join(lines[-1:]).strip()[-300:]
