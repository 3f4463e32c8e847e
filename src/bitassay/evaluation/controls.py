"""Replicated models beside their controls (`replication/controls.py`), on the same windows: against these
alone a claim that copies repair what quantizing broke counts.

A replica *beats* a control where its KL to the base is lower beyond doubt, `false` where it is higher beyond
doubt, and None where the interval, paired by window, holds zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from bitassay.data.windows import Protocol
from bitassay.evaluation.divergence import TokenScores
from bitassay.evaluation.quality import Evaluation, score_windows, summarise, text_difference
from bitassay.models.identity import identity
from bitassay.models.walk import decoder_layers
from bitassay.models.windows import model_windows
from bitassay.quantization.pipeline import quantize_once
from bitassay.quantization.recipe.recipe import BASE, Recipe
from bitassay.quantization.replication.controls import REPLICA, Place, with_controls
from bitassay.quantization.runtime.model import bits_per_weight
from bitassay.record.progress import Progress, silent


def pair(place: Place, replica: str, text: Mapping[str, Sequence[TokenScores]]) -> dict[str, Any]:
    """The variant of that name less the control at `place`."""
    apart = text_difference(text[place.variant], text[replica])
    return {
        "group": place.group,
        "role": place.role,
        "replica": replica,
        "control": place.variant,
        **asdict(apart),
        "beats": beats(apart.kl_ci),
    }


def beats(interval: tuple[float, float] | None) -> bool | None:
    """Of a difference that is good where it is negative; None: not decided."""
    if interval is None or interval[0] <= 0 <= interval[1]:
        return None
    return interval[1] < 0


def evaluate_with_controls(
    base: PreTrainedModel,
    recipe: Recipe,
    protocol: Protocol,
    *,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """A row for the replicated model and one for each of its controls, each with an `evaluation` against
    `base`.

    role: `replica`, or in what the control equals it. gain: the control's perplexity less the replica's, and
    its interval; beats: whether the replica's KL is the lower one (`beats`; None where there is no interval).
    """
    recipes, places = with_controls([recipe], len(decoder_layers(base)))
    windows, source = model_windows(base, protocol)
    models = {one.name: quantize_once(base, one, progress=progress) for one in recipes}
    scores: dict[str, list[TokenScores]] = {name: [] for name in (BASE, *models)}
    for index, found in score_windows(base, models, windows):
        for name, score in found.items():
            scores[name].append(score)
        progress(f"evaluating {recipe.name} and its controls on {protocol.id}", index + 1, len(windows))
    rows = []
    for place in (Place(recipe.name, REPLICA, recipe.name), *places):
        name, is_base = place.variant, place.variant == BASE
        row: dict[str, Any] = {
            "role": place.role,
            "recipe": name,
            "bits_per_weight": bits_per_weight(base if is_base else models[name]),
            "evaluation": Evaluation(
                f"{identity(base).name} ({name})",
                identity(base).name,
                protocol.id,
                source,
                len(windows),
                windows.shape[0] * (windows.shape[1] - 1),
                summarise(scores[name], scores[BASE]),
            ),
            "gain": None,
            "gain_ci": None,
            "beats": None,
        }
        if place.role != REPLICA:
            # Of the control against the replica: positive where the replica predicts the text better.
            paired = summarise(scores[name], scores[recipe.name])
            row |= {"gain": paired.ppl_delta, "gain_ci": paired.ppl_delta_ci}
            row["beats"] = pair(place, recipe.name, scores)["beats"]
        rows.append(row)
    return rows
