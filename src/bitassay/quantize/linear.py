"""The real model's linear: it keeps codes, not weights."""

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitassay.quantize.kernels import MAX_ROWS, Product, packed_product
from bitassay.quantize.tensor import QuantizedTensor


class QuantizedLinear(nn.Module):
    """`y = x W'^T + b` with `W'` from a QuantizedTensor.

    For a few rows of bf16 input the product reads the codes, where there is a kernel for them (which keeps
    its own arrangement of the codes in memory); otherwise `weight` is dequantized at each call.
    """

    def __init__(self, quantized: QuantizedTensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.quantized = quantized
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = quantized.shape
        self.dtype = dtype

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The dequantized weight, rounded to the model's dtype exactly as the fake model holds it."""
        return self.quantized.dequantize().to(self.dtype)

    @cached_property
    def product(self) -> Product | None:
        """The kernel for a few rows of bf16 input; made at first use."""
        return packed_product(self.quantized) if self.dtype == torch.bfloat16 else None

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        rows = x.numel() // self.in_features
        if rows <= MAX_ROWS and self.product is not None:
            y = self.product(x.reshape(rows, self.in_features).contiguous()).view(
                *x.shape[:-1], self.out_features
            )
            return y if self.bias is None else y + self.bias
        return nn.functional.linear(x, self.weight, self.bias)

    def _apply(self, fn, recurse: bool = True):
        """Follow `model.to(device)` and `model.to(dtype)`; the codes keep their dtypes."""
        super()._apply(fn, recurse)
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.quantized.packed.device))
        self.dtype, self.quantized = moved.dtype, self.quantized.to(moved.device)
        self.__dict__.pop("product", None)
        return self

    def extra_repr(self) -> str:
        scheme = self.quantized.scheme
        return f"in={self.in_features}, out={self.out_features}, {scheme.format} {scheme.granularity}"
