"""What a dishonest host might send, one small function an attack.

An attack answers the requests of a `Setting` and claims that its base model did. Where it lies about a header
field, it writes what the verifier expects, unless the defect is the attack. "Honest prefill" is the strongest
forgery of hidden states: whatever chose the tokens, one forward of the real model over them gives the states,
so that only the tokens are left to judge by. The list follows the threats named by TOPLOC (arXiv 2501.16007),
VeriLLM (2509.24257) and DiFR (2511.20621), with the structural ones of any protocol. Attacks by receipt, and
of verifiers in a committee, are in `forgeries.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.engines.decode import TokenIds, end_tokens, vocabulary_size
from bitassay.engines.sampling import GREEDY, Sampler
from bitassay.models.hooks import hooked
from bitassay.models.identity import identity
from bitassay.models.walk import decoder_layers
from bitassay.quantization.inputs.kv_cache import KvCache, round_cache
from bitassay.quantization.pipeline import quantize_cached
from bitassay.quantization.recipe.recipe import Recipe, WeightScheme
from bitassay.quantization.runtime.model import copy_sharing_parameters
from bitassay.verification.attacks.attack import Setting, attack
from bitassay.verification.numerics import numerics
from bitassay.verification.observe import batches, prefills
from bitassay.verification.prove import prove_many
from bitassay.verification.trace import Sampling, Trace

INT8_GROUP64 = Recipe(
    name="w8-g64", description="INT8, groups of 64", weights=WeightScheme(format="int8", granularity="g64")
)


def answered(
    setting: Setting,
    model: PreTrainedModel,
    *,
    prompts: Sequence[TokenIds] | None = None,
    sampler: Sampler | None = None,
) -> list[Trace]:
    """Answer with `model`, otherwise as asked; the traces claim the setting's model and sampler."""
    traces = prove_many(
        model,
        setting.prompts if prompts is None else prompts,
        max_new_tokens=setting.max_new_tokens,
        sampler=sampler or setting.sampler,
        claim=identity(setting.model),
        nonces=setting.nonces,
        batch_size=setting.batch_size,
    )
    return [
        _with_header(trace, sampling=Sampling.of(setting.sampler, setting.max_new_tokens)) for trace in traces
    ]


def _with_header(trace: Trace, **fields: object) -> Trace:
    return replace(trace, header=trace.header.model_copy(update=fields))


# --- other weights, cache, layers ---


@attack("int8", "INT8 weights, a scale for each row", "w8")
@attack("int8-g64", "INT8 weights in groups of 64", INT8_GROUP64)
@attack("fp8", "FP8 (e4m3) weights", "fp8")
@attack("int4", "INT4 weights", "w4")
@attack("int3", "INT3 weights", "w3")
@attack("int2", "INT2 weights", "w2")
def quantized_weights(setting: Setting, recipe: str | Recipe) -> list[Trace]:
    return answered(setting, quantize_cached(setting.model, recipe))


@attack("kv8", "INT8 keys and values in the cache", "int8")
@attack("kv4", "INT4 keys and values in the cache", "int4")
def quantized_cache(setting: Setting, format: Literal["int8", "int4"]) -> list[Trace]:
    model = copy_sharing_parameters(setting.model)
    round_cache(model, KvCache(format=format, scale_dtype="float32"))
    return [_with_header(trace, numerics=numerics(setting.model)) for trace in answered(setting, model)]


@attack("fine-tune-0.01", "a low-rank update of 1 % of the weights' norm", 0.01)
@attack("fine-tune-0.03", "a low-rank update of 3 % of the weights' norm", 0.03)
@attack("fine-tune-0.1", "a low-rank update of 10 % of the weights' norm", 0.1)
def fine_tuned(setting: Setting, norm: float) -> list[Trace]:
    with low_rank_update(setting.model, norm):
        return answered(setting, setting.model)


@attack("half-depth", "a smaller model: every other decoder layer", None)
@attack("skip-1", "one decoder layer left out", 1)
@attack("skip-4", "four decoder layers left out", 4)
def skipped_layers(setting: Setting, count: int | None) -> list[Trace]:
    with skip(setting.model, count or len(decoder_layers(setting.model)) // 2):
        return answered(setting, setting.model)


@contextmanager
def low_rank_update(model: PreTrainedModel, norm: float, rank: int = 8, seed: int = 0) -> Iterator[None]:
    """Make every linear of the decoder layers W + norm ||W|| D / ||D|| within the context; D has `rank`."""
    generator = torch.Generator().manual_seed(seed)
    kept: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        try:
            for layer in decoder_layers(model):
                for module in layer.modules():
                    if isinstance(module, torch.nn.Linear):
                        weight = module.weight
                        rows, columns = weight.shape
                        D = torch.randn(rows, rank, generator=generator) @ torch.randn(
                            rank, columns, generator=generator
                        )
                        kept.append((weight, weight.detach().clone()))
                        change = norm * weight.float().norm().cpu() / D.norm() * D
                        weight.copy_(weight.float() + change.to(weight.device))
            yield
        finally:
            for weight, before in kept:
                weight.copy_(before)


@contextmanager
def skip(model: PreTrainedModel, count: int) -> Iterator[None]:
    """Make `count` evenly spaced decoder layers return their input within the context."""
    layers = decoder_layers(model)

    def input_of(_module: object, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: object) -> object:
        states = args[0] if args else kwargs["hidden_states"]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    chosen = [(2 * index + 1) * len(layers) // (2 * count) for index in range(count)]
    with hooked(layers[index].register_forward_hook(input_of, with_kwargs=True) for index in chosen):
        yield


# --- another prompt ---


@attack("system-altered", "the tokens of the system prompt in another order", True)
@attack("system-dropped", "the system prompt left out", False)
def system_prompt(setting: Setting, reorder: bool) -> list[Trace]:
    """The system prompt is what all prompts begin with, or the first quarter where that is little."""
    alike = [len(set(tokens)) == 1 for tokens in zip(*setting.prompts, strict=False)]
    shared = [*alike, False].index(False) if len(setting.prompts) > 1 else 0

    def changed(prompt: TokenIds) -> TokenIds:
        cut = min(shared if shared >= 4 else max(len(prompt) // 4, 2), len(prompt) - 1)
        return [*reversed(prompt[:cut]), *prompt[cut:]] if reorder else prompt[cut:]

    return _other_prompts(setting, [changed(prompt) for prompt in setting.prompts])


@attack("context-10", "the first 10 % of the prompt left out", 0.1)
@attack("context-50", "the first 50 % of the prompt left out", 0.5)
@attack("context-90", "the first 90 % of the prompt left out", 0.9)
def cut_context(setting: Setting, share: float) -> list[Trace]:
    cut = [prompt[min(max(round(share * len(prompt)), 1), len(prompt) - 1) :] for prompt in setting.prompts]
    return _other_prompts(setting, cut)


def _other_prompts(setting: Setting, prompts: Sequence[TokenIds]) -> list[Trace]:
    """Answer other prompts and say that they were the ones asked; positions that are missing at the front
    show the first state that there is."""
    answers = answered(setting, setting.model, prompts=prompts)
    return [_fitted(trace, honest) for trace, honest in zip(answers, setting.honest, strict=True)]


def _fitted(trace: Trace, honest: Trace) -> Trace:
    """`trace` with the prompt and nonce of `asked`, and as many states as that takes."""
    prompt = honest.header.prompt_ids
    count = len(prompt) + trace.n_tokens - 1
    states = {}
    for layer, rows in trace.states.items():
        last = rows[-count:]
        states[layer] = torch.cat([last[:1].expand(count - len(last), -1), last])
    header = trace.header.model_copy(
        update={"prompt_ids": prompt, "nonce": honest.header.nonce, "positions": tuple(range(count))}
    )
    return Trace(header, states)


# --- other tokens ---


@attack(
    "greedy-instead", "the most likely token where sampling was asked for", lambda _: GREEDY, sampled=True
)
@attack("top-p", "a nucleus half as large", lambda s: replace(s, top_p=s.top_p / 2), sampled=True)
@attack("seed", "another seed", lambda s: replace(s, seed=s.seed + 1), sampled=True)
@attack(
    "temperature",
    "1.5 times the temperature that was asked for",
    lambda s: replace(s, temperature=1.5 * s.temperature),
    sampled=True,
)
def other_sampling(setting: Setting, change: Callable[[Sampler], Sampler]) -> list[Trace]:
    return answered(setting, setting.model, sampler=change(setting.sampler))


@attack("tokens-one", "one token altered, honest prefill", 0.0)
@attack("tokens-1%", "1 % of the tokens altered (one at least), honest prefill", 0.01)
@attack("tokens-10%", "10 % of the tokens altered, honest prefill", 0.1)
def altered_tokens(setting: Setting, share: float) -> list[Trace]:
    random, ends, size = np.random.default_rng(0), end_tokens(setting.model), vocabulary_size(setting.model)
    allowed = np.setdiff1d(np.arange(size), sorted(ends))
    outputs = []
    for trace in setting.honest:
        output = list(trace.header.output_ids)
        body = len(output) - (output[-1] in ends) or 1
        for position in random.choice(
            body, size=min(max(round(share * len(output)), 1), body), replace=False
        ):
            output[position] = int(random.choice(allowed[allowed != output[position]]))
        outputs.append(output)
    return honest_prefill(setting.honest, setting.model, outputs)


@attack("decode-int8", "decoded by INT8 weights, honest prefill", "w8")
@attack("decode-int4", "decoded by INT4 weights, honest prefill", "w4")
def cheap_decode(setting: Setting, recipe: str) -> list[Trace]:
    cheap = answered(setting, quantize_cached(setting.model, recipe))
    return honest_prefill(setting.honest, setting.model, [trace.header.output_ids for trace in cheap])


@attack("padded", "the last third is one token again and again, honest prefill")
def padded(setting: Setting) -> list[Trace]:
    outputs = []
    for trace in setting.honest:
        output = trace.header.output_ids
        keep = max(2 * len(output) // 3, 1)
        outputs.append([*output[:keep], *[output[keep - 1]] * (len(output) - keep)])
    return honest_prefill(setting.honest, setting.model, outputs)


def honest_prefill(
    traces: Sequence[Trace], model: PreTrainedModel, outputs: Sequence[TokenIds]
) -> list[Trace]:
    """Return the traces with other outputs, and the states of one forward of `model` over these."""
    headers = []
    for trace, output in zip(traces, outputs, strict=True):
        positions = tuple(range(trace.n_prompt + len(output) - 1))
        update = {"output_ids": tuple(output), "positions": positions}
        headers.append(trace.header.model_copy(update=update))
    traced: dict[int, Trace] = {}
    for batch in batches(headers, model):
        of_batch = [headers[index] for index in batch]
        for index, header, prefill in zip(batch, of_batch, prefills(of_batch, model), strict=True):
            traced[index] = Trace(header, prefill.states)
    return [traced[index] for index in range(len(headers))]


# --- forged traces ---


def with_states(trace: Trace, forge: Callable[[Tensor], Tensor]) -> Trace:
    """Return `trace` with the states that `forge` makes of each layer's."""
    return replace(trace, states={layer: forge(rows) for layer, rows in trace.states.items()})


def with_copied_states(trace: Trace) -> Trace:
    """Return `trace` with the state of the position before at each, as a host has that saves its work."""
    return with_states(trace, _shifted)


def _shifted(rows: Tensor) -> Tensor:
    return rows.roll(1, 0)


def _noise(rows: Tensor) -> Tensor:
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    return (noise * rows.float().std()).to(rows.dtype)


@attack("stopped-early", "three quarters of the output", structural=True)
def stopped_early(setting: Setting) -> list[Trace]:
    cut = []
    for trace in setting.honest:
        output = trace.header.output_ids[: max(3 * trace.n_tokens // 4, 1)]
        count = trace.n_prompt + len(output) - 1
        header = trace.header.model_copy(update={"output_ids": output, "positions": tuple(range(count))})
        cut.append(Trace(header, {layer: rows[:count] for layer, rows in trace.states.items()}))
    return cut


@attack("replayed", "the trace of another request", structural=True)
def replayed(setting: Setting) -> list[Trace]:
    return [*setting.honest[1:], setting.honest[0]]


@attack("replayed-relabelled", "tokens and states of another request under this prompt and nonce")
def replayed_relabelled(setting: Setting) -> list[Trace]:
    return [_fitted(trace, honest) for trace, honest in zip(replayed(setting), setting.honest, strict=True)]


@attack("missing-cells", "states of the last position left out", structural=True)
def missing_cells(setting: Setting) -> list[Trace]:
    return [
        replace(
            _with_header(trace, positions=trace.header.positions[:-1]),
            states={layer: rows[:-1] for layer, rows in trace.states.items()},
        )
        for trace in setting.honest
    ]


@attack("other-weights", "the header names other weights", structural=True)
def other_weights(setting: Setting) -> list[Trace]:
    claim = setting.honest[0].header.model
    other = claim.model_copy(update={"weights_digest": claim.weights_digest[::-1]})
    return [_with_header(trace, model=other) for trace in setting.honest]


@attack("zero-states", "states of nothing but 0", torch.zeros_like)
@attack("random-states", "Gaussian noise of the states' size", _noise)
@attack("copied-states", "each position shows the state of the one before", _shifted)
def forged_states(setting: Setting, forge: Callable[[Tensor], Tensor]) -> list[Trace]:
    return [with_states(trace, forge) for trace in setting.honest]
