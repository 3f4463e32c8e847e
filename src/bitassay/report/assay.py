"""An assay for people: the columns of its table, and one HTML file that opens offline."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from bitassay.record.files import write_text
from bitassay.report.bench import page_table
from bitassay.report.figures import (
    layers_figure,
    quality_figure,
    speed_figure,
    summary_figure,
    svg,
    svg_file,
    write_png,
)
from bitassay.report.page import write_page
from bitassay.report.replication import PAIR_COLUMNS
from bitassay.report.schema import AssayRun, Row, parse_run
from bitassay.report.tables import (
    DECIDED,
    Column,
    interval_note,
    number,
    percent,
    significant,
    size,
    with_interval,
)

RowText = Callable[[dict[str, Any]], str]
_ppl, _kl, _few = number(2), significant(3), significant(2)


def _not_for_base(form: RowText) -> RowText:
    """The base model is not compared with itself."""
    return lambda row: "" if row["recipe"] == "base" else form(row)


def _compared(form: RowText) -> RowText:
    """`-` where there was nothing to compare with."""
    return lambda row: form(row) if row.get("against") else "-"


def _column(title: str, key: str, interval_key: str, form: Callable[[float], str], shown: Any) -> Column:
    column = with_interval(key, title, form, interval_key)
    return replace(column, format=shown(column.format))


RECIPE = Column("recipe", "recipe", align="left")
ASSAY_COLUMNS = [
    RECIPE,
    Column("bits_per_weight", "bits/\nweight", number(2)),
    Column("size_bytes", "size", size),
    Column("ppl", "ppl", _ppl, also=("ppl_ci",)),
    _column("ppl delta\n[95 %]", "ppl_delta", "ppl_delta_ci", _ppl, _not_for_base),
    _column("KL to base\n[95 %]", "kl_mean", "kl_ci", _kl, _not_for_base),
    Column(
        "top1_agreement",
        "top-1\nagreement",
        _not_for_base(lambda row: percent(1)(row["top1_agreement"])),
        whole_row=True,
        also=("top1_ci",),
    ),
    Column("prefill_tok_s", "prefill\ntok/s", number(0)),
    Column("decode_tok_s", "decode\ntok/s", number(1)),
    Column("hidden_distance", "hidden\ndistance", significant(3)),
    Column("verdict", "verdict", align="left"),
]

QUALITY_COLUMNS = [
    RECIPE,
    Column("protocol", "protocol", align="left"),
    Column("against", "against", align="left"),
    _column("ppl\n[95 %]", "ppl", "ppl_ci", _ppl, lambda text: text),
    _column("ppl delta\n[95 %]", "ppl_delta", "ppl_delta_ci", _ppl, _compared),
    _column("KL\n[95 %]", "kl_mean", "kl_ci", _kl, _compared),
    Column("kl_p99", "KL 99 %", _compared(lambda row: _kl(row["kl_p99"])), whole_row=True),
    _column("top-1 agreement\n[95 %]", "top1_agreement", "top1_ci", number(3), _compared),
]

CONTROL_COLUMNS = [
    *QUALITY_COLUMNS[:1],
    Column("role", "role", align="left"),
    Column("bits_per_weight", "bits/weight", number(3)),
    *QUALITY_COLUMNS[1:],
    _column("gain of the\ncopies, ppl", "gain", "gain_ci", _ppl, lambda text: text),
    Column("gain", "beats it\n(by KL)", lambda row: DECIDED[row["beats"]], whole_row=True, also=("beats",)),
]


def write_report(runs: Sequence[dict[str, Any]] | dict[str, Any], path: Path) -> None:
    """One HTML file for one or several assays. Raises BitassayError for a value that is not an assay."""
    many = [runs] if isinstance(runs, dict) else runs
    parsed = [parse_run(run, f"run {index + 1}") for index, run in enumerate(many)]
    pages = [_page(run, f"run{index + 1}-") for index, run in enumerate(parsed)]
    write_page(path, "assay.html.j2", filters={"plain": plain}, pages=pages)


def write_picture(run: dict[str, Any], path: Path) -> None:
    """The summary figure of a run, as .svg or .png by the name of `path`."""
    figure = summary_figure(parse_run(run, str(path)))
    if path.suffix == ".svg":
        write_text(path, svg_file(figure))
        return
    write_png(figure, path, dpi=160)


def plain(value: Any) -> str:
    """A value of a run as text: numbers to four digits, lists and objects spelled out."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    return str(value)


def _page(run: AssayRun, prefix: str) -> dict[str, Any]:
    """What the template shows of one run; `prefix` starts its ids."""
    rows, pairs = ([row.model_dump() for row in part] for part in (run.rows, run.pairs))
    verification = run.verification
    drawn = [
        (
            quality_figure(run),
            "Quality against size",
            "KL divergence to the base model (left) and change of perplexity (right) against the size of the "
            "checkpoint. Bars are 95 % intervals; the right axis is linear around zero, logarithmic beyond.",
        ),
        (
            layers_figure(run),
            "What a verifier sees",
            "Relative distance between the hidden states that each model produced and those that the base "
            "model recomputes, by decoder layer, on generated tokens (geometric mean over traces). The band "
            "is what the honest base model spanned.",
        ),
        (speed_figure(run), "Speed", _speed_caption(run)),
    ]
    return {
        "id": prefix.rstrip("-"),
        "run": run,
        "headline": headline(run),
        "titles": [column.title.replace(" %", "\N{NO-BREAK SPACE}%").split("\n") for column in ASSAY_COLUMNS],
        "note": interval_note([[column.text(row) for column in ASSAY_COLUMNS] for row in rows]),
        "table": [[_value_and_interval(column.text(row)) for column in ASSAY_COLUMNS] for row in rows],
        "pairs": page_table("Replicas less their controls", PAIR_COLUMNS, pairs) if pairs else None,
        "verdicts": [row for row in run.rows if row.verdict],
        "figures": [
            (Markup(svg(figure, f"{prefix}{place}-")), title, text)
            for place, (figure, title, text) in enumerate(drawn)
            if figure is not None
        ],
        "about": {
            "verification": verification.model_dump(exclude_unset=True) if verification else {},
            "model": run.model.model_dump(),
            "protocol": run.protocol.model_dump(),
        },
    }


def _value_and_interval(text: str) -> tuple[str, str]:
    value, bracket, rest = text.partition(" [")
    return value, f"[{rest}" if bracket else ""


def _speed_caption(run: AssayRun) -> str:
    caption = (
        "Speed of the packed models in bf16, one sequence, models timed in turn; "
        "in brackets the ratio to the base."
    )
    spreads = [s for row in run.rows for s in (row.prefill_spread, row.decode_spread) if s is not None]
    if spreads and max(spreads) > 0:  # those of a single round are 0, or none
        caption += (
            f" Repeats of one measurement differed by up to {percent(0)(max(spreads))} of their median."
        )
    return caption


def headline(run: AssayRun) -> str:
    """What the intervals and the verdicts support, in a few clauses, and nothing more."""
    recipes = run.rows[1:]
    compared = [(row.recipe, *row.ppl_delta_ci) for row in recipes if row.ppl_delta_ci]
    clauses = [
        f"perplexity is the base model's on every window for {_listed(names)}"
        if (names := [name for name, low, high in compared if low == high == 0])
        else "",
        f"no difference in perplexity is visible for {_listed(names)}"
        if (names := [_with_reach(row) for row in recipes if _holds_zero(row)])
        else "",
        f"perplexity is higher than the base model's for {_listed(names)}"
        if (names := [name for name, low, _ in compared if low > 0])
        else "",
        f"perplexity is lower than the base model's for {_listed(names)}"
        if (names := [name for name, _, high in compared if high < 0])
        else "",
        *_verdict_clauses(run),
    ]
    nothing = "only the base model was measured" if not recipes else "no interval supports a comparison"
    text = "; ".join(clause for clause in clauses if clause) or nothing
    return text[0].upper() + text[1:] + "."


def _holds_zero(row: Row) -> bool:
    """Where it is not (0, 0), which is that of equal losses."""
    low, high = row.ppl_delta_ci or (0.0, 0.0)
    return low <= 0 <= high and low < high


def _with_reach(row: Row) -> str:
    """The name, and what could have been seen; of older runs, which do not say, what the interval allows."""
    if row.ppl_delta_visible is not None:
        seen = f"one of {_few(row.ppl_delta_visible)} would show with a probability of 80 %"
        return f"{row.recipe} (the 95 % interval holds zero; {seen})"
    assert row.ppl_delta_ci is not None
    return f"{row.recipe} (the 95 % interval holds zero, and {_few(max(map(abs, row.ppl_delta_ci)))} too)"


def _verdict_clauses(run: AssayRun) -> list[str]:
    base, recipes = run.rows[0], run.rows[1:]
    by_verdict = {
        verdict: [row.recipe for row in recipes if row.verdict == verdict]
        for verdict in ("FAIL", "PASS", "INCONCLUSIVE")
    }
    says = {
        "FAIL": "rejects {}",
        "PASS": "cannot tell {} from it",
        "INCONCLUSIVE": "comes to no decision on {}",
    }
    found = [says[verdict].format(_listed(names)) for verdict, names in by_verdict.items() if names]
    clauses = [f"a verifier that expects the base model {_listed(found)}"] if found else []
    if base.verdict == "FAIL":
        clauses.append("it also rejected the honest base model, so its verdicts are in doubt")
    return clauses


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
