"""What a run.json must hold before anything is drawn from it. A run folder may come from anyone, so sizes,
types and everything that the page names are checked."""

from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bitassay.errors import BitassayError

MAX_ROWS = 1000
MAX_LAYERS = 1000

MOST = 1e200  # the axis of a picture needs room beyond

Finite = Annotated[float, Field(ge=-MOST, le=MOST, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=MOST, allow_inf_nan=False)]
Distance = Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=2**63)]
Pair = tuple[Finite, Finite]
Text = Annotated[str, Field(max_length=10_000)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Described(BaseModel):
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
    ppl_delta_visible: Distance | None = None
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


class Model(Described):
    name: Text
    origin: Text


class Protocol(Described):
    id: Text
    windows: Count
    predicted_tokens: Count
    interval: Text


class Verification(Described):
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
    pairs: Annotated[list["ControlPair"], Field(max_length=MAX_ROWS)] = []

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


class Measured(_Part):
    name: Text
    value: Finite
    interval: Pair | None = None


class ClaimRow(_Part):
    section: Text
    claim: Text
    expected: Text
    unit: Literal["points", "%", "perplexity", "nats of KL", "ratio"]
    measured: Annotated[list[Measured], Field(max_length=MAX_ROWS)]
    not_measured: Count
    verdict: Literal["supported", "not supported", "not decidable at this n"]


class Compared(Described):
    """Numbers and their intervals under any names, which only the columns of a table know."""

    __pydantic_extra__: dict[str, int | Finite | Pair | bool | Text | None]  # type: ignore[reportIncompatibleVariableOverride]


class VariantRow(Compared):
    variant: Annotated[str, Field(min_length=1, max_length=64)]
    format: Text | None
    granularity: Text | None
    kind: Literal["fake", "real"] | None
    refused: Text | None = None
    kl_mean: Distance | None = None
    kl_ci: Pair | None = None
    ppl_delta: Finite | None = None
    ppl_delta_ci: Pair | None = None
    direct_acc: Fraction | None = None
    direct_acc_ci: Pair | None = None
    generate_acc: Fraction | None = None
    generate_acc_ci: Pair | None = None

    @model_validator(mode="after")
    def _measured_or_refused(self) -> "VariantRow":
        for name in ("direct_acc", "direct_acc_ci", "generate_acc", "generate_acc_ci"):
            if self.refused is None and getattr(self, name) is None:
                raise ValueError(f"{self.variant} was run, but has no {name}")
        if (self.kl_mean is None) != (self.ppl_delta is None):
            raise ValueError(f"{self.variant} has one of kl_mean and ppl_delta only")
        return self


class PairRow(Compared):
    family: Text
    first: Text
    second: Text
    direct_difference: Finite
    direct_p_holm: Fraction
    generate_difference: Finite
    generate_p_holm: Fraction


class Table(Described):
    rows: Annotated[list[dict[Text, Any]], Field(max_length=MAX_ROWS)]


class QuestionProtocols(_Part):
    text: Text | None
    questions: Text
    questions_source: Text


class _StudyRun(_Part):
    """What run.json of every study of variants holds."""

    schema_: Literal[1] = Field(alias="schema")
    study: Text
    about: Text
    run_id: Text
    created: Text
    model: Model
    settings: dict[Text, Any]
    interval: Text
    claims: Annotated[list[ClaimRow], Field(max_length=MAX_ROWS)]
    environment: dict[Text, Any]


class EightBitRun(_StudyRun):
    """The content of run.json of an INT8/FP8 study. The first row is the model in BF16."""

    kind: Literal["eight-bit"]
    protocols: QuestionProtocols
    rows: Annotated[list[VariantRow], Field(min_length=1, max_length=MAX_ROWS)]
    pairs: Annotated[list[PairRow], Field(max_length=MAX_ROWS)]
    uneven_groups: dict[Text, list[Count]]
    speed: Table | None = None
    products: Table | None = None

    @model_validator(mode="after")
    def _text_of_all_or_none(self) -> "EightBitRun":
        if len({row.kl_mean is None for row in self.rows if row.refused is None}) > 1:
            raise ValueError("some rows have a kl_mean, others have none")
        return self


class ReplicationRow(Compared):
    """controls: the kinds that there are of a replica; none of another row."""

    group: Annotated[str, Field(min_length=1, max_length=64)]
    role: Text
    variant: Text
    controls: list[Text]
    beats_single: bool | None
    beats_rescaled: bool | None = None
    beats_equal_bits: bool | None
    beats_equal_flops: bool | None
    bits_per_weight: Finite
    size_bytes: Count
    flop_per_token: Positive
    bytes_per_token: Positive
    kl_mean: Distance
    kl_ci: Pair | None = None


class ControlPair(Compared):
    group: Text
    role: Text
    control: Text
    kl: Finite
    ppl: Finite
    beats: bool | None
    read_ratio: Positive | None = None
    decode_tok_s: Positive | None = None
    control_decode_tok_s: Positive | None = None


class DraftRow(Compared):
    draft_tokens: Count
    texts: Count
    identical: Count
    acceptance: Fraction
    speed_bound: Positive
    speed: Positive


class ReplicationRun(_StudyRun):
    """The content of run.json of a study of replication. The first row is the base model."""

    kind: Literal["replication"]
    protocol: Text
    corpus_source: Text
    rows: Annotated[list[ReplicationRow], Field(min_length=1, max_length=MAX_ROWS)]
    pairs: Annotated[list[ControlPair], Field(max_length=MAX_ROWS)]
    drafts: Annotated[list[DraftRow], Field(max_length=MAX_ROWS)]


Kind = TypeVar("Kind", bound=BaseModel)


def parse_run(value: object, where: str) -> AssayRun:
    """Raises BitassayError that names the first defects of a value that is not an assay."""
    return parsed(AssayRun, value, where)


def parse_study(value: object, where: str) -> EightBitRun:
    """The same of an INT8/FP8 study."""
    return parsed(EightBitRun, value, where)


def parse_replication(value: object, where: str) -> ReplicationRun:
    """The same of a study of replication."""
    return parsed(ReplicationRun, value, where)


def parsed(kind: type[Kind], value: object, where: str) -> Kind:
    """`value` as a run of a kind. Raises BitassayError that names its first defects."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        found = "; ".join(map(_defect, error.errors(include_url=False)[:3]))
        (name,) = get_args(kind.model_fields["kind"].annotation)
        raise BitassayError(
            f"{where}: not a run of kind {name!r} as this version writes it: {found}",
            "run the same command again",
        ) from error


def _defect(error: Any) -> str:
    """In plain words: `rows.0.ppl is -1, not above 0`."""
    place = ".".join(str(part) for part in error["loc"] if part not in _MARKS) or "it"
    if error["type"] == "missing":
        return f"{place} is missing"
    if error["type"] == "value_error":
        return f"{error['ctx']['error']}"
    wanted = next(
        (text for kind, text in _WANTED.items() if error["type"].startswith(kind)), "not valid here"
    )
    return f"{place} is {_shown(error['input'])}, {wanted.format(**error.get('ctx', {}))}"


_MARKS = ("int", "float", "bool", "str", "constrained-str", "nullable")  # of the members of a union
_WANTED = {
    "finite_number": "not a finite number",
    "greater_than_equal": "below {ge}",
    "greater_than": "not above {gt}",
    "less_than_equal": "above {le}",
    "int": "not a whole number",
    "float": "not a number",
    "bool": "not true or false",
    "string_too_long": "longer than {max_length} characters",
    "string_too_short": "shorter than {min_length} characters",
    "string": "not text",
    "too_long": "longer than {max_length}",
    "too_short": "shorter than {min_length}",
    "list": "not a list",
    "tuple": "not a pair",
    "dict": "not an object",
    "model": "not an object",
    "literal": "not {expected}",
    "union": "not one of the known kinds",
}


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
