"""The trace: what a prover claims (the header) and shows (hidden states), and how it travels.

A trace is one safetensors file. Its `__metadata__` has one entry, `bitassay`: the header as JSON text. Its
tensors are `layer.<n>`, one for each sampled decoder layer, `[positions, hidden]` in the declared dtype,
before the final norm for the last layer.

A trace is untrusted. `read_trace` looks at sizes before it allocates, at the header before the tensors, and
refuses every defect with a TraceError that has a short code. What it returns is consistent in itself; whether
it fits the verifier's model is for `structure.py` to say.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
from jaxtyping import Float
from pydantic import AfterValidator, Field, ValidationError, model_serializer, model_validator
from torch import Tensor

from bitassay.engines.sampling import Sampler
from bitassay.errors import BitassayError
from bitassay.models.identity import Identity
from bitassay.record.files import write_bytes
from bitassay.record.hashing import canonical_json
from bitassay.record.schema import StrictFields
from bitassay.record.text import check_line, one_line
from bitassay.verification.container import (
    FILE_BYTES,
    HEADER_KEY,
    UNEXPECTED_BYTES,
    Entry,
    TraceError,
    first_defect,
    is_version,
    open_regular,
    read_tensors,
)
from bitassay.verification.numerics import STATE_DTYPES, Numerics

SCHEMA_VERSION = 1
TOKENS = 2**18
LAYERS = 1024
HIDDEN = 2**16

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Version = Annotated[int, Field(ge=1, le=1)]  # as an int, 1 alone: a literal would take true and 1.0, too
_Index = Annotated[int, Field(ge=0, lt=2**31)]


class ModelClaim(StrictFields):
    """Which model the prover says it ran. config_digest: of what the files beside the weights say
    (`models/config.py`); None in what was written before there was one, where it is left out."""

    name: Annotated[str, Field(max_length=512), AfterValidator(check_line)]
    weights_digest: Digest
    tokenizer_digest: Digest
    recipe_id: Digest | None
    config_digest: Digest | None = None

    @classmethod
    def of(cls, identity: Identity) -> "ModelClaim":
        return cls(
            name=one_line(identity.name),
            weights_digest=identity.weights_digest,
            tokenizer_digest=identity.tokenizer_digest,
            recipe_id=identity.recipe_id,
            config_digest=identity.config_digest,
        )

    @model_serializer(mode="wrap")
    def _as_written(self, usual: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Without a configuration where there is none: what was signed without one keeps its digest."""
        written = usual(self)
        if self.config_digest is None:
            written.pop("config_digest", None)
        return written

    def is_same_model(self, other: "ModelClaim") -> bool:
        """Return whether both name one model, whatever they call it. A configuration counts where both have
        one."""
        exclude = {"name"}
        if None in (self.config_digest, other.config_digest):
            exclude.add("config_digest")
        return self.model_dump(exclude=exclude) == other.model_dump(exclude=exclude)


class Sampling(StrictFields):
    """How the prover says it chose tokens. Values are as in `generate.sampling.Sampler`."""

    sampler: Literal["greedy", "gumbel-max"]
    temperature: float = Field(ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(gt=0, le=1, allow_inf_nan=False)
    seed: int = Field(ge=0, lt=2**63)
    max_new_tokens: int = Field(ge=1, le=TOKENS)

    @classmethod
    def of(cls, sampler: Sampler, max_new_tokens: int) -> "Sampling":
        return cls(
            sampler=sampler.name,  # type: ignore[arg-type]
            temperature=float(sampler.temperature),
            top_p=float(sampler.top_p),
            seed=sampler.seed,
            max_new_tokens=max_new_tokens,
        )

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "Sampling":
        if self.sampler != self.to_sampler().name:
            raise ValueError(f"{self.sampler} at temperature {self.temperature} is a contradiction")
        return self

    @property
    def in_effect(self) -> "Sampling":
        """Return it without what changes nothing: seed and top-p where nothing is sampled."""
        return self.model_copy(update={"top_p": 1.0, "seed": 0}) if self.sampler == "greedy" else self

    def to_sampler(self) -> Sampler:
        return Sampler(self.temperature, self.top_p, self.seed)


NONCE = r"^[A-Za-z0-9._:-]*$"


def check_nonce(nonce: str) -> None:
    """Raise BitassayError for a nonce that no trace can hold."""
    if len(nonce) > 128 or not re.fullmatch(NONCE, nonce):
        raise BitassayError(
            f"the nonce {nonce!r:.60} is not one that a trace can hold",
            "nonces have up to 128 of A-Z a-z 0-9 . _ : -",
        )


class Header(StrictFields):
    """Everything in a trace but the states. `positions` are those of prompt and output but for the last
    token, from 0."""

    schema_version: Literal[1] = SCHEMA_VERSION
    model: ModelClaim
    numerics: Numerics
    sampling: Sampling
    nonce: str = Field(max_length=128, pattern=NONCE)
    prompt_ids: tuple[_Index, ...] = Field(min_length=1, max_length=TOKENS, strict=False)
    output_ids: tuple[_Index, ...] = Field(min_length=1, max_length=TOKENS, strict=False)
    layers: tuple[_Index, ...] = Field(min_length=1, max_length=LAYERS, strict=False)
    positions: tuple[_Index, ...] = Field(min_length=1, max_length=2 * TOKENS, strict=False)


@dataclass(frozen=True)
class Trace:
    """A header, and the states by layer in the declared dtype."""

    header: Header
    states: Mapping[int, Float[Tensor, "positions hidden"]]

    @property
    def n_tokens(self) -> int:
        """Return the number of output tokens, the end-of-text token included."""
        return len(self.header.output_ids)

    @property
    def n_prompt(self) -> int:
        """Return the number of prompt tokens."""
        return len(self.header.prompt_ids)


def tensor_name(layer: int) -> str:
    """Return what the tensor of a layer is called."""
    return f"layer.{layer}"


def write_trace(path: str | Path, trace: Trace) -> None:
    """Write `trace` to `path`, whole or not at all."""
    tensors = {tensor_name(layer): states.contiguous().clone() for layer, states in trace.states.items()}
    metadata = {HEADER_KEY: canonical_json(trace.header.model_dump(mode="json"))}
    write_bytes(path, safetensors.torch.save(tensors, metadata))


Expecting = Callable[[Header, int], None]
"""What a reader that knows more asks of header and hidden size before it reads a state; raises TraceError."""


def read_trace(
    path: str | Path, expecting: Expecting | None = None, *, limit_bytes: int | None = None
) -> Trace:
    """Read a trace that may come from anyone. Raises TraceError for each defect of the content, BitassayError
    where there is no file to read.

    expecting: `structure.expecting(model, request)` of a verifier, which refuses what does not fit before a
    state is read. limit_bytes: of the file; by default UNEXPECTED_BYTES where nothing is expected, else
    FILE_BYTES.
    """
    where = str(path)

    def check(content: Any, entries: dict[str, Entry]) -> Header:
        header = validate_header(content, where)
        _check_cells(header, entries, where)
        if expecting is not None:
            ((_, hidden), *_) = (shape for _, shape in entries.values())
            expecting(header, hidden)
        return header

    limit = limit_bytes or (UNEXPECTED_BYTES if expecting is None else FILE_BYTES)
    with open_regular(Path(path), limit) as stream:
        header, tensors = read_tensors(stream, Path(path), check)
    trace = Trace(header, {layer: tensors[tensor_name(layer)] for layer in header.layers})
    check_consistent(trace, where)
    return trace


def check_consistent(trace: Trace, where: str = "trace") -> None:
    """Raise the TraceError for the first way in which header and states do not fit together, or in which a
    state is not finite."""
    header = validate_header(trace.header.model_dump(), where)
    cells = {
        tensor_name(layer): (str(states.dtype).removeprefix("torch."), list(states.shape))
        for layer, states in trace.states.items()
    }
    _check_cells(header, cells, where)
    for layer, states in trace.states.items():
        if not states.isfinite().all():
            raise TraceError("not-finite", f"{where}: layer {layer} has NaN or infinity")


def validate_header(content: Any, where: str = "trace") -> Header:
    """Return the header in `content`, every field of it checked. Raises TraceError."""
    if isinstance(content, dict) and not is_version(content.get("schema_version"), SCHEMA_VERSION):
        version = f"{content.get('schema_version')!r:.40}"
        raise TraceError("schema-version", f"{where}: schema version {version}; this reads {SCHEMA_VERSION}")
    try:
        return Header.model_validate(content)
    except ValidationError as error:
        raise TraceError("header-field", f"{where}: header field {first_defect(error)}") from error


def _check_cells(header: Header, tensors: Mapping[str, Entry], where: str) -> None:
    """Raise the TraceError for the first way in which names, dtypes and shapes of a trace's tensors do not
    fit its header."""
    dtype = header.numerics.dtype
    if dtype not in STATE_DTYPES:
        raise TraceError("wrong-dtype", f"{where}: states in {dtype!r}; known are {', '.join(STATE_DTYPES)}")
    if len(set(header.layers)) != len(header.layers):
        raise TraceError("duplicate-layer", f"{where}: a layer is named twice in {header.layers}")
    names = {tensor_name(layer) for layer in header.layers}
    if missing := sorted(names - set(tensors)):
        raise TraceError("missing-layer", f"{where}: no tensor {missing[0]}, which the header names")
    if extra := sorted(set(tensors) - names):
        raise TraceError("extra-layer", f"{where}: a tensor {extra[0]!r:.80}, which the header does not name")
    hidden = {shape[-1] for _, shape in tensors.values() if len(shape) == 2}
    for name, (stored, shape) in tensors.items():
        if stored != dtype:
            raise TraceError("wrong-dtype", f"{where}: {name} is {stored:.20}, the header says {dtype}")
        rows = len(header.positions)
        if len(shape) != 2 or shape[0] != rows or not 0 < shape[1] <= HIDDEN or len(hidden) > 1:
            raise TraceError("wrong-shape", f"{where}: {name} is {shape!s:.60}, not [{rows}, hidden]")
