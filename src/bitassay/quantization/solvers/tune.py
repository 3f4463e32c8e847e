"""End-to-end tuning: after the layers were quantized one by one, learn them all together.

What a user loses is the distance between the two models' predictions, so that is the loss: the KL divergence
from the unquantized model's next-token distribution, over the calibration text,

    L = mean over tokens of sum_t p_t (log p_t - log p'_t)

and everything that is stored may move: codes (through their latents, `latent.py`), scales, and the gains
of the norms. Adam, one learning rate for latents in steps, one for scales relative to their first value, a
cosine decay to zero. Tuning scales alone is the second phase of EfficientQAT (2407.11062); moving the codes
too is distillation of a quantized network as in LLM-QAT (2305.17888), here with the text that the other
methods calibrate on, instead of the model's own samples.

Learning a layer leaves many latents close to a threshold, over which straight-through gradients carry them to
and fro (2203.11086), and the first steps of Adam move all of them equally far: thousands of codes would
change at once. So each is brought a little nearer to its code first, and has to insist.

The base model's last hidden states are kept instead of its logits, which are `vocabulary / hidden` times
larger and are one product away. Products are in bf16, what is learned in fp32. On the way back each layer is
computed once more instead of being kept (1604.06174), which takes a third more time than the rest and much
less memory.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.config import text_config
from bitassay.models.hooks import forwarded
from bitassay.models.walk import decoder_layers, decoder_of
from bitassay.quantization.recipe.solvers import Tune
from bitassay.quantization.solvers.latent import LatentWeight
from bitassay.quantization.solvers.layerwise import BATCH_SAMPLES
from bitassay.quantization.solvers.schedule import learning_rate, sample_order
from bitassay.record.run import RunFolder

KEEP_STEPS = 16
SETTLED = 0.9  # of a latent's distance from its code is kept at the start
MOMENTS = ("exp_avg", "exp_avg_sq")
# Latent, gradient, two moments and the draft's value make 20; what was measured on two models takes 12 more,
# and what holds them is not known.
BYTES_A_WEIGHT = 4 * 4 + 4 + 12
BYTES_IN_A_PASS = 4 + 2 + 2  # of the layer that is being computed: value, bf16 and position
BYTES_A_FEATURE = 2.6  # and, for each input and output of each of its linears and token: SmolLM2's
CHUNK_TOKENS = 512  # logits that are held at once


def memory_of(
    spec: Tune,
    tokens: int,
    shapes: Collection[tuple[int, int]],
    layers: int,
    hidden: int,
    parameters: int,
    vocabulary: int,
) -> int:
    """Bytes that tuning holds at its peak, roughly: the base model in fp32, what is learned, the states
    between layers of a batch of samples of `tokens` tokens, what one layer leaves for the way back, and
    logits."""
    weights, features = sum(out * columns for out, columns in shapes), sum(map(sum, shapes))
    states = spec.batch * tokens * 4 * hidden * (layers + 1)
    layer = (BYTES_IN_A_PASS * weights + spec.batch * tokens * BYTES_A_FEATURE * features) / layers
    logits = 4 * 4 * CHUNK_TOKENS * vocabulary
    return int(4 * parameters + BYTES_A_WEIGHT * weights + states + layer + logits)


def head_weight(model: PreTrainedModel) -> Float[Tensor, "vocabulary hidden"]:
    """The matrix that makes logits of the last hidden states. Raises BitassayError for a model that does more
    than a product there."""
    head = model.get_output_embeddings()
    config = text_config(model)
    more = [name for name in ("final_logit_softcapping", "logit_scale") if getattr(config, name, None)]
    if head is None or more:
        why = more[0] if more else "no output head"
        raise BitassayError(
            f"{type(model).__name__} has {why}: tune knows of a plain head alone", "a recipe without tune"
        )
    return head.get_parameter("weight").detach()


def own_norms(model: PreTrainedModel) -> list[nn.Parameter]:
    """The gains of the decoder's norms, each replaced by a copy in fp32 that may be changed."""
    norms = []
    for module in decoder_of(model).modules():
        gain = module._parameters.get("weight")
        if gain is not None and gain.ndim == 1:
            module.register_parameter("weight", nn.Parameter(gain.detach().float().clone()))
            norms.append(module.get_parameter("weight"))
    return norms


@torch.no_grad()
def last_states(
    model: PreTrainedModel, tokens: Int[Tensor, "samples tokens"], batch: int = BATCH_SAMPLES
) -> Float[Tensor, "samples tokens hidden"]:
    """What the output head reads, in bf16."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        parts = [
            decoder_of(model)(input_ids=part, use_cache=False).last_hidden_state.bfloat16()
            for part in tokens.split(batch)
        ]
    return torch.cat(parts)


def divergence(
    states: Float[Tensor, "... hidden"],
    base_states: Float[Tensor, "... hidden"],
    head: Float[Tensor, "vocabulary hidden"],
    base_head: Float[Tensor, "vocabulary hidden"],
) -> tuple[float, Float[Tensor, "... hidden"]]:
    """The mean KL divergence from the base model's distributions, and its gradient in `states`; logits exist
    for CHUNK_TOKENS at a time."""
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
    latents: dict[str, LatentWeight],
    norms: list[nn.Parameter],
    tokens: Int[Tensor, "samples tokens"],
    base_states: Float[Tensor, "samples tokens hidden"],
    base_head: Float[Tensor, "vocabulary hidden"],
    spec: Tune,
    folder: RunFolder | None = None,
) -> Iterator[tuple[int, float]]:
    """Learn in place; yields each step, counted from 1, and its loss. `student` computes with the latents,
    `norms` are its gains; the base model's states and head say what it should say. With a folder the state
    is kept there every KEEP_STEPS steps, and gone on from."""
    head, base_head = head_weight(student).bfloat16(), base_head.bfloat16()
    codes = [latent.u for latent in latents.values()]
    scales = [parameter for latent in latents.values() for parameter in latent.grid_parameters()]
    for latent in latents.values():
        latent.requires_grad_(False)
        latent.settle(SETTLED)
    kinds = [(codes, spec.codes), (scales, spec.scales), (norms, spec.norms)]
    for parameters, rate in kinds:
        for parameter in parameters:
            parameter.requires_grad_(rate > 0)
    groups = [{"params": parameters, "lr": rate, "rate": rate} for parameters, rate in kinds if rate > 0]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    order = sample_order(len(tokens), spec.steps * spec.batch, spec.seed)
    learned = [parameter for group in groups for parameter in group["params"]]
    for step in range(_restore(folder, learned, optimizer), spec.steps):
        chosen = order[step * spec.batch : (step + 1) * spec.batch]
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * learning_rate(step, spec.steps, spec.warmup)
        with torch.autocast(tokens.device.type, torch.bfloat16), layers_computed_again(student):
            states = decoder_of(student)(input_ids=tokens[chosen], use_cache=False).last_hidden_state
        loss, gradient = divergence(states, base_states[chosen], head, base_head)
        states.backward(gradient.to(states.dtype))
        optimizer.step()
        optimizer.zero_grad()
        for latent in latents.values():
            latent.clamp()
        if folder is not None and (step + 1) % KEEP_STEPS == 0:
            _keep(folder, step + 1, learned, optimizer)
        yield step + 1, loss


@contextmanager
def layers_computed_again(model: PreTrainedModel) -> Iterator[None]:
    """While this lasts, a decoder layer keeps its inputs alone for the way back."""
    with forwarded(
        (layer, partial(checkpoint, layer.forward, use_reentrant=False))  # type: ignore[arg-type]
        for layer in decoder_layers(model)
    ):
        yield


def _keep(
    folder: RunFolder, step: int, learned: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Write what has been learned after `step` steps, and Adam's moments."""
    kept = {"step": torch.tensor(step)}
    for place, parameter in enumerate(learned):
        kept[f"{place}.value"] = parameter.detach()
        kept |= {f"{place}.{moment}": optimizer.state[parameter][moment] for moment in MOMENTS}
    folder.write_tensors("tune", kept)


def _restore(folder: RunFolder | None, learned: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """The steps that are done, once their state is back in place."""
    if folder is None or not folder.has_tensors("tune"):
        return 0
    kept = folder.read_tensors("tune")
    for place, parameter in enumerate(learned):
        parameter.data.copy_(kept[f"{place}.value"])
        moments = {moment: kept[f"{place}.{moment}"] for moment in MOMENTS}
        optimizer.state[parameter] = {"step": kept["step"].float(), **moments}
    return int(kept["step"])
