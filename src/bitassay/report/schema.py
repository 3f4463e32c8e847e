"""What a run.json must hold before anything is drawn from it. A run folder may come from anyone, so sizes and types are checked."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitassay.errors import BitassayError
from bitassay.record.files import read_json

Finite = Annotated[float, Field(allow_inf_nan=False)]
Pair = tuple[Finite, Finite] | None
Text = Annotated[str, Field(max_length=10_000)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Row(_Part):
    """One model of an assay; intervals are 95 %."""

    recipe: Annotated[str, Field(max_length=64)]
    recipe_id: str | None = None
    bits_per_weight: Finite
    size_bytes: int
    ppl: Finite
    ppl_ci: Pair = None
    ppl_delta: Finite
    ppl_delta_ci: Pair = None
    kl_mean: Finite
    kl_ci: Pair = None
    kl_p99: Finite | None = None
    top1_agreement: Finite
    top1_ci: Pair = None
    prefill_tok_s: Finite | None = None
    decode_tok_s: Finite | None = None
    hidden_distance: Finite | None = None
    hidden_distance_by_layer: list[Finite] | None = None
    hidden_distance_range_by_layer: list[tuple[Finite, Finite]] | None = None
    verdict: Literal["PASS", "FAIL", "INCONCLUSIVE"] | None = None
    traces_passed: int | None = None
    traces: int | None = None
    p_value: Finite | None = None


class AssayRun(_Part):
    """The content of run.json; what is free-form (model, protocol, recipes, environment) is shown as it is."""

    schema_: Literal[1] = Field(alias="schema")
    kind: Literal["assay"]
    run_id: Text
    created: Text
    model: dict
    protocol: dict
    recipes: dict[str, dict]
    verification: dict | None = None
    environment: dict
    seconds: dict[str, Finite] = {}
    rows: Annotated[list[Row], Field(min_length=1, max_length=1000)]


def parse_run(value: object, where: str) -> AssayRun:
    """Raises BitassayError that names the first defects of a value that is not an assay."""
    try:
        return AssayRun.model_validate(value)
    except ValidationError as error:
        defects = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
        raise BitassayError(f"{where}: not a run of `bitassay assay`: {defects}", "run the assay again") from error


def read_run(folder: Path) -> AssayRun:
    """The run of a folder (or of a run.json)."""
    path = folder / "run.json" if folder.is_dir() else folder
    if folder.is_dir() and not path.exists():
        raise BitassayError(f"{folder}: no run.json, so the run is not finished", "run the same assay again: it goes on")
    return parse_run(read_json(path), str(path))
