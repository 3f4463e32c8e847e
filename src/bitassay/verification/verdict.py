"""A verdict: PASS, FAIL or INCONCLUSIVE, why, and the numbers that led there. `verify.py` reaches it."""

from dataclasses import asdict, dataclass, field
from math import exp
from statistics import fmean
from typing import Any

from bitassay.verification.attribution import Attribution
from bitassay.verification.detectors.detector import Part
from bitassay.verification.detectors.distance import DISTANCE
from bitassay.verification.detectors.token_difr import TOKEN_DIFR
from bitassay.verification.detectors.verillm import RULE_SETS, CellStatistics, accept_rate, summary
from bitassay.verification.observe import Observation
from bitassay.verification.profile import Profile, Score
from bitassay.verification.structure import Reason, Status

STATISTICAL = frozenset({"states-too-far", "tokens-unlikely", "detector-unlikely"})  # could be bad luck


@dataclass(frozen=True)
class Verdict:
    """status and why, with the numbers that led there; those are None where they could not be computed.

    n_tokens: output tokens. observation: series by detector. cells: VeriLLM statistics [layers,
    positions] in `format`, the first `n_prompt` positions in the prompt. p_value, score, alpha,
    n_calibration: from the profile whose digest is `profile`. refusal: the smallest alpha at which its
    guarantee refuses the run. ranked: the score that counts, lower for a run that ended early
    (`Profile.ranked`). unlike: the p-value of the text's rounding noise among calibration texts. limit:
    the generated positions at which the honest runs were cut that the score was ranked among. trace:
    digest of the header judged. calibration: the profile itself. attribution: what the observation fits
    best, where the profile has a library; it has no part in the status. segments: the ends of the segments
    of layers that a spot check drew (`spot.py`); None: all was looked at.
    """

    status: Status
    reasons: tuple[Reason, ...]
    model: str
    n_tokens: int
    observation: Observation | None = None
    cells: CellStatistics | None = field(default=None, repr=False, compare=False)
    n_prompt: int = 0
    format: str | None = None
    p_value: float | None = None
    refusal: float | None = None
    unlike: float | None = None
    score: Score | None = None
    ranked: float | None = None
    alpha: float | None = None
    profile: str | None = None
    n_calibration: int | None = None
    limit: int | None = None
    trace: str | None = None
    calibration: Profile | None = field(default=None, repr=False, compare=False)
    attribution: Attribution | None = None
    segments: tuple[int, ...] | None = None

    @property
    def structural(self) -> tuple[Reason, ...]:
        """Return why it fails whatever the statistics say."""
        reasons = self.reasons if self.status == "FAIL" else ()
        return tuple(reason for reason in reasons if reason.code not in STATISTICAL)

    @property
    def margins(self) -> tuple[float, ...]:
        """Return the nats by which each claimed token loses; empty where nothing was compared."""
        series = self.observation.series.get(TOKEN_DIFR.name) if self.observation else None
        return series[0].values if series else ()

    @property
    def mean_margin(self) -> float | None:
        """Return the mean of the margins."""
        return fmean(self.margins) if self.margins else None

    @property
    def hidden_distance(self) -> float | None:
        """Return the geometric mean of the relative distance over generated positions at the last sampled
        layer."""
        return self.distance(self.observation.layers[-1]) if self.observation else None

    def distance(self, layer: int, part: Part = "generated") -> float | None:
        """Return the geometric mean of the relative distance over one part's positions at a sampled layer."""
        if self.observation is None or layer not in self.observation.layers:
            return None
        if DISTANCE.name not in self.observation.series:  # states were not shown
            return None
        series = self.observation.series[DISTANCE.name][self.observation.layers.index(layer)]
        values = series.prompt if part == "prompt" else series.values
        return exp(fmean(values)) if values else None

    def accept_rate(self, rules: str, part: Part = "generated") -> float | None:
        """Return accepted cells / cells compared over all sampled layers, by the VeriLLM rule set `rules`."""
        cells = self._cells(part)
        return accept_rate(cells, RULE_SETS[rules]) if cells and cells.Pe.numel() else None

    def _cells(self, part: Part, layer: slice | int = slice(None)) -> CellStatistics | None:
        """Return the statistics of one part, of all layers or of one by its index."""
        positions = slice(self.n_prompt) if part == "prompt" else slice(self.n_prompt, None)
        return None if self.cells is None else self.cells[layer, positions]

    def _verillm(self, index: int) -> dict[str, dict[str, dict[str, Any]]]:
        parts: tuple[Part, ...] = ("prompt", "generated")
        cells = {part: self._cells(part, index) for part in parts}
        return {
            part: {name: summary(part_cells, rules) for name, rules in RULE_SETS.items()}
            for part, part_cells in cells.items()
            if part_cells
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        layers, margins = self.observation.layers if self.observation else (), self.margins
        return {
            "status": self.status,
            "reasons": [asdict(reason) for reason in self.reasons],
            "model": self.model,
            "n_tokens": self.n_tokens,
            "segments": None if self.segments is None else list(self.segments),
            "p_value": self.p_value,
            "refusal": self.refusal,
            "unlike": self.unlike,
            "alpha": self.alpha,
            "score": asdict(self.score) if self.score else None,
            "ranked": self.ranked,
            "profile": self.profile,
            "n_calibration": self.n_calibration,
            "limit": self.limit,
            "trace_digest": self.trace,
            "attribution": asdict(self.attribution) if self.attribution else None,
            "hidden_distance": self.hidden_distance,
            "mean_margin": self.mean_margin,
            "max_margin": max(margins) if margins else None,
            "tokens_not_chosen": sum(margin > 0 for margin in margins) if margins else None,
            "margins": list(margins),
            "accept_rate": {rules: self.accept_rate(rules) for rules in RULE_SETS},
            "format": self.format,
            "layers": [
                {
                    "layer": layer,
                    "prompt_distance": self.distance(layer, "prompt"),
                    "generated_distance": self.distance(layer),
                    "verillm": self._verillm(index),
                }
                for index, layer in enumerate(layers)
            ],
        }

    def __str__(self) -> str:
        lines = [f"{self.status}: {'; '.join(reason.sentence for reason in self.reasons)}"]
        if self.observation:
            distances = ", ".join(
                f"{self.distance(layer) or 0:.3g} at layer {layer}" for layer in self.observation.layers
            )
            positions = self.observation.positions
            if self.hidden_distance is not None:
                lines.append(f"  states: relative distance {distances} ({positions} generated positions)")
            if self.mean_margin is not None:
                margin = f"{self.mean_margin:.3g} nats over {self.n_tokens} tokens"
                lines.append(f"  tokens: mean margin {margin}")
        if self.p_value is not None:
            lines.append(
                f"  p-value {self.p_value:.3g} against {self.n_calibration} honest runs, alpha {self.alpha:g}"
            )
        if self.attribution and self.status == "FAIL":
            lines.append(f"  fits best: {self.attribution}")
        return "\n".join(lines)
