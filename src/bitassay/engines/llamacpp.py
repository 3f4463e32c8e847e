"""The engine llama.cpp: a GGUF file, run by the C library on the CPU.

Texts are read one after the other, each in pieces of BATCH tokens, and continued token by token; the cache is
in float16, attention is what llama.cpp chooses (flash attention where it has it). States and logits are in
float32. Token ids come from this package's tokenizer of the same file, and tokens are chosen by its samplers,
so that what two engines say of a file is said of the same ids. What it cannot do: replay states that
somebody claims, and run on a GPU.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.engines.decode import Generation, Prefill, States, TokenIds, check_ids, end_tokens
from bitassay.engines.llamacpp_library import Context, Library, bindings, capability, version
from bitassay.engines.prompts import encode_prompt
from bitassay.engines.sampling import GREEDY, Draw, Sampler
from bitassay.engines.scores import token_logprobs
from bitassay.errors import BitassayError
from bitassay.models.config import text_config
from bitassay.models.identity import identity
from bitassay.models.walk import decoder_layers

NAME = "llama.cpp"


class LlamaCppEngine:
    """A GGUF file in llama.cpp. `model` has its identity and tokenizer, and needs no weights. Raises
    BitassayError for a model that is no GGUF file, or that llama.cpp does not load; MissingError without
    llama-cpp-python."""

    def __init__(self, model: PreTrainedModel) -> None:
        source = identity(model).source
        if source.gguf is None:
            raise BitassayError(
                f"{source.name}: llama.cpp reads GGUF files, and this is a folder",
                "bitassay quantize MODEL --gguf FILE.gguf writes one",
            )
        self.model = model
        self.library = Library(source.gguf, torch.get_num_threads())
        self._contexts: dict[tuple[int, ...], Context] = {}
        weakref.finalize(self, _free, self._contexts, self.library)
        for what, theirs, ours in (
            ("vocabulary", self.library.vocabulary, text_config(model).vocab_size),
            ("hidden size", self.library.hidden, text_config(model).hidden_size),
            ("number of layers", self.library.layers, len(decoder_layers(model))),
        ):
            if theirs != ours:
                raise BitassayError(
                    f"{source.gguf}: the {what} is {theirs} in llama.cpp, {ours} in transformers"
                )

    @staticmethod
    def check_installed() -> None:
        """Raise MissingError without llama-cpp-python."""
        bindings()

    def encode(self, prompt: str | TokenIds) -> tuple[int, ...]:
        return encode_prompt(self.model, prompt)

    def generate(
        self,
        prompts: Sequence[TokenIds],
        *,
        max_new_tokens: int,
        sampler: Sampler = GREEDY,
        nonces: Sequence[str] | None = None,
        layers: Sequence[int] = (),
    ) -> list[Generation]:
        nonces = [str(index) for index in range(len(prompts))] if nonces is None else list(nonces)
        assert len(nonces) == len(prompts)
        if max_new_tokens < 1:
            raise BitassayError(f"max_new_tokens is {max_new_tokens}", "ask for at least 1")
        check_ids(self.model, prompts, max_new_tokens - 1)
        ends, made = end_tokens(self.model), list[Generation]()
        for prompt, nonce in zip(prompts, nonces, strict=True):
            output: list[int] = []
            with self._context(len(prompt) + max_new_tokens, layers) as context:
                logits = context.decode(prompt, 1)
                while True:
                    output += sampler.choose(logits, [Draw(nonce, len(output))]).tolist()
                    if output[-1] in ends or len(output) == max_new_tokens:
                        break
                    logits = context.decode(output[-1:], 1)
                made.append(Generation(tuple(output), dict(context.states())))
        return made

    def prefill(
        self,
        prompts: Sequence[TokenIds],
        outputs: Sequence[TokenIds],
        *,
        layers: Sequence[int] = (),
        claimed: Sequence[States] | None = None,
    ) -> list[Prefill]:
        if claimed:
            raise BitassayError("llama.cpp cannot go on from states that somebody claims", "transformers can")
        texts = [[*prompt, *output[:-1]] for prompt, output in zip(prompts, outputs, strict=True)]
        check_ids(self.model, texts)
        read = []
        for text, output in zip(texts, outputs, strict=True):
            with self._context(len(text), layers) as context:
                logits = context.decode(text, len(output))
                read.append(Prefill(dict(context.states()), logits))
        return read

    def logprobs(self, prompts: Sequence[TokenIds], outputs: Sequence[TokenIds]) -> list[Tensor]:
        pairs = zip(prompts, outputs, strict=True)  # one at a time: all of the vocabulary takes memory
        return [token_logprobs(self.prefill([p], [out])[0].logits, out) for p, out in pairs]

    def numerics(self) -> dict[str, Any]:
        """Describe what computes: dtype is that of the states; of the weights' types the file is the record.
        torch takes no part."""
        return {
            "dtype": "float32",
            "kv_dtype": "float16",
            "attention": "auto",
            "device": "cpu",
            "threads": self.library.threads,
            "cpu_capability": capability(),
            "torch": "none",
            "transformers": transformers.__version__,
            "engine": NAME,
            "engine_version": version(),
        }

    @contextmanager
    def _context(self, room: int, layers: Sequence[int]) -> Iterator[Context]:
        """An empty context with this much room that keeps the states of `layers`."""
        count, key = len(decoder_layers(self.model)), tuple(layers)
        if unknown := [layer for layer in layers if not 1 <= layer <= count]:
            raise BitassayError(
                f"there is no decoder layer {unknown[0]}", f"layers are counted from 1 to {count}"
            )
        context = self._contexts.get(key)
        if context is None or context.room < room:
            if context is not None:
                context.free()
            context = self._contexts[key] = Context(self.library, room, layers)
        context.clear()
        yield context


def _free(contexts: dict[tuple[int, ...], Context], library: Library) -> None:
    for context in contexts.values():
        context.free()
    library.free()
