"""Linears that a checkpoint stores as `[in, out]`: GPT-2's `Conv1D`.

`Conv1D` computes `x W + b`, which is what `nn.Linear` computes with W transposed. `as_linears` replaces each
by a linear over the same memory, so nothing else here has to know of a second kind; files keep `[in, out]`.
"""

from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitassay.models.walk import replace_module


class TransposedLinear(nn.Linear):
    """`y = x W^T + b`; the state dict has W as `[in, out]`."""

    stored_transposed = True

    def __init__(self, weight: Float[Tensor, "out in"], bias: Tensor | None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, bias.requires_grad))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].T

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        key = f"{prefix}weight"
        stored = {**state_dict, key: state_dict[key].T} if key in state_dict else state_dict
        super()._load_from_state_dict(
            stored, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def as_linears(model: nn.Module) -> None:
    """Replace every `Conv1D` of a model."""
    for module in [part for part in model.modules() if isinstance(part, Conv1D)]:
        replace_module(model, module, TransposedLinear(module.weight.T, module.bias))


def stores_transposed(module: nn.Module) -> bool:
    """Return whether files have the module's weight as `[in, out]`."""
    return bool(getattr(module, "stored_transposed", False))
