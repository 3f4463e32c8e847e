"""The numerics fingerprint: what decides the last bits of a forward pass besides the weights.

Two runs of the same model with equal fingerprints are assumed to differ by no more than honest runs do, so a
calibration profile belongs to one pair of them. A prover *declares* its own; a false declaration gains it
nothing but a profile that the verifier already trusts.
"""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field, model_serializer
from transformers import PreTrainedModel

from bitassay.engines.engine import engine_of
from bitassay.models.options import DTYPES
from bitassay.record.schema import StrictFields

STATE_DTYPES = {name: DTYPES[name] for name in ("float32", "float16", "bfloat16")}


_PRINTABLE = r"^[ -~]*$"
_Word = Annotated[str, Field(max_length=16, pattern=_PRINTABLE)]
_Name = Annotated[str, Field(max_length=32, pattern=_PRINTABLE)]
_Label = Annotated[str, Field(max_length=64, pattern=_PRINTABLE)]
_Count = Annotated[int, Field(ge=1, le=2**16)]


class Numerics(StrictFields):
    """kv_dtype: of cached keys and values, or how they are packed, such as int4/g32/asymmetric/bfloat16.
    device is its type (cpu, cuda, mps); threads and cpu_capability are those of PyTorch.

    What may be left out (None) says more where it is known: gpu, the model of the device; driver, its
    version; batch, the most requests that are computed together; tensor_parallel, over how many devices;
    engine and engine_version, where another engine than transformers computes. Left out, it is written
    nowhere, so that what was signed without these fields keeps its digest.
    """

    dtype: _Word
    kv_dtype: _Label
    attention: _Label
    device: _Word
    threads: _Count
    cpu_capability: _Name
    torch: _Label
    transformers: _Label
    gpu: _Label | None = None
    driver: _Label | None = None
    batch: _Count | None = None
    tensor_parallel: _Count | None = None
    engine: _Label | None = None
    engine_version: _Label | None = None

    @model_serializer(mode="wrap")
    def _as_written(self, usual: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in usual(self).items() if value is not None}

    def __str__(self) -> str:
        where = f"{self.cpu_capability}, {self.threads} threads" if self.device == "cpu" else self.device
        said = f"{self.dtype} {self.attention} on {self.gpu or where}, torch {self.torch}"
        named = {
            "driver": self.driver,
            "batch": self.batch,
            "tensor parallel": self.tensor_parallel,
            "engine": " ".join(filter(None, (self.engine, self.engine_version))),
        }
        return ", ".join([said, *(f"{name} {value}" for name, value in named.items() if value)])


def numerics(model: PreTrainedModel) -> Numerics:
    """Return the fingerprint of `model` where and as it would run now."""
    return Numerics(**engine_of(model).numerics())
