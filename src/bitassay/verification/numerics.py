"""The numerics fingerprint: what decides the last bits of a forward pass besides the weights.

Two runs of the same model with equal fingerprints are assumed to differ by no more than honest runs do, so a
calibration profile belongs to one pair of them. A prover *declares* its own; a false declaration gains it
nothing but a profile that the verifier already trusts.
"""

from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel

from bitassay.engines.engine import engine_of
from bitassay.models.options import DTYPES

STATE_DTYPES = {name: DTYPES[name] for name in ("float32", "float16", "bfloat16")}


class Numerics(BaseModel):
    """kv_dtype: of cached keys and values, or how they are packed, such as int4/g32/asymmetric/bfloat16.
    device is its type (cpu, cuda, mps); threads and cpu_capability are those of PyTorch."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dtype: str = Field(max_length=16)
    kv_dtype: str = Field(max_length=64)
    attention: str = Field(max_length=64)
    device: str = Field(max_length=16)
    threads: int = Field(ge=1, le=2**16)
    cpu_capability: str = Field(max_length=32)
    torch: str = Field(max_length=64)
    transformers: str = Field(max_length=64)

    def __str__(self) -> str:
        where = f"{self.cpu_capability}, {self.threads} threads" if self.device == "cpu" else self.device
        return f"{self.dtype} {self.attention} on {where}, torch {self.torch}"


def numerics(model: PreTrainedModel) -> Numerics:
    """Return the fingerprint of `model` where and as it would run now."""
    return Numerics(**engine_of(model).numerics())
