"""Hosts that run the real model and then choose other tokens, or change it in one place only.

They are what a verifier finds hardest: each changes little at a time. Tokens are steered by samplers that
take logits of the real model: the second best at near ties (also what speculative decoding does that accepts
drafts which lose by little), a watermark, a slightly lower temperature. Models differ in one layer, or by a
rotary base that is 1 % too large.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from bitassay.engines.decode import Prefill, TokenIds
from bitassay.engines.rotary import rotary_base_times
from bitassay.engines.sampling import Draw, Sampler
from bitassay.models.walk import decoder_layers, decoder_of, module_name
from bitassay.quantization.recipe.recipe import Override, Recipe
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.transforms.residual_stream import find_norm
from bitassay.verification.attacks.attack import Setting, attack
from bitassay.verification.attacks.hosts import answered, honest_prefill, quantized_weights
from bitassay.verification.observe import prefills
from bitassay.verification.trace import Trace

INT8 = WeightScheme(format="int8")
ROUNDS = 3  # of moving states: rounding undoes some of the first
SLACK = 0.02  # nats beyond the tie
DELTA = 0.5  # nats that a watermark adds to half of the vocabulary


@dataclass(frozen=True)
class Steered(Sampler):
    """A sampler that takes the second best token where it loses by at most `within` nats, at most `times` in
    a request. taken: how often, by nonce."""

    within: float = 0.0
    times: int = 2**31
    taken: dict[str, int] = field(default_factory=dict, compare=False)

    def choose(self, logits: Float[Tensor, "rows vocabulary"], draws: Sequence[Draw]) -> Int[Tensor, " rows"]:
        best = self.scores(logits, draws).topk(2)
        chosen = best.indices[:, 0].clone()
        for row, draw in enumerate(draws):
            near = best.values[row, 0] - best.values[row, 1] <= self.within
            if near and self.taken.get(draw.nonce, 0) < self.times:
                self.taken[draw.nonce] = self.taken.get(draw.nonce, 0) + 1
                chosen[row] = best.indices[row, 1]
        return chosen


@dataclass(frozen=True)
class Watermarked(Sampler):
    """A sampler that adds DELTA to the logits of a half of the vocabulary, which depends on the position."""

    def choose(self, logits: Float[Tensor, "rows vocabulary"], draws: Sequence[Draw]) -> Int[Tensor, " rows"]:
        size = logits.shape[-1]
        green = np.stack([np.random.default_rng(draw.index).random(size) < 0.5 for draw in draws])
        return super().choose(logits + DELTA * torch.from_numpy(green).to(logits), draws)


@attack("near-tie", "the second best token once an answer, where it loses by at most 0.3 nats", 1)
@attack("near-ties", "the second best token wherever it loses by at most 0.3 nats", 2**31)
def near_ties(setting: Setting, times: int) -> list[Trace]:
    asked = setting.sampler
    steered = Steered(asked.temperature, asked.top_p, asked.seed, within=0.3, times=times)
    return answered(setting, setting.model, sampler=steered)


@attack("near-ties-moved", "the same, and the last states moved until they choose these tokens")
def moved_states(setting: Setting) -> list[Trace]:
    """The output head alone reads the last states, so moving them changes no other token. Each is moved the
    shortest way, along the row of the wanted token less that of the best, until the head agrees."""
    traces = near_ties(setting, times=2**31)
    output = setting.model.get_output_embeddings()
    assert isinstance(output, torch.nn.Module)
    head = output.get_parameter("weight").detach().float()
    norm = copy.deepcopy(decoder_of(setting.model).get_submodule("norm")).float()
    gain = find_norm(norm, "").gain()
    for _ in range(ROUNDS):
        for trace, replay in zip(traces, replays_of(traces, setting.model), strict=True):
            header, layer = trace.header, trace.header.layers[-1]
            first = len(header.prompt_ids) - 1  # of the positions that choose the output
            for index, token in enumerate(header.output_ids):
                logits = replay.logits[index].float()
                best = int(logits.argmax())
                if best == token:
                    continue
                state = trace.states[layer][first + index].float()
                direction = (gain * (head[token] - head[best])).to(state)
                gap = float(logits[best] - logits[token]) + SLACK
                step = gap * state.pow(2).mean().sqrt() / direction.pow(2).sum() * direction
                trace.states[layer][first + index] = (state + step).to(trace.states[layer])
    return traces


def replays_of(traces: Sequence[Trace], model: PreTrainedModel) -> list[Prefill]:
    """Return what the output head makes of the last states of each trace."""
    last = [{trace.header.layers[-1]: trace.states[trace.header.layers[-1]]} for trace in traces]
    return [
        replay
        for trace, states in zip(traces, last, strict=True)
        for replay in prefills([trace.header], model, [states])
    ]


@attack("watermark", "half a nat more for a half of the vocabulary")
def watermark(setting: Setting) -> list[Trace]:
    asked = setting.sampler
    return answered(setting, setting.model, sampler=Watermarked(asked.temperature, asked.top_p, asked.seed))


@attack("temperature-0.9", "0.9 times the temperature that was asked for", sampled=True)
def lower_temperature(setting: Setting) -> list[Trace]:
    sampler = replace(setting.sampler, temperature=0.9 * setting.sampler.temperature)
    return answered(setting, setting.model, sampler=sampler)


@attack("prompt-token", "decoded behind a prompt with one token twice, honest prefill")
def prompt_token(setting: Setting) -> list[Trace]:
    def changed(prompt: TokenIds) -> TokenIds:
        at = 3 * len(prompt) // 4
        return [*prompt[:at], prompt[at], *prompt[at:]]

    other = answered(setting, setting.model, prompts=[changed(prompt) for prompt in setting.prompts])
    return honest_prefill(setting.honest, setting.model, [trace.header.output_ids for trace in other])


@attack("int8-last-layer", "the last decoder layer in INT8", -1)
@attack("int8-middle-layer", "one decoder layer, in the middle, in INT8", None)
def one_layer(setting: Setting, index: int | None) -> list[Trace]:
    layers = decoder_layers(setting.model)
    chosen = range(len(layers))[len(layers) // 2 if index is None else index]
    there = Override(match=f"{module_name(setting.model, layers)}.{chosen}.*", weights=INT8)
    return quantized_weights(setting, Recipe(name="w8-layer", weights=None, overrides=(there,)))


@attack("rope-1%", "a rotary base that is 1 % too large, where there is one", 1.01)
def rotary_base(setting: Setting, factor: float) -> list[Trace]:
    with rotary_base_times(setting.model, factor):
        return answered(setting, setting.model)
