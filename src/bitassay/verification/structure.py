"""Does a trace fit the verifier's own model and the request that it is meant to answer? Questions with exact
answers, asked before any statistics.

Every defect is a Reason with a short stable code. *Shape* defects mean that states and tokens cannot be
compared; with *claim* defects they can, and are, so that a verdict says how far off the run was besides.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import transformers
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.engines.decode import TokenIds, end_tokens, vocabulary_size
from bitassay.engines.prompts import encode_prompt
from bitassay.engines.sampling import Sampler
from bitassay.engines.taps import tap_layers
from bitassay.models.config import text_config
from bitassay.models.identity import identity
from bitassay.models.positions import context_length
from bitassay.verification.numerics import STATE_DTYPES
from bitassay.verification.trace import Header, ModelClaim, Sampling, Trace, TraceError, check_consistent

Status = Literal["PASS", "FAIL", "INCONCLUSIVE"]


@dataclass(frozen=True)
class Reason:
    """Why a verdict is what it is: a code for programs and a sentence for people."""

    code: str
    sentence: str


@dataclass(frozen=True)
class Request:
    """What the verifier knows was asked for. None: not known, so not checked."""

    prompt: str | TokenIds | None = None
    nonce: str | None = None
    sampler: Sampler | None = None
    max_new_tokens: int | None = None


def shape_defects(trace: Trace, model: PreTrainedModel) -> list[Reason]:
    """Return why the states and tokens cannot be compared with `model`'s; empty where they can."""
    try:
        check_consistent(trace)
    except TraceError as error:
        return [Reason(error.code, error.problem)]
    return header_defects(trace.header, model) + hidden_size_defects(trace.states, model)


def hidden_size_defects(states: Mapping[int, Tensor], model: PreTrainedModel) -> list[Reason]:
    """Return a defect where states have another size than those of `model`."""
    hidden = text_config(model).hidden_size
    for layer, rows in states.items():
        if rows.shape[1] != hidden:
            sentence = f"states of layer {layer} have {rows.shape[1]} numbers, the model has {hidden}"
            return [Reason("wrong-hidden-size", sentence)]
    return []


def header_defects(header: Header, model: PreTrainedModel) -> list[Reason]:
    """Return why a run with this header cannot be compared with one of `model`, whatever its states."""
    found = []
    expected = tap_layers(model)
    if missing := sorted(set(expected) - set(header.layers)):
        found.append(
            Reason(
                "missing-layer",
                f"layer {missing[0]} has no states; this model is sampled at layers {_some(expected)}",
            )
        )
    elif header.layers != expected:
        found.append(Reason("wrong-layers", f"layers {_some(header.layers)} instead of {_some(expected)}"))
    count = len(header.prompt_ids) + len(header.output_ids) - 1
    if len(header.positions) < count:
        found.append(Reason("missing-position", f"{len(header.positions)} positions instead of {count}"))
    elif header.positions != tuple(range(count)):
        found.append(Reason("wrong-positions", f"positions are not 0 to {count - 1} in order, each once"))
    largest, size = max(*header.prompt_ids, *header.output_ids), vocabulary_size(model)
    if largest >= size:
        found.append(Reason("token-outside-vocabulary", f"token id {largest}; the vocabulary has {size}"))
    limit = context_length(model)
    if limit is not None and count > limit:
        found.append(Reason("too-long", f"{count} positions; the model was made for {limit}"))
    return found


def claim_defects(
    header: Header,
    model: PreTrainedModel,
    request: Request,
    allowed_dtypes: Collection[str] = tuple(STATE_DTYPES),
) -> list[Reason]:
    """Return in what the header contradicts `model`, `request` or itself."""
    own = ModelClaim.of(identity(model))
    found = []
    if header.model.weights_digest != own.weights_digest:
        digests = [claim.weights_digest[:12] for claim in (header.model, own)]
        found.append(
            Reason("other-weights", f"the prover claims weights {digests[0]}, the verifier has {digests[1]}")
        )
    if header.model.recipe_id != own.recipe_id:
        names = [(recipe or "none")[:12] for recipe in (header.model.recipe_id, own.recipe_id)]
        found.append(
            Reason("other-recipe", f"the prover claims recipe {names[0]}, the verifier has {names[1]}")
        )
    if header.model.tokenizer_digest != own.tokenizer_digest:
        found.append(Reason("other-tokenizer", "the prover claims another tokenizer than the verifier has"))
    if header.model.config_digest not in (None, own.config_digest):
        found.append(Reason("other-configuration", _other_configuration(header, own)))
    if header.numerics.dtype not in allowed_dtypes:
        found.append(
            Reason("dtype-not-allowed", f"{header.numerics.dtype}; allowed are {', '.join(allowed_dtypes)}")
        )
    return found + request_defects(header, model, request) + _length_defects(header, model)


def _other_configuration(header: Header, own: ModelClaim) -> str:
    digests = [(claim.config_digest or "")[:12] for claim in (header.model, own)]
    sentence = (
        f"the prover claims configuration {digests[0]}, the verifier has {digests[1]}: config.json, "
        "generation_config.json, the chat template or tokenizer_config.json differ"
    )
    if header.numerics.transformers != transformers.__version__:
        sentence += f" (or transformers {header.numerics.transformers} reads them otherwise than yours)"
    return sentence


def request_defects(header: Header, model: PreTrainedModel, request: Request) -> list[Reason]:
    """Return in what the header contradicts what was asked for."""
    found = []
    if request.prompt is not None and header.prompt_ids != encode_prompt(model, request.prompt):
        found.append(Reason("other-prompt", "the prompt tokens are not those of the request"))
    if request.nonce is not None and header.nonce != request.nonce:
        found.append(
            Reason(
                "other-nonce",
                f"nonce {header.nonce!r} instead of {request.nonce!r}: a trace of another request",
            )
        )
    if request.sampler is not None:
        wanted, claimed = (
            Sampling.of(request.sampler, 1),
            header.sampling.model_copy(update={"max_new_tokens": 1}),
        )
        if claimed != wanted and not claimed.sampler == wanted.sampler == "greedy":
            found.append(
                Reason(
                    "other-sampler",
                    "tokens were not to be chosen by this sampler, temperature, top-p and seed",
                )
            )
    if request.max_new_tokens is not None and header.sampling.max_new_tokens != request.max_new_tokens:
        found.append(
            Reason(
                "other-length",
                f"{header.sampling.max_new_tokens} new tokens at most instead of {request.max_new_tokens}",
            )
        )
    return found


def _length_defects(header: Header, model: PreTrainedModel) -> list[Reason]:
    """An output ends with an end token or has as many tokens as were asked for, and nothing follows an end
    token."""
    output, most, ends = header.output_ids, header.sampling.max_new_tokens, end_tokens(model)
    found = []
    if len(output) > most:
        found.append(Reason("too-many-tokens", f"{len(output)} output tokens; {most} were asked for"))
    if len(output) < most and output[-1] not in ends:
        found.append(
            Reason(
                "stopped-early",
                f"{len(output)} output tokens of {most}, and the last one does not end the text",
            )
        )
    if ends & set(output[:-1]):
        found.append(Reason("tokens-after-end", "the output goes on after an end token"))
    return found


def _some(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown + (", …" if len(numbers) > 8 else "")
