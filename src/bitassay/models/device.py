"""Devices by their names, checked before there is work for them."""

import torch

from bitassay.errors import BitassayError, MissingError


def as_device(name: str) -> torch.device:
    """Raises BitassayError for what torch knows no device by, MissingError for one that is not here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BitassayError(f"{name!r} is no device", "cpu, cuda, cuda:1 or mps") from error
    if device.type == "cpu":
        return device
    if device.type == "meta":
        raise BitassayError(f"{name!r} computes nothing", "cpu, cuda, cuda:1 or mps")
    backend = getattr(torch, device.type, None)
    available = getattr(backend, "is_available", None)
    if available is None or not available():
        why = (
            ""
            if device.type != "cuda" or torch.version.cuda or torch.version.hip
            else ": this torch has no CUDA"
        )
        raise MissingError(
            f"no device {name!r} here{why}", "--device cpu; `bitassay doctor` lists what is here"
        )
    count = backend.device_count()  # type: ignore[union-attr]
    if device.index is not None and device.index >= count:
        raise MissingError(
            f"no device {name!r} here: {count} of them, numbered from 0", "`bitassay doctor` lists them"
        )
    return device
