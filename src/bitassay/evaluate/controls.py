"""A replicated model beside its controls, in one pass over the text: what it gains over each, with an
interval that is paired by window.

A claim that copies repair what quantizing broke counts against the controls alone (`replicate/controls.py`).
"""

from typing import Any

from transformers import PreTrainedModel

from bitassay.data.windows import Protocol, token_windows
from bitassay.evaluate.compare import BASE, Evaluation, score_windows, summarise
from bitassay.evaluate.divergence import TokenScores
from bitassay.models.load import identity, tokenizer
from bitassay.models.walk import decoder_layers
from bitassay.quantize.model import bits_per_weight
from bitassay.quantize.pipeline import quantize_once
from bitassay.quantize.recipe import Recipe
from bitassay.record.progress import Progress, silent
from bitassay.replicate.controls import controls

REPLICA = "replica"


def evaluate_with_controls(
    base: PreTrainedModel,
    recipe: Recipe,
    protocol: Protocol,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """A row for the replicated model and one for each of its controls, each with an `evaluation` against
    `base`.

    role: `replica`, or in what the control equals it. gain: the control's perplexity less the replica's, and
    its interval; beats: whether the replica is better beyond doubt (the whole interval above 0; None for one
    window).
    """
    plain = controls(recipe, len(decoder_layers(base)))
    recipes = {REPLICA: recipe, **{", ".join(control.kinds): control.recipe for control in plain}}
    models = {role: quantize_once(base, own, progress=progress) for role, own in recipes.items()}
    windows, source = token_windows(tokenizer(base), protocol)
    scores: dict[str, list[TokenScores]] = {name: [] for name in (BASE, *models)}
    for index, found in score_windows(base, models, windows):
        for name, score in found.items():
            scores[name].append(score)
        progress(f"evaluating {recipe.name} and its controls on {protocol.id}", index + 1, len(windows))
    rows = []
    for role, model in models.items():
        row: dict[str, Any] = {
            "role": role,
            "recipe": recipes[role].name,
            "bits_per_weight": bits_per_weight(model),
            "evaluation": Evaluation(
                f"{identity(base).name} ({recipes[role].name})",
                identity(base).name,
                protocol.id,
                source,
                len(windows),
                windows.shape[0] * (windows.shape[1] - 1),
                seed,
                summarise(scores[role], scores[BASE], seed),
            ),
            "gain": None,
            "gain_ci": None,
            "beats": None,
        }
        if role != REPLICA:
            # Of the control against the replica: positive where the replica predicts the text better.
            paired = summarise(scores[role], scores[REPLICA], seed)
            row |= {"gain": paired.ppl_delta, "gain_ci": paired.ppl_delta_ci}
            row["beats"] = None if paired.ppl_delta_ci is None else paired.ppl_delta_ci[0] > 0
        rows.append(row)
    return rows
