"""The studies of replication: does a layer that runs more than once repair what rounding broke?

    control-table   the proposal's table: baseline, GPTQ at 4 bits, four ways to replicate at 2 bits and 1
    phase1          a 2-bit baseline; the same codes again, plain and damped, by the number of copies
    phase2          copies that differ: scales, clipping, offsets, noise, seeds, residual codes, group sizes
    phase3          chosen layers, as many first and last ones; rotation before copies and in each
    phase4          one bit and ternary, with what repaired most
    uses            what else copies could be good for: input grids, rotations, stopping early, loops
    planes          one checkpoint in residual codes, read to several depths, and drafts by its first plane

A study is rows: a *group* is a recipe, and each one with copies brings its controls along
(`replication/controls.py`) as rows of their own. Equal models are one variant, measured once. Source:
the layer-replication proposal, sections 4.1 and 4.3; `replication_claims.py` holds what its
theory predicts. Weights shared across layers are not among them: `benchmarks/sharing.py` says why.
"""

from dataclasses import dataclass
from typing import Any

from bitassay.data.windows import Protocol
from bitassay.errors import BitassayError, suggestion
from bitassay.quantization.recipe.recipe import BASE, Recipe
from bitassay.quantization.recipe.replication import Chosen
from bitassay.quantization.replication.controls import REPLICA, Place, changes_nothing, controls
from bitassay.studies.variants import Reading, Variant, VariantPlan

PLAIN = "plain"
DEFAULT_PROTOCOL = Protocol(window_tokens=1024, windows=16)
THRESHOLDS = (1.0, 2.5, 4.0)  # of the entropy gate, in nats
BLOCK = 8  # a variant is made anew for each block

W2 = {"format": "int2", "granularity": "g64", "symmetric": False, "scale": "mse"}
EVEN = {"format": "int2", "granularity": "g64", "offset": 0.5}  # the levels -1.5 ... 1.5: two planes mesh
W1 = {"format": "binary", "granularity": "g64"}
TERNARY = {"format": "ternary", "granularity": "g64"}
SOLVED = {"gptq": {}, "calibration": {"samples": 16}}  # few: a study has a dozen such models
APART = SOLVED | {"gptq": {"planes": "apart"}}
INT8 = {"activations": {"format": "int8"}}
RESIDUAL = {"how": "parallel", "of": "linear", "differ": "residual"}
MESHED = RESIDUAL | {"values": [1.3, 1]}


@dataclass(frozen=True)
class Group:
    """A recipe under the name that its rows have, and how it is read; None: the base model."""

    name: str
    recipe: Recipe | None = None
    reading: Reading | None = None


@dataclass(frozen=True)
class Study:
    """A row of the table above. drafts: lengths of drafts by the first plane."""

    name: str
    about: str
    groups: tuple[Group, ...]
    speed: bool = False
    drafts: tuple[int, ...] = ()


def group(
    name: str, weights: dict[str, Any] | None, copies: dict[str, Any] | None = None, **parts: Any
) -> Group:
    """Return a group of a recipe that is called like it."""
    fields = {"name": name, "weights": weights, **parts}
    if copies is not None:
        fields["replication"] = copies
    return Group(name, Recipe.model_validate(fields))


def average(format: str, **how: Any) -> dict[str, Any]:
    """Parallel copies of linears, averaged."""
    return {"how": "parallel", "of": "linear", "differ": format, **how}


def chosen(by: str, share: float = 0.3) -> dict[str, Any]:
    """Return the fields of a replication of the layers that are chosen by a measure."""
    return {"layers": {"by": by, "share": share}}


def _control_table() -> tuple[Group, ...]:
    fitted = {"coefficients": "fitted"}
    return (
        Group("Baseline"),
        group("GPTQ-4bit", {"format": "int4", "granularity": "g64", "symmetric": False}, **SOLVED),
        group("Simple-2bit", W2, {}, **SOLVED, **INT8),
        group("Selective-2bit", W2, fitted | chosen("kl"), **SOLVED, **INT8),
        group("Rotated-2bit", W2, fitted | chosen("kl"), rotation={}, **SOLVED, **INT8),
        group("Extreme-1bit", W1, RESIDUAL | {"copies": 3}, rotation={}, **SOLVED, **INT8),
    )


def _phase1() -> tuple[Group, ...]:
    damped = {"coefficients": "mean"}
    return (
        Group(BASE),
        group("w2", W2),
        group("w2-gptq", W2, **SOLVED),
        group("w4", W2 | {"format": "int4"}),
        *(group(f"serial-{n}", W2, {"copies": n}) for n in (2, 3, 4)),
        *(group(f"damped-{n}", W2, damped | {"copies": n}) for n in (2, 3)),
        *(group(f"serial-{n}-gptq", W2, {"copies": n}, **SOLVED) for n in (2, 3, 4)),
        *(group(f"damped-{n}-gptq", W2, damped | {"copies": n}, **SOLVED) for n in (2, 3, 4)),
        *(group(f"fitted-{n}-gptq", W2, {"coefficients": "fitted", "copies": n}, **SOLVED) for n in (2, 3)),
        group("damped-layer-2-gptq", W2, damped | {"layers": [2]}, **SOLVED),
        group("damped-2-dense", None, damped),
        group("damped-layer-2-dense", None, damped | {"layers": [2]}),
    )


def _phase2() -> tuple[Group, ...]:
    at = [(size, W2 | {"granularity": size}) for size in ("g32", "g128")]
    return (
        Group(BASE),
        group("w2", W2),
        group("w3", W2 | {"format": "int3"}),
        group("w4", W2 | {"format": "int4"}),
        group("w4-g32", W2 | {"format": "int4", "granularity": "g32"}),  # what two copies store
        group("scale-2", W2, average("scale", values=[0.9, 1.1])),
        group("clip-2", W2, average("clip", values=[97.0, 99.9])),
        *(group(f"offset-{n}", W2, average("offset", copies=n)) for n in (2, 3, 4)),
        *(group(f"offset-2-{size}", weights, average("offset")) for size, weights in at),
        group("offset-2-weighted", W2, average("offset", coefficients=[0.6, 0.4])),
        group("noise-2", W2, average("noise", values=[0.0, 0.3])),
        group("seed-2", W2, average("seed")),
        group("residual-2", W2, RESIDUAL),
        group("residual-2-meshed", EVEN, MESHED),
        group("offset-2-layers", W2, {"how": "parallel", "differ": "offset"}),
        group(
            "offset-2-fitted",
            W2,
            {"how": "parallel", "differ": "offset", "coefficients": "fitted"},
            calibration={"samples": 16},
        ),
        group("offset-2-serial", W2, {"differ": "offset", "coefficients": "mean"}),
    )


def _phase3() -> tuple[Group, ...]:
    listed = RESIDUAL | {"layers": {0: 2, 1: 2, 2: 2}}
    there = {"r1": "online", "layers": [0, 1, 2]}
    ends = {"first": {"start": 0, "end": 0.3}, "last": {"start": 0.7, "end": 1}}  # as many as are chosen
    return (
        Group(BASE),
        group("w2-gptq", W2, **SOLVED),
        group("w2-gptq-rotated", W2, rotation={}, **SOLVED),
        *(group(f"residual-{by}", EVEN, MESHED | chosen(by), **SOLVED) for by in ("error", "kl", "massive")),
        *(
            group(f"residual-{end}", EVEN, MESHED | {"layers": share}, **SOLVED)
            for end, share in ends.items()
        ),
        group("residual-front", EVEN, RESIDUAL | {"layers": "progressive"}, **SOLVED),
        group("residual-listed", EVEN, listed, **SOLVED),
        group("residual-listed-rotated", EVEN, listed, rotation=there, **SOLVED),
        group("residual-rotated", EVEN, MESHED, rotation={}, **SOLVED),
        group("residual-kl-rotated", EVEN, MESHED | chosen("kl"), rotation={}, **SOLVED),
        group("w2", W2),
        group("rotations-2", W2, average("rotation")),
    )


def _phase4() -> tuple[Group, ...]:
    return (
        Group(BASE),
        group("w1", W1),
        group("w1-gptq", W1, **SOLVED),
        group("w1.58-gptq", TERNARY, **SOLVED),
        group("serial-w1", W1, {"coefficients": "mean"}),
        group("seed-w1-4", W1, average("seed", copies=4)),
        group("rotations-w1-4", W1, average("rotation", copies=4)),
        *(group(f"residual-w1-{n}", W1, RESIDUAL | {"copies": n}, **SOLVED) for n in (2, 3, 4)),
        group("residual-w1-3-apart", W1, RESIDUAL | {"copies": 3}, **APART),
        group("residual-w1-3-rotated", W1, RESIDUAL | {"copies": 3}, rotation={}, **SOLVED),
        group("residual-w1.58-2", TERNARY, RESIDUAL, **SOLVED),
        group("residual-w1.58-2-rotated", TERNARY, RESIDUAL, rotation={}, **SOLVED),
    )


def _uses() -> tuple[Group, ...]:
    grids, inputs = average("inputs"), {n: {"activations": {"format": f"int{n}"}} for n in (4, 6, 8)}
    again = {"copies": 3, "coefficients": [1, 0.1, 0.1]}  # a token may stop behind the layer as it is
    stops = again | {"stop": {"norm": 0.3, "cosine": 0.05}}
    middle = {"of": "block", "layers": "middle"}
    loops = {"loop-2": middle | {"coefficients": "mean"}, "loop-2-again": middle | {"coefficients": [1, 0.1]}}
    return (
        Group(BASE),
        *(group(f"w16a{n}", None, **one) for n, one in inputs.items()),
        *(group(f"w16a4-grids-{n}", None, grids | {"copies": n}, **inputs[4]) for n in (2, 4)),
        *(group(f"w2a{n}", W2, **SOLVED, **one) for n, one in inputs.items()),
        *(group(f"w2a4-grids-{n}", W2, grids | {"copies": n}, **SOLVED, **inputs[4]) for n in (2, 4)),
        group("w16a4-passes-2", None, {"how": "parallel", "differ": "inputs"}, **inputs[4]),
        *(group(f"rotations-{n}", W2, average("rotation", copies=n)) for n in (2, 4)),
        group("again-3-gptq", W2, again, **SOLVED),
        group("stopping-3-gptq", W2, stops, **SOLVED),
        group("stopping-3-dense", None, stops),
        *(group(f"{name}-dense", None, loop) for name, loop in loops.items()),
        *(group(f"{name}-gptq", W2, loop, **SOLVED) for name, loop in loops.items()),
        group("budget-3-gptq", W2, stops | {"stop": {"norm": 0, "cosine": 0, "budget": 8}}, **SOLVED),
    )


def _planes() -> tuple[Group, ...]:
    whole = group("both", EVEN, MESHED, **SOLVED)
    apart = group("apart", EVEN, RESIDUAL, **APART)
    digits = group("digits", EVEN, RESIDUAL | {"differ": "digits"}, **SOLVED)
    depths = {
        "plane-1": Reading(),
        **{f"gated-{theta:g}": Reading(threshold=theta) for theta in THRESHOLDS},
        **{f"random-{theta:g}": Reading(threshold=theta, seed=0) for theta in THRESHOLDS},
        **{f"layers-{share:.0%}": Reading(Chosen(by="kl", share=share)) for share in (0.2, 0.4, 0.6, 0.8)},
    }
    mixed = {"formats": ["int2", "int3", "int4"], "samples": 8}
    return (
        Group(BASE),
        whole,
        *(Group(name, whole.recipe, reading) for name, reading in depths.items()),
        apart,
        Group("apart-plane-1", apart.recipe, Reading()),
        digits,
        *(
            Group(f"digits-{name}", digits.recipe, depths[name])
            for name in ("plane-1", "gated-2.5", "layers-40%")
        ),
        *(group(f"uniform-{n}", W2 | {"format": f"int{n}"}, **SOLVED) for n in (2, 3, 4)),
        *(
            group(f"mixed-{bits:g}", W2, mixed={"bits": bits, **mixed}, **SOLVED)
            for bits in (2.7, 3.15, 3.6, 4.05)
        ),
    )


STUDIES = {
    study.name: study
    for study in (
        Study(
            "control-table",
            "replicated models and their controls, as in the proposal",
            _control_table(),
            True,
        ),
        Study("phase1", "the same 2-bit codes again: does it help, and how often", _phase1()),
        Study("phase2", "copies at 2 bits that differ: grids, clipping, noise, residual codes", _phase2()),
        Study("phase3", "chosen layers, rotation before copies and in each, at 2 bits", _phase3()),
        Study("phase4", "one bit and ternary with residual codes and rotation", _phase4()),
        Study("uses", "input grids, rotations in copies, stopping early, loops over a block", _uses()),
        Study(
            "planes", "one checkpoint in residual codes read to several depths", _planes(), drafts=(2, 4, 8)
        ),
    )
}


def arranged(groups: tuple[Group, ...], layers: int) -> tuple[tuple[Variant, ...], list[Place]]:
    """Return the variants, each model once and the base first, and the rows, each group with its controls,
    for a model of so many layers."""
    found: dict[tuple[str | None, Reading | None], Variant] = {(None, None): Variant(groups[0].name)}
    places = []

    def add(name: str, role: str, recipe: Recipe | None, reading: Reading | None = None) -> None:
        key = (None if recipe is None or changes_nothing(recipe) else recipe.recipe_id, reading)
        variant = found.setdefault(
            key, Variant(recipe.name if recipe and not reading else name, recipe=recipe, reading=reading)
        )
        places.append(Place(name, role, variant.name))

    for one in groups:
        plain = [] if one.recipe is None or one.reading else controls(one.recipe, layers)
        add(one.name, REPLICA if plain else PLAIN, one.recipe, one.reading)
        for control in plain:
            add(one.name, ", ".join(control.kinds), control.recipe)
    return tuple(found.values()), places


def replication_plan(
    study: str,
    model: str,
    layers: int,
    protocol: Protocol = DEFAULT_PROTOCOL,
    *,
    only: tuple[str, ...] = (),
    **how: Any,
) -> tuple[VariantPlan, list[Place]]:
    """Return the plan of a study and the places of its rows; with `only`, of these groups and the base alone.
    `how` are further fields of the plan. Raises BitassayError for what there is not."""
    found = find_study(study)
    names = [one.name for one in found.groups]
    if unknown := [name for name in only if name not in names]:
        raise BitassayError(f"{study} has no group {unknown[0]!r}; {suggestion(unknown[0], names)}")
    groups = tuple(one for place, one in enumerate(found.groups) if not (only and place) or one.name in only)
    variants, places = arranged(groups, layers)
    drafts = found.drafts if any(variant.reading for variant in variants) else ()
    plan = VariantPlan(study, model, variants, protocol, drafts=drafts, speed=found.speed, block=BLOCK, **how)
    return plan, places


def find_study(name: str) -> Study:
    """Return the study called `name`. Raises BitassayError that names the nearest."""
    if name not in STUDIES:
        raise BitassayError(f"no study of replication is called {name!r}; {suggestion(name, STUDIES)}")
    return STUDIES[name]
