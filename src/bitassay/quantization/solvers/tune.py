"""End-to-end tuning: after the layers were quantized one by one, learn them all together.

What a user loses is the distance between the two models' predictions, so that is the loss: the KL divergence
from the unquantized model's next-token distribution, over the calibration text,

    L = mean over tokens of sum_t p_t (log p_t - log p'_t)

and everything that is stored may move: codes (through their shadow weights), scales, and the gains of the
norms. There is one learning rate for positions in steps, one for scales relative to their first value. Tuning
scales alone is the second phase of EfficientQAT (2407.11062); moving the codes too is distillation of a
quantized network as in LLM-QAT (2305.17888).

Learning a layer leaves many positions close to a threshold, over which straight-through gradients carry them
to and fro (2203.11086), and the first steps of Adam move all of them equally far. So each is first moved 10 %
nearer to its code, to damp oscillation.

Products are in bf16, what is learned in fp32, Adam's moments in bf16. On the way back each layer is computed
once more instead of being kept (1604.06174), which takes a third more time and much less memory; its weights
move as soon as their gradients are there, and these are dropped. So a weight takes eight bytes, and those of
one layer more.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from bitassay.models.hooks import forwarded
from bitassay.models.walk import decoder_layers, decoder_of
from bitassay.quantization.recipe.solvers import Tune
from bitassay.quantization.shapes import Tokens
from bitassay.quantization.solvers.descent import Adam, descend
from bitassay.quantization.solvers.distillation import distillation_data, head_weight
from bitassay.quantization.solvers.shadow_weight import ShadowWeight, shadow_linears
from bitassay.quantization.solvers.solver import Model, Solution
from bitassay.record.memory import release_freed_memory
from bitassay.record.run import RunFolder

KEEP_STEPS = 16
KEPT_DISTANCE = 0.9  # the share of a position's distance from its code with which tuning starts
BYTES_A_WEIGHT = 4 + 2 + 2  # a position and two moments
BYTES_IN_A_PASS = 4 + 4 + 2 + 2 + 3 * 4  # of a layer: value, its gradient, bf16, position, and a step
BYTES_A_FEATURE = 2.6  # and, for each input and output of each of its linears and token: SmolLM2's
CHUNK_TOKENS = 128  # logits that are held at once


def memory_of(
    spec: Tune,
    tokens: int,
    shapes: Collection[tuple[int, int]],
    layers: int,
    hidden: int,
    parameters: int,
    vocabulary: int,
) -> int:
    """Return the bytes that tuning holds at its peak, roughly: the base model in fp32, what is learned, the
    states of a batch between layers, what one layer leaves for the way back, and logits."""
    weights, features = sum(out * columns for out, columns in shapes), sum(map(sum, shapes))
    states = spec.batch * tokens * 4 * hidden * (layers + 1)
    layer = (BYTES_IN_A_PASS * weights + spec.batch * tokens * BYTES_A_FEATURE * features) / layers
    logits = 4 * 4 * CHUNK_TOKENS * vocabulary
    return int(4 * parameters + BYTES_A_WEIGHT * weights + states + layer + logits)


def solve_model(spec: Tune, model: Model) -> dict[str, Solution]:
    """Return what tuning makes of the linears; the working copy is left with the norms that go with them."""
    tokens, states = distillation_data(model.base, model.tokens, spec, model.folder, model.progress)
    shadows = {}
    for name in list(model.linears):  # a shadow weight takes the place of what it is made of
        shadows[name] = model.linears.pop(name).shadow_weight()
        linear = model.working_copy.get_submodule(name)
        empty = linear.get_parameter("weight").new_empty(0)
        linear.register_parameter("weight", nn.Parameter(empty, requires_grad=False))
    release_freed_memory()
    norms, head = tunable_norms(model.working_copy), head_weight(model.base)
    steps = tune(model.working_copy, shadows, norms, tokens, states, head, spec, model.folder)
    losses = list[float]()
    with shadow_linears(model.working_copy, shadows):
        for step, loss in steps:
            model.progress(f"tuning by {model.recipe_name}", step, spec.steps)
            losses.append(loss)
            if step % KEEP_STEPS == 0 or step == spec.steps:
                mean = sum(losses) / len(losses)
                model.progress(f"step {step}: KL {mean:.3f}, the mean of {len(losses)} steps")
                losses.clear()
    return {name: Solution(shadows.pop(name).quantized()) for name in list(shadows)}


def tunable_norms(model: PreTrainedModel) -> list[nn.Parameter]:
    """Replace the gains of the decoder's norms by copies in fp32 that may be changed, and return these."""
    norms = []
    for module in decoder_of(model).modules():
        gain = module._parameters.get("weight")
        if gain is not None and gain.ndim == 1:
            module.register_parameter("weight", nn.Parameter(gain.detach().float().clone()))
            norms.append(module.get_parameter("weight"))
    return norms


def divergence(
    states: Float[Tensor, "... hidden"],
    base_states: Float[Tensor, "... hidden"],
    head: Float[Tensor, "vocabulary hidden"],
    base_head: Float[Tensor, "vocabulary hidden"],
) -> tuple[float, Float[Tensor, "... hidden"]]:
    """Return the mean KL divergence from the base model and its gradient, CHUNK_TOKENS at a time."""
    flat, base = states.detach().reshape(-1, states.shape[-1]), base_states.reshape(-1, states.shape[-1])
    total, gradients = 0.0, []
    for part, base_part in zip(flat.split(CHUNK_TOKENS), base.split(CHUNK_TOKENS), strict=True):
        wanted = (base_part.to(base_head.dtype) @ base_head.T).float().log_softmax(-1)
        log_p = (part.to(head.dtype) @ head.T).float().log_softmax(-1)
        p = wanted.exp()
        total += (p * (wanted - log_p)).sum().item()
        # d KL / d logits = p' - p
        gradients.append((log_p.exp_().sub_(p).to(head.dtype) @ head).float())
    count = len(flat)
    return total / count, (torch.cat(gradients) / count).view(states.shape)


def tune(
    student: PreTrainedModel,
    shadows: dict[str, ShadowWeight],
    norms: list[nn.Parameter],
    tokens: Tokens,
    base_states: Float[Tensor, "samples tokens hidden"],
    base_head: Float[Tensor, "vocabulary hidden"],
    spec: Tune,
    folder: RunFolder | None = None,
) -> Iterator[tuple[int, float]]:
    """Learn in place; yields each step, counted from 1, and its loss. `student` computes with the shadow
    weights, `norms` are its gains; the base model's states and head say what it should predict. With a folder
    the state is kept there every KEEP_STEPS steps, and gone on from."""
    head, base_head = head_weight(student).bfloat16(), base_head.bfloat16()
    codes = [shadow.u for shadow in shadows.values()]
    scales = [parameter for shadow in shadows.values() for parameter in shadow.grid_parameters()]
    for shadow in shadows.values():
        shadow.shrink_to_grid(KEPT_DISTANCE)
    for norm in norms:
        norm.requires_grad_(False)

    def backward(chosen: Int[Tensor, " chosen"]) -> float:
        with torch.autocast(tokens.device.type, torch.bfloat16), layers_computed_again(student):
            states = decoder_of(student)(input_ids=tokens[chosen], use_cache=False).last_hidden_state
        loss, gradient = divergence(states, base_states[chosen], head, base_head)
        states.backward(gradient.to(states.dtype))
        return loss

    def keep(step: int, learned: list[nn.Parameter], adam: Adam) -> None:
        if folder is not None and step % KEEP_STEPS == 0:
            _keep(folder, step, learned, adam)

    kinds = [(codes, spec.codes), (scales, spec.scales), (norms, spec.norms)]
    restore = partial(_restore, folder)
    moving = list(shadows.values())
    yield from descend(kinds, moving, len(tokens), spec, backward, restore, keep, torch.bfloat16)


@contextmanager
def layers_computed_again(model: PreTrainedModel) -> Iterator[None]:
    """While this lasts, a decoder layer keeps its inputs alone for the way back."""
    with forwarded(
        (layer, partial(checkpoint, layer.forward, use_reentrant=False))  # type: ignore[arg-type]
        for layer in decoder_layers(model)
    ):
        yield


def _keep(folder: RunFolder, step: int, learned: list[nn.Parameter], adam: Adam) -> None:
    kept = {"step": torch.tensor(step)}
    for place, parameter in enumerate(learned):
        kept[f"{place}.value"] = parameter.detach()
        kept[f"{place}.mean"], kept[f"{place}.square"] = adam.mean[parameter], adam.square[parameter]
    folder.write_tensors("tune", kept)


def _restore(folder: RunFolder | None, learned: list[nn.Parameter], adam: Adam) -> int:
    """The steps that are done, once their state is back in place."""
    if folder is None or not folder.has_tensors("tune"):
        return 0
    kept = folder.read_tensors("tune")
    for place, parameter in enumerate(learned):
        parameter.data.copy_(kept[f"{place}.value"])
        adam.mean[parameter].copy_(kept[f"{place}.mean"])
        adam.square[parameter].copy_(kept[f"{place}.square"])
    return int(kept["step"])
