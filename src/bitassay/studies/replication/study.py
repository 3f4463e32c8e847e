"""The studies of replication: does a layer that runs more than once repair what rounding broke?

    control-table   the proposal's table: baseline, GPTQ at 4 bits, four ways to replicate at 2 bits and 1
    phase1          a 2-bit baseline; the same codes again, plain and damped, by the number of copies
    phase2          copies that differ: scales, clipping, offsets, noise, seeds, residual codes, group sizes
    phase3          chosen layers, as many first and last ones; rotation before copies and in each
    phase4          one bit and ternary, with what repaired most
    uses            what else copies could be good for: input grids, rotations, stopping early, loops
    planes          one checkpoint in residual codes, read to several depths, and drafts by its first plane

They are rows of data, in `studies.yaml`: a *group* is a recipe, and each one with copies brings its controls
along (`quantization/replication/controls.py`) as rows of their own. Equal models are one variant, measured
once. Source: the layer-replication proposal (docs/sources.md), sections 4.1 and 4.3; `claims.yaml` holds what
its theory predicts. Weights shared across layers are not among them: `benchmarks/sharing.py` says why.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from bitassay.data.windows import Protocol
from bitassay.errors import BitassayError, find, suggestion
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.replication.controls import REPLICA, Place, changes_nothing, controls
from bitassay.record.files import read_yaml
from bitassay.studies.variants import Reading, Variant, VariantPlan

PLAIN = "plain"
DEFAULT_PROTOCOL = Protocol(window_tokens=1024, windows=16)
BLOCK = 8  # a variant is made anew for each block
_READING = TypeAdapter(Reading)


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


def read_study(name: str, content: Mapping[str, Any]) -> Study:
    """Return a study of `studies.yaml`."""
    groups: dict[str, Group] = {}
    for group, fields in content["groups"].items():
        reading = _READING.validate_python(fields["reading"]) if "reading" in fields else None
        recipe = None
        if "of" in fields:
            recipe = groups[fields["of"]].recipe
        elif fields:
            recipe = Recipe.model_validate({"name": group, **fields})
        groups[group] = Group(group, recipe, reading)
    drafts = tuple(content.get("drafts", ()))
    return Study(name, content["about"], tuple(groups.values()), content.get("speed", False), drafts)


CONTENT = read_yaml(Path(__file__).with_name("studies.yaml"))
STUDIES = {name: read_study(name, content) for name, content in CONTENT.items() if name != "presets"}


def arranged(groups: tuple[Group, ...], layers: int) -> tuple[tuple[Variant, ...], list[Place]]:
    """Return the variants, each model once and the base first, and the rows, each group with its controls,
    for a model of so many layers."""
    variants: dict[tuple[str | None, Reading | None], Variant] = {(None, None): Variant(groups[0].name)}
    places = []

    def add(name: str, role: str, recipe: Recipe | None, reading: Reading | None = None) -> None:
        key = (None if recipe is None or changes_nothing(recipe) else recipe.recipe_id, reading)
        variant = variants.setdefault(
            key, Variant(recipe.name if recipe and not reading else name, recipe=recipe, reading=reading)
        )
        places.append(Place(name, role, variant.name))

    for group in groups:
        plain = [] if group.recipe is None or group.reading else controls(group.recipe, layers)
        add(group.name, REPLICA if plain else PLAIN, group.recipe, group.reading)
        for control in plain:
            add(group.name, ", ".join(control.kinds), control.recipe)
    return tuple(variants.values()), places


def replication_plan(
    study: str,
    model: str,
    layers: int,
    protocol: Protocol = DEFAULT_PROTOCOL,
    *,
    only: tuple[str, ...] = (),
    **options: Any,
) -> tuple[VariantPlan, list[Place]]:
    """Return the plan of a study and the places of its rows; with `only`, of these groups and the base alone.
    `options` are further fields of the plan. Raises BitassayError for an unknown study or group."""
    row = find(STUDIES, study, "study of replication")
    names = [group.name for group in row.groups]
    if unknown := [name for name in only if name not in names]:
        raise BitassayError(f"{study} has no group {unknown[0]!r}; {suggestion(unknown[0], names)}")
    base, *others = row.groups
    variants, places = arranged((base, *(g for g in others if not only or g.name in only)), layers)
    drafts = row.drafts if any(variant.reading for variant in variants) else ()
    plan = VariantPlan(
        study, model, variants, protocol, drafts=drafts, speed=row.speed, block=BLOCK, **options
    )
    return plan, places
