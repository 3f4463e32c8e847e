"""Which dtypes a device has, and in which it is fast.

Float64 where a device has it. MPS has none: there sums stay in float32, and what cannot do with that, such as
a factorisation, is computed on the host.

Products in bf16 where they are fast. An x86 CPU without AMX has no or slow units for them: one with AVX-512
BF16 did 85 GFLOP/s in bf16 and 155 in float32 (one thread, 2048 x 1536 x 576, torch 2.13).
"""

import platform

import torch
from torch import Tensor

WITHOUT_FP64 = {"mps"}  # types of devices


def widest(device: torch.device) -> torch.dtype:
    """Return the widest floating-point dtype of a device."""
    return torch.float32 if device.type in WITHOUT_FP64 else torch.float64


def fast_in_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies matrices in bf16 faster than in float32."""
    is_x86 = device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    return not is_x86 or torch.cpu._is_amx_tile_supported()


def short_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether learning multiplies in bf16: everywhere but where all is float32 and that is faster."""
    return dtype != torch.float32 or fast_in_bf16(device)


def exact(tensor: Tensor, copy: bool = False) -> Tensor:
    """Return a tensor in float64: on its device, or on the host where its device has no float64. copy: a new
    one in any case."""
    return (tensor.cpu() if tensor.device.type in WITHOUT_FP64 else tensor).to(torch.float64, copy=copy)
