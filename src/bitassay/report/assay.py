"""An assay for people: the columns of its table, and one HTML file that opens offline."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from bitassay.record.files import atomic_file, write_text
from bitassay.report.figures import layers_figure, quality_figure, speed_figure, summary_figure, svg
from bitassay.report.schema import AssayRun, Row, parse_run
from bitassay.report.tables import Column, number, percent, significant, size

_ppl, _kl = number(2), significant(3)


def _interval(key: str, interval_key: str, form) -> Any:
    """Value and interval of one row: `1.23 [1.10, 1.36]`."""

    def text(row: dict[str, Any]) -> str:
        pair = row.get(interval_key)
        return form(row[key]) + (f" [{form(pair[0])}, {form(pair[1])}]" if pair else "")

    return text


def _not_for_base(form):
    """The base model is not compared with itself."""
    return lambda row: "" if row["recipe"] == "base" else form(row)


RECIPE = Column("recipe", "recipe", align="left")
_DELTA = Column("ppl_delta", "ppl delta\n[95 %]", _not_for_base(_interval("ppl_delta", "ppl_delta_ci", _ppl)), whole_row=True)
_KL = Column("kl_mean", "KL to base\n[95 %]", _not_for_base(_interval("kl_mean", "kl_ci", _kl)), whole_row=True)
_TOP1 = Column("top1_agreement", "top-1\nagreement", _not_for_base(lambda row: percent(1)(row["top1_agreement"])), whole_row=True)

ASSAY_COLUMNS = [
    RECIPE,
    Column("bits_per_weight", "bits/\nweight", number(2)),
    Column("size_bytes", "size", size),
    Column("ppl", "ppl", _ppl),
    _DELTA,
    _KL,
    _TOP1,
    Column("prefill_tok_s", "prefill\ntok/s", number(0)),
    Column("decode_tok_s", "decode\ntok/s", number(1)),
    Column("hidden_distance", "hidden\ndistance", significant(3)),
    Column("verdict", "verdict", align="left"),
]

QUALITY_COLUMNS = [
    RECIPE,
    Column("protocol", "protocol", align="left"),
    Column("against", "against", align="left"),
    Column("ppl", "ppl\n[95 %]", _interval("ppl", "ppl_ci", _ppl), whole_row=True),
    Column("ppl_delta", "ppl delta\n[95 %]", lambda row: _compared(row, _interval("ppl_delta", "ppl_delta_ci", _ppl)), whole_row=True),
    Column("kl_mean", "KL\n[95 %]", lambda row: _compared(row, _interval("kl_mean", "kl_ci", _kl)), whole_row=True),
    Column("kl_p99", "KL 99 %", lambda row: _compared(row, lambda r: _kl(r["kl_p99"])), whole_row=True),
    Column("top1_agreement", "top-1 agreement\n[95 %]", lambda row: _compared(row, _interval("top1_agreement", "top1_ci", number(3))), whole_row=True),
]


def _compared(row: dict[str, Any], form) -> str:
    return form(row) if row.get("against") else "-"


def write_report(runs: Sequence[dict[str, Any]] | dict[str, Any], path: Path) -> None:
    """One HTML file for one or several assays. Raises BitassayError for a value that is not an assay."""
    many = [runs] if isinstance(runs, dict) else runs
    parsed = [parse_run(run, f"run {index + 1}") for index, run in enumerate(many)]
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        (files("bitassay") / "report" / "assay.html.j2").read_text(encoding="utf-8")
    )
    write_text(path, template.render(runs=[_page(run) for run in parsed]))


def write_picture(run: dict[str, Any], path: Path) -> None:
    """The summary figure of a run, as .svg or .png by the name of `path`."""
    figure = summary_figure(parse_run(run, str(path)))
    if path.suffix == ".svg":
        write_text(path, svg(figure))
        return
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)


def _page(run: AssayRun) -> dict[str, Any]:
    """What the template shows of one run."""
    rows = [row.model_dump() for row in run.rows]
    figures = [
        (quality_figure(run), "Quality against size", "KL divergence to the base model and perplexity, against the size of the checkpoint; bars are 95 % intervals"),
        (layers_figure(run), "What a verifier sees", "Relative distance of hidden states between prover and verifier by decoder layer, on generated positions; the band is what honest runs spanned"),
        (speed_figure(run), "Speed", "Decode and prefill speed of the packed models in bf16"),
    ]
    return {
        "run": run,
        "headline": headline(run),
        "titles": [column.title.replace("\n", " ") for column in ASSAY_COLUMNS],
        "table": [[column.text(row) for column in ASSAY_COLUMNS] for row in rows],
        "verdicts": [row for row in run.rows if row.verdict],
        "figures": [(Markup(svg(figure)), title, text) for figure, title, text in figures if figure is not None],
    }


def headline(run: AssayRun) -> str:
    """One sentence that the intervals support: which recipes show no difference in perplexity, and which a verifier caught."""
    candidates = run.rows[1:]
    harmless = [row.recipe for row in candidates if _holds_zero(row)]
    caught = [row.recipe for row in candidates if row.verdict == "FAIL"]
    parts = []
    if harmless:
        parts.append(f"no difference in perplexity is visible for {_listed(harmless)} (the 95 % interval holds zero)")
    if worse := [row.recipe for row in candidates if row.recipe not in harmless]:
        parts.append(f"{_listed(worse)} differ{'s' if len(worse) == 1 else ''} from the base model")
    if any(row.verdict for row in candidates):
        parts.append(f"a verifier that expects the base model rejects {_listed(caught) if caught else 'none of them'}")
    text = "; ".join(parts) or "only the base model was measured"
    return text[0].upper() + text[1:] + "."


def _holds_zero(row: Row) -> bool:
    return row.ppl_delta_ci is not None and row.ppl_delta_ci[0] <= 0 <= row.ppl_delta_ci[1]


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
