"""Distillation data: calibration text, and more that the base model writes itself.
The base model's last hidden states come along.

Learning all codes end to end sees every calibration token several times and begins to know them by heart. The
base model can say what follows in any text, so it may as well write the text (LLM-QAT, 2305.17888, section
3.1): each new sample goes on from PROMPT_TOKENS tokens of a calibration sample, drawn from the model's own
distribution, sharpened by TEMPERATURE. States are kept instead of logits, which are `vocabulary / hidden`
times larger and are one product away.
"""

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.cache import behind, takes_cache
from bitassay.models.config import text_config
from bitassay.models.lockstep import Forward, in_step
from bitassay.models.opened import change_parameter, parameter_of
from bitassay.models.positions import frequencies
from bitassay.models.precision import short_products
from bitassay.models.walk import decoder_layers, decoder_of, module_name
from bitassay.quantization.recipe.solvers import Tune
from bitassay.quantization.runtime.model import copy_sharing_parameters
from bitassay.quantization.shapes import Tokens
from bitassay.quantization.solvers.layerwise import BATCH_SAMPLES
from bitassay.record.progress import Progress
from bitassay.record.run import RunFolder

PROMPT_TOKENS = 16
TEMPERATURE = 0.8  # at 1 a small model soon loses the thread
WRITING_SAMPLES = 64


def distillation_data(
    base: PreTrainedModel, tokens: Tokens, spec: Tune, folder: RunFolder | None, progress: Progress
) -> tuple[Int[Tensor, "texts tokens"], Float[Tensor, "texts tokens hidden"]]:
    """Return token ids and the base model's last hidden states in bf16, both on the host; written text is
    kept in `folder`."""
    progress("running the base model over the calibration text")
    parts, head = [(tokens, last_states(base, tokens))], head_weight(base)
    starts = prompts(tokens, spec.generated).split(WRITING_SAMPLES) if spec.generated else ()
    for index, start in enumerate(starts):
        name = f"written-{index:04d}"
        if folder is not None and folder.has_tensors(name):
            kept = folder.read_tensors(name)
            parts.append((kept["tokens"], kept["states"]))
            continue
        progress("the base model writes", index * WRITING_SAMPLES, spec.generated)
        generator = torch.Generator().manual_seed(spec.seed + index)
        parts.append(continued(base, head, start, tokens.shape[1], generator))
        if folder is not None:
            folder.write_tensors(name, {"tokens": parts[-1][0], "states": parts[-1][1]})
    texts, states = (torch.cat(part) for part in zip(*parts, strict=True))
    return texts, states


def head_weight(model: PreTrainedModel) -> Float[Tensor, "vocabulary hidden"]:
    """Return the output matrix. Raises BitassayError for a model that does more than a product there."""
    head, config = model.get_output_embeddings(), text_config(model)
    more = [name for name in ("final_logit_softcapping", "logit_scale") if getattr(config, name, None)]
    if head is None or more:
        why = more[0] if more else "no output head"
        raise BitassayError(
            f"{type(model).__name__} has {why}: tune knows of a plain head alone", "a recipe without tune"
        )
    return parameter_of(model, f"{module_name(model, head)}.weight")


def last_states(
    model: PreTrainedModel, tokens: Tokens, batch: int = BATCH_SAMPLES
) -> Float[Tensor, "samples tokens hidden"]:
    """Return what the output head reads, in bf16, on the host; layers of an opened model are read once."""
    decoder, short = decoder_of(model), short_products(model.device, model.dtype)

    def states(part: Tokens) -> Tensor:
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=short):
            output = decoder(input_ids=part.to(model.device), use_cache=False)
        return output.last_hidden_state.bfloat16().cpu()

    return torch.cat(list(in_step([Forward(model, partial(states, part)) for part in tokens.split(batch)])))


def prompts(tokens: Tokens, count: int) -> Int[Tensor, "count prompt"]:
    """Return `count` pieces of PROMPT_TOKENS tokens: the first of every sample, then the second and so on."""
    length = min(PROMPT_TOKENS, tokens.shape[1])
    pieces = tokens[:, : tokens.shape[1] // length * length].unflatten(1, (-1, length))
    interleaved = pieces.transpose(0, 1).flatten(0, 1)
    return interleaved[torch.arange(count) % len(interleaved)]


def in_bf16(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy whose decoder has its parameters in bf16. Buffers stay as they are: rotary frequencies
    in bf16 would be others."""
    made, decoder = copy_sharing_parameters(model), decoder_of(model)
    for name, parameter in decoder.named_parameters(prefix=module_name(model, decoder)):
        if parameter.is_floating_point():
            change_parameter(made, name, Tensor.bfloat16)
    return made


def writing_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Return the bytes of the keys, values and states, in bf16, of as many samples as are written at once."""
    config = text_config(model)
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * WRITING_SAMPLES * tokens * (2 * keys * size * len(decoder_layers(model)) + config.hidden_size)


@torch.inference_mode()
def continued(
    model: PreTrainedModel,
    head: Float[Tensor, "vocabulary hidden"],
    start: Int[Tensor, "samples prompt"],
    length: int,
    generator: torch.Generator,
) -> tuple[Int[Tensor, "samples length"], Float[Tensor, "samples length hidden"]]:
    """Go on to `length` tokens by bf16 products; return them and their last hidden states, on the host. An
    opened model reads its layers for every token."""
    decoder, head = decoder_of(in_bf16(model)), head.bfloat16()
    tokens, caches = start.to(head.device), takes_cache(model)
    states, cache, begun = list[Tensor](), DynamicCache(config=model.config), 0
    while True:
        if not caches or frequencies(model, tokens.shape[1]) != frequencies(model, max(1, begun)):
            states, cache, begun = [], DynamicCache(config=model.config), 0  # read everything (again)
        entering = tokens[:, begun:]
        options = behind(decoder, cache, begun, entering) if caches else {"use_cache": False}
        states.append(decoder(input_ids=entering, **options).last_hidden_state)
        begun = tokens.shape[1]
        if begun == length:
            return tokens.cpu(), torch.cat(states, dim=1).cpu()
        p = ((states[-1][:, -1].to(head.dtype) @ head.T).float() / TEMPERATURE).softmax(-1)
        # The first token at which the distribution function exceeds a uniform number.
        u = torch.rand(len(p), 1, generator=generator).to(p.device)
        written = torch.searchsorted(p.cumsum(-1), u, right=True).clamp_(max=p.shape[1] - 1)
        tokens = torch.cat([tokens, written], dim=1)
