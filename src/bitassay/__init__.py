"""bitassay: fewer bits, known cost, provable identity for language models.

The Python API is six names, imported on first use so that `import bitassay` is instant:

    base = bitassay.load("smollm2-135m")
    w4 = bitassay.quantize(base, recipe="w4")       # or a bitassay.Recipe
    print(bitassay.evaluate(w4, against=base))
    trace = bitassay.prove(w4, "Why is the sky blue?")
    print(bitassay.verify(trace, base))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Recipe", "evaluate", "load", "prove", "quantize", "verify"]

if TYPE_CHECKING:
    from bitassay.engines.load import load
    from bitassay.evaluation.quality import evaluate
    from bitassay.quantization.pipeline import quantize
    from bitassay.quantization.recipe.recipe import Recipe
    from bitassay.verification.prove import prove
    from bitassay.verification.verify import verify

_HOME = {
    "Recipe": "bitassay.quantization.recipe.recipe",
    "evaluate": "bitassay.evaluation.quality",
    "load": "bitassay.engines.load",
    "prove": "bitassay.verification.prove",
    "quantize": "bitassay.quantization.pipeline",
    "verify": "bitassay.verification.verify",
}

if not TYPE_CHECKING:  # a type checker would take every name for one that there is

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'bitassay' has no attribute {name!r}")
        return getattr(import_module(_HOME[name]), name)

    def __dir__() -> list[str]:
        return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
