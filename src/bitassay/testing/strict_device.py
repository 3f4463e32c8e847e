"""A pretend accelerator of CPU memory that refuses to mix: `strict_device`.

A function that makes a tensor on the CPU and lets it meet a model on a GPU works in every test on a machine
without one. Here it does not: tensors of the device `strict:0` are wrappers around CPU tensors. Every
operator unwraps, computes and wraps, and raises where a CPU tensor of one or more dimensions is among its
arguments, as CUDA does. Copies to the CPU are allowed and counted: on a real device they wait for it.

    with strict_device() as device:
        model = bitassay.load("stories260k", device=device.name)

The device is PyTorch's PrivateUse1 under a name of our own, with a device guard in Python; nothing is
compiled. It shows where tensors are, not how an accelerator rounds, and takes any kernel that a CPU has;
`fp64=False` takes float64 away, as MPS does. Once used, a process keeps the name.
"""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import rename_privateuse1_backend

from bitassay.models.precision import WITHOUT_FP64

NAME = "strict"
_aten = torch.ops.aten
_CPU = torch.device("cpu")
_COPIES = {_aten._to_copy.default, _aten.copy_.default}  # the only ones that may see both sides
# What autocast computes in its dtype.
_PRODUCTS = ["linear", "matmul", "mm", "bmm", "addmm", "scaled_dot_product_attention"]


@contextmanager
def strict_device(*, fp64: bool = True) -> Iterator["StrictDevice"]:
    """Yield the device; tensors can be made on it while the context lasts. fp64: whether it has float64."""
    _register()
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=)` then copies by an operator
    if not fp64:
        WITHOUT_FP64.add(NAME)
    try:
        # Backward passes in this thread: those that autograd keeps for a device know nothing of the mode.
        with torch.autograd.set_multithreading_enabled(False), StrictDevice(fp64) as mode:
            yield mode
    finally:
        WITHOUT_FP64.discard(NAME)
        torch._C._set_only_lift_cpu_tensors(before)


class StrictDevice(TorchDispatchMode):
    """The device within its context. name: as torch calls it. waits: how often the CPU waited for a value."""

    name = f"{NAME}:0"

    def __init__(self, fp64: bool):
        super().__init__()
        self.fp64, self.waits = fp64, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        given = [*_tensors(args), *_tensors(kwargs.values())]
        ours = any(type(tensor) is StrictTensor for tensor in given)
        if not ours and (device is None or device.type != NAME):
            return func(*args, **kwargs)
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        if ours and func not in _COPIES:
            _refuse_mixing(func, given)
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"{func}: a generator of cpu cannot draw on {self.name}")
        if device is not None:
            kwargs["device"] = _CPU
        bare = _bare(args)
        if func is _aten.histc.default:  # which accelerators have for integers
            bare = (bare[0].float(), *bare[1:])
        out = func(*bare, **{key: _bare(value) for key, value in kwargs.items()})
        if func is _aten.copy_.default:
            self.waits += type(args[0]) is not StrictTensor
            return args[0]
        if device is not None and device.type != NAME:
            self.waits += 1
            return out.clone() if func is _aten._to_copy.default else out
        if not isinstance(out, Tensor | tuple | list):
            self.waits += 1
            return out
        if not self.fp64 and any(tensor.dtype == torch.float64 for tensor in _tensors((out,))):
            raise TypeError(f"{func}: this device has no float64")
        wrapped = tree_map_only(Tensor, StrictTensor, out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped) if _shares(func) else wrapped


class StrictTensor(Tensor):
    """A tensor on the device: its values are a CPU tensor that no operator but the device's own reaches."""

    bare: Tensor

    @staticmethod
    def __new__(cls, bare: Tensor) -> "StrictTensor":
        with torch.inference_mode(False):  # a view of a tensor from outside that mode is none of the mode's
            outer = Tensor._make_wrapper_subclass(
                cls,
                bare.shape,
                strides=bare.stride(),
                storage_offset=bare.storage_offset(),
                dtype=bare.dtype,
                device=torch.device(StrictDevice.name),
            )
        outer.bare = bare
        return outer

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor on {StrictDevice.name} outside of `with strict_device()`")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{StrictDevice.name} {self.bare!r}"


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _bare(value: Any) -> Any:
    if type(value) is StrictTensor:
        return value.bare
    return type(value)(map(_bare, value)) if type(value) in (list, tuple) else value


def _refuse_mixing(func: Any, given: list[Tensor]) -> None:
    for tensor in given:
        if type(tensor) is not StrictTensor and tensor.ndim > 0:
            met = f"a tensor {list(tensor.shape)} on cpu meets one on {StrictDevice.name}"
            raise RuntimeError(f"{func}: {met}")


@cache
def _shares(func: Any) -> bool:
    """Whether an operator returns, or writes to, memory of its arguments."""
    return any(argument.alias_info is not None for argument in func._schema.arguments)


@cache
def _is_composite(func: Any) -> bool:
    """Whether an operator is made of others; in inference mode such operators come here whole."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@cache
def _register() -> tuple[Any, ...]:
    """Give PrivateUse1 its name and the little that autograd and autocast ask of a device. The cache keeps
    the objects, which must outlive the process's tensors."""

    core: Any = torch._C  # whose stubs leave these out

    class Guard(core._acc.DeviceGuard):
        def type_(self) -> Any:
            return core._autograd.DeviceType.PrivateUse1

    class Hooks(core._acc.PrivateUse1Hooks):
        def is_available(self) -> bool:
            return True

        def has_primary_context(self, index: int) -> bool:
            return True

        def is_built(self) -> bool:
            return True

    rename_privateuse1_backend(NAME)
    guard, hooks = Guard(), Hooks()
    core._acc.register_python_privateuseone_device_guard(guard)
    core._acc.register_python_privateuseone_hook(hooks)
    module: Any = types.ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch._register_device_module(NAME, module)
    others, products = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in _PRODUCTS:
        products.impl(name, _in_autocast(getattr(_aten, name)), "AutocastPrivateUse1")
    return guard, hooks, others, products


def _in_autocast(product: Any) -> Any:
    def cast(value: Any) -> Any:
        is_number = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(torch.get_autocast_dtype(NAME)) if is_number else value

    def computed(*arguments: Any, **options: Any) -> Any:
        given, named = [cast(value) for value in arguments], {k: cast(v) for k, v in options.items()}
        with torch.autocast(NAME, enabled=False):
            return product(*given, **named)

    return computed
