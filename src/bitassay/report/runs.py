"""What run.json of the other kinds must hold before a page is drawn from it (`schema.py` has assays, INT8/FP8
and replication): what pictures and paragraphs use. The cells of tables are numbers, text or intervals under
any names; a column refuses what it cannot show (`tables.py`)."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bitassay.report.schema import (
    MAX_LAYERS,
    MAX_ROWS,
    Compared,
    Count,
    Described,
    Distance,
    Finite,
    Fraction,
    Pair,
    Positive,
    Text,
)

MANY = 100_000  # trials, prompts, matrices
LongText = Annotated[str, Field(max_length=1_000_000)]
Rows = Annotated[list[Compared], Field(max_length=MAX_ROWS)]


class Run(Described):
    schema_: Literal[1] = Field(alias="schema")
    created: Text


class Named(Described):
    name: Text


class BenchSettings(Described):
    repeats: Count
    prompt_tokens: Count
    new_tokens: Count


class BenchMachine(Described):
    bandwidth: Positive
    peaks: Annotated[dict[Text, Positive], Field(min_length=1)]
    load: Annotated[list[Distance], Field(min_length=1)]


class BenchEnvironment(Described):
    threads: Count
    cores: Count


class BenchRow(Compared):
    model: Text
    kind: Text
    batch: Annotated[int, Field(ge=1, le=2**63)]
    prompt_tokens: Annotated[int, Field(ge=1, le=2**63)]
    skipped: Text | None = None
    ttft_s: Positive | None = None
    decode_tok_s: Positive | None = None
    prefill_tok_s: Positive | None = None
    prefill_flop: Positive | None = None
    decode_flop: Positive | None = None
    prefill_flop_per_byte: Positive | None = None
    decode_flop_per_byte: Positive | None = None
    cache_bytes: Distance | None = None

    @model_validator(mode="after")
    def _timed_or_skipped(self) -> "BenchRow":
        if self.skipped is None:
            for name in (*TIMED, "cache_bytes"):
                if getattr(self, name) is None:
                    raise ValueError(f"{self.model} was not skipped, but has no {name}")
        return self


TIMED = [name for name in BenchRow.model_fields if name.startswith(("ttft", "decode", "prefill"))]


class BenchRun(Run):
    """Of `bitassay bench`."""

    kind: Literal["bench"]
    model: Named
    settings: BenchSettings
    interval: Text
    machine: BenchMachine
    environment: BenchEnvironment
    models: Rows
    rows: Annotated[list[BenchRow], Field(max_length=MAX_ROWS)]
    pairs: Rows


class MatmulSettings(Described):
    draws: Count


class MatmulRun(Run):
    """Of `bitassay bench matmul --format json`."""

    created: Text = ""
    kind: Literal["matmul"]
    settings: MatmulSettings
    interval: Text
    environment: dict[Text, Any]
    rows: Rows


class Written(Described):
    """A text; `prefix`: its beginning that is the base model's too."""

    text: LongText
    tokens: Count
    prefix_tokens: Count
    prefix: LongText


class GenerationSettings(Described):
    max_new_tokens: Annotated[int, Field(ge=1, le=1_000_000)]
    dtype: Text
    batch: Count


class GenerationRow(Compared):
    recipe: Text
    bleu_signature: Text


class GenerationRun(Run):
    """Of `bitassay generate`. The first texts are the base model's."""

    kind: Literal["generation"]
    run_id: Text
    model: Named
    settings: GenerationSettings
    interval: Text
    prompts: Annotated[list[LongText], Field(min_length=1, max_length=MANY)]
    texts: Annotated[dict[Text, list[Written]], Field(min_length=1, max_length=MAX_ROWS)]
    rows: Annotated[list[GenerationRow], Field(min_length=1, max_length=MAX_ROWS)]

    @model_validator(mode="after")
    def _one_text_for_each_prompt(self) -> "GenerationRun":
        for name, texts in self.texts.items():
            if len(texts) != len(self.prompts):
                raise ValueError(f"{name} has {len(texts)} texts for {len(self.prompts)} prompts")
        return self


class TaskRow(Compared):
    protocol: Text
    metric: Text
    model: Text
    n: Count


class TasksRun(Run):
    """Of `bitassay eval --tasks`."""

    kind: Literal["tasks"]
    run_id: Text
    models: Annotated[dict[Text, dict[Text, Any]], Field(min_length=1)]
    protocols: dict[Text, Described]
    interval: Text
    test: Text
    visible_difference: Text
    versions: dict[Text, Any]
    environment: dict[Text, Any] | None
    rows: Annotated[list[TaskRow], Field(max_length=MANY)]


class AttackRow(Described):
    attack: Text
    detector: Text
    sees: Literal["all", "some", "nothing"]
    auc: Fraction
    tpr_at_1pct_fpr: Fraction
    tpr_ci: Pair
    tokens_to_99: Count | None


class AttackCost(Described):
    detector: Text
    sampler: Text
    bytes_per_token: Finite
    seconds_per_token: Finite
    prefill_seconds_per_token: Finite
    prover_seconds_per_token: Finite


class HonestRow(Described):
    numerics: Text
    detector: Text
    refused: Count
    n: Count
    false_positive_rate: Fraction
    false_positive_ci: Pair


class AttackRun(Run):
    """Of `bitassay attack`."""

    kind: Literal["attack"]
    run_id: Text
    model: Named
    tokens: Count
    alpha: Fraction
    sequences: Count
    timed: Count
    rows: Annotated[list[AttackRow], Field(max_length=MANY)]
    costs: Annotated[list[AttackCost], Field(max_length=MAX_ROWS)]
    honest: Annotated[list[HonestRow], Field(max_length=MANY)]
    about: dict[Text, Text]
    numerics_pooled: dict[Text, Text]

    @model_validator(mode="after")
    def _a_cell_for_each_attack_and_detector(self) -> "AttackRun":
        detectors = {row.detector for row in self.rows}
        for attack in {row.attack for row in self.rows}:
            if attack not in self.about:
                raise ValueError(f"nothing is said about the attack {attack}")
            if lacking := detectors - {row.detector for row in self.rows if row.attack == attack}:
                raise ValueError(f"{attack} has no row of {min(lacking)}")
        return self


class Missing(Described):
    study: Text
    missing: Text


class StudyPart(Run):
    model: Text
    missing: Annotated[list[Missing], Field(default_factory=list, max_length=MAX_ROWS)]


class Detected(Described):
    avg_accept_rate: Fraction


class ExperimentRow(Described):
    study: Text
    prover: Text
    verifier: Text
    expected: Pair
    avg_accept_rate: Fraction
    accept_rate_ci: Pair | None
    refused: dict[Text, Text]
    detection: dict[Text, Detected]


class ExperimentsRun(StudyPart):
    """Of `bitassay study run exp1` to exp5."""

    kind: Literal["experiments"]
    rows: Annotated[list[ExperimentRow], Field(max_length=MAX_ROWS)]


class SeparabilityRow(Described):
    prover: Text
    verifier: Text
    honest: bool
    tpr_at_fpr: Fraction | None

    @model_validator(mode="after")
    def _a_rate_for_what_is_not_honest(self) -> "SeparabilityRow":
        if not self.honest and self.tpr_at_fpr is None:
            raise ValueError(f"{self.prover} has no tpr_at_fpr")
        return self


class SeparabilityRun(StudyPart):
    """Of `bitassay study run separability`."""

    kind: Literal["separability"]
    trials: Count
    tokens: Count
    alpha: Fraction
    rows: Annotated[list[SeparabilityRow], Field(max_length=MAX_ROWS)]


class Histogram(Described):
    counts: Annotated[list[Count], Field(min_length=1, max_length=MAX_ROWS)]
    edges: Annotated[list[Finite], Field(min_length=2, max_length=MAX_ROWS)]

    @model_validator(mode="after")
    def _an_edge_more_than_counts(self) -> "Histogram":
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError(f"a histogram of {len(self.counts)} counts has {len(self.edges)} edges")
        return self


class Distribution(Described):
    n: Count
    histogram: Histogram | None = None

    @model_validator(mode="after")
    def _a_histogram_of_what_there_is(self) -> "Distribution":
        if self.n and self.histogram is None:
            raise ValueError(f"a distribution of {self.n} values has no histogram")
        return self


class Distributions(Described):
    Pe: Distribution
    Pm: Distribution
    Pw: Distribution
    mean_error: Distribution
    accept_rate: Distribution


class Thresholds(Described):
    Pe: Finite
    Pm: Finite
    Pw: Finite
    mean_epsilon: Finite
    accept_rate_min: Finite


class Caught(Described):
    caught: Fraction
    caught_by_distance: Fraction


class ThresholdRow(Described):
    study: Text
    direction: Text
    thresholds: Thresholds
    false_positive_rate: Fraction
    false_positive_ci: Pair
    attacks: dict[Text, Caught]
    distributions: Annotated[dict[Text, Distributions], Field(max_length=MAX_ROWS)]


class ThresholdsRun(StudyPart):
    """Of `bitassay calibrate --study`."""

    kind: Literal["thresholds"]
    rows: Annotated[list[ThresholdRow], Field(max_length=MAX_ROWS)]


StudyRun = Annotated[ExperimentsRun | SeparabilityRun | ThresholdsRun, Field(discriminator="kind")]


class StudiesRun(Described):
    """Of one `bitassay study run`, which may be of several."""

    schema_: Literal[1] = Field(alias="schema")
    kind: Literal["studies"]
    runs: Annotated[list[StudyRun], Field(min_length=1, max_length=MAX_ROWS)]


class Space(Described):
    name: Text
    parameters: dict[Text, Any]


class SearchSettings(Described):
    objectives: Annotated[list[Text], Field(min_length=1, max_length=100)]
    space: Space
    sampler: Text
    windows: Count
    window: Count
    corpus: Text
    at_most: dict[Text, Finite]


class TrialRow(Described):
    bits_per_weight: Finite | None = None


class Trial(Described):
    number: Count
    state: Text
    values: dict[Text, Any]
    objectives: list[Finite] | None
    row: TrialRow | None
    stopped: Text | None


class Against(Described):
    kl: Finite
    kl_ci: Pair | None


class SearchRow(Described):
    recipe: Text
    against: dict[Text, Against] | None = None


class SearchRun(Run):
    """Of `bitassay search`."""

    kind: Literal["search"]
    run_id: Text
    model: Named
    settings: SearchSettings
    interval: Text
    rows: Annotated[list[SearchRow], Field(max_length=MAX_ROWS)]
    best: list[Text]
    trials: Annotated[list[Trial], Field(max_length=MANY)]
    importance: dict[Text, dict[Text, Finite]]
    environment: dict[Text, Any]

    @model_validator(mode="after")
    def _objectives_of_what_is_complete(self) -> "SearchRun":
        wanted = len(self.settings.objectives)
        for trial in self.trials:
            if trial.state == "complete":
                if trial.objectives is None or len(trial.objectives) != wanted:
                    raise ValueError(f"trial {trial.number} is complete, but has not {wanted} objectives")
                if wanted == 1 and (trial.row is None or trial.row.bits_per_weight is None):
                    raise ValueError(f"trial {trial.number} is complete, but has no bits_per_weight")
        if not self.best_trials:
            raise ValueError("none of the best is among the complete trials")
        return self

    @property
    def best_trials(self) -> list[Trial]:
        names = {f"{self.settings.space.name}-{trial.number:03d}": trial for trial in self.trials}
        return [names[name] for name in self.best if name in names and names[name].state == "complete"]


class Whole(Described):
    matrices: Count
    bits_per_weight: Finite
    kl: Finite
    kl_se: Distance | None


class AnalysisText(Described):
    samples: Count
    tokens: Count
    corpus: Text


class MatrixRow(Compared):
    layer: Count
    kind: Text
    name: Text
    kl_predicted: Finite


class AnalysisRun(Described):
    """Of `bitassay quantize --analyze`."""

    schema_version: Literal[1]
    kind: Literal["analysis"]
    run_id: Text
    created: Text
    model: Named
    recipe: Named
    text: AnalysisText
    whole: Whole
    layers: Annotated[list[Compared], Field(min_length=1, max_length=MAX_LAYERS)]
    matrices: Annotated[list[MatrixRow], Field(min_length=1, max_length=MANY)]
    routing: Annotated[list[Described], Field(max_length=MANY)]

    @model_validator(mode="after")
    def _layers_that_there_are(self) -> "AnalysisRun":
        for row in self.matrices:
            if row.layer >= len(self.layers):
                raise ValueError(f"{row.name} is in layer {row.layer} of {len(self.layers)}")
        return self
