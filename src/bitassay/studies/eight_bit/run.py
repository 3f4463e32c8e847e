"""Run an INT8/FP8 study (`eight_bit.py`): its cells, speeds and products, then what they say.

    OUT/plan.json, parts/    as every run folder (`record/run.py`); a file for what each cell made
    OUT/bench/               speeds, which are measured alone, after all cells
    OUT/run.json             rows by variant, pairs, claims

A killed run goes on where it stopped. Differences are paired by window or by question. p-values are exact
McNemar's, adjusted by Holm within a family of comparisons and a way of asking; intervals of a family's
comparisons hold together at 95 %, and `visible` differences are those that its tests would show.
"""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from bitassay.bench.matmul import matmul
from bitassay.bench.models import bench
from bitassay.evaluation.quality import INTERVAL, INTERVALS, PAIR_INTERVALS, summarise, text_difference
from bitassay.evaluation.statistics import ALPHA, TANGO, WILSON, holm, paired_difference, wilson_interval
from bitassay.evaluation.tasks.mmlu import is_letter
from bitassay.evaluation.tasks.registry import require_lm_eval
from bitassay.quantization.recipe.granularity import Granularity
from bitassay.record.environment import environment
from bitassay.record.files import write_json
from bitassay.record.progress import Progress, silent
from bitassay.record.run import RunFolder
from bitassay.studies.cells import METHODS, read_facts, read_text
from bitassay.studies.claims import judged
from bitassay.studies.crew import do_study
from bitassay.studies.eight_bit.claims import CLAIMS
from bitassay.studies.eight_bit.study import FORMATS, GRANULARITIES, EightBitFindings, find_study
from bitassay.studies.eight_bit.torchao_models import require_torchao
from bitassay.studies.variants import VariantPlan

Pair = tuple[str, str, str]  # family, first variant, second variant


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
    """Run a study; the run (the content of run.json) and its folder. repeats: rounds of timing. The rest is
    as in `do_study`, whose errors it raises."""
    require_lm_eval()
    if any(variant.torchao for variant in plan.variants):
        require_torchao()
    about = find_study(plan.study).about
    folder, head = do_study(plan, "eight-bit", about, out=out, jobs=jobs, ray=ray, progress=progress)
    asked = folder.plan["questions"]
    found = findings(folder, plan)
    if plan.speed:
        found.speed, found.products = _speed(plan, folder, repeats, progress)
    run = {
        **head,
        "protocols": {
            "text": plan.protocol.id if plan.protocol else None,
            "questions": question_protocol(plan, asked["whole"]),
            "questions_source": asked["source"],
        },
        "interval": "95 %, of pairs for all of a family together. Of text: "
        f"{INTERVAL.removeprefix('95 %, ')}. Of questions: Wilson's of an accuracy, Tango's of a paired "
        "difference",
        "intervals": {"rows": INTERVALS | _QUESTIONS, "pairs": PAIR_INTERVALS | _QUESTIONS},
        "rows": rows_of(found),
        "pairs": pairs_of(found),
        "claims": judged(found, CLAIMS),
        "uneven_groups": uneven_groups(found),
        "speed": found.speed,
        "products": found.products,
        "environment": environment(plan.device),
    }
    write_json(folder.path / "run.json", run)
    return run, folder.path


def question_protocol(plan: VariantPlan, whole: bool) -> str:
    """Everything about the questions that changes the number."""
    spread = f"{len(plan.subjects)} subjects"
    return f"mmlu/5-shot[n={plan.questions} over {spread}{'' if whole else ' of the bundled slice'}]"


def findings(folder: RunFolder, plan: VariantPlan) -> EightBitFindings:
    """Read what all cells made."""
    found = EightBitFindings(plan, {variant.name: variant for variant in plan.variants})
    for place, (name, variant) in enumerate(found.variants.items()):
        asked = folder.part(f"questions-{place:02d}", dict)
        if "refused" in asked:
            found.refused[name] = asked["refused"]
            continue
        found.facts[name], found.asked[name] = read_facts(folder, variant), asked
        found.right[name] = {method: asked[method]["right"] for method in METHODS}
        if plan.blocks:
            text = read_text(folder, plan, variant)
            assert not isinstance(text, str)
            found.text[name] = text
    return found


def _speed(
    plan: VariantPlan, folder: RunFolder, repeats: int, progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    recipes = [variant.recipe for variant in plan.variants if variant.granularity == "row" and variant.recipe]
    timed, _ = bench(
        plan.model,
        recipes,
        out=folder.path / "bench",
        batches=(1, 8),
        contexts=(1024,),
        repeats=repeats,
        dtype=plan.dtype,
        device=plan.device,
        progress=progress,
        trust_remote_code=plan.trust_remote_code,
        attention=plan.attention,
    )
    products = folder.part(
        "products", lambda: matmul(repeats=0, seed=plan.seed, device=plan.device, progress=progress)
    )
    return timed, products


def rows_of(found: EightBitFindings) -> list[dict[str, Any]]:
    """A row a variant, in the study's order, which is no ranking; the base is the first."""
    adjusted = {method: _against_base(found, method) for method in METHODS}
    rows = []
    for name, variant in found.variants.items():
        row: dict[str, Any] = {
            "variant": name,
            "format": variant.format,
            "granularity": variant.granularity,
            "kind": variant.kind,
            "tool": None if variant.format is None else "torchao" if variant.torchao else "bitassay",
            "refused": found.refused.get(name),
        }
        if name in found.asked:
            facts = found.facts[name]
            row |= {key: facts.get(key) for key in ("recipe_id", "bits_per_weight", "size_bytes")}
            if name in found.text:
                row |= summarise(found.text[name], found.text[found.plan.base]).to_dict()
            for method in METHODS:
                row |= {f"{method}_{key}": value for key, value in adjusted[method][name].items()}
            row["unparsed"] = _unparsed(found.asked[name]["generate"]["answers"])
        rows.append(row)
    return rows


def _against_base(found: EightBitFindings, method: str) -> dict[str, dict[str, Any]]:
    """Accuracy of every variant, and its difference from the base's."""
    base = found.right[found.plan.base][method]
    accuracies = {
        name: {
            "n": len(base),
            "acc": sum(r[method]) / len(base),
            "acc_ci": wilson_interval(sum(r[method]), len(base)),
        }
        for name, r in found.right.items()
    }
    others = [name for name in found.right if name != found.plan.base]
    differences = {
        name: paired_difference(base, found.right[name][method], alpha=ALPHA / len(others)) for name in others
    }
    p_values = holm([one.p_value for one in differences.values()])
    for (name, one), p_holm in zip(differences.items(), p_values, strict=True):
        accuracies[name] |= {
            "difference": one.difference,
            "difference_ci": one.interval,
            "p_value": one.p_value,
            "p_holm": p_holm,
            "visible_difference": one.visible_difference,
        }
    return accuracies


def _unparsed(answers: Sequence[Sequence[str]]) -> int:
    """How many generated texts are none of the letters."""
    return sum(not is_letter(str(given[0])) for given in answers)


def comparisons(found: EightBitFindings) -> list[Pair]:
    """Which variants are compared with which, by family; only those that there are."""
    pairs: list[Pair] = []

    def add(family: str, first: str, second: str) -> None:
        if found.has(first, second):
            pairs.append((family, first, second))

    for name, variant in found.variants.items():
        fake = name.replace("-real", "-fake")  # real ones are compared with these, below
        if variant.format == "fp8" and (name == fake or not found.has(fake)):
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


def pairs_of(found: EightBitFindings) -> list[dict[str, Any]]:
    """Every comparison: the second's figures less the first's. Those of a family hold together: intervals by
    Bonferroni, p-values by Holm."""
    rows, made = [], comparisons(found)
    for family, first, second in made:
        row: dict[str, Any] = {"family": family, "first": first, "second": second}
        alpha = ALPHA / sum(other == family for other, *_ in made)
        if first in found.text:
            row |= asdict(text_difference(found.text[first], found.text[second], 1 - alpha))
        for method in METHODS:
            sides = (found.right[name][method] for name in (first, second))
            one = paired_difference(*sides, level=1 - alpha, alpha=alpha)
            row |= {
                f"{method}_difference": one.difference,
                f"{method}_difference_ci": one.interval,
                f"{method}_p_value": one.p_value,
                f"{method}_visible_difference": one.visible_difference,
            }
        rows.append(row)
    for family in dict.fromkeys(row["family"] for row in rows):
        members = [row for row in rows if row["family"] == family]
        for method in METHODS:
            for row, p in zip(members, holm([m[f"{method}_p_value"] for m in members]), strict=True):
                row[f"{method}_p_holm"] = p
    return rows


def uneven_groups(found: EightBitFindings) -> dict[str, list[int]]:
    """By granularity, which lengths of rows its groups do not divide: there the last group is shorter."""
    uneven: dict[str, set[int]] = {}
    for name, facts in found.facts.items():
        granularity = found.variants[name].granularity
        group = Granularity.parse(GRANULARITIES[granularity]).group_size if granularity else None
        if granularity and group:
            uneven.setdefault(granularity, set()).update(c for c in facts["columns"] if c % group)
    return {granularity: sorted(columns) for granularity, columns in uneven.items() if columns}
