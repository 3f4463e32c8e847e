"""Replicated models compared with their controls (`replication/controls.py`) on the same windows.

A replica *beats* a control (`true`) where the interval of the difference of their KL to the base, paired by
window, lies below 0; `false` where it lies above 0, None where it holds 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from bitassay.data.windows import Protocol
from bitassay.evaluation.divergence import TokenScores
from bitassay.evaluation.quality import score_text, text_difference
from bitassay.models.identity import identity
from bitassay.models.walk import decoder_layers
from bitassay.quantization.pipeline import quantize_cached
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.replication.controls import REPLICA, Place, with_controls
from bitassay.quantization.runtime.model import bits_per_weight
from bitassay.record.progress import Progress, silent


def pair(place: Place, replica: str, text: Mapping[str, Sequence[TokenScores]]) -> dict[str, Any]:
    """Return a row that compares the variant `replica` with the control at `place`: replica less control."""
    difference = text_difference(text[place.variant], text[replica])
    return {
        "group": place.group,
        "role": place.role,
        "replica": replica,
        "control": place.variant,
        **asdict(difference),
        "beats": beats(difference.kl_ci),
    }


def beats(interval: tuple[float, float] | None) -> bool | None:
    """Return whether the interval of a difference, replica less control, says that the replica has the lower
    value: True, False, or None where it does not tell."""
    if interval is None or interval[0] <= 0 <= interval[1]:
        return None
    return interval[1] < 0


def evaluate_with_controls(
    base: PreTrainedModel, recipe: Recipe, protocol: Protocol, *, progress: Progress = silent
) -> list[dict[str, Any]]:
    """Return a row for the replicated model and one for each of its controls, each with an `evaluation`
    against `base`.

    role: `replica`, or in what the control equals it. gain: the control's perplexity less the replica's, with
    its interval; beats: whether the replica has the lower KL (`beats`).
    """
    recipes, controls = with_controls([recipe], len(decoder_layers(base)))
    models = {item.name: quantize_cached(base, item, progress=progress) for item in recipes}
    text = score_text(base, models, protocol, progress)
    base_name, rows = identity(base).name, []
    for place in (Place(recipe.name, REPLICA, recipe.name), *controls):
        name = place.variant
        row: dict[str, Any] = {
            "role": place.role,
            "recipe": name,
            "bits_per_weight": bits_per_weight(models.get(name, base)),
            "evaluation": text.evaluation(name, f"{base_name} ({name})", base_name),
            "gain": None,
            "gain_ci": None,
            "beats": None,
        }
        if place.role != REPLICA:
            # The control less the replica: positive where the replica predicts the text better.
            paired = pair(place, recipe.name, text.scores)
            ends = paired["ppl_ci"]
            row |= {"gain": -paired["ppl"], "beats": paired["beats"]}
            row["gain_ci"] = None if ends is None else (-ends[1], -ends[0])
        rows.append(row)
    return rows
