"""llama.cpp through the C functions that llama-cpp-python binds: `Library`, `Context`.

Hidden states are read by the callback `cb_eval`, which llama.cpp calls for each tensor of its graph: once to
ask whether somebody wants it, and again when it is computed. The output of layer i, counted from 0, is called
`l_out-i`; llama.cpp keeps it in float32 whatever the types of the weights are. Of the last layer it computes
only the positions whose logits are asked for, so whoever wants its states asks for all.

llama.cpp built for Intel's matrix unit (AMX) was seen to die at the first product on machines that report
the unit and refuse it. Where the library says that it was built for it, weights are not repacked for such
units (`use_extra_bufts`), which keeps to the usual kernels.
"""

import ctypes
import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bitassay.errors import BitassayError, MissingError

BATCH = 512  # tokens that are read at a time
GRAIN = 256  # a context has room for a multiple of so many tokens
GPU_LAYERS = 0
CACHE_TYPE = 1  # of GGML_TYPE_F16, llama.cpp's default
LEVELS = ("AVX512", "AVX2", "AVX", "SSE3", "SVE", "NEON", "RISCV_V", "VSX")  # best first

_said: deque[str] = deque(maxlen=50)


@cache
def bindings() -> tuple[Any, Any]:
    """Return the C functions of llama.cpp and those of ggml. Raises MissingError where llama-cpp-python is
    not installed, or its library cannot be loaded."""
    remedy = "pip install 'bitassay[llamacpp]' (it compiles llama.cpp: a C++ compiler, some minutes)"
    try:
        llama = import_module("llama_cpp.llama_cpp")
        ggml = import_module("llama_cpp._ggml").libggml
    except ImportError as error:
        raise MissingError(f"the engine llama.cpp needs llama-cpp-python ({error})", remedy) from error
    except (OSError, RuntimeError) as error:
        raise MissingError(f"llama-cpp-python cannot load llama.cpp ({error})", "install it again") from error
    for name, result, arguments in (
        ("ggml_get_name", ctypes.c_char_p, [ctypes.c_void_p]),
        ("ggml_nbytes", ctypes.c_size_t, [ctypes.c_void_p]),
        ("ggml_element_size", ctypes.c_size_t, [ctypes.c_void_p]),
        ("ggml_is_contiguous", ctypes.c_bool, [ctypes.c_void_p]),
        ("ggml_backend_tensor_get", None, [ctypes.c_void_p] * 2 + [ctypes.c_size_t] * 2),
    ):
        function = getattr(ggml, name)
        function.restype, function.argtypes = result, arguments
    llama.llama_log_set(_log_function(), ctypes.c_void_p())
    llama.llama_backend_init()
    return llama, ggml


@cache
def _log_function() -> Any:
    llama = import_module("llama_cpp.llama_cpp")

    def keep(_level: int, text: bytes, _data: Any) -> None:
        _said.append(text.decode(errors="replace").strip())

    return llama.llama_log_callback(keep)


def last_words() -> str:
    """Return what llama.cpp last said of an error; empty where it said nothing."""
    lines = [line for line in _said if "error" in line or "failed" in line or "unknown" in line]
    return "; ".join(lines[:2])[:300]


def features() -> dict[str, str]:
    """Return what the library says that it was built with, such as AVX512 and REPACK, by name."""
    llama, _ = bindings()
    words = llama.llama_print_system_info().decode().replace(":", "|").split("|")
    pairs = (word.partition("=") for word in words if "=" in word)
    return {name.strip(): value.strip() for name, _, value in pairs}


def capability() -> str:
    """Return the widest vector instructions that the library was built with."""
    found = features()
    return next((level for level in LEVELS if found.get(level, "0") != "0"), "scalar")


def version() -> str:
    """Return the versions of llama.cpp and of its bindings, and a digest of how it was built."""
    llama, _ = bindings()
    package = import_module("llama_cpp")
    said = llama.llama_version().decode() if hasattr(llama, "llama_version") else ""
    build = hashlib.sha256(llama.llama_print_system_info()).hexdigest()[:8]
    return " ".join(filter(None, (said, f"llama-cpp-python {package.__version__} build {build}")))[:64]


class Library:
    """A GGUF file that llama.cpp has loaded. Raises BitassayError for one that it cannot load."""

    def __init__(self, path: Path, threads: int):
        self.llama, self.ggml = bindings()
        self.path, self.threads = path, threads
        options = self.llama.llama_model_default_params()
        options.n_gpu_layers = GPU_LAYERS
        options.use_extra_bufts = not any(name.startswith("AMX") for name in features())
        _said.clear()
        self.pointer = self.llama.llama_model_load_from_file(str(path).encode(), options)
        if not self.pointer:
            raise BitassayError(f"{path}: llama.cpp {version()} cannot load it ({last_words()})")
        vocabulary = self.llama.llama_model_get_vocab(self.pointer)
        self.vocabulary = self.llama.llama_vocab_n_tokens(vocabulary)
        self.hidden = self.llama.llama_model_n_embd(self.pointer)
        self.layers = self.llama.llama_model_n_layer(self.pointer)

    @property
    def most_texts(self) -> int:
        """Return how many texts a context can hold."""
        return self.llama.llama_max_parallel_sequences()

    def free(self) -> None:
        """Free the model; nothing may use it afterwards."""
        if self.pointer:
            self.llama.llama_model_free(self.pointer)
            self.pointer = None


class Context:
    """Room for `texts` texts of up to `room` tokens, which are read piece by piece. layers: counted from 1,
    whose states are kept by `states` until `clear`. Raises BitassayError where there is not enough memory.
    """

    def __init__(self, library: Library, room: int, layers: Sequence[int] = (), texts: int = 1):
        llama, self.library = library.llama, library
        self.room, self.read = -(-room // GRAIN) * GRAIN, 0
        self.names = {f"l_out-{layer - 1}".encode(): layer for layer in layers}
        self.pieces: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
        self.trouble = ""
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_seq_max = self.room * texts, texts
        options.n_batch = options.n_ubatch = BATCH
        options.n_threads = options.n_threads_batch = library.threads
        options.type_k = options.type_v = CACHE_TYPE
        options.offload_kqv = options.op_offload = False  # of a build that has a GPU
        self._callback = llama.ggml_backend_sched_eval_callback(self._watch)  # must live as long as this
        if layers:
            options.cb_eval = self._callback
        self.pointer = llama.llama_init_from_model(library.pointer, options)
        if not self.pointer:
            raise BitassayError(
                f"llama.cpp makes no context of {texts} x {self.room} tokens ({last_words()})"
            )
        self.batch = llama.llama_batch_init(BATCH, 0, 1)

    def free(self) -> None:
        """Free the context."""
        if self.pointer:
            self.library.llama.llama_batch_free(self.batch)
            self.library.llama.llama_free(self.pointer)
            self.pointer = None

    def clear(self) -> None:
        """Forget the text."""
        llama = self.library.llama
        llama.llama_memory_clear(llama.llama_get_memory(self.pointer), True)
        self.read = 0
        for kept in self.pieces.values():
            kept.clear()

    def decode(self, tokens: Sequence[int], outputs: int) -> Float[Tensor, "outputs vocabulary"]:
        """Read `tokens` behind what was read; return the logits behind the last `outputs` of them. With
        layers, the states of all of them are kept."""
        found = []
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            first = max(0, len(tokens) - outputs - start)  # of this part, whose logits are wanted
            asked = 0 if self.names else first
            rows = self._decode(part, asked)
            found.append(rows[max(0, first - asked) :])
        return torch.from_numpy(np.concatenate(found))

    def _decode(self, part: Sequence[int], asked: int) -> np.ndarray:
        """The logits behind each token of a part of the first text, from `asked` on."""
        rows = self._run([(0, self.read + place, token, place >= asked) for place, token in enumerate(part)])
        self.read += len(part)
        return rows.copy()

    def likeliest(self, pieces: Sequence[Sequence[int]]) -> list[int]:
        """Read a piece of each text, all of one length, behind what was read of it, and return the likeliest
        next token of each."""
        length = len(pieces[0])
        entries = [
            (text, self.read + place, token, place == length - 1)
            for text, piece in enumerate(pieces)
            for place, token in enumerate(piece)
        ]
        found = [
            self._run(entries[start : start + BATCH]).argmax(-1) for start in range(0, len(entries), BATCH)
        ]
        self.read += length
        return np.concatenate(found).tolist()

    def _run(self, entries: Sequence[tuple[int, int, int, bool]]) -> np.ndarray:
        """Read tokens, each with its text, its position and whether its logits are wanted; the wanted logits,
        in llama.cpp's own memory, until the next call."""
        llama, batch = self.library.llama, self.batch
        batch.n_tokens = len(entries)
        for place, (text, position, token, wanted) in enumerate(entries):
            batch.token[place], batch.pos[place] = token, position
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, text
            batch.logits[place] = wanted
        if code := llama.llama_decode(self.pointer, batch):
            raise BitassayError(f"{self.library.path}: llama_decode gave {code} ({last_words()})")
        if self.trouble:
            raise BitassayError(f"{self.library.path}: {self.trouble}")
        count = sum(wanted for *_, wanted in entries)
        if not count:
            return np.empty((0, self.library.vocabulary), np.float32)
        pointer = llama.llama_get_logits(self.pointer)
        return np.ctypeslib.as_array(pointer, (count, self.library.vocabulary))

    def states(self) -> Mapping[int, Float[Tensor, "positions hidden"]]:
        """Return the states of all that was read since `clear`, by layer. Raises BitassayError where
        llama.cpp shows none of a layer."""
        for layer, pieces in self.pieces.items():
            rows = sum(map(len, pieces))
            if rows != self.read:
                raise BitassayError(
                    f"{self.library.path}: llama.cpp showed the states of layer {layer} at {rows} of "
                    f"{self.read} positions; its graph of this architecture has no l_out-{layer - 1}",
                    "--engine transformers",
                )
        return {layer: torch.from_numpy(np.concatenate(pieces)) for layer, pieces in self.pieces.items()}

    def _watch(self, tensor: int, ask: bool, _data: Any) -> bool:
        layer = self.names.get(self.library.ggml.ggml_get_name(tensor))
        if ask or layer is None:
            return layer is not None or not ask
        ggml, hidden = self.library.ggml, self.library.hidden
        size = ggml.ggml_nbytes(tensor)
        if ggml.ggml_element_size(tensor) != 4 or size % (4 * hidden) or not ggml.ggml_is_contiguous(tensor):
            self.trouble = f"l_out-{layer - 1} is not {hidden} float32 numbers a token"
            return True
        rows = np.empty((size // (4 * hidden), hidden), np.float32)
        ggml.ggml_backend_tensor_get(tensor, rows.ctypes.data, 0, size)
        self.pieces[layer].append(rows)
        return True
