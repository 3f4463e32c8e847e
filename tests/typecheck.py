"""The run-time type checker of the tests: beartype, taking an int where a float is annotated, as Python's own
checkers do (PEP 484).

jaxtyping's import hook puts `jaxtyped` on every function, so that sizes of the same name agree within a call.
It binds the arguments and checks them twice, which takes most of the time of small models. Here beartype checks
each call once, and within a context of sizes of its own only where there are shapes.
"""

import dataclasses
import functools
import inspect
from typing import get_args

import jaxtyping
from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))
_jaxtyped = jaxtyping.jaxtyped


def _parts(annotation):
    """Yield the annotation and all that it is made of."""
    yield annotation
    for part in annotation if isinstance(annotation, list) else get_args(annotation):
        yield from _parts(part)


def _is_shape(annotation):
    return isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray)


def _with_sizes_of_its_own(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        with _jaxtyped("context"):
            return function(*args, **kwargs)

    return call


def _checked_once(*, typechecker):
    def decorate(decorated):
        if dataclasses.is_dataclass(decorated):
            decorated.__init__ = decorate(decorated.__init__)
        if isinstance(decorated, type):
            return decorated
        parts = [part for each in decorated.__annotations__.values() for part in _parts(each)]
        shaped = any(map(_is_shape, parts))
        # A name in quotes may not be defined yet, or never; beartype checks a generator when it is begun.
        if any(isinstance(part, str) for part in parts) or (
            shaped and inspect.isgeneratorfunction(decorated)
        ):
            return _jaxtyped(decorated, typechecker=typechecker)
        return _with_sizes_of_its_own(checked(decorated)) if shaped else checked(decorated)

    return decorate


# The hook imports this module when it decorates the first function, and looks `jaxtyped` up anew for the others.
jaxtyping.jaxtyped = _checked_once
