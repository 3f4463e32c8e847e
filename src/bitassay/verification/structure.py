"""Does a trace fit the verifier's own model and the request that it is meant to answer? Questions with exact
answers, asked before any statistics.

Every defect is a Reason with a short stable code. *Shape* defects mean that states and tokens cannot be
compared; with *claim* defects they can. A verdict says how far off a run of another model was besides; a run
of another request or length is no answer, so it is worth no prefill (`unanswered`). A verifier that knows
what it asked for refuses both before it reads a state (`expecting`).
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
from bitassay.verification.trace import (
    Expecting,
    Header,
    ModelClaim,
    Sampling,
    Trace,
    TraceError,
    check_consistent,
)

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


class RefusedError(TraceError):
    """A header that fits neither model nor request; `reasons` says all that is wrong, `tokens` how many it
    claims."""

    def __init__(self, reasons: Sequence[Reason], tokens: int):
        super().__init__(reasons[0].code, reasons[0].sentence)
        self.reasons, self.tokens = tuple(reasons), tokens


def expecting(model: PreTrainedModel, request: Request) -> Expecting:
    """Return the check by which `read_trace` and `read_opening` refuse, before they read a state, what cannot
    be compared with `model` or is no answer to `request`. It raises RefusedError."""

    def check(header: Header, hidden: int) -> None:
        defects = header_defects(header, model) + hidden_defects(hidden, header.layers[0], model)
        if defects := defects or unanswered(header, model, request):
            raise RefusedError(defects, len(header.output_ids))

    return check


def shape_defects(trace: Trace, model: PreTrainedModel) -> list[Reason]:
    """Return why states and tokens cannot be compared with `model`'s; empty where they can."""
    try:
        check_consistent(trace)
    except TraceError as error:
        return [Reason(error.code, error.problem)]
    return header_defects(trace.header, model) + hidden_size_defects(trace.states, model)


def hidden_size_defects(states: Mapping[int, Tensor], model: PreTrainedModel) -> list[Reason]:
    """Return a defect where states have another size than those of `model`."""
    defects = (hidden_defects(rows.shape[1], layer, model) for layer, rows in states.items())
    return next(filter(None, defects), [])


def hidden_defects(count: int, layer: int, model: PreTrainedModel) -> list[Reason]:
    """Return a defect where the states of `layer` have another `count` of numbers than those of `model`."""
    hidden = text_config(model).hidden_size
    sentence = f"states of layer {layer} have {count} numbers, the model has {hidden}"
    return [Reason("wrong-hidden-size", sentence)] if count != hidden else []


def header_defects(header: Header, model: PreTrainedModel) -> list[Reason]:
    """Return why a run with this header cannot be compared with one of `model`, whatever its states."""
    expected, count = tap_layers(model), len(header.prompt_ids) + len(header.output_ids) - 1
    largest, size = max(*header.prompt_ids, *header.output_ids), vocabulary_size(model)
    limit = context_length(model)
    defects: dict[str, str] = {}
    if missing := sorted(set(expected) - set(header.layers)):
        sampled = f"this model is sampled at layers {_some(expected)}"
        defects["missing-layer"] = f"layer {missing[0]} has no states; {sampled}"
    elif header.layers != expected:
        defects["wrong-layers"] = f"layers {_some(header.layers)} instead of {_some(expected)}"
    if len(header.positions) < count:
        defects["missing-position"] = f"{len(header.positions)} positions instead of {count}"
    elif header.positions != tuple(range(count)):
        defects["wrong-positions"] = f"positions are not 0 to {count - 1} in order, each once"
    if largest >= size:
        defects["token-outside-vocabulary"] = f"token id {largest}; the vocabulary has {size}"
    if limit is not None and count > limit:
        defects["too-long"] = f"{count} positions; the model was made for {limit}"
    return _reasons(defects)


def claim_defects(
    header: Header,
    model: PreTrainedModel,
    request: Request,
    allowed_dtypes: Collection[str] = tuple(STATE_DTYPES),
) -> list[Reason]:
    """Return in what the header contradicts `model`, `request` or itself."""
    claim, expected = header.model, ModelClaim.of(identity(model))
    defects: dict[str, str] = {}
    if claim.weights_digest != expected.weights_digest:
        theirs, ours = claim.weights_digest[:12], expected.weights_digest[:12]
        defects["other-weights"] = f"the prover claims weights {theirs}, the verifier has {ours}"
    if claim.recipe_id != expected.recipe_id:
        theirs, ours = ((recipe or "none")[:12] for recipe in (claim.recipe_id, expected.recipe_id))
        defects["other-recipe"] = f"the prover claims recipe {theirs}, the verifier has {ours}"
    if claim.tokenizer_digest != expected.tokenizer_digest:
        defects["other-tokenizer"] = "the prover claims another tokenizer than the verifier has"
    if claim.config_digest not in (None, expected.config_digest):
        defects["other-configuration"] = _other_configuration(header, expected)
    if header.numerics.dtype not in allowed_dtypes:
        allowed = ", ".join(allowed_dtypes)
        defects["dtype-not-allowed"] = f"{header.numerics.dtype}; allowed are {allowed}"
    return _reasons(defects) + request_defects(header, model, request) + _length_defects(header, model)


def unanswered(header: Header, model: PreTrainedModel, request: Request) -> list[Reason]:
    """Return all that is wrong with the claims of a run that is no answer to `request`, because of another
    prompt, nonce, sampler or length; nothing where it is one, even of another model."""
    if request_defects(header, model, request) + _length_defects(header, model):
        return claim_defects(header, model, request)
    return []


def _other_configuration(header: Header, expected: ModelClaim) -> str:
    theirs, ours = ((claim.config_digest or "")[:12] for claim in (header.model, expected))
    sentence = (
        f"the prover claims configuration {theirs}, the verifier has {ours}: config.json, "
        "generation_config.json, the chat template or tokenizer_config.json differ"
    )
    if header.numerics.transformers != transformers.__version__:
        sentence += f" (or transformers {header.numerics.transformers} reads them otherwise than yours)"
    return sentence


def request_defects(header: Header, model: PreTrainedModel, request: Request) -> list[Reason]:
    """Return in what the header contradicts what was asked for."""
    defects: dict[str, str] = {}
    if request.prompt is not None and header.prompt_ids != encode_prompt(model, request.prompt):
        defects["other-prompt"] = "the prompt tokens are not those of the request"
    if request.nonce is not None and header.nonce != request.nonce:
        nonces = f"nonce {header.nonce!r} instead of {request.nonce!r}"
        defects["other-nonce"] = f"{nonces}: a trace of another request"
    if request.sampler is not None:
        asked = Sampling.of(request.sampler, header.sampling.max_new_tokens).in_effect
        if header.sampling.in_effect != asked:
            what = "sampler, temperature, top-p and seed"
            defects["other-sampler"] = f"tokens were not to be chosen by this {what}"
    most = header.sampling.max_new_tokens
    if request.max_new_tokens not in (None, most):
        defects["other-length"] = f"{most} new tokens at most instead of {request.max_new_tokens}"
    return _reasons(defects)


def _length_defects(header: Header, model: PreTrainedModel) -> list[Reason]:
    """Return where an output does not end with an end token or has not as many tokens as were asked for, or
    goes on after an end token."""
    output, most, ends = header.output_ids, header.sampling.max_new_tokens, end_tokens(model)
    defects: dict[str, str] = {}
    if len(output) > most:
        defects["too-many-tokens"] = f"{len(output)} output tokens; {most} were asked for"
    if len(output) < most and output[-1] not in ends:
        counts = f"{len(output)} output tokens of {most}"
        defects["stopped-early"] = f"{counts}, and the last one does not end the text"
    if ends & set(output[:-1]):
        defects["tokens-after-end"] = "the output goes on after an end token"
    return _reasons(defects)


def _reasons(defects: Mapping[str, str]) -> list[Reason]:
    return [Reason(code, sentence) for code, sentence in defects.items()]


def _some(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown + (", …" if len(numbers) > 8 else "")
