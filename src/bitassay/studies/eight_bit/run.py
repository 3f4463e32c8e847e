"""Run an INT8/FP8 study (`study.py`): its cells, speeds and products, then what they say.

    OUT/plan.json, parts/    as every run folder (`record/run.py`); a file for what each cell made
    OUT/bench/               speeds, which are measured alone, after all cells
    OUT/run.json             rows by variant, pairs, claims

Differences are paired by window or by question. p-values are exact McNemar's, adjusted by Holm within a
family of comparisons and a way of asking; intervals of a family's comparisons hold together at 95 %, and
`visible` differences are those that its tests would show.
"""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from bitassay.bench.matmul import matmul
from bitassay.evaluation.quality import INTERVAL, INTERVALS, PAIR_INTERVALS, summarise, text_difference
from bitassay.evaluation.statistics import ALPHA, TANGO, WILSON, holm, paired_difference, wilson_interval
from bitassay.evaluation.tasks.mmlu import is_letter
from bitassay.evaluation.tasks.registry import require_lm_eval
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.record.environment import environment
from bitassay.record.progress import Progress, silent
from bitassay.record.result import write_run
from bitassay.studies.cells import METHODS, read_findings
from bitassay.studies.claims import judged, read_claims
from bitassay.studies.eight_bit.study import FORMATS, GRANULARITIES, STUDIES
from bitassay.studies.run import do_study, time_variants
from bitassay.studies.torchao_models import require_torchao
from bitassay.studies.variants import Findings, VariantPlan

Pair = tuple[str, str, str]  # family, first variant, second variant
CLAIMS = read_claims(Path(__file__).with_name("claims.yaml"))
_QUESTIONS = {f"{method}_acc_ci": WILSON for method in METHODS} | {
    f"{method}_difference_ci": TANGO for method in METHODS
}


def run_eight_bit(
    plan: VariantPlan,
    *,
    out: Path | None = None,
    jobs: int | None = None,
    ray: str | None = None,
    repeats: int = 5,
    progress: Progress = silent,
) -> tuple[dict[str, Any], Path]:
    """Run a study; return the run (the content of run.json) and its folder. repeats: rounds of timing. The
    rest is as in `do_study`, whose errors it raises."""
    require_lm_eval()
    if any(variant.torchao for variant in plan.variants):
        require_torchao()
    about = STUDIES[plan.study].about
    folder, head = do_study(plan, "eight-bit", about, out=out, jobs=jobs, ray=ray, progress=progress)
    asked = folder.plan["questions"]
    findings = read_findings(folder, plan)
    if plan.speed:
        recipes = [v.recipe for v in plan.variants if v.granularity == "row" and v.recipe]
        cells = {"batches": (1, 8), "contexts": (1024,), "repeats": repeats}
        findings.speed = time_variants(plan, recipes, folder.path / "bench", progress, **cells)
        findings.products = folder.part(
            "products", lambda: matmul(repeats=0, seed=plan.seed, device=plan.device, progress=progress)
        )
    run = write_run(
        folder,
        **head,
        protocols={
            "text": plan.protocol.id if plan.protocol else None,
            "questions": question_protocol(plan, asked["whole"]),
            "questions_source": asked["source"],
        },
        interval="95 %, of pairs for all of a family together. Of text: "
        f"{INTERVAL.removeprefix('95 %, ')}. Of questions: Wilson's of an accuracy, Tango's of a paired "
        "difference",
        intervals={"rows": INTERVALS | _QUESTIONS, "pairs": PAIR_INTERVALS | _QUESTIONS},
        rows=rows_of(findings),
        pairs=pairs_of(findings),
        claims=judged(findings, CLAIMS.get(plan.study, ())),
        uneven_groups=uneven_groups(findings),
        speed=findings.speed,
        products=findings.products,
        environment=environment(plan.device),
    )
    return run, folder.path


def question_protocol(plan: VariantPlan, complete: bool) -> str:
    """Return everything about the questions that changes the number."""
    spread = f"{len(plan.subjects)} subjects"
    return f"mmlu/5-shot[n={plan.questions} over {spread}{'' if complete else ' of the bundled slice'}]"


def rows_of(findings: Findings) -> list[dict[str, Any]]:
    """Return a row a variant, in the study's order, which is no ranking; the base is the first."""
    adjusted = {method: _against_base(findings, method) for method in METHODS}
    rows = []
    for name, variant in findings.variants.items():
        row: dict[str, Any] = {
            "variant": name,
            "format": variant.format,
            "granularity": variant.granularity,
            "kind": variant.kind,
            "tool": None if variant.format is None else "torchao" if variant.torchao else "bitassay",
            "refused": findings.refused.get(name),
        }
        if name in findings.asked:
            facts = findings.facts[name]
            row |= {key: facts.get(key) for key in ("recipe_id", "bits_per_weight", "size_bytes")}
            if name in findings.text:
                row |= summarise(findings.text[name], findings.text[findings.plan.base]).to_dict()
            for method in METHODS:
                row |= {f"{method}_{key}": value for key, value in adjusted[method][name].items()}
            answers = findings.asked[name]["generate"]["answers"]
            row["unparsed"] = sum(not is_letter(str(answer[0])) for answer in answers)
        rows.append(row)
    return rows


def _against_base(findings: Findings, method: str) -> dict[str, dict[str, Any]]:
    """Accuracy of every variant, and its difference from the base's."""
    right = {name: by_method[method] for name, by_method in findings.right.items()}
    base = right[findings.plan.base]
    figures: dict[str, dict[str, Any]] = {
        name: {"n": len(r), "acc": sum(r) / len(r), "acc_ci": wilson_interval(sum(r), len(r))}
        for name, r in right.items()
    }
    others = [name for name in right if name != findings.plan.base]
    for name in others:
        figures[name] |= _difference(base, right[name], alpha=ALPHA / len(others))
    adjusted = holm([figures[name]["p_value"] for name in others])
    for name, p_holm in zip(others, adjusted, strict=True):
        figures[name]["p_holm"] = p_holm
    return figures


def _difference(first: Sequence[bool], second: Sequence[bool], **levels: float) -> dict[str, Any]:
    difference = paired_difference(first, second, **levels)
    return {
        "difference": difference.difference,
        "difference_ci": difference.interval,
        "p_value": difference.p_value,
        "visible_difference": difference.visible_difference,
    }


def comparisons(findings: Findings) -> list[Pair]:
    """Return which variants are compared with which, by family; only those that were measured."""
    pairs: list[Pair] = []

    def add(family: str, first: str, second: str) -> None:
        if findings.has(first, second):
            pairs.append((family, first, second))

    for name, variant in findings.variants.items():
        fake = name.replace("-real", "-fake")  # real ones are compared with these, below
        if variant.format == "fp8" and (name == fake or not findings.has(fake)):
            add("INT8 against FP8", name, name.replace("fp8", "int8"))
    for format in FORMATS:
        for coarse, fine in pairwise(("tensor", "row", "g512", "g256", "g128", "g64")):
            add("one step finer", f"{format}-{coarse}-fake", f"{format}-{fine}-fake")
        for granularity in GRANULARITIES:
            add("real against fake", f"{format}-{granularity}-fake", f"{format}-{granularity}-real")
        for tool in ("ours", "torchao"):
            add("smoothed against plain", f"{format}-{tool}", f"{format}-smooth-{tool}")
        for kind in (format, f"{format}-smooth"):
            add("torchao against ours", f"{kind}-ours", f"{kind}-torchao")
    return pairs


def pairs_of(findings: Findings) -> list[dict[str, Any]]:
    """Return every comparison: the second's figures less the first's. Those of a family hold together:
    intervals by Bonferroni, p-values by Holm."""
    rows, made = [], comparisons(findings)
    for family, first, second in made:
        row: dict[str, Any] = {"family": family, "first": first, "second": second}
        alpha = ALPHA / sum(other == family for other, *_ in made)
        if first in findings.text:
            row |= asdict(text_difference(findings.text[first], findings.text[second], 1 - alpha))
        for method in METHODS:
            sides = [findings.right[name][method] for name in (first, second)]
            difference = _difference(*sides, level=1 - alpha, alpha=alpha)
            row |= {f"{method}_{key}": value for key, value in difference.items()}
        rows.append(row)
    for family in dict.fromkeys(row["family"] for row in rows):
        members = [row for row in rows if row["family"] == family]
        for method in METHODS:
            for row, p in zip(members, holm([m[f"{method}_p_value"] for m in members]), strict=True):
                row[f"{method}_p_holm"] = p
    return rows


def uneven_groups(findings: Findings) -> dict[str, list[int]]:
    """Return by granularity the lengths of rows that its groups do not divide: there the last group is
    shorter."""
    uneven: dict[str, set[int]] = {}
    for name, facts in findings.facts.items():
        granularity = findings.variants[name].granularity
        group = Granularity.parse(GRANULARITIES[granularity]).group_size if granularity else None
        if granularity and group:
            uneven.setdefault(granularity, set()).update(c for c in facts["columns"] if c % group)
    return {granularity: sorted(columns) for granularity, columns in uneven.items() if columns}
