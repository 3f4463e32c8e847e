"""vLLM in a process of its own, which the engine `vllm` (`vllm.py`) starts in an interpreter that has vLLM.

    python vllm_worker.py READ WRITE        two file descriptors; messages go both ways

A message is 8 bytes with the length of a JSON object, the object, and the bytes of the float32 arrays whose
shapes it lists. This file imports neither bitassay nor, before it is started, vLLM: the two want other
versions of the same packages.

vLLM runs eagerly, without a prefix cache, one text at a time. Hooks read what leaves each decoder layer (its
output and the residual, added as the next layer adds them) and what leaves the model; the logits are vLLM's
own function of the latter. Which token comes next, the other side chooses: it gets the logits of every step,
and vLLM, which is asked to be greedy, gets them back with that token alone.
"""

import importlib
import json
import os
import struct
import sys
import time
from io import BufferedIOBase
from typing import Any

import torch

ROWS = 256  # rows of logits that are computed at a time
FORBIDDEN = -1e30
TEXTS, BATCH_TOKENS = 32, 4096  # that vLLM reads at once, where it is timed


def send(
    stream: BufferedIOBase, message: dict[str, Any], arrays: dict[str, torch.Tensor] | None = None
) -> None:
    """Write a message with float32 arrays by name."""
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in (arrays or {}).items()}
    head = message | {"arrays": {name: list(tensor.shape) for name, tensor in tensors.items()}}
    text = json.dumps(head).encode()
    stream.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        stream.write(tensor.numpy().tobytes())
    stream.flush()


def receive(stream: BufferedIOBase) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a message. Raises EOFError where the other side has ended."""
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    message = json.loads(stream.read(struct.unpack("<Q", head)[0]))
    arrays = {}
    for name, shape in message.pop("arrays").items():
        values = torch.empty(shape, dtype=torch.float32)
        data = stream.read(values.numel() * 4)
        if values.numel():
            values = torch.frombuffer(bytearray(data), dtype=torch.float32).view(shape)
        arrays[name] = values
    return message, arrays


class Worker:
    """A loaded model, and the taps on it."""

    def __init__(self, job: dict[str, Any]):
        self.vllm: Any = importlib.import_module("vllm")
        self.limit = limit = job["positions"]
        self.llm = self.vllm.LLM(
            job["folder"],
            dtype=job["dtype"],
            enforce_eager=True,
            enable_prefix_caching=False,
            max_model_len=limit,
            max_num_seqs=TEXTS,
            max_num_batched_tokens=max(limit, BATCH_TOKENS),
            seed=0,
        )
        self.taps: dict[int, list[torch.Tensor]] = {}
        self.finals: list[torch.Tensor] | None = None
        self.choose: Any = None
        self.model: Any = None
        self.logits_of: Any = None
        self.layers = self.timed = 0
        self.llm.apply_model(self._attach_to(job["layers"]))

    def _attach_to(self, count: int) -> Any:
        def attach(model: Any) -> None:
            self.model, self.logits_of = model, model.compute_logits
            lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
            for index, layer in enumerate(lists[0] if lists else []):
                layer.register_forward_hook(self._tap(index + 1))
            self.layers = len(lists[0]) if lists else 0
            model.register_forward_hook(self._final)
            model.compute_logits = self._compute_logits

        return attach

    def _tap(self, layer: int) -> Any:
        def hook(_module: Any, _arguments: Any, output: Any) -> None:
            if layer in self.taps:
                parts = [output] if isinstance(output, torch.Tensor) else [p for p in output if p is not None]
                states = parts[0] + parts[1] if len(parts) == 2 else parts[0].clone()
                self.taps[layer].append(states.reshape(-1, states.shape[-1]))

        return hook

    def _final(self, _module: Any, _arguments: Any, output: Any) -> None:
        if self.finals is not None:
            self.finals.append(output.clone())

    def _compute_logits(self, hidden: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        logits = self.logits_of(hidden, *arguments, **options)
        if self.choose is None:
            return logits
        forced = torch.full_like(logits, FORBIDDEN)
        forced[0, self.choose(logits)] = 0
        return forced

    def about(self) -> dict[str, Any]:
        """Describe what computes."""
        config = self.llm.llm_engine.vllm_config
        blocks = getattr(config.cache_config, "num_gpu_blocks", None)
        backends = {type(m.impl).__name__ for m in self.model.modules() if hasattr(m, "impl")}
        return {
            "version": self.vllm.__version__,
            "torch": str(torch.__version__),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "kv_dtype": str(config.cache_config.cache_dtype),
            "attention": ", ".join(sorted(backends))[:64],
            "device": str(next(self.model.parameters()).device.type),
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "layers": self.layers,
            "texts": TEXTS,
            "batch_tokens": max(self.limit, BATCH_TOKENS),
            "cache_tokens": None if blocks is None else blocks * config.cache_config.block_size,
        }

    def run(self, ids: list[int], tokens: int, layers: list[int], ends: list[int] | None = None) -> None:
        """Let vLLM read a text and continue it."""
        self.taps = {layer: [] for layer in layers}
        sampling = self.vllm.SamplingParams(
            max_tokens=tokens, temperature=0, ignore_eos=True, stop_token_ids=ends or [], detokenize=False
        )
        self.llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)

    def time(self, prompts: list[list[int]], tokens: int) -> dict[str, float]:
        """Read all prompts and continue each; the seconds to all first tokens, and of `tokens` more."""
        engine, self.taps = self.llm.llm_engine, {}
        sampling = self.vllm.SamplingParams(
            max_tokens=tokens + 1, temperature=0, ignore_eos=True, stop_token_ids=[], detokenize=False
        )
        start, begun, read = time.perf_counter(), set[str](), 0.0
        for ids in prompts:
            self.timed += 1
            engine.add_request(f"timed-{self.timed}", {"prompt_token_ids": ids}, sampling)
        while engine.has_unfinished_requests():
            begun |= {output.request_id for output in engine.step()}
            if not read and len(begun) == len(prompts):
                read = time.perf_counter()
        return {"read_s": read - start, "decode_s": time.perf_counter() - read}

    def states(self, count: int) -> dict[str, torch.Tensor]:
        """Return the states of the first `count` positions that were read."""
        return {f"layer.{layer}": torch.cat(pieces)[:count] for layer, pieces in self.taps.items()}


def main(reader: BufferedIOBase, writer: BufferedIOBase) -> None:
    """Answer messages until there are no more."""
    job, _ = receive(reader)
    try:
        worker = Worker(job)
        send(writer, {"kind": "loaded", **worker.about()})
    except Exception as error:  # whatever vLLM trips over is said to whoever asked
        send(writer, {"kind": "error", "problem": f"{type(error).__name__}: {error}"})
        return
    while True:
        try:
            job, _ = receive(reader)
        except EOFError:
            return
        try:
            _answer(worker, job, reader, writer)
        except Exception as error:
            send(writer, {"kind": "error", "problem": f"{type(error).__name__}: {error}"})


def _answer(worker: Worker, job: dict[str, Any], reader: BufferedIOBase, writer: BufferedIOBase) -> None:
    if job["kind"] == "time":
        send(writer, {"kind": "done", **worker.time(job["prompts"], job["tokens"])})
        return
    ids, layers = job["ids"], job["layers"]
    if job["kind"] == "generate":
        chosen: list[int] = []
        ended = False

        def choose(logits: torch.Tensor) -> int:
            nonlocal ended
            if not ended:  # else vLLM goes on alone, where no token ends a text
                send(writer, {"kind": "step"}, {"logits": logits})
                answer, _ = receive(reader)
                chosen.append(answer["token"])
                ended = answer["last"]
            return job["ends"][0] if ended and job["ends"] else chosen[-1]

        worker.choose = choose
        try:
            worker.run(ids, job["tokens"], layers, job["ends"])
        finally:
            worker.choose = None
        send(writer, {"kind": "done"}, worker.states(len(ids) + len(chosen) - 1))
        return
    worker.finals = []
    try:
        worker.run(ids, 1, layers)
        final = torch.cat(worker.finals)[: len(ids)]
    finally:
        worker.finals = None
    with torch.inference_mode():
        rows = [worker.logits_of(part) for part in final[-job["outputs"] :].split(ROWS)]
    send(writer, {"kind": "done"}, worker.states(len(ids)) | {"logits": torch.cat([r.float() for r in rows])})


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[1]), "rb") as read, os.fdopen(int(sys.argv[2]), "wb") as write:
        main(read, write)
