"""The columns of the tables of runs: COLUMNS, from `columns.yaml`.
Also the formats that are named there, and the columns that depend on a run, such as those of a matrix of
attacks by detectors. Tables that are no run's, such as that of `bitassay verify`, are in `cli/`."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import yaml

from bitassay.report.tables import (
    DECIDED,
    MISSING,
    Cell,
    Column,
    Row,
    Run,
    interval,
    number,
    percent,
    points,
    significant,
    size,
)

if TYPE_CHECKING:
    from bitassay.report.figures.heat_maps import HeatMap

MOST_LETTERS = 10_000  # in a cell
_few = significant(3)


def _count(value: float) -> str:
    """A whole number, or a mean of such; refuses what is no number."""
    return str(value) if isinstance(value, int) else f"{value:g}"


def _text(value: str) -> str:
    if not isinstance(value, str) or len(value) > MOST_LETTERS:
        raise ValueError(f"not a text of at most {MOST_LETTERS} characters")
    return value


def _short(value: float) -> str:
    """Three digits, and all of those before the point."""
    return number(0)(value) if value >= 100 else _few(value)


def _metric(row: Row) -> str:
    """A share of items in percent, anything else as it is, with its interval."""
    is_share = row["metric"].split(" ")[0] in ("acc", "acc_norm", "exact_match")
    form = percent(1) if is_share else significant(4)
    return f"{form(row['value'])} {interval(form)(row['value_ci'])}"


def _differences(row: Row) -> str:
    """KL less that of each recipe that was written by hand, itself left out."""
    return "; ".join(
        f"{name} {other['kl']:+.4g} {interval(significant(4))(other['kl_ci'])}"
        for name, other in row["against"].items()
        if name != row["recipe"]
    )


_UNITS = {
    "points": points,
    "%": lambda value: f"{value * 100:+.1f} %",
    "perplexity": lambda value: f"{value:+.3f}",
    "nats of KL": lambda value: f"{value:+.2g}",
    "ratio": _few,
}


def _measured(row: Row) -> str:
    """The quantities of a claim, each with its interval."""
    form = _UNITS[row["unit"]]
    parts = [f"{q['name']}: {form(q['value'])} {interval(form)(q['interval'])}" for q in row["measured"]]
    if row["not_measured"]:
        parts.append(f"{row['not_measured']} not measured here")
    return "; ".join(parts)


def _beats(kind: str, row: Row) -> str:
    """Whether a replica beats its control of a kind; nothing where it has none."""
    return DECIDED[row[f"beats_{kind.replace('-', '_')}"]] if kind in row["controls"] else MISSING


_WITH_DIGITS = {"number": number, "significant": significant, "percent": percent}
_FORMATS: dict[str, Callable[[Any], str]] = {
    "count": _count,
    "text": _text,
    "size": size,
    "points": points,
    "unsigned_points": lambda value: number(1)(value * 100),
    "short": _short,
    "milliseconds": lambda seconds: _short(seconds * 1e3),
    "joined": ", ".join,
    "listed": lambda parts: ", ".join(f"{name} {value}" for name, value in parts.items()),
    "yes_or_no": lambda value: "yes" if value else "no",
    "percent_range": interval(percent(0)),
    "traces_passed": lambda row: f"{row['traces_passed']} of {row['traces']}",
    "traces_failed": lambda row: str(row["traces"] - row["traces_passed"]),
    "metric": _metric,
    "differences": _differences,
    "measured": _measured,
}
_INSTEAD: dict[str, Callable[[Row], str | None]] = {
    "blank_for_base": lambda row: "" if row["recipe"] == "base" else None,
    "dash_without_base": lambda row: None if row.get("against") else MISSING,
    "decided": lambda row: DECIDED[row["beats"]],
    "decided_where_gained": lambda row: MISSING if row.get("gain") is None else DECIDED[row["beats"]],
    "beats_single": partial(_beats, "single"),
    "beats_rescaled": partial(_beats, "rescaled"),
    "beats_equal_bits": partial(_beats, "equal-bits"),
    "beats_equal_flops": partial(_beats, "equal-flops"),
}


def _column(
    key: str,
    title: str,
    format: str = "count",
    instead: str = "",
    signed: bool = False,
    most: float | None = None,
    **options: Any,
) -> Column:
    """A column from an entry of `columns.yaml`."""
    name, _, digits = format.partition(" ")
    if name == "text":
        options["align"] = "left"
    if instead:
        options["instead"] = _INSTEAD[instead]
    for several in {"also", "choices"} & set(options):
        options[several] = tuple(options[several])
    if most is None:
        most = 1.0 if name in ("percent", "points") else math.inf
    return Column(
        key,
        title.replace("|", "\n"),
        _WITH_DIGITS[name](int(digits)) if digits else _FORMATS[name],
        least=-most if signed or name == "points" else 0.0,
        most=most,
        **options,
    )


def _spliced(entries: Iterable[Any]) -> list[dict[str, Any]]:
    return [part for entry in entries for part in (_spliced(entry) if isinstance(entry, list) else [entry])]


_TEXT = (files("bitassay") / "report" / "columns.yaml").read_text(encoding="utf-8")
COLUMNS: dict[str, list[Column]] = {
    table: [_column(**entry) for entry in _spliced(entries)]
    for table, entries in yaml.safe_load(_TEXT).items()
}


def quality_columns(rows: Sequence[Row]) -> list[Column]:
    """Return the columns of `eval`, with those of controls where there are any."""
    return COLUMNS["controlled_quality" if any("role" in row for row in rows) else "quality"]


def samples(run: Run) -> list[dict[str, Any]]:
    """Return a row for each prompt, with what each model wrote."""
    lines = zip(run["prompts"], *run["texts"].values(), strict=True)
    return [
        {"place": place, "prompt": prompt} | dict(zip(run["texts"], texts, strict=True))
        for place, (prompt, *texts) in enumerate(lines, 1)
    ]


def sample_columns(names: Iterable[str]) -> list[Column]:
    """Return the columns of texts side by side, marked from the first token on that is not the base's."""

    def marked(text: Row) -> Cell:
        return Cell(text["prefix"], mark=text["text"][len(text["prefix"]) :])

    texts = [Column(name, name, lambda text: text["text"], "left", cell=marked) for name in names]
    return [Column("place", ""), Column("prompt", "prompt", align="left"), *texts]


def attack_matrix_columns(run: Run) -> list[Column]:
    """Return the columns of attacks by detectors. `100 % @8`: the share that is detected with all tokens, and
    the tokens from which on 99 % are; `blind` where the interval of that share reaches down to alpha."""

    def detected(row: Row) -> str:
        if row["sees"] == "nothing":
            return "blind"
        tokens = f" @{row['tokens_to_99']}" if row["tokens_to_99"] else ""
        return f"{percent(0)(row['tpr_at_1pct_fpr'])}{tokens}"

    def shaded(row: Row) -> Cell:
        low, high = map(percent(1), row["tpr_ci"])
        hint = f"AUC {row['auc']:.3f}, 95 % interval {low} to {high}"
        return Cell(detected(row), shade=float(row["tpr_at_1pct_fpr"]), hint=hint)

    def attack(name: str) -> Cell:
        return Cell(name, small=run["about"].get(name, ""))

    detectors = dict.fromkeys(row["detector"] for row in run["rows"])
    cells = [Column(name, name.replace("-", "-\n"), detected, cell=shaded) for name in detectors]
    return [Column("attack", "attack", align="left", cell=attack), *cells]


def trial_columns(parameters: Iterable[str]) -> list[Column]:
    """Return the columns of the trials of a search: their values, and what came of them."""

    def value(name: str, values: Row) -> str:
        value = values.get(name)
        return MISSING if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    def result(trial: Row) -> str:
        return ", ".join(map(significant(4), trial["objectives"] or [])) or str(trial["stopped"])

    values = [Column("values", name, partial(value, name)) for name in parameters]
    return [Column("number", "trial"), *values, Column("state", "result", result, "left", whole_row=True)]


def heat_map_columns(heat_map: "HeatMap") -> list[Column]:
    """Return the columns of a heat map: a layer, and a shaded cell for each kind of matrix."""

    def shaded(value: float) -> Cell:
        return Cell(_few(value), shade=heat_map.shade(value))

    return [Column("layer", "layer"), *(Column(name, name, cell=shaded) for name in heat_map.kinds)]


def separability_columns(run: Run) -> list[Column]:
    """Return the columns of verifiers by provers: the share that is refused; a prover of the verifier's own
    precision is honest."""

    def refused(row: Row) -> str:
        return "honest" if row["honest"] else percent(0)(row["tpr_at_fpr"])

    provers = dict.fromkeys(row["prover"] for row in run["rows"])
    return [Column("verifier", "verifier", align="left"), *(Column(name, name, refused) for name in provers)]


def threshold_rows(run: Run) -> list[dict[str, Any]]:
    """Return a flat row for each direction of a fit of thresholds."""

    def detected(row: Row, key: str) -> str:
        return ", ".join(f"{name} {percent(0)(attack[key])}" for name, attack in row["attacks"].items())

    return [
        {
            **{key: row[key] for key in ("study", "direction", "false_positive_rate", "false_positive_ci")},
            **row["thresholds"],
            "caught": detected(row, "caught"),
            "caught_by_distance": detected(row, "caught_by_distance"),
        }
        for row in run["rows"]
    ]
