"""bitassay: fewer bits, known cost, provable identity for language models.

The Python API is five names, imported on first use so that `import bitassay` is instant:

    base = bitassay.load("smollm2-135m")
    w4 = bitassay.quantize(base, recipe="w4")
    print(bitassay.evaluate(w4, against=base))
    trace = bitassay.prove(w4, "Why is the sky blue?")
    print(bitassay.verify(trace, base))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["evaluate", "load", "prove", "quantize", "verify"]

if TYPE_CHECKING:
    from bitassay.evaluate.compare import evaluate
    from bitassay.models.load import load
    from bitassay.quantize.pipeline import quantize
    from bitassay.verify.prove import prove
    from bitassay.verify.verdict import verify

# `quantize`, `evaluate` and `verify` are folders too: their `__init__.py` makes the package itself callable.
_HOME = {
    "load": "bitassay.models.load",
    "prove": "bitassay.verify.prove",
    "quantize": "bitassay.quantize",
    "evaluate": "bitassay.evaluate",
    "verify": "bitassay.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bitassay' has no attribute {name!r}")
    module = import_module(_HOME[name])
    return module if module.__name__ == f"bitassay.{name}" else getattr(module, name)


def _callable_package(package: str, function: str) -> None:
    """Let `package(...)` call `function` ("module:name"), which is imported at the first call."""
    import sys

    module_name, attribute = function.split(":")

    class CallablePackage(type(sys)):
        def __call__(self, *args, **kwargs):
            return getattr(import_module(module_name), attribute)(*args, **kwargs)

    sys.modules[package].__class__ = CallablePackage
