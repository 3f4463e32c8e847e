"""The INT8/FP8 studies, task3.1 to task3.3: what do 8 bits cost, by format and by granularity?

    study     variants                                                              measured
    task3.1   {INT8, FP8} x {tensor, row, groups of 64 ... 512} x {fake, real}      perplexity, KL, MMLU
    task3.2   {INT8, FP8} x {tensor, row, groups of 128}, fake                      MMLU, speed, products
    task3.3   INT8 and FP8 with inputs rounded per token, plain and smoothed,       perplexity, KL, MMLU
              by torchao (no smoothed FP8: 0.18 has none) and by this package

beside the model as it is, in BF16 unless told otherwise, which is the first variant. Source: the
INT8/FP8 report (docs/sources.md); `claims.yaml` holds what it claims. *Fake* models hold dequantized weights,
*real* ones codes. A group that does not divide a row is shorter at the end, and nothing else changes; the
report says where that is so.

MMLU is asked with 5 examples, by likelihood (`direct`) and by greedy text (`generate`), the same questions of
every variant. `studies/cells.py` says what is measured in one piece, `record/jobs.py` who does it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bitassay.data.windows import Protocol
from bitassay.errors import BitassayError, find
from bitassay.quantization.recipe.recipe import BASE, Recipe
from bitassay.studies.parties import DTYPES
from bitassay.studies.torchao_models import ALPHA, SAMPLES
from bitassay.studies.variants import Kind, Variant, VariantPlan

FORMATS = {"int8": "int8", "fp8": "fp8_e4m3"}
GRANULARITIES = {"tensor": "tensor", "row": "channel", **{f"g{n}": f"g{n}" for n in (64, 128, 256, 512)}}
_PRECISIONS = {dtype: precision for precision, dtype in DTYPES.items()}
DEFAULT_PROTOCOL = Protocol(windows=16)


@dataclass(frozen=True)
class Study:
    """A row of the table above. model, questions: the report's own."""

    name: str
    about: str
    variants: tuple[Variant, ...]
    model: str = "Qwen/Qwen3-1.7B"
    questions: int = 200
    text: bool = True
    speed: bool = False


def weight_only(format: str, granularity: str, kind: Kind) -> Variant:
    """Return the variant that quantizes weights only."""
    name = f"{format}-{granularity}"
    weights = {"format": FORMATS[format], "granularity": GRANULARITIES[granularity]}
    recipe = Recipe.model_validate({"name": name, "weights": weights})
    return Variant(f"{name}-{kind}", format, granularity, kind, recipe)


def both_sides(format: str, smoothed: bool, torchao: bool) -> Variant:
    """Return the variant with one scale for each weight row and each token of the inputs. INT8 products
    are of codes, as torchao's are."""
    name = f"{format}{'-smooth' if smoothed else ''}-{'torchao' if torchao else 'ours'}"
    if torchao:
        return Variant(name, format, "row", "real", torchao=True, smoothed=smoothed)
    parts: dict[str, Any] = {
        "weights": {"format": FORMATS[format], "granularity": "channel", "scale_dtype": "float32"},
        "activations": {"format": FORMATS[format]},
    }
    if smoothed:
        parts["smoothing"] = {"method": "smoothquant", "places": ["inputs"], "alpha": ALPHA}
        parts["calibration"] = {"samples": SAMPLES}
    kind = "real" if format == "int8" else "fake"
    return Variant(name, format, "row", kind, Recipe(name=name, **parts), smoothed=smoothed)


STUDIES = {
    study.name: study
    for study in (
        Study(
            "task3.1",
            "INT8 and FP8 weights by granularity: perplexity, KL and MMLU, fake and real",
            (
                Variant(BASE),
                *(
                    weight_only(format, granularity, kind)
                    for format in FORMATS
                    for granularity in GRANULARITIES
                    for kind in ("fake", "real")
                ),
            ),
            questions=1000,
        ),
        Study(
            "task3.2",
            "speed of real INT8 and FP8 per row, MMLU of fake ones, errors of products",
            (
                Variant(BASE),
                *(
                    weight_only(format, granularity, "fake")
                    for format in FORMATS
                    for granularity in ("tensor", "row", "g128")
                ),
            ),
            text=False,
            speed=True,
        ),
        Study(
            "task3.3",
            "SmoothQuant INT8 and FP8 with rounded inputs, by torchao and by this package",
            (
                Variant(BASE),
                *(
                    both_sides(format, smoothed, torchao)
                    for torchao in (False, True)
                    for smoothed in (False, True)
                    for format in FORMATS
                    if not (torchao and smoothed and format == "fp8")
                ),
            ),
            model="Qwen/Qwen2.5-1.5B-Instruct",
        ),
    )
}


def eight_bit_plan(
    study: str,
    model: str,
    questions: int,
    protocol: Protocol = DEFAULT_PROTOCOL,
    only: Sequence[str] = (),
    **options: Any,
) -> VariantPlan:
    """Return the plan of a study; `options` are further fields of it. only: names of variants, or parts of
    them, such as "row" or "fp8"; the base is always there. Raises BitassayError for what makes no sense."""
    row = find(STUDIES, study, "INT8/FP8 study")
    if questions < 1:
        raise BitassayError(f"{questions} questions leave nothing to measure", "--limit 1 or more")
    text = protocol if row.text else None
    base, *others = _named(row.variants, only) if only else row.variants
    base = replace(base, name=_PRECISIONS.get(options.get("dtype", "bfloat16"), BASE))
    return VariantPlan(study, model, (base, *others), text, questions=questions, speed=row.speed, **options)


def _named(variants: Sequence[Variant], only: Sequence[str]) -> tuple[Variant, ...]:
    known = {variant.name: {variant.name, *variant.name.split("-")} for variant in variants}
    if unknown := [word for word in only if not any(word in words for words in known.values())]:
        raise BitassayError(
            f"--only {unknown[0]}: no variant is called that",
            f"one of {', '.join(known)}, or a part of a name",
        )
    return tuple(v for v in variants if v.name == BASE or known[v.name] & set(only))
