"""The tables and verdicts of docs/replication-results.md, from the stored runs of the studies.

    <!-- NAME -->  ...  <!-- end -->

is filled in the page with what benchmarks/results/replication/NAME.json, the run.json of a study, says, and
speeds/NAME.json beside it, the run.json of a `bitassay bench` in which all groups took turns. The words
around it are written by hand.

Run: python benchmarks/replication_tables.py
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitassay.quantization.recipe.recipe import BASE
from bitassay.report.columns import COLUMNS
from bitassay.report.tables import interval, render

ROOT = Path(__file__).parent
RUNS, PAGE = ROOT / "results" / "replication", ROOT.parent / "docs" / "replication-results.md"
REGION = re.compile(r"(<!-- ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
KINDS = {
    "single": "KL less once",
    "rescaled": "less once, rescaled",
    "equal-bits": "less equal bits",
    "equal-flops": "less equal bit operations",
}
UNITS = {"nats of KL": " nats of KL", "perplexity": " of perplexity"}
Row = Mapping[str, Any]


def short(value: float) -> str:
    """Three digits, whole from a hundred on, and four decimals at most."""
    size = abs(value)
    return f"{value:.{0 if size >= 99.5 else 1 if size >= 9.95 else 2 if size >= 0.995 else 3}f}"


def signed(value: float) -> str:
    return ("+" if value > 0 else "") + short(value)


def with_interval(value: float, ends: Sequence[float], form: Callable[[float], str] = short) -> str:
    return f"{form(value)} {interval(short)(ends)}"


def speeds(name: str) -> dict[str, Row]:
    """Timings of decoding by group; none where the study's models were not timed."""
    path = RUNS / "speeds" / f"{name}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {row["model"]: row for row in rows}


def table(run: Row, timed: Mapping[str, Row]) -> str:
    """A line for each group: what it costs, what it is worth, and that less its controls."""
    pairs = {(p["group"], kind): p for p in run["pairs"] for kind in p["role"].split(", ")}
    kinds = [kind for kind in KINDS if any(kind == other for _, other in pairs)]
    head = ["group", "bits/weight", "MB a token", "GFLOP a token", "perplexity", "KL [95 %]"]
    if timed:
        head += ["decode tok/s", "of the baseline's [95 %]", "peak", "grade"]
    head += [KINDS[kind] for kind in kinds]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in run["rows"]:
        if row["role"] not in ("plain", "replica"):
            continue
        cells = [
            row["group"],
            f"{row['bits_per_weight']:.2f}",
            f"{row['bytes_per_token'] / 1e6:.0f}",
            f"{row['flop_per_token'] / 1e9:.2f}",
            short(row["ppl"]),
            with_interval(row["kl_mean"], row["kl_ci"]) if row["kl_mean"] else "",
        ]
        if timed:
            mine = timed.get(row["group"]) or timed[BASE]
            ratio = mine.get("decode_ratio")
            cells += [
                short(mine["decode_tok_s"]),
                "" if ratio is None else with_interval(ratio, mine["decode_ratio_ci"]),
                f"{mine['peak_resident_bytes'] / 1e9:.2f} GB",
                row["grade"] or "none",
            ]
        for kind in kinds:
            pair = pairs.get((row["group"], kind))
            cells.append(with_interval(pair["kl"], pair["kl_ci"], signed) if pair else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdicts(run: Row) -> str:
    """A line for each claim."""
    measured = next(column for column in COLUMNS["claims"] if column.key == "measured")
    return "\n".join(
        f"- {row['claim']}: **{row['verdict']}**. {measured.text(row)}" + UNITS.get(row["unit"], "")
        for row in run["claims"]
    )


def filled(page: str) -> str:
    def of(found: re.Match[str]) -> str:
        run = json.loads((RUNS / f"{found[2]}.json").read_text())
        parts = [
            table(run, speeds(found[2])),
            render(run["drafts"], COLUMNS["drafts"], "md") if run["drafts"] else "",
            verdicts(run),
        ]
        return found[1] + "\n\n".join(part.strip() for part in parts if part) + f"\n{found[3]}"

    return REGION.sub(of, page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
