"""A verifier's worker: the VeriLLM statistics and the relative distance of every cell of a trace.
A cell is a layer at a position; it is compared with the verifier's own prefill."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.record.files import atomic_file
from bitassay.record.progress import Progress
from bitassay.record.schema import Fields
from bitassay.studies.parties import ITEMS, load_party, timed
from bitassay.verification.detectors.distance import cell_distances
from bitassay.verification.detectors.token_difr import token_margins
from bitassay.verification.detectors.verillm import CellStatistics, run_statistics
from bitassay.verification.numerics import numerics
from bitassay.verification.observe import compare
from bitassay.verification.structure import Request, request_defects, shape_defects
from bitassay.verification.trace import Trace, read_trace

VERIFIER = "bitassay.studies.verillm.verifier:verifier"
STATISTICS = tuple(field.name for field in fields(CellStatistics))


class _About(Fields):
    layers: tuple[int, ...] = Field(min_length=1)
    n_prompt: int = Field(ge=0)
    seconds: float = Field(gt=0, allow_inf_nan=False)
    verifier: dict[str, Any]


@dataclass(frozen=True)
class TraceStatistics:
    """What a verifier measured on one trace: the VeriLLM statistics (with e_m and e_w of the rule set
    `documents`) and the relative distance (not below the verifier's floor) of each cell, [layers, positions].

    margins in nats, by output token; n_prompt: positions of the prompt; seconds: of the verifier's work;
    verifier: its numerics.
    """

    layers: tuple[int, ...]
    n_prompt: int
    seconds: float
    verifier: dict[str, Any]
    statistics: CellStatistics
    distance: Float[Tensor, "layers positions"]
    margins: Float[Tensor, " outputs"]

    @property
    def prompt(self) -> CellStatistics:
        return self.statistics[:, : self.n_prompt]

    @property
    def generated(self) -> CellStatistics:
        return self.statistics[:, self.n_prompt :]

    @property
    def log_distances(self) -> Float[Tensor, " layers"]:
        """The mean log relative distance of each layer's generated cells."""
        return self.distance[:, self.n_prompt :].log().mean(-1)


def verifier(setup: Any, folder: Path, progress: Progress) -> Callable[[Any], None]:
    """Return the function of a verifier's jobs: write the statistics of each item's trace."""
    model, is_warm = load_party(setup), False

    def verify(content: Any) -> None:
        nonlocal is_warm
        for item in ITEMS.validate_python(content):
            if item.made.exists():
                continue
            trace = read_trace(item.trace)
            request = Request(item.prompt, item.nonce, None, item.tokens)
            if defects := shape_defects(trace, model) or request_defects(trace.header, model, request):
                raise BitassayError(
                    f"{item.trace}: {defects[0].sentence}", "remove the file and run the same command again"
                )
            if not is_warm:
                statistics_of(trace, model)  # a first forward is slower than all others
                is_warm = True
            tensors, seconds = timed(model, lambda trace=trace: statistics_of(trace, model))
            about = {
                "layers": trace.header.layers,
                "n_prompt": trace.n_prompt,
                "seconds": seconds,
                "verifier": numerics(model).model_dump(),
            }
            with atomic_file(item.made) as temporary:
                save_file(tensors, temporary, metadata={"bitassay": json.dumps(about)})

    return verify


def statistics_of(trace: Trace, model: PreTrainedModel) -> dict[str, Tensor]:
    """Return all tensors of `TraceStatistics`, by the verifier's own prefill."""
    comparison = compare(trace, model, precise=False)
    margins = torch.tensor(token_margins(comparison))
    return {**vars(run_statistics(comparison)), "distance": cell_distances(comparison), "margins": margins}


def read_statistics(path: Path) -> TraceStatistics:
    """Read what a verifier wrote. Raises BitassayError where the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            about = _About.model_validate_json((file.metadata() or {})["bitassay"])
            tensors = {name: file.get_tensor(name) for name in (*STATISTICS, "distance", "margins")}
        shape = (len(about.layers), tensors["distance"].shape[-1])
        if shape[1] <= about.n_prompt or any(tensors[n].shape != shape for n in (*STATISTICS, "distance")):
            raise ValueError("the shapes do not fit")
    except (SafetensorError, OSError, LookupError, ValueError) as error:
        raise BitassayError(
            f"{path}: damaged ({error})", "remove this file and run the same command again"
        ) from error
    statistics = CellStatistics(*(tensors.pop(name) for name in STATISTICS))
    return TraceStatistics(**dict(about), statistics=statistics, **tensors)
