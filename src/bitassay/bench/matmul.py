"""What INT8 and FP8 cost a matrix product: error and speed.

For a shape m x k, `x` [m, k] and `W` [k, k] are drawn from a normal distribution, in fp32. Three errors, each
with one absmax scale a row (of x: a token) or a tensor:

    rounding   mean |x' - x| / mean |x|        of the m x k matrix alone, as if it were a weight
    product    || x' W'^T - x W^T || / || x W^T ||       both sides rounded, by the kernel that runs them
    weights    || x  W'^T - x W^T || / || x W^T ||       only W rounded

DOCUMENTED holds the "matrix product quantization error" of the INT8/FP8 report. It is the first of the three
with a scale for the tensor; a product with two rounded sides has about sqrt(2) times the error of one side.
Errors of a large product are taken over PRODUCT_ROWS rows of x. Speed: `QuantizedLinear` in a bf16 model, the
rounding of its inputs included, in turns with dense products of fp32 and bf16; `path` says how it computed.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from bitassay.bench.roofline import wait_for
from bitassay.bench.timing import INTERVAL, alternate, ratio_of, spread
from bitassay.errors import BitassayError, at_least
from bitassay.models.options import as_device
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.codes.scales import absmax_grid
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.inputs.activations import InputRounding
from bitassay.quantization.recipe.formats import INPUT_FORMATS
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.runtime.linear import QuantizedLinear
from bitassay.quantization.runtime.products import product_kind
from bitassay.record.environment import environment
from bitassay.record.progress import Progress, silent
from bitassay.record.result import new_run

SHAPES = ((16, 512), (100, 1024), (4096, 4096))
FORMATS = {"int8": "int8", "fp8": "fp8_e4m3"}
SCALES = {"row": "channel", "tensor": "tensor"}
PRODUCT_ROWS = 256
MOST = 2**15  # columns: a square matrix of fp32 is then 4 GiB
DOCUMENTED = {
    ("int8", 16, 512): 0.009608,
    ("int8", 100, 1024): 0.010707,
    ("int8", 4096, 4096): 0.013310,
    ("fp8", 16, 512): 0.022184,
    ("fp8", 100, 1024): 0.022522,
    ("fp8", 4096, 4096): 0.022538,
}

Matrix = Float[Tensor, "_ _"]
Kind = tuple[str, str]  # a format, and what shares a scale


def matmul(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    *,
    draws: int = 4,
    repeats: int = 5,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure errors (means over `draws`, with the range of the rounding error) and speeds (ratios over
    `repeats` rounds; none for 0) of every shape; return the run as a JSON value. Raises BitassayError for a
    shape without rows or with more than MOST."""
    for rows, columns in shapes:
        if not (1 <= rows <= MOST and 1 <= columns <= MOST):
            raise BitassayError(f"a product of {rows}x{columns}", f"1 to {MOST} rows and columns")
    at_least(1, draws=draws)
    at_least(0, repeats=repeats, seed=seed)
    as_device(device)
    rows = []
    for m, k in shapes:
        progress(f"errors of {m}x{k}")
        errors = [_all_errors(*_draw(m, k, seed + draw, device)) for draw in range(draws)]
        speeds = _speeds(*_draw(m, k, seed, device), repeats, progress) if repeats else {}
        for kind in errors[0]:
            by_draw = {name: [draw[kind][name] for draw in errors] for name in errors[0][kind]}
            documented = DOCUMENTED.get((kind[0], m, k)) if kind[1] == "tensor" else None
            mean = {name: statistics.fmean(values) for name, values in by_draw.items()}
            rows.append(
                {
                    "shape": f"{m}x{k}",
                    "format": kind[0],
                    "scales": kind[1],
                    **mean,
                    "rounding_error_range": [min(by_draw["rounding_error"]), max(by_draw["rounding_error"])],
                    "documented": documented,
                    "over_documented": documented and mean["rounding_error"] / documented,
                    **speeds.get(kind, {}),
                }
            )
    settings = {"draws": draws, "repeats": repeats, "seed": seed, "device": device}
    return new_run("matmul", settings=settings, interval=INTERVAL, environment=environment(device), rows=rows)


def rounding_error(rounded: Matrix, exact: Matrix) -> float:
    """Return mean |x' - x| / mean |x|."""
    return ((rounded - exact).double().abs().mean() / exact.double().abs().mean()).item()


def relative_error(rounded: Matrix, exact: Matrix) -> float:
    """Return the relative error in the Frobenius norm."""
    return ((rounded - exact).double().norm() / exact.double().norm()).item()


def rounding_of(x: Matrix, format: str, scales: str) -> InputRounding:
    """Return how the inputs of a product are rounded: with a scale for each row, or with one for all of
    `x`."""
    if scales == "row":
        return InputRounding(format)
    grid = absmax_grid(x.reshape(1, -1), INPUT_FORMATS[format], True, torch.float32)
    return InputRounding(format, scale=grid.scale.item())


def _draw(m: int, k: int, seed: int, device: str) -> tuple[Matrix, Matrix]:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(m, k, generator=generator), torch.randn(k, k, generator=generator)
    return x.to(device), weight.to(device)


def _quantized(weight: Matrix, format: str, scales: str) -> QuantizedTensor:
    scheme = {"format": FORMATS[format], "granularity": SCALES[scales], "scale_dtype": "float32"}
    return quantize_tensor(weight, WeightScheme.model_validate(scheme))


def _kinds(x: Matrix, weight: Matrix) -> Iterator[tuple[Kind, QuantizedTensor, InputRounding]]:
    """Both sides of the product, rounded in every way."""
    for format in FORMATS:
        for scales in SCALES:
            yield (
                (format, scales),
                _quantized(weight, format, scales),
                rounding_of(x, FORMATS[format], scales),
            )


def _all_errors(x: Matrix, weight: Matrix) -> dict[Kind, dict[str, float]]:
    """The three errors of each kind; of bf16 for comparison."""
    few = x[:PRODUCT_ROWS]
    exact = linear(few, weight)

    def errors(rounded: Matrix, product: Matrix, weights_only: Matrix) -> dict[str, float]:
        return {
            "rounding_error": rounding_error(rounded, x),
            "product_error": relative_error(product, exact),
            "weights_error": relative_error(weights_only, exact),
        }

    x16, weight16 = x.bfloat16().float(), weight.bfloat16().float()
    product16 = linear(few.bfloat16(), weight.bfloat16()).float()
    by_kind = {("bfloat16", "-"): errors(x16, product16, linear(few, weight16))}
    for kind, quantized, inputs in _kinds(x, weight):
        product = QuantizedLinear(quantized, None, torch.float32, inputs)(few)
        rounded = _quantized(x, *kind).dequantize()
        by_kind[kind] = errors(rounded, product, linear(few, quantized.dequantize()))
    return by_kind


@torch.inference_mode()
def _speeds(x: Matrix, weight: Matrix, repeats: int, progress: Progress) -> dict[Kind, dict[str, Any]]:
    """Ratios to the fp32 and to the bf16 product, and the path that was taken."""
    x16, weight16 = x.bfloat16(), weight.bfloat16()
    work: dict[str, Callable[[], Tensor]] = {
        "float32": lambda: linear(x, weight),
        "bfloat16": lambda: linear(x16, weight16),
    }
    paths = {("bfloat16", "-"): "dense"}
    for kind, quantized, inputs in _kinds(x, weight):
        module = QuantizedLinear(quantized, None, torch.bfloat16, inputs)
        work[" ".join(kind)] = lambda module=module: module(x16)
        product = product_kind(quantized, inputs, torch.bfloat16)
        paths[kind] = f"{product} product" if product else "both dequantized, bf16 product"
    times = alternate(work, rounds=repeats, wait=lambda: wait_for(x.device), progress=progress)
    speeds = {}
    for kind, path in paths.items():
        seconds = times[" ".join(kind).removesuffix(" -")]
        speeds[kind] = {"path": path, "seconds": statistics.median(seconds), "spread": spread(seconds)}
        for dense in ("float32", "bfloat16"):
            ratio = ratio_of(times[dense], seconds)
            if dense != kind[0]:
                speeds[kind] |= {f"speed_over_{dense}": ratio.value, f"speed_over_{dense}_ci": ratio.interval}
    return speeds
