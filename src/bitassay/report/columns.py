"""The columns of every table: which keys of a row are shown, how, and under which title. To add a column to a
table, put the value into the row where it is made (of an assay: `studies/assay.py`) and a line here."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bitassay.quantization.replication.controls import KINDS as CONTROL_KINDS
from bitassay.report.figures.heat_maps import HeatMap
from bitassay.report.tables import (
    DECIDED,
    MISSING,
    Cell,
    Column,
    Row,
    interval,
    number,
    percent,
    points,
    significant,
    size,
    text_column,
    with_interval,
)

_few = significant(3)


def _short(value: float) -> str:
    """Three digits, and all of those before the point."""
    return number(0)(value) if value >= 100 else _few(value)


def _blank_for_base(row: Row) -> str | None:
    """The base model is not compared with itself."""
    return "" if row["recipe"] == "base" else None


def _dash_without_base(row: Row) -> str | None:
    """Nothing was compared."""
    return None if row.get("against") else MISSING


def _decided(row: Row) -> str:
    return DECIDED[row["beats"]]


# assay, eval

RECIPE = text_column("recipe", "recipe")
ASSAY = [
    RECIPE,
    Column("bits_per_weight", "bits/\nweight", number(2)),
    Column("size_bytes", "size", size),
    Column("ppl", "ppl", number(2), also=("ppl_ci",)),
    with_interval("ppl_delta", "ppl delta", number(2), instead=_blank_for_base),
    with_interval("kl_mean", "KL to base", _few, "kl_ci", instead=_blank_for_base),
    Column("top1_agreement", "top-1\nagreement", percent(1), also=("top1_ci",), instead=_blank_for_base),
    Column("prefill_tok_s", "prefill\ntok/s", number(0)),
    Column("decode_tok_s", "decode\ntok/s", number(1)),
    Column("hidden_distance", "hidden\ndistance", _few),
    text_column("verdict", "verdict"),
]


def _passed(row: Row) -> str:
    return f"{row['traces_passed']} of {row['traces']}"


VERDICT = [
    RECIPE,
    Column("traces_passed", "traces passed", _passed, whole_row=True),
    Column("traces", "not\npassed", lambda row: str(row["traces"] - row["traces_passed"]), whole_row=True),
    Column("p_value", "pooled\np-value", significant(2)),
    text_column("verdict", "verdict"),
]


RECIPES = [RECIPE, text_column("recipe_id", "id")]
QUALITY = [
    RECIPE,
    text_column("protocol", "protocol"),
    text_column("against", "against"),
    with_interval("ppl", "ppl", number(2)),
    with_interval("ppl_delta", "ppl delta", number(2), instead=_dash_without_base),
    with_interval("kl_mean", "KL", _few, "kl_ci", instead=_dash_without_base),
    Column("kl_p99", "KL 99 %", _few, instead=_dash_without_base),
    with_interval("top1_agreement", "top-1 agreement", number(3), "top1_ci", instead=_dash_without_base),
]
CONTROLLED_QUALITY = [
    RECIPE,
    text_column("role", "role"),
    Column("bits_per_weight", "bits/weight", number(3)),
    *QUALITY[1:],
    Column("gain", "gain of the\ncopies, ppl", number(2), interval="gain_ci"),
    Column(
        "beats",
        "beats it\n(by KL)",
        instead=lambda row: MISSING if row.get("gain") is None else DECIDED[row["beats"]],
    ),
]


def quality_columns(rows: Sequence[Row]) -> list[Column]:
    """Return the columns of `eval`, with those of controls where there are any."""
    return CONTROLLED_QUALITY if any("role" in row for row in rows) else QUALITY


# eval --tasks


def _metric(row: Row) -> str:
    """A share of items in percent, anything else as it is, with its interval."""
    is_share = row["metric"].split(" ")[0] in ("acc", "acc_norm", "exact_match")
    form = percent(1) if is_share else significant(4)
    return f"{form(row['value'])} {interval(form)(row['value_ci'])}"


TASKS = [
    text_column("protocol", "protocol"),
    text_column("metric", "metric"),
    text_column("model", "model"),
    Column("n", "items"),
    Column("value", "value\n[95 %]", _metric, whole_row=True, also=("value_ci",)),
    Column("unparsed", "unparsed"),
    with_interval("difference", "points to base", points),
    Column("lost", "lost"),
    Column("gained", "gained"),
    Column("p_value", "p\nMcNemar", significant(2)),
    Column("p_holm", "p\nHolm", significant(2)),
    Column("visible_difference", "visible\npoints", lambda value: number(1)(value * 100)),
]
TASK_PROTOCOLS = [
    text_column("id", "protocol"),
    Column("tasks", "tasks"),
    Column("items", "items"),
    text_column("harness", "by"),
    text_column("sources", "questions", ", ".join),
]

# generate

GENERATION = [
    RECIPE,
    Column("prompts", "prompts"),
    with_interval("prefix_tokens", "equal prefix,\ntokens", number(1)),
    with_interval("divergence", "first divergence,\nmedian token", number(0)),
    with_interval("identical_fraction", "identical\ntexts", percent(0), "identical_ci"),
    with_interval("bleu", "BLEU", number(1)),
    with_interval("rouge1", "ROUGE-1", number(3)),
    with_interval("rouge2", "ROUGE-2", number(3)),
    with_interval("rougeL", "ROUGE-L", number(3)),
]


def _sample(text: Row) -> Cell:
    """A text, marked from the first token on that is not the base model's."""
    return Cell(text["prefix"], mark=text["text"][len(text["prefix"]) :])


def samples(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each prompt, with what each model wrote."""
    return [
        {"place": index + 1, "prompt": prompt} | {name: run["texts"][name][index] for name in run["texts"]}
        for index, prompt in enumerate(run["prompts"])
    ]


def sample_columns(names: Iterable[str]) -> list[Column]:
    """Return the columns of texts side by side: a prompt, and what each model wrote."""
    texts = [Column(name, name, lambda text: text["text"], "left", cell=_sample) for name in names]
    return [Column("place", ""), text_column("prompt", "prompt"), *texts]


# bench


def _ratio(key: str, title: str) -> Column:
    return Column(key, f"{title} [95 %]", number(2), interval=f"{key}_ci")


BENCH = [
    text_column("model", "model"),
    Column("batch", "batch"),
    Column("prompt_tokens", "prompt\ntokens"),
    Column("ttft_s", "first token\nms", lambda seconds: _short(seconds * 1e3)),
    Column("prefill_tok_s", "prefill\ntok/s", _short),
    Column("prefill_samples_s", "samples/s", _short),
    _ratio("prefill_ratio", "prefill\nover base"),
    Column("prefill_share_of_bound", "of\nbound", percent(1)),
    Column("decode_tok_s", "decode\ntok/s", _short),
    _ratio("decode_ratio", "decode\nover base"),
    Column("decode_flop_per_byte", "FLOP/\nbyte", _short),
    Column("decode_share_of_bound", "of\nbound", percent(1)),
    Column("decode_spread", "spread", percent(0)),
    Column("cache_bytes", "KV cache", size),
    Column("peak_resident_bytes", "peak\nresident", size),
    Column("peak_device_bytes", "peak\ndevice", size),
    text_column("skipped", "skipped"),
]
BENCH_MODELS = [
    text_column("model", "model"),
    Column("bits_per_weight", "bits/\nweight", number(2)),
    Column("checkpoint_bytes", "checkpoint", size),
    Column("weight_bytes_per_token", "weights read\na token", size),
    Column("kv_bytes_per_token", "KV cache\na token", size),
    Column("resident_bytes", "resident\nonce loaded", size),
    text_column("dtype", "dtype"),
    text_column("product_dtype", "products\nin"),
]
SPEED_PAIRS = [
    text_column("group", "replica"),
    text_column("role", "over its control"),
    text_column("control", "which is"),
    Column("batch", "batch"),
    Column("prompt_tokens", "prompt\ntokens"),
    with_interval("prefill_ratio", "prefill", number(2)),
    with_interval("decode_ratio", "decode", number(2)),
]
MATMUL = [
    text_column("shape", "shape"),
    text_column("format", "format"),
    text_column("scales", "one scale a"),
    Column("rounding_error", "rounding\nerror", significant(4), also=("rounding_error_range",)),
    Column("documented", "documented", significant(4)),
    Column("over_documented", "measured over\ndocumented", number(3)),
    Column("product_error", "product\nerror", _few),
    Column("weights_error", "weights\nonly", _few),
    _ratio("speed_over_float32", "speed over\nfp32"),
    _ratio("speed_over_bfloat16", "speed over\nbf16"),
    Column("spread", "spread", percent(0)),
    text_column("path", "path"),
]

# attack


def _seen(row: Row) -> str:
    """`100 % @8`: the share that is caught with all tokens, and the tokens from which on 99 % are; `blind`
    where the interval of that share reaches down to alpha."""
    if row["sees"] == "nothing":
        return "blind"
    tokens = f" @{row['tokens_to_99']}" if row["tokens_to_99"] else ""
    return f"{percent(0)(row['tpr_at_1pct_fpr'])}{tokens}"


def _seen_cell(row: Row) -> Cell:
    low, high = map(percent(1), row["tpr_ci"])
    hint = f"AUC {row['auc']:.3f}, 95 % interval {low} to {high}"
    return Cell(_seen(row), shade=float(row["tpr_at_1pct_fpr"]), hint=hint)


def attack_matrix_columns(run: Mapping[str, Any]) -> list[Column]:
    """Return the columns of attacks by detectors."""

    def attack(name: str) -> Cell:
        return Cell(name, small=run["about"].get(name, ""))

    detectors = dict.fromkeys(row["detector"] for row in run["rows"])
    cells = [Column(name, name.replace("-", "-\n"), _seen, cell=_seen_cell) for name in detectors]
    return [Column("attack", "attack", align="left", cell=attack), *cells]


_COSTS = [
    Column("bytes_per_token", "bytes\na token", _few),
    Column("seconds_per_token", "verifier's seconds\na token", significant(2)),
    Column("prefill_seconds_per_token", "its prefill\na token", significant(2)),
    Column("prover_seconds_per_token", "host's seconds\na token", significant(2)),
]
ATTACK = [
    text_column("attack", "attack"),
    text_column("detector", "detector"),
    Column("auc", "AUC", number(3)),
    with_interval("tpr_at_1pct_fpr", "caught", percent(1), "tpr_ci"),
    Column("tokens_to_99", "tokens\nto 99 %"),
    *_COSTS,
    Column("n_honest", "honest"),
    Column("n_attacked", "attacked"),
    text_column("sees", "sees"),
]
ATTACK_COSTS = [text_column("sampler", "sampler"), text_column("detector", "detector"), *_COSTS]
HONEST = [
    text_column("numerics", "numerics"),
    text_column("detector", "detector"),
    Column("refused", "refused"),
    Column("n", "of"),
    with_interval("false_positive_rate", "rate", percent(1), "false_positive_ci"),
]

# search


def _differences(row: Row) -> str:
    """KL less that of each recipe that was written by hand, itself left out."""
    return "; ".join(
        f"{name} {other['kl']:+.4g} {interval(significant(4))(other['kl_ci'])}"
        for name, other in row["against"].items()
        if name != row["recipe"]
    )


SEARCH = [
    RECIPE,
    Column("bits_per_weight", "bits/\nweight", number(3)),
    with_interval("ppl", "ppl", significant(4)),
    with_interval("kl_mean", "KL to base", significant(4), "kl_ci"),
    Column("against", "KL less that of\n[95 %]", _differences, "left", whole_row=True),
]


def _result(trial: Row) -> str:
    return ", ".join(map(significant(4), trial["objectives"] or [])) or str(trial["stopped"])


def trial_columns(parameters: Iterable[str]) -> list[Column]:
    """Return the columns of the trials of a search: their values, and what came of them."""

    def value(name: str) -> Column:
        def text(trial: Row) -> str:
            value = trial["values"].get(name)
            return MISSING if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

        return Column("values", name, text, whole_row=True)

    result = Column("state", "result", _result, "left", whole_row=True)
    return [Column("number", "trial"), *map(value, parameters), result]


# quantize --analyze

_STATISTICS = [
    ("mean", "mean", _few),
    ("variance", "variance", _few),
    ("kurtosis", "kurtosis", _few),
    ("outlier_columns", "outlier columns", str),
    ("beyond_3_sigma", "beyond 3 sigma", percent(2)),
    ("beyond_100_medians", "beyond 100 medians", str),
    ("largest_in_medians", "largest in medians", _few),
]


def _statistics(of: str) -> list[Column]:
    return [Column(f"{of}_{key}", f"{of}\n{title}", form) for key, title, form in _STATISTICS]


LAYERS = [
    Column("layer", "layer"),
    Column("kl", "KL, only this\nlayer quantized", _few, also=("kl_se",)),
    Column("kl_predicted", "KL\npredicted", _few),
    *_statistics("hidden")[1:],
]
MATRICES = [
    text_column("name", "matrix"),
    Column("bits", "bits/\nweight", significant(4)),
    Column("tokens", "tokens"),
    Column("weight_error", "weight\nerror", _few),
    Column("output_error", "output\nerror", _few),
    Column("kl_predicted", "KL\npredicted", _few),
    Column("kl", "KL\nmeasured", _few),
    *_statistics("weight"),
    *_statistics("input"),
]
ROUTING = [
    text_column("module", "experts"),
    Column("tokens", "tokens"),
    Column("experts_per_token", "experts\na token"),
    Column("fewest_tokens", "fewest tokens\nof an expert"),
    Column("largest_share", "largest\nshare", percent(1)),
    Column("changed_fraction", "tokens whose\nexperts changed", percent(1)),
]


def heat_map_columns(heat_map: HeatMap) -> list[Column]:
    """Return the columns of a heat map: a layer, and a shaded cell for each kind of matrix."""

    def shaded(value: float) -> Cell:
        return Cell(_few(value), shade=heat_map.shade(value))

    return [Column("layer", "layer"), *(Column(name, name, cell=shaded) for name in heat_map.kinds)]


# study run task3.1 ... and control-table ...

_UNITS = {
    "points": points,
    "%": lambda value: f"{value * 100:+.1f} %",
    "perplexity": lambda value: f"{value:+.3f}",
    "nats of KL": lambda value: f"{value:+.2g}",
    "ratio": _few,
}


def _measured(row: Row) -> str:
    form = _UNITS[row["unit"]]
    parts = [
        f"{part['name']}: {form(part['value'])} {interval(form)(part['interval'])}"
        for part in row["measured"]
    ]
    if row["not_measured"]:
        parts.append(f"{row['not_measured']} not measured here")
    return "; ".join(parts)


SHORT_CLAIMS = [
    text_column("section", "section"),
    text_column("claim", "claim"),
    text_column("expected", "expected"),
    text_column("verdict", "verdict"),
]
CLAIMS = [*SHORT_CLAIMS, Column("measured", "measured", _measured, "left", whole_row=True)]


def _method(method: str) -> list[Column]:
    return [
        with_interval(f"{method}_acc", method, percent(1)),
        with_interval(f"{method}_difference", f"{method}, points\nto base", points),
        Column(f"{method}_p_holm", "p\nHolm", significant(2), also=(f"{method}_p_value",)),
    ]


VARIANTS = [
    text_column("variant", "variant"),
    Column("bits_per_weight", "bits/\nweight", number(2)),
    Column("size_bytes", "size", size),
    Column("ppl", "ppl", number(2), also=("ppl_ci",)),
    with_interval("ppl_delta", "ppl delta", number(3)),
    with_interval("kl_mean", "KL to base", significant(2), "kl_ci"),
    Column("top1_agreement", "top-1\nagreement", percent(1), also=("top1_ci",)),
    *_method("direct"),
    *_method("generate"),
    Column("unparsed", "unparsed"),
    text_column("refused", "not run here"),
]
VARIANT_PAIRS = [
    text_column("family", "comparison"),
    text_column("second", "this"),
    text_column("first", "less this"),
    with_interval("ppl", "ppl", number(3)),
    with_interval("kl", "KL", significant(2)),
    with_interval("direct_difference", "direct, points", points),
    Column("direct_p_holm", "p\nHolm", significant(2)),
    with_interval("generate_difference", "generate, points", points),
    Column("generate_p_holm", "p\nHolm", significant(2)),
    Column("generate_visible_difference", "visible\npoints", lambda value: number(1)(value * 100)),
]


def _beats(kind: str) -> Column:
    """Whether a replica does; nothing where it has no such control, or is none."""
    key = f"beats_{kind.replace('-', '_')}"

    def text(row: Row) -> str:
        return DECIDED[row[key]] if kind in row["controls"] else MISSING

    return Column(key, f"beats\n{kind.replace('-', ' ')}", instead=text)


REPLICAS = [
    text_column("group", "group"),
    text_column("role", "is"),
    Column("bits_per_weight", "bits/\nweight", number(2)),
    Column("size_bytes", "size", size),
    Column("passes", "passes\na layer", number(2)),
    Column("flop_per_token", "FLOP\na token", _few),
    Column("bytes_per_token", "weights read\na token", size),
    Column("ppl", "ppl", significant(4), also=("ppl_ci",)),
    with_interval("ppl_delta", "ppl delta", _few),
    with_interval("kl_mean", "KL to base", _few, "kl_ci"),
    Column("top1_agreement", "top-1\nagreement", percent(1), also=("top1_ci",)),
    _ratio("decode_ratio", "decode over\nbase"),
    Column("decode_tok_s", "decode\ntok/s", _few),
    Column("peak_bytes", "peak\nmemory", size),
    text_column("grade", "grade"),
    *map(_beats, CONTROL_KINDS),
]
REPLICA_PAIRS = [
    text_column("group", "replica"),
    text_column("role", "less its control"),
    text_column("control", "which is"),
    with_interval("kl", "KL", _few),
    with_interval("kl_fraction", "KL as a share", percent(1)),
    with_interval("ppl", "ppl", _few),
    Column("read_ratio", "the control reads,\nover the replica", number(2)),
    Column("decode_tok_s", "decode\ntok/s", _few),
    Column("control_decode_tok_s", "the control's\ntok/s", _few),
    Column("beats", "beats it", instead=_decided),
]
DRAFTS = [
    Column("draft_tokens", "tokens of\na draft"),
    Column("texts", "texts"),
    Column("identical", "identical to\nboth planes"),
    with_interval("acceptance", "accepted", percent(1)),
    with_interval("speed_bound", "speed by\nbytes read", number(2)),
    with_interval("speed", "speed measured,\ndense weights", number(2)),
]

# study run exp1 ..., separability, calibrate --study

EXPERIMENTS = [
    text_column("study", "study"),
    text_column("prover", "prover"),
    text_column("verifier", "verifier"),
    Column("expected", "accept rate\nexpected", interval(percent(0))),
    Column("avg_accept_rate", "accept rate\nmeasured [95 %]", percent(1), interval="accept_rate_ci"),
    Column("as_expected", "as\nexpected", lambda yes: "yes" if yes else "no"),
    Column("pass_rate", "trials that\npass", percent(0)),
    Column("avg_overhead_percentage", "overhead\n%", number(2)),
    Column("refused", "refused at\nthis threshold", lambda by: ", ".join(f"{k} {v}" for k, v in by.items())),
    Column("avg_relative_distance", "relative\ndistance", significant(2)),
]


def _separated(row: Row) -> str:
    """The share that is refused; a prover of the verifier's own precision is honest."""
    return "honest" if row["honest"] else percent(0)(row["tpr_at_fpr"])


def separability_columns(run: Mapping[str, Any]) -> list[Column]:
    """Return the columns of verifiers by provers."""
    provers = dict.fromkeys(row["prover"] for row in run["rows"])
    return [text_column("verifier", "verifier"), *(Column(name, name, _separated) for name in provers)]


SEPARABILITY = [
    text_column("prover", "prover"),
    text_column("verifier", "verifier"),
    with_interval("tpr_at_fpr", "refused", percent(1), "tpr_ci"),
    with_interval("auc", "AUC", number(3)),
    Column("relative_distance", "relative\ndistance", _few, also=("range",)),
    Column("n", "runs"),
]


THRESHOLDS = [
    text_column("study", "study"),
    text_column("direction", "direction"),
    Column("Pe", "Pe\nmax", _few),
    Column("Pm", "Pm\nmin", _few),
    Column("Pw", "Pw\nmin", _few),
    Column("mean_epsilon", "mean error\nmax", significant(2)),
    Column("accept_rate_min", "accept rate\nmin", percent(1)),
    with_interval("false_positive_rate", "honest\nrefused", percent(1), "false_positive_ci"),
    text_column("caught", "attacks caught"),
    text_column("caught_by_distance", "by relative distance"),
]


def threshold_rows(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a flat row for each direction of a fit of thresholds."""

    def caught(row: Row, key: str) -> str:
        return ", ".join(f"{name} {percent(0)(attack[key])}" for name, attack in row["attacks"].items())

    return [
        {
            **{key: row[key] for key in ("study", "direction", "false_positive_rate", "false_positive_ci")},
            **row["thresholds"],
            "caught": caught(row, "caught"),
            "caught_by_distance": caught(row, "caught_by_distance"),
        }
        for row in run["rows"]
    ]
