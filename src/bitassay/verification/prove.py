"""What a host does: generate, and keep what a verifier needs to check it."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from bitassay.engines.decode import TokenIds
from bitassay.engines.engine import engine_of
from bitassay.engines.prompts import encode_prompt
from bitassay.engines.sampling import GREEDY, Sampler
from bitassay.engines.taps import tap_layers
from bitassay.errors import BitassayError
from bitassay.models.identity import Identity, identity
from bitassay.record.progress import Progress, silent
from bitassay.verification.numerics import STATE_DTYPES, numerics
from bitassay.verification.trace import Header, ModelClaim, Sampling, Trace, check_nonce

BATCH = 16


def prove(
    model: PreTrainedModel,
    prompt: str | TokenIds,
    *,
    max_new_tokens: int = 32,
    sampler: Sampler = GREEDY,
    claim: Identity | None = None,
    nonce: str = "0",
) -> Trace:
    """Generate for one prompt and return its trace.

    prompt: text (put into the chat template where the tokenizer has one) or token ids, taken as they are.
    nonce: a word that the verifier chose for this request, so that no older trace answers it; it also keys
    the sampling noise. claim: the identity to put into the header instead of the model's own, as a host would
    that runs another model than it sells; measurements of the verifier use it. Raises BitassayError for an
    empty prompt or one that does not fit.
    """
    return prove_many(
        model, [prompt], max_new_tokens=max_new_tokens, sampler=sampler, claim=claim, nonces=[nonce]
    )[0]


def prove_many(
    model: PreTrainedModel,
    prompts: Sequence[str | TokenIds],
    *,
    max_new_tokens: int = 32,
    sampler: Sampler = GREEDY,
    claim: Identity | None = None,
    nonces: Sequence[str] | None = None,
    batch_size: int = BATCH,
    progress: Progress = silent,
) -> list[Trace]:
    """Return the traces of many prompts, in their order; generation goes in batches of similar length.
    Default nonces: "0", "1", ..."""
    nonces = [str(index) for index in range(len(prompts))] if nonces is None else list(nonces)
    if len(nonces) != len(prompts):
        raise BitassayError(
            f"{len(nonces)} nonces for {len(prompts)} prompts", "give one for each prompt, or none"
        )
    for nonce in nonces:
        check_nonce(nonce)
    claimed, layers = ModelClaim.of(claim or identity(model)), tap_layers(model)
    ids = [encode_prompt(model, prompt) for prompt in prompts]
    if numerics(model).dtype not in STATE_DTYPES:
        raise BitassayError(
            f"traces cannot hold {numerics(model).dtype} states",
            f"load the model in {', '.join(STATE_DTYPES)}",
        )
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    traces: dict[int, Trace] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        progress("generating", start, len(order))
        done = engine_of(model).generate(
            [ids[index] for index in batch],
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            nonces=[nonces[index] for index in batch],
            layers=layers,
        )
        for index, generation in zip(batch, done, strict=True):
            header = Header(
                model=claimed,
                numerics=numerics(model),
                sampling=Sampling.of(sampler.of_request(nonces[index]), max_new_tokens),
                nonce=nonces[index],
                prompt_ids=ids[index],
                output_ids=generation.output_ids,
                layers=layers,
                positions=tuple(range(len(ids[index]) + len(generation.output_ids) - 1)),
            )
            traces[index] = Trace(header, generation.states)
    progress("generating", len(order), len(order))
    return [traces[index] for index in range(len(ids))]
