"""Fixtures that several folders use."""

import importlib.util
import signal
import sys
from functools import cache
from pathlib import Path

import pytest

from bitassay.quantization import pipeline
from bitassay.quantization.recipe.calibration import calibration_tokens
from bitassay.studies import machines
from bitassay.testing.tiny import stories260k

# A shell starts background jobs with interrupts ignored, and children inherit that; tests send them some.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def stories():
    """The tiny trained model in fp32; tests must not change it."""
    return stories260k()


@pytest.fixture(scope="session")
def benchmark():
    """A script of `benchmarks/` as a module, by its name."""
    made = []

    def imported(name):
        path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"bitassay_{name}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        made.append(spec.name)
        spec.loader.exec_module(module)
        return module

    yield imported
    for name in made:
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def many_prompts():
    """As many short prompts as calibrating a verifier takes."""
    words = ["a", "the", "big", "cat", "dog", "sun", "red", "hat", "boy", "girl", "saw", "ran", "sat", "ate"]
    return [f"{first} {second} a" for first in words[:4] for second in words]


@cache
def _calibration_text(spec):
    return calibration_tokens(stories260k(), spec)


@pytest.fixture
def text_read_once(monkeypatch):
    """Calibration text, which takes longer to tokenize than these models to quantize, is read once."""
    monkeypatch.setattr(pipeline, "calibration_tokens", lambda model, spec: _calibration_text(spec))


@pytest.fixture
def really_tried():
    """Whoever asks for this has numerics tried on this machine."""


@pytest.fixture(autouse=True)
def _numerics_run(request, monkeypatch):
    """Numerics are not tried: that takes a process for each, and depends on the machine."""
    if "really_tried" not in request.fixturenames:
        monkeypatch.setattr(machines, "probe_here", lambda machine, dtype: "")
        monkeypatch.setattr(machines, "_probe_in_process", lambda machine, dtype: "")
