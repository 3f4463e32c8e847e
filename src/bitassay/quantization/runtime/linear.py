"""The real model's linear, which keeps codes, not weights; and the fake model's where inputs are rounded."""

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitassay.models.transposed import stores_transposed
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.inputs.activations import InputRounding, rounded_inputs
from bitassay.quantization.runtime.kernels import MAX_ROWS, Product, packed_product
from bitassay.quantization.runtime.products import RoundedProduct, product_kind, rounded_product
from bitassay.quantization.shapes import Matrix


class RoundedInputLinear(nn.Linear):
    """`y = x' W^T + b` with `x'` what `inputs` rounds `x` to; weight and bias are the given linear's own."""

    def __init__(self, linear: nn.Linear, inputs: InputRounding):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.inputs = inputs
        self.stored_transposed = stores_transposed(linear)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.stored_transposed:
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].T

    def forward(self, input: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        return nn.functional.linear(rounded_inputs(input, self.inputs), self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.inputs}, fake"


class QuantizedLinear(nn.Module):
    """`y = x W'^T + b` with `W'` from a QuantizedTensor; with `inputs`, of `x'` instead of `x`.

    For a few rows of bf16 input the product reads the codes, where there is a kernel for them; otherwise
    `weight` is dequantized at each call. Where inputs are rounded too, the product is of codes on both sides
    wherever there is one (`products.py`); otherwise of the dequantized inputs.
    """

    def __init__(
        self,
        quantized: QuantizedTensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        inputs: InputRounding | None = None,
    ):
        super().__init__()
        self.quantized, self.inputs = quantized, inputs
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = quantized.shape
        self.dtype = dtype

    @property
    def weight(self) -> Matrix:
        """Return the dequantized weight, rounded to the model's dtype exactly as the fake model holds it."""
        return self.quantized.dequantize().to(self.dtype)

    @cached_property
    def product(self) -> Product | None:
        """Return the kernel for a few rows of bf16 input; made at first use."""
        return packed_product(self.quantized) if self.dtype == torch.bfloat16 else None

    @cached_property
    def rounded_product(self) -> RoundedProduct | None:
        """Return the product of rounded inputs with the codes; made at first use."""
        return None if self.inputs is None else rounded_product(self.quantized, self.inputs, self.dtype)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if self.inputs is None:
            return self._product_of(x)
        if self.rounded_product is None:
            return self._product_of(rounded_inputs(x, self.inputs))
        y = self.rounded_product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _product_of(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Multiply by the packed kernel where there is one, else by dequantized weights."""
        x = x.contiguous()  # products of a strided view add up in another order
        rows = x.numel() // self.in_features
        if rows <= MAX_ROWS and self.product is not None:
            y = self.product(x.view(rows, self.in_features)).view(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias
        return nn.functional.linear(x, self.weight, self.bias)

    def _apply(self, fn, recurse: bool = True):
        """Follow `model.to(device)` and `model.to(dtype)`; the codes keep their dtypes."""
        super()._apply(fn, recurse)
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.quantized.packed.device))
        self.dtype, self.quantized = moved.dtype, self.quantized.to(moved.device)
        self.__dict__.pop("product", None)
        self.__dict__.pop("rounded_product", None)
        return self

    def extra_repr(self) -> str:
        scheme = self.quantized.scheme
        weights = f"in={self.in_features}, out={self.out_features}, {scheme.format} {scheme.granularity}"
        if self.inputs is None:
            return weights
        kind = product_kind(self.quantized, self.inputs, self.dtype)
        return f"{weights}, {self.inputs}, {'inputs dequantized' if kind is None else f'{kind} product'}"
