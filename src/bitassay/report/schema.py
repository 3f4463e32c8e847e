"""What a run.json must hold before anything is drawn from it. A run folder may come from anyone, so sizes,
types and everything that the page names are checked."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bitassay.errors import BitassayError
from bitassay.record.files import read_json

MAX_ROWS = 1000
MAX_LAYERS = 1000

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Distance = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=2**63)]
Pair = tuple[Finite, Finite]
Text = Annotated[str, Field(max_length=10_000)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Described(BaseModel):
    """A part with fields that the page needs and any number of others, which it lists as they are."""

    model_config = ConfigDict(frozen=True, extra="allow")


class Row(_Part):
    """One model of an assay; intervals are 95 %. Distances by layer belong to `verification.layers`."""

    recipe: Annotated[str, Field(min_length=1, max_length=64)]
    recipe_id: Text | None = None
    bits_per_weight: Finite
    size_bytes: Count
    ppl: Positive
    ppl_ci: Pair | None = None
    ppl_delta: Finite
    ppl_delta_ci: Pair | None = None
    kl_mean: Finite
    kl_ci: Pair | None = None
    kl_median: Finite | None = None
    kl_p99: Finite | None = None
    top1_agreement: Fraction
    top1_ci: Pair | None = None
    prefill_tok_s: Positive | None = None
    decode_tok_s: Positive | None = None
    prefill_spread: Finite | None = None
    decode_spread: Finite | None = None
    hidden_distance: Distance | None = None
    hidden_distance_by_layer: list[Distance] | None = None
    hidden_distance_range_by_layer: list[tuple[Distance, Distance]] | None = None
    verdict: Literal["PASS", "FAIL", "INCONCLUSIVE"] | None = None
    traces_passed: Count | None = None
    traces: Count | None = None
    p_value: Fraction | None = None


class Model(_Described):
    name: Text
    origin: Text


class Protocol(_Described):
    id: Text
    windows: Count
    predicted_tokens: Count
    interval: Text


class Verification(_Described):
    """How verdicts were reached. `layers`: after which decoder layers hidden states were compared; none where
    verification did not come about, and then `reason` says why."""

    layers: Annotated[list[Count], Field(max_length=MAX_LAYERS)] = []
    reason: Text | None = None


class AssayRun(_Part):
    """The content of run.json. The first row is the unquantized model."""

    schema_: Literal[1] = Field(alias="schema")
    kind: Literal["assay"]
    run_id: Text
    created: Text
    model: Model
    protocol: Protocol
    recipes: dict[Text, dict[Text, Any]]
    verification: Verification | None = None
    environment: dict[Text, Any]
    seconds: dict[Text, Finite] = {}
    rows: Annotated[list[Row], Field(min_length=1, max_length=MAX_ROWS)]

    @model_validator(mode="after")
    def _one_distance_for_each_layer(self) -> "AssayRun":
        if self.verification and not self.verification.layers and self.verification.reason is None:
            raise ValueError("verification has neither layers nor a reason why not")
        layers = len(self.verification.layers) if self.verification else 0
        for row in self.rows:
            for found in (row.hidden_distance_by_layer, row.hidden_distance_range_by_layer):
                if found is not None and len(found) != layers:
                    raise ValueError(f"row {row.recipe!r} has {len(found)} distances for {layers} layers")
        return self


def parse_run(value: object, where: str) -> AssayRun:
    """Raises BitassayError that names the first defects of a value that is not an assay."""
    try:
        return AssayRun.model_validate(value)
    except ValidationError as error:
        defects = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'run'}: {e['msg']}" for e in error.errors()[:3]
        )
        raise BitassayError(
            f"{where}: not a run of `bitassay assay`: {defects}", "run the assay again"
        ) from error


def read_run(folder: Path) -> AssayRun:
    """The run of a folder (or of a run.json)."""
    path = folder / "run.json" if folder.is_dir() else folder
    if folder.is_dir() and not path.exists():
        raise BitassayError(
            f"{folder}: no run.json, so the run is not finished", "run the same assay again: it goes on"
        )
    return parse_run(read_json(path), str(path))
