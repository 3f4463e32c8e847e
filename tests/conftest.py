"""Fixtures that several folders use."""

import gzip
import importlib.util
import signal
import sys
import zlib
from functools import cache
from pathlib import Path

import hypothesis
import pytest

# What is imported under jaxtyping's import hook, as by a module of bitassay, is compiled anew.
import scipy.stats  # noqa: F401
import torch  # noqa: F401
from compressed_tensors.quantization import QuantizationConfig  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

from bitassay.data import windows
from bitassay.data.corpora import bundled_file
from bitassay.studies import machines
from bitassay.testing.tiny import stories260k

# On a busy machine any example may be slow.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")

# A shell starts background jobs with interrupts ignored, and children inherit that; tests send them some.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Mark as slow what `sample(n)` leaves out: all but the n cases that a digest of their names puts first. Tests
    of real models, which are the longest, come first, so that none is left alone at the end."""
    sampled: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sample"):
            sampled.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in sampled.values():
        kept = cases[0].get_closest_marker("sample").args[0]
        for item in sorted(cases, key=lambda item: zlib.crc32(item.nodeid.encode()))[kept:]:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("real") is None)


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
def short_texts(tmp_path_factory):
    """A folder for BITASSAY_DATA with the beginnings of the bundled texts, which are tokenized in no time."""
    folder = tmp_path_factory.mktemp("texts")
    for name, path, lines in (
        ("wikitext2-test.raw.gz", "wikitext2/wiki.test.raw.gz", 100),
        ("c4-train-1000.jsonl.gz", "c4/c4_en_train_first1000.jsonl.gz", 60),
    ):
        text = gzip.decompress(bundled_file(name)[0].read_bytes()).decode()
        (folder / path).parent.mkdir()
        (folder / path).write_bytes(gzip.compress("".join(text.splitlines(True)[:lines]).encode()))
    return folder


@pytest.fixture(scope="session")
def many_prompts():
    """As many short prompts as calibrating a verifier takes."""
    words = ["a", "the", "big", "cat", "dog", "sun", "red", "hat", "boy", "girl", "saw", "ran", "sat", "ate"]
    return [f"{first} {second} a" for first in words[:4] for second in words]


@pytest.fixture(scope="session", autouse=True)
def _texts_tokenized_once():
    """A text takes longer to tokenize than these models to quantize, and each load has a tokenizer anew: those
    that say the same of themselves share its tokens."""
    tokenize, known = windows._token_ids, {}

    @cache
    def token_ids(tokenizer, vocabulary, text):
        key = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer, text
        if key not in known:
            known[key] = tokenize(tokenizer, vocabulary, text)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "_token_ids", token_ids)
        yield


@pytest.fixture
def really_tried():
    """Whoever asks for this has numerics tried on this machine."""


@pytest.fixture(autouse=True)
def _numerics_run(request, monkeypatch):
    """Numerics are not tried: that takes a process for each, and depends on the machine."""
    if "really_tried" not in request.fixturenames:
        monkeypatch.setattr(machines, "probe_here", lambda machine, dtype: "")
        monkeypatch.setattr(machines, "_probe_in_process", lambda machine, dtype: "")
