"""Run a study of replication (`study.py`): its cells, speeds, then what they say.

    OUT/plan.json, parts/    as every run folder (`record/run.py`); a file for what each cell made
    OUT/bench/GROUP/         speeds: a group's models take turns with the base, alone, after all cells
    OUT/run.json             rows, pairs of replicas and controls, drafts, claims

What a replica beats is in `evaluation/controls.py`. Grades are the proposal's.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitassay.bench.timing import RATIO, ratio_of
from bitassay.data.corpora import corpus
from bitassay.errors import find
from bitassay.evaluation.controls import pair
from bitassay.evaluation.quality import INTERVAL, INTERVALS, PAIR_INTERVALS, summarise
from bitassay.evaluation.statistics import LOG, LOGIT, log_interval, logit_interval, mean_of
from bitassay.models.config import layer_count
from bitassay.models.source import resolve
from bitassay.quantization.recipe.recipe import BASE
from bitassay.quantization.replication.controls import KINDS, REPLICA, Place
from bitassay.record.environment import environment
from bitassay.record.progress import Progress, silent
from bitassay.record.result import write_run
from bitassay.record.run import RunFolder
from bitassay.studies.cells import Cell, read_findings
from bitassay.studies.claims import judged, read_claims
from bitassay.studies.replication.study import STUDIES, replication_plan
from bitassay.studies.run import do_study, time_variants
from bitassay.studies.variants import Findings, VariantPlan

CLAIMS = read_claims(Path(__file__).with_name("claims.yaml"))
GRADES = {0.5: "excellent", 1.0: "good", 2.0: "acceptable"}  # by the increase of perplexity
ONE_BIT_GRADES = GRADES | {10.0: "acceptable for 1 bit"}

Row = dict[str, Any]


def run_replication(
    study: str,
    model: str,
    *,
    out: Path | None = None,
    jobs: int | None = None,
    ray: str | None = None,
    repeats: int = 3,
    progress: Progress = silent,
    **options: Any,
) -> tuple[dict[str, Any], Path]:
    """Run a study on MODEL; return the run (the content of run.json) and its folder. repeats: rounds of
    timing. `options` go to `replication_plan`; the rest is as in `do_study`. Raises as these do."""
    about = find(STUDIES, study, "study of replication").about
    source = resolve(model, progress)
    layers = layer_count(source.folder, trust_remote_code=options.get("trust_remote_code", False))
    plan, places = replication_plan(study, model, layers, **options)
    folder, head = do_study(plan, "replication", about, out=out, jobs=jobs, ray=ray, progress=progress)
    findings = read_findings(folder, plan)
    speed = _speed(plan, places, folder, repeats, progress) if plan.speed else {}
    pairs = pairs_of(findings, places, speed)
    assert plan.protocol is not None
    run = write_run(
        folder,
        **head,
        protocol=plan.protocol.id,
        corpus_source=corpus(plan.protocol.corpus).source,
        interval=INTERVAL,
        intervals={
            "rows": INTERVALS | {"decode_ratio_ci": RATIO},
            "pairs": PAIR_INTERVALS,
            "drafts": {"acceptance_ci": LOGIT, "speed_bound_ci": LOG, "speed_ci": RATIO},
        },
        rows=[row_of(findings, place, pairs, speed) for place in places],
        pairs=pairs,
        drafts=drafts_of(folder, plan),
        claims=judged(findings, CLAIMS.get(study, ())),
        environment=environment(plan.device),
    )
    return run, folder.path


def row_of(findings: Findings, place: Place, pairs: Sequence[Row], speed: dict[str, Row]) -> Row:
    """Return one line of the table."""
    facts, timed = findings.facts[place.variant], speed.get(place.variant, {})
    quality = summarise(findings.text[place.variant], findings.text[findings.plan.base]).to_dict()
    kept = ("recipe_id", "bits_per_weight", "size_bytes", "passes", "flop_per_token", "bytes_per_token")
    group_pairs = [pair for pair in pairs if pair["group"] == place.group and place.role == REPLICA]
    by_kind = {kind: pair["beats"] for pair in group_pairs for kind in pair["role"].split(", ")}
    return {
        **asdict(place),
        **{key: facts[key] for key in kept},
        **quality,
        "grade": grade(quality["ppl_delta"], facts["bits_per_weight"]),
        **{key: timed.get(key) for key in ("decode_tok_s", "decode_ratio", "decode_ratio_ci")},
        "peak_bytes": timed.get("peak_device_bytes") or timed.get("peak_resident_bytes"),
        "controls": list(by_kind),
        **{f"beats_{kind.replace('-', '_')}": by_kind.get(kind) for kind in KINDS},
    }


def grade(ppl_delta: float, bits_per_weight: float) -> str | None:
    """Return what the proposal calls such an increase of perplexity; None where it has no word for it. Below
    2 stored bits there is one more: three planes of 1 bit are no 1-bit model."""
    grades = ONE_BIT_GRADES if bits_per_weight < 2 else GRADES
    return next((name for most, name in grades.items() if ppl_delta < most), None)


def pairs_of(findings: Findings, places: Sequence[Place], speed: dict[str, Row]) -> list[Row]:
    """Return every replica less each of its controls. read_ratio: the weights that the control reads for a
    token, over the replica's."""
    replicas = {place.group: place.variant for place in places if place.role == REPLICA}
    rows = []
    for place in places:
        replica = replicas.get(place.group)
        if replica is None or place.role == REPLICA:
            continue
        control_bytes, replica_bytes = (
            findings.facts[name]["bytes_per_token"] - findings.facts[name]["head_bytes"]
            for name in (place.variant, replica)
        )
        rows.append(
            pair(place, replica, findings.text)
            | {
                "read_ratio": control_bytes / replica_bytes,
                "decode_tok_s": speed.get(replica, {}).get("decode_tok_s"),
                "control_decode_tok_s": speed.get(place.variant, {}).get("decode_tok_s"),
            }
        )
    return rows


def _speed(
    plan: VariantPlan, places: Sequence[Place], folder: RunFolder, repeats: int, progress: Progress
) -> dict[str, Row]:
    """Timings by variant. Each group's models and the base take turns; ratios are to the base."""
    recipes, speed = {variant.name: variant.recipe for variant in plan.variants}, dict[str, Row]()
    for group in dict.fromkeys(place.group for place in places):
        group_recipes = [
            recipe for p in places if p.group == group and (recipe := recipes[p.variant]) is not None
        ]
        if group_recipes:
            cells = {"batches": (1,), "contexts": (), "repeats": repeats}
            run = time_variants(plan, group_recipes, folder.path / "bench" / group, progress, **cells)
            rows = {row["model"]: row for row in run["rows"]}
            speed = {plan.base: rows.pop(BASE)} | speed | rows
    return speed


def drafts_of(folder: RunFolder, plan: VariantPlan) -> list[Row]:
    """Return a row for each length of drafts: means over texts with their intervals; speed is the ratio of
    seconds without and with drafts, speed_bound that of bytes read."""
    rows = []
    for which in range(len(plan.drafts)):
        content = folder.part(Cell("drafts", which).name, dict)
        texts = content["texts"]
        acceptance = mean_of([text["accepted"] / max(1, text["drafted"]) for text in texts])
        bound = mean_of([text["plain_bytes_per_token"] / text["bytes_per_token"] for text in texts])
        ratio = ratio_of([text["plain_seconds"] for text in texts], [text["seconds"] for text in texts])
        rows.append(
            {
                "draft_tokens": content["draft_tokens"],
                "texts": len(texts),
                "identical": sum(text["identical"] for text in texts),
                "acceptance": acceptance.value,
                "acceptance_ci": logit_interval(acceptance),
                "speed_bound": bound.value,
                "speed_bound_ci": log_interval(bound),
                "speed": ratio.value,
                "speed_ci": ratio.interval,
            }
        )
    return rows
