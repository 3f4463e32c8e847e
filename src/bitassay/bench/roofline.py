"""The roofline: the least time that a forward pass can take on a machine.
Williams et al. 2009, "Roofline: an insightful visual performance model".

    t >= max( bytes / bandwidth, flop / peak )

bandwidth (bytes/s) and peak (FLOP/s, by dtype) are measured on the spot, as the best of a few repeats of
reading a buffer larger than most caches, and of a product of two matrices. Bytes and FLOP are counted:

    bytes   every weight that the pass needs, as stored (codes, scales, zero points), once a pass; of a
            mixture, the experts that the tokens reach on average with even routing; and for a decode step the
            keys and values of the context
    flop    2 a weight and token, and 4 x heads x width a layer for each key that a token looks at

Left out: activations, norms, and what a kernel reads beyond that (torch keeps codes of 2 or 3 bits in 4;
weights that are dequantized first are written and read again). All of it shows as a smaller share of the
bound. A model that fits into the processor's cache can do better than the bound.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from bitassay.models.walk import decoder_layers, module_name, walk
from bitassay.quantization.runtime.linear import QuantizedLinear
from bitassay.quantization.runtime.model import cache_slots, quantization_of
from bitassay.quantization.runtime.products import product_kind

BUFFER_BYTES = 256 * 2**20
CPU_SHAPE = (512, 2048, 2048)
GPU_SHAPE = (8192, 8192, 8192)
PEAK_DTYPES = ("float32", "bfloat16", "int8", "fp8")
REPEATS = 5


class Cost(NamedTuple):
    """What one forward pass needs: bytes that are read, floating-point (or integer) operations."""

    bytes: float
    flop: float

    @property
    def flop_per_byte(self) -> float:
        """Return the arithmetic intensity."""
        return self.flop / self.bytes

    def bound_s(self, bandwidth: float, peak: float) -> float:
        """Return the least seconds, with bandwidth in bytes/s and peak in FLOP/s."""
        return max(self.bytes / bandwidth, self.flop / peak)


@dataclass
class Matrices:
    """A model's weights in a forward pass, as bytes and numbers: of the layers without experts, of experts,
    and of the output head. reached: the share of experts that one token reaches; attention_flop: a token and
    key."""

    reached: float
    attention_flop: int
    body_bytes: float = 0
    body_weights: int = 0
    expert_bytes: float = 0
    expert_weights: int = 0
    head_bytes: float = 0
    head_weights: int = 0

    @property
    def token_bytes(self) -> float:
        """Return the bytes of weights that decoding one token reads."""
        return self.body_bytes + self.reached * self.expert_bytes + self.head_bytes

    def decode(self, batch: int, context: int, cache_bytes: float) -> Cost:
        """Return the cost of one step of `batch` sequences with `context` tokens each behind them, whose
        cache takes `cache_bytes` in all."""
        return self._cost(batch, batch, batch * context, cache_bytes)

    def prefill(self, batch: int, tokens: int) -> Cost:
        """Return the cost of `batch` prompts of `tokens` tokens, of which only the last has logits; each
        token looks at those before it."""
        return self._cost(batch * tokens, batch, batch * tokens * (tokens + 1) / 2, 0)

    def _cost(self, tokens: int, rows: int, keys: float, cache_bytes: float) -> Cost:
        touched = 1 - (1 - self.reached) ** tokens
        weights = self.body_weights + self.reached * self.expert_weights
        return Cost(
            self.body_bytes + touched * self.expert_bytes + self.head_bytes + cache_bytes,
            2 * (tokens * weights + rows * self.head_weights) + self.attention_flop * keys,
        )


def matrices_of(model: PreTrainedModel, dense_bytes: int | None = None) -> Matrices:
    """Count the weights of a model, packed or dense. dense_bytes: of a weight that is not quantized (default:
    as it is held)."""
    done = quantization_of(model)
    tensors = done.tensors if done is not None else {}
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    assert output is not None
    experts, counted, repeated = set(walk(model).experts), set[str](), _repeated(model)
    text = model.config.get_text_config(decoder=True)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    matrices = Matrices(1.0, 4 * cache_slots(model) * text.num_attention_heads * width)

    def add(name: str, is_expert: bool, size_bytes: float, weights: int) -> None:
        times = repeated(name)
        if is_expert:
            matrices.reached = _reached(text)
            matrices.expert_bytes += times * size_bytes
            matrices.expert_weights += times * weights
        else:
            matrices.body_bytes += times * size_bytes
            matrices.body_weights += times * weights

    for name, tensor in tensors.items():
        parent, _, last = name.rpartition(".")
        add(name, last.isdigit(), tensor.stored_bits / 8, tensor.shape[0] * tensor.shape[1])
        counted |= {f"{name}.weight", parent}
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        held = count * (dense_bytes or parameter.itemsize)
        if parameter is output.weight:
            matrices.head_bytes, matrices.head_weights = held, count
        elif parameter is not embedding and name not in counted:  # of the embedding, a row a token is read
            add(name, name in experts, held, count)
    return matrices


def _repeated(model: PreTrainedModel) -> Callable[[str], int]:
    """How often one token reads a matrix or parameter: once, or once a pass if passes share their codes."""
    done = quantization_of(model)
    if done is None or not done.passes or done.recipe.coded_replication is not None:
        return lambda name: 1
    prefix = f"{module_name(model, decoder_layers(model))}."

    def times(name: str) -> int:
        layer = name.removeprefix(prefix).partition(".")[0]
        steps = done.passes.get(int(layer)) if name.startswith(prefix) else None
        return 1 if steps is None else steps.count

    return times


def _reached(config: Any) -> float:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    count = next((n for name in names if (n := getattr(config, name, None))), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / count if chosen and count else 1.0


def product_dtype(model: PreTrainedModel) -> str:
    """Return the dtype of the matrix products of a prefill: the model's own, or that of codes on both
    sides."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.inputs is not None:
            return product_kind(module.quantized, module.inputs, module.dtype) or str(module.dtype)[6:]
    return str(model.dtype)[6:]


def stream_bandwidth(device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> float:
    """Measure the bytes a second of reading: the best of a sum over a buffer and a matrix-vector product."""
    rows = max(1, buffer_bytes // 4 // 4096)
    matrix, vector = torch.ones(rows, 4096, device=device), torch.ones(4096, device=device)
    seconds = min(_best(matrix.sum, device), _best(lambda: matrix @ vector, device))
    return matrix.nbytes / seconds


def matrix_peak(dtype: str, device: torch.device, shape: tuple[int, int, int] | None = None) -> float | None:
    """Measure the FLOP a second of a product `[m, k] x [n, k]^T` with shape (m, n, k); None where the device
    has no product of that dtype (fp8 on a CPU)."""
    m, n, k = shape or (GPU_SHAPE if device.type == "cuda" else CPU_SHAPE)
    if dtype == "fp8" and device.type != "cuda":
        return None
    function = _product(dtype, torch.ones(m, k, device=device), torch.ones(n, k, device=device))
    return 2 * m * n * k / _best(function, device)


def _product(dtype: str, x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    if dtype == "int8":
        a, b = x.to(torch.int8), weight.to(torch.int8)
        return lambda: torch.ops.aten._int_mm(a, b.t())
    if dtype == "fp8":
        a, b = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
        unit = torch.ones((), device=x.device)
        return lambda: torch.ops.aten._scaled_mm(a, b.t(), unit, unit, out_dtype=torch.bfloat16)
    a, b = x.to(getattr(torch, dtype)), weight.to(getattr(torch, dtype))
    return lambda: linear(a, b)


def machine_limits(device: torch.device) -> dict[str, Any]:
    """Measure bandwidth in bytes/s and the peaks in FLOP/s that the device has, as JSON values."""
    peaks = {dtype: matrix_peak(dtype, device) for dtype in PEAK_DTYPES}
    return {
        "bandwidth": stream_bandwidth(device),
        "peaks": {dtype: peak for dtype, peak in peaks.items() if peak is not None},
    }


def _best(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of REPEATS calls, after one that does not count."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        function()
        wait_for(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def wait_for(device: torch.device) -> None:
    """Return once everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
