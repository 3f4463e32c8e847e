"""bitassay: fewer bits, known cost, provable identity for language models.

The Python API is six names, imported on first use so that `import bitassay` is instant:

    base = bitassay.load("smollm2-135m")
    w4 = bitassay.quantize(base, recipe="w4")       # or a bitassay.Recipe
    print(bitassay.evaluate(w4, against=base))
    trace = bitassay.prove(w4, "Why is the sky blue?")
    print(bitassay.verify(trace, base))
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Recipe", "evaluate", "load", "prove", "quantize", "verify"]

if TYPE_CHECKING:
    from bitassay.evaluate.compare import evaluate
    from bitassay.models.load import load
    from bitassay.quantize.pipeline import quantize
    from bitassay.quantize.recipe import Recipe
    from bitassay.verify.prove import prove
    from bitassay.verify.verdict import verify

# `quantize`, `evaluate` and `verify` are folders too: their `__init__.py` makes the package itself callable.
_HOME = {
    "Recipe": "bitassay.quantize.recipe",
    "load": "bitassay.models.load",
    "prove": "bitassay.verify.prove",
    "quantize": "bitassay.quantize",
    "evaluate": "bitassay.evaluate",
    "verify": "bitassay.verify",
}


if not TYPE_CHECKING:  # a type checker would take every name for one that there is

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'bitassay' has no attribute {name!r}")
        module = import_module(_HOME[name])
        return module if module.__name__ == f"bitassay.{name}" else getattr(module, name)

    def __dir__() -> list[str]:
        return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def _callable_package(package: str, function: str) -> None:
    """Let `package(...)` call `function` ("module:name"), which is imported at the first call; signature and
    help are the function's, and the package can be pickled."""
    module_name, attribute = function.split(":")

    def called() -> Any:
        return getattr(import_module(module_name), attribute)

    class CallablePackage(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return called()(*args, **kwargs)

        @property
        def __wrapped__(self) -> Any:  # where `inspect.signature` looks
            return called()

        @property
        def __doc__(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
            import inspect

            return f"{attribute}{inspect.signature(called())}\n\n{inspect.getdoc(called())}"

        def __reduce__(self) -> tuple[Any, ...]:
            return import_module, (package,)

    sys.modules[package].__class__ = CallablePackage
