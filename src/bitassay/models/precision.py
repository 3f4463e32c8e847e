"""Float64 where a device has it. MPS has none: there sums stay in float32, and what cannot do with that, such
as a factorisation, is computed on the host."""

import torch
from torch import Tensor

WITHOUT_FP64 = {"mps"}  # types of devices


def widest(device: torch.device) -> torch.dtype:
    """Return the widest floating-point dtype of a device."""
    return torch.float32 if device.type in WITHOUT_FP64 else torch.float64


def exact(tensor: Tensor, copy: bool = False) -> Tensor:
    """Return a tensor in float64: on its device, or on the host where its device has no float64. copy: a new
    one in any case."""
    return (tensor.cpu() if tensor.device.type in WITHOUT_FP64 else tensor).to(torch.float64, copy=copy)
