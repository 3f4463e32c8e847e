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
from time import perf_counter
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from bitassay.engines.decode import Generation, Prefill, TokenIds, end_tokens
from bitassay.engines.llamacpp_library import Context, Library, bindings, capability, version
from bitassay.engines.one_by_one import OneByOneEngine, Until
from bitassay.engines.sampling import Draw, Sampler
from bitassay.errors import BitassayError
from bitassay.models.config import text_config
from bitassay.models.identity import identity
from bitassay.models.walk import decoder_layers

NAME = "llama.cpp"


class LlamaCppEngine(OneByOneEngine):
    """A GGUF file in llama.cpp. `model` has its identity and tokenizer, and needs no weights. Raises
    BitassayError for a model that is no GGUF file, or that llama.cpp does not load; MissingError without
    llama-cpp-python."""

    title = "llama.cpp"

    def __init__(self, model: PreTrainedModel) -> None:
        source = identity(model).source
        if source.gguf is None:
            raise BitassayError(
                f"{source.name}: llama.cpp reads GGUF files, and this is a folder",
                "bitassay quantize MODEL --gguf FILE.gguf writes one",
            )
        super().__init__(model)
        self.path, self.library = source.gguf, Library(source.gguf, torch.get_num_threads())
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

    def continued(
        self,
        prompt: TokenIds,
        nonce: str,
        max_new_tokens: int,
        sampler: Sampler,
        layers: Sequence[int],
        until: Until,
    ) -> Generation:
        ends, output = end_tokens(self.model), list[int]()
        with self._context(len(prompt) + max_new_tokens, layers) as context:
            logits = context.decode(prompt, 1)
            while True:
                output += sampler.choose(logits, [Draw(nonce, len(output))]).tolist()
                if output[-1] in ends or len(output) == max_new_tokens or until(output):
                    return Generation(tuple(output), dict(context.states()))
                logits = context.decode(output[-1:], 1)

    def read(self, text: TokenIds, outputs: int, layers: Sequence[int]) -> Prefill:
        with self._context(len(text), layers) as context:
            logits = context.decode(text, outputs)
            return Prefill(dict(context.states()), logits)

    def impossible(self, batch: int, prompt_tokens: int, new_tokens: int) -> str:
        """Return why such prompts cannot be timed; empty where they can."""
        return "" if batch <= (most := self.library.most_texts) else f"llama.cpp reads {most} texts at most"

    def time(self, prompts: Sequence[TokenIds], new_tokens: int) -> tuple[float, float]:
        """Return the seconds in which prompts of one length are read together, up to the first tokens, and in
        which they are continued greedily by `new_tokens` more."""
        context = Context(self.library, len(prompts[0]) + new_tokens, texts=len(prompts))
        try:
            start = perf_counter()
            tokens = context.likeliest(prompts)
            read = perf_counter()
            for _ in range(new_tokens):
                tokens = context.likeliest([[token] for token in tokens])
            return read - start, perf_counter() - read
        finally:
            context.free()

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
        key = tuple(layers)
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
