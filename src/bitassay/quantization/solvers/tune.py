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

Products are in bf16 where that is faster, what is learned in fp32, Adam's moments in bf16. On the way back
each layer is computed once more instead of being kept (1604.06174), which takes a third more time and much
less memory; its weights move as soon as their gradients are there, and these are dropped. So a weight takes
eight bytes, and those of one layer more.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from bitassay.models.hooks import forwarded
from bitassay.models.opened import is_opened, parameter_of, present, put_parameter, weights_of
from bitassay.models.precision import short_products
from bitassay.models.walk import decoder_layers, decoder_of, module_name
from bitassay.quantization.recipe.solvers import Tune
from bitassay.quantization.shapes import Tokens
from bitassay.quantization.solvers.descent import descend
from bitassay.quantization.solvers.distillation import distillation_data, head_weight
from bitassay.quantization.solvers.kept import Kept
from bitassay.quantization.solvers.shadow_weight import ShadowWeight, shadow_linears
from bitassay.quantization.solvers.shelf import IN_MEMORY, Shelf
from bitassay.quantization.solvers.solver import Model, Solution
from bitassay.record.memory import release_freed_memory
from bitassay.record.run import RunFolder

SAID_STEPS = 16
KEPT_DISTANCE = 0.9  # the share of a position's distance from its code with which tuning starts
BYTES_A_WEIGHT = 4 + 2 + 2  # a position and two moments
BYTES_IN_A_PASS = 4 + 4 + 2 + 2 + 3 * 4  # of a layer: value, its gradient, bf16, position, and a step
BYTES_A_FEATURE = 2.6  # and, for each input and output of each of its linears and token, in bf16: SmolLM2's
CHUNK_TOKENS = 128  # logits that are held at once


def work_bytes_a_weight(opened: bool) -> int:
    """Return the bytes of a weight in the work folder: its start and the last two states; of an opened model
    what it learns, too."""
    return 4 + (3 if opened else 2) * BYTES_A_WEIGHT


def memory_of(
    spec: Tune,
    samples: int,
    tokens: int,
    shapes: Collection[tuple[int, int]],
    layers: int,
    hidden: int,
    parameters: int,
    vocabulary: int,
    *,
    short: bool,
    opened: bool = False,
) -> int:
    """Return the bytes that tuning holds at its peak, roughly: the base model in fp32, what is learned (of an
    opened model neither), the base model's last states in bf16 and its head, the states of a batch between
    layers, and the most of what one layer leaves for the way back, of logits, and of the embedding, which an
    opened model reads at every step. short: products are in bf16, not in fp32."""
    weights, features = sum(out * columns for out, columns in shapes), sum(map(sum, shapes))
    states = 2 * (samples + spec.generated) + 4 * spec.batch * (layers + 1)
    longer = 1 if short else 2
    layer = (BYTES_IN_A_PASS * weights + spec.batch * tokens * longer * BYTES_A_FEATURE * features) / layers
    logits = 4 * 4 * CHUNK_TOKENS * vocabulary
    if opened:
        layer += BYTES_A_WEIGHT * weights / layers
        resident = 0
    else:
        resident = 4 * parameters + BYTES_A_WEIGHT * weights
    return int(
        resident
        + longer * 2 * vocabulary * hidden
        + states * tokens * hidden
        + max(layer, logits, 4 * vocabulary * hidden)
    )


def solve_model(spec: Tune, model: Model) -> Iterator[tuple[str, Solution]]:
    """Yield what tuning makes of the linears; the working copy is left with the norms that go with them. What
    is learned of an opened model is in memory a layer at a time too."""
    tokens, states = distillation_data(model.base, model.tokens, spec, model.folder, model.progress)
    student, shadows = model.working_copy, dict[str, ShadowWeight]()
    shelf = Shelf(model.folder.path if model.folder is not None and is_opened(student) else None)
    layers, norms = by_layer(student, model.linears), tunable_norms(student)
    for layer, names in layers.items():
        for name in names:  # a shadow weight takes the place of what it is made of
            shadows[name] = model.take(name).shadow_weight()
            shadows[name].shrink_to_grid(KEPT_DISTANCE)
            empty = torch.empty(0, dtype=student.dtype, device=student.device)
            put_parameter(student, f"{name}.weight", nn.Parameter(empty, requires_grad=False))
        shelf.add(layer, [part for name in names for part in shadows[name].tensors()])
        release_freed_memory()
    own = {layer: [shadows[name] for name in names] for layer, names in layers.items()}
    heads = heads_of(student, model.base)
    steps = tune(student, own, norms, tokens, states, heads, spec, model.folder, shelf)
    losses = list[float]()
    with shadow_linears(student, shadows):
        for step, loss in steps:
            model.progress(f"tuning by {model.recipe_name}", step, spec.steps)
            losses.append(loss)
            if step % SAID_STEPS == 0 or step == spec.steps:
                mean = sum(losses) / len(losses)
                model.progress(f"step {step}: KL {mean:.3f}, the mean of {len(losses)} steps")
                losses.clear()
    for layer, names in layers.items():
        shelf.enter(layer)
        for name in names:
            yield name, Solution(shadows.pop(name).quantized())


def by_layer(model: PreTrainedModel, names: Collection[str]) -> dict[int, list[str]]:
    """Return names of what is in decoder layers by the number of the layer, in the order of the layers."""
    prefix, layers = module_name(model, decoder_layers(model)), dict[int, list[str]]()
    for name in names:
        layers.setdefault(int(name.removeprefix(f"{prefix}.").partition(".")[0]), []).append(name)
    return dict(sorted(layers.items()))


def tunable_norms(model: PreTrainedModel) -> list[nn.Parameter]:
    """Replace the gains of the decoder's norms by copies in fp32 that may be changed, and return these."""
    norms, within = list[nn.Parameter](), set(decoder_of(model).modules())
    for owner, module in model.named_modules():
        gain = module._parameters.get("weight") if module in within else None
        if gain is not None and gain.ndim == 1:
            name = f"{owner}.weight"
            norms.append(nn.Parameter(parameter_of(model, name).float().clone()))
            put_parameter(model, name, norms[-1])
    return norms


class Heads(NamedTuple):
    """The output matrices in the dtype of products: of the model that is tuned and of the base model, often
    the same."""

    own: Float[Tensor, "vocabulary hidden"]
    base: Float[Tensor, "vocabulary hidden"]


def heads_of(model: PreTrainedModel, base: PreTrainedModel) -> Heads:
    """Return the output matrices of a model and its base."""
    dtype = torch.bfloat16 if short_products(model.device, model.dtype) else torch.float32
    base_head = head_weight(base).to(dtype)
    weights, head = weights_of(model), model.get_output_embeddings()
    assert head is not None
    same = head.weight is base.get_output_embeddings().weight  # type: ignore[union-attr]
    if same and (weights is None or f"{module_name(model, head)}.weight" not in weights.changes):
        return Heads(base_head, base_head)
    return Heads(head_weight(model).to(dtype), base_head)


def divergence(
    states: Float[Tensor, "... hidden"],
    base_states: Float[Tensor, "... hidden"],
    head: Float[Tensor, "vocabulary hidden"],
    base_head: Float[Tensor, "vocabulary hidden"],
) -> tuple[float, Float[Tensor, "... hidden"]]:
    """Return the mean KL divergence from the base model and its gradient, CHUNK_TOKENS at a time."""
    flat, base = states.detach().reshape(-1, states.shape[-1]), base_states.reshape(-1, states.shape[-1])
    # Made first, so that the system's heap has no holes between what the chunks take and leave.
    total, gradient = 0.0, torch.empty(flat.shape, device=flat.device)
    chunks = (tensor.split(CHUNK_TOKENS) for tensor in (flat, base, gradient))
    for part, base_part, out in zip(*chunks, strict=True):
        wanted = (base_part.to(base_head.dtype) @ base_head.T).float().log_softmax(-1)
        log_p = (part.to(head.dtype) @ head.T).float().log_softmax(-1)
        p = wanted.exp()
        total += wanted.sub_(log_p).mul_(p).sum().item()
        # d KL / d logits = p' - p
        out.copy_(log_p.exp_().sub_(p).to(head.dtype) @ head)
    count = len(flat)
    return total / count, gradient.div_(count).view(states.shape)


def tune(
    student: PreTrainedModel,
    layers: dict[int, list[ShadowWeight]],
    norms: list[nn.Parameter],
    tokens: Tokens,
    base_states: Float[Tensor, "samples tokens hidden"],
    heads: Heads,
    spec: Tune,
    folder: RunFolder | None = None,
    shelf: Shelf = IN_MEMORY,
) -> Iterator[tuple[int, float]]:
    """Learn in place; yields each step, counted from 1, and its loss. `student` computes with the shadow
    weights, here by layer, and `norms` are its gains; the base model's states and head say what it should
    predict. With a folder the state is kept there every KEEP_STEPS steps, and gone on from. shelf: where
    shadow weights may be."""
    shadows = [shadow for own in layers.values() for shadow in own]
    codes = [shadow.u for shadow in shadows]
    scales = [parameter for shadow in shadows for parameter in shadow.grid_parameters()]
    device, short = heads.own.device, heads.own.dtype == torch.bfloat16
    for norm in norms:
        norm.requires_grad_(False)

    def backward(chosen: Int[Tensor, " chosen"]) -> float:
        in_dtype = torch.autocast(device.type, torch.bfloat16, enabled=short)
        with in_dtype, layers_computed_again(student, shelf):
            read = tokens[chosen].to(device)
            states = decoder_of(student)(input_ids=read, use_cache=False).last_hidden_state
        loss, gradient = divergence(states, base_states[chosen].to(device), *heads)
        states.backward(gradient.to(states.dtype))
        return loss

    parameters = {layer: [each for one in own for each in one.parameters()] for layer, own in layers.items()}
    kept = Kept(folder, parameters)
    kinds = [(codes, spec.codes), (scales, spec.scales), (norms, spec.norms)]
    yield from descend(
        kinds, shadows, len(tokens), spec, backward, kept.restore, kept.keep, torch.bfloat16, shelf
    )


@contextmanager
def layers_computed_again(model: PreTrainedModel, shelf: Shelf = IN_MEMORY) -> Iterator[None]:
    """While this lasts, a decoder layer keeps its inputs alone for the way back; what it is made of is in
    memory while it is computed, either time."""
    layers = decoder_layers(model)
    prefix = module_name(model, layers)

    def computed(index: int, forward: Callable[..., Any], *positional: Any, **named: Any) -> Any:
        shelf.enter(index)
        with present(model, f"{prefix}.{index}"):
            return forward(*positional, **named)

    forwards = (partial(computed, index, layer.forward) for index, layer in enumerate(layers))
    again = (partial(checkpoint, forward, use_reentrant=False) for forward in forwards)
    with forwarded(zip(layers, again, strict=True)):  # type: ignore[arg-type]
        yield
