"""What INT8 and FP8 cost a matrix product: error and speed.

For a shape m x k, `x` [m, k] and `W` [k, k] are drawn from a normal distribution, in fp32. Three errors:

    rounding   mean |x' - x| / mean |x|        of the m x k matrix alone, as if it were a weight
    product    || x' W'^T - x W^T || / || x W^T ||       both sides rounded, by the kernel that runs them
    weights    || x  W'^T - x W^T || / || x W^T ||       only W rounded

each with one scale for a row (of x: a token) or for the whole tensor, absmax. DOCUMENTED holds what the
documents that this package replicates give as "matrix product quantization error". It is the first of the
three with a scale for the tensor: FP8's error is 0.022 in one rounded matrix whatever the shape, and INT8's
grows with the largest of m x k normal numbers. The error of a product with two rounded sides is larger: about
sqrt(2) times the error of one side.

Errors of a large product are taken over PRODUCT_ROWS rows of x (its scales over all of them). Speed: what
`QuantizedLinear` does in a bf16 model, rounding of its inputs included, beside dense products of fp32 and
bf16, in turns (`rounds.py`); `path` says what that was.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from bitassay.bench.roofline import wait_for
from bitassay.bench.rounds import INTERVAL, alternate, ratio_of, spread
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

SCHEMA = 1
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


@dataclass(frozen=True)
class Errors:
    """As above, fractions."""

    rounding_error: float
    product_error: float
    weights_error: float


def matmul(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    *,
    draws: int = 4,
    repeats: int = 5,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Errors (means over `draws`, with their smallest and largest) and speeds (ratios over `repeats` rounds;
    0 leaves them out) of every shape, as a JSON value. Raises BitassayError for a shape that makes no
    sense."""
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
            found = [asdict(one[kind]) for one in errors]
            documented = DOCUMENTED.get((kind[0], m, k)) if kind[1] == "tensor" else None
            mean = {name: statistics.fmean(one[name] for one in found) for name in found[0]}
            span = [min(one["rounding_error"] for one in found), max(one["rounding_error"] for one in found)]
            rows.append(
                {
                    "shape": f"{m}x{k}",
                    "format": kind[0],
                    "scales": kind[1],
                    **mean,
                    "rounding_error_range": span,
                    "documented": documented,
                    "over_documented": documented and mean["rounding_error"] / documented,
                    **speeds.get(kind, {}),
                }
            )
    return {
        "schema": SCHEMA,
        "kind": "matmul",
        "settings": {"draws": draws, "repeats": repeats, "seed": seed, "device": device},
        "interval": INTERVAL,
        "environment": environment(device),
        "rows": rows,
    }


def rounding_error(rounded: Matrix, exact: Matrix) -> float:
    """mean |x' - x| / mean |x|."""
    return ((rounded - exact).double().abs().mean() / exact.double().abs().mean()).item()


def relative_error(found: Matrix, exact: Matrix) -> float:
    """Of Frobenius norms."""
    return ((found - exact).double().norm() / exact.double().norm()).item()


def rounding_of(x: Matrix, format: str, scales: str) -> InputRounding:
    """How the inputs of a product are rounded: by each row's own scale, or by one for all of `x`."""
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


def _all_errors(x: Matrix, weight: Matrix) -> dict[tuple[str, str], Errors]:
    """By format and what shares a scale; bf16 for comparison."""
    few = x[:PRODUCT_ROWS]
    exact = linear(few, weight)
    x16, weight16 = x.bfloat16().float(), weight.bfloat16().float()
    found = {
        ("bfloat16", "-"): Errors(
            rounding_error(x16, x),
            relative_error(linear(few.bfloat16(), weight.bfloat16()).float(), exact),
            relative_error(linear(few, weight16), exact),
        )
    }
    for format in FORMATS:
        for scales in SCALES:
            quantized = _quantized(weight, format, scales)
            inputs = rounding_of(x, FORMATS[format], scales)
            product = QuantizedLinear(quantized, None, torch.float32, inputs)
            found[format, scales] = Errors(
                rounding_error(_quantized(x, format, scales).dequantize(), x),
                relative_error(product(few), exact),
                relative_error(linear(few, quantized.dequantize()), exact),
            )
    return found


@torch.inference_mode()
def _speeds(
    x: Matrix, weight: Matrix, repeats: int, progress: Progress
) -> dict[tuple[str, str], dict[str, Any]]:
    """Ratios to the fp32 and to the bf16 product, and the path that was taken."""
    x16, weight16 = x.bfloat16(), weight.bfloat16()
    work: dict[tuple[str, str], Callable[[], Tensor]] = {
        ("float32", "-"): lambda: linear(x, weight),
        ("bfloat16", "-"): lambda: linear(x16, weight16),
    }
    paths = {("bfloat16", "-"): "dense"}
    for format in FORMATS:
        for scales in SCALES:
            quantized = _quantized(weight, format, scales)
            inputs = rounding_of(x, FORMATS[format], scales)
            module = QuantizedLinear(quantized, None, torch.bfloat16, inputs)
            work[format, scales] = lambda module=module: module(x16)
            kind = product_kind(quantized, inputs, torch.bfloat16)
            paths[format, scales] = f"{kind} product" if kind else "both dequantized, bf16 product"
    names = {" ".join(kind): kind for kind in work}
    times = alternate(
        {name: work[kind] for name, kind in names.items()},
        rounds=repeats,
        wait=lambda: wait_for(x.device),
        progress=progress,
    )
    found = {}
    for name, kind in names.items():
        if kind not in paths:
            continue
        found[kind] = {
            "path": paths[kind],
            "seconds": statistics.median(times[name]),
            "spread": spread(times[name]),
        }
        for dense in ("float32", "bfloat16"):
            ratio = ratio_of(times[f"{dense} -"], times[name])
            if dense != kind[0]:
                found[kind] |= {f"speed_over_{dense}": ratio.value, f"speed_over_{dense}_ci": ratio.interval}
    return found
