"""Any-precision inference: residual codes, or nested bit planes, as one model.
It is read at the precision that a token deserves.

Plane 1 of a matrix in residual codes is a complete matrix of few bits, and each further plane repairs it
(Matryoshka quantization, 2502.06786, nests bits in the same spirit). So one checkpoint is several models, and
a precision policy decides while it runs:

    depth     every token reads so many planes
    layers    chosen layers read all planes, the others plane 1 alone
    gated     a token reads all planes where the entropy of the distribution that it was drawn from is above
              a threshold, H_(t-1) > theta, else plane 1. The first token, and a prompt, read all
    shuffled  as many tokens as a gate opened, others: its control

The gate knows H_(t-1) before it reads anything for token t. `gated_logits` finds for a whole text what
decoding it token by token would give, a piece at a time: a token's depth depends on the tokens before it
alone, so each round over a piece fixes at least one more token.

`PrecisionPolicy` counts bytes of codes, scales and all that is stored with a plane: by token, as decoding one
by one reads them, and by forward, which reads a plane once for all its tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitassay.errors import BitassayError
from bitassay.models.hooks import hooked
from bitassay.models.positions import frequencies
from bitassay.models.walk import walk
from bitassay.quantization.codes.copies import planes
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.inputs.activations import InputRounding, rounded_inputs
from bitassay.quantization.inputs.kv_cache import cache_to_crop
from bitassay.quantization.recipe.weights import SUMS
from bitassay.quantization.runtime.linear import QuantizedLinear
from bitassay.quantization.runtime.model import copy_sharing_parameters, quantization_of, size_bytes
from bitassay.quantization.solvers.sensitivity import matrix_locations

PIECE = 64  # tokens that rounds of `gated_logits` go over

Depth = int | Int[Tensor, "batch tokens"]


@dataclass
class PrecisionPolicy:
    """How many planes the next forwards read, and what they have read.

    depth: of every token, or of each. deep_layers: those that read all planes whatever the depth. all_bytes:
    of all planes. other_bytes: what else is read for every token or forward (norms, head). by_token and
    by_forward count bytes of planes.
    """

    planes: int
    all_bytes: int
    other_bytes: int
    depth: Depth
    deep_layers: frozenset[int] = frozenset()
    by_token: float = 0.0
    by_forward: float = 0.0
    tokens: int = 0
    forwards: int = 0

    def clear(self) -> None:
        """Count from 0."""
        self.by_token = self.by_forward = 0.0
        self.tokens = self.forwards = 0

    @property
    def bytes_per_token(self) -> float:
        """As if each token was decoded by itself."""
        return self.by_token / max(1, self.tokens) + self.other_bytes

    @property
    def bytes_per_forward(self) -> float:
        return self.by_forward / max(1, self.forwards) + self.other_bytes

    @contextmanager
    def reading(self, depth: Depth) -> Iterator[None]:
        """Read so many planes within the context."""
        before, self.depth = self.depth, depth
        try:
            yield
        finally:
            self.depth = before


@dataclass
class _Product:
    """The forward of a linear in planes. weights: of the first k planes for each k; plane_bytes: of each."""

    layer: int
    weights: list[Tensor]
    plane_bytes: list[float]
    bias: Tensor | None
    inputs: InputRounding | None
    policy: PrecisionPolicy = field(repr=False)

    def __call__(self, x: Float[Tensor, "batch tokens in"]) -> Float[Tensor, "batch tokens out"]:
        policy, count = self.policy, x.shape[0] * x.shape[1]
        depth = len(self.weights) if self.layer in policy.deep_layers else policy.depth
        x = x if self.inputs is None else rounded_inputs(x, self.inputs)
        if isinstance(depth, int):
            read = [count if plane < depth else 0 for plane in range(len(self.weights))]
            y = nn.functional.linear(x, self.weights[min(depth, len(self.weights)) - 1], self.bias)
        else:
            read, y = [count], nn.functional.linear(x, self.weights[0], self.bias)
            for plane, weight in enumerate(self.weights[1:], start=1):
                deeper = (depth > plane).to(x.device)
                read.append(int(deeper.expand(x.shape[:2]).sum()))
                if read[-1]:
                    y = torch.where(deeper[..., None], nn.functional.linear(x, weight, self.bias), y)
        policy.by_token += sum(size * tokens for size, tokens in zip(self.plane_bytes, read, strict=True))
        policy.by_forward += sum(size for size, tokens in zip(self.plane_bytes, read, strict=True) if tokens)
        return y


def with_any_precision(model: PreTrainedModel) -> tuple[PreTrainedModel, PrecisionPolicy]:
    """Return a copy of a model in residual codes whose linears read as many planes as its policy says, at
    first all. Raises BitassayError for a model without residual codes, or a packed one."""
    done, linears = quantization_of(model), walk(model).linears
    tensors = {} if done is None else done.tensors
    count = max((len(planes(tensor)) for tensor in tensors.values()), default=0)
    recipe = None if done is None else done.recipe
    copies = recipe and (recipe.replication or (recipe.weights and recipe.weights.copies))
    averaged = copies is not None and copies.differ not in SUMS
    if count < 2 or averaged or any(isinstance(m, QuantizedLinear) for m in model.modules()):
        raise BitassayError(
            "any-precision inference needs a model in residual codes, not packed",
            "a recipe with replication: {how: parallel, of: linear, differ: residual}, or digits",
        )
    if done is not None and done.passes:
        raise BitassayError("any-precision inference is of models whose layers run once", "of: linear")
    if others := [name for name in tensors if name not in linears]:
        raise BitassayError(f"{others[0]}: planes of experts are always read together", "leave experts out")
    copied = copy_sharing_parameters(model)
    stored = sum(tensor.stored_bits for tensor in tensors.values()) // 8
    embedding, head = copied.get_input_embeddings(), copied.get_output_embeddings()
    untied = head is None or head.weight is not embedding.weight
    unread = 2 * embedding.get_parameter("weight").numel() if untied else 0  # a row a token is read
    policy = PrecisionPolicy(count, stored, size_bytes(model) - stored - unread, count)
    where = matrix_locations(model)
    for name, tensor in tensors.items():
        linear: Any = copied.get_submodule(name)
        weights, sizes = _by_depth(tensor, linear.get_parameter("weight"))
        linear.forward = _Product(
            where[name].layer, weights, sizes, linear.bias, getattr(linear, "inputs", None), policy
        )

    def count_tokens(_module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        policy.tokens += _input_ids(args, options).numel()
        policy.forwards += 1

    copied.register_forward_pre_hook(count_tokens, with_kwargs=True)
    return copied, policy


def _input_ids(args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    ids = options.get("input_ids")
    return ids if ids is not None else args[0]


def _by_depth(tensor: QuantizedTensor, weight: Tensor) -> tuple[list[Tensor], list[float]]:
    """Return the weights of the first k planes for each k, the last being the model's, and their bytes."""
    parts, total, weights = planes(tensor), torch.zeros((), device=weight.device), []
    for part in parts[:-1]:
        total = total + part.dequantize()
        weights.append(total.to(weight.dtype))
    return [*weights, weight], [part.stored_bits / 8 for part in parts]


def entropy(logits: Float[Tensor, "*rows vocabulary"]) -> Float[Tensor, "*rows"]:
    """Return the entropy of the next-token distributions, in nats."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@contextmanager
def gated(model: PreTrainedModel, policy: PrecisionPolicy, threshold: float) -> Iterator[None]:
    """Read all planes for prompts and after an entropy above `threshold` within the context."""

    def before(_module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        cache = options.get("past_key_values")
        text_begins = cache is None or cache.get_seq_length() == 0
        if text_begins or _input_ids(args, options).shape[1] > 1:
            policy.depth = policy.planes

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        unsure = entropy(output.logits[:, -1]) > threshold
        policy.depth = torch.where(unsure, policy.planes, 1)[:, None]

    entering = model.register_forward_pre_hook(before, with_kwargs=True)
    with hooked([entering, model.register_forward_hook(after)]), policy.reading(policy.planes):
        yield


@torch.inference_mode()
def gated_logits(
    model: PreTrainedModel, policy: PrecisionPolicy, window: Int[Tensor, " tokens"], threshold: float
) -> tuple[Float[Tensor, "tokens vocabulary"], Int[Tensor, " tokens"]]:
    """Return the logits at every position of a text that is decoded token by token, and the depth of each
    token. Raises BitassayError for a text on whose way the model's rotary frequencies change."""
    if frequencies(model, 1) != frequencies(model, len(window)):
        raise BitassayError(
            f"a gate over {len(window)} tokens: on the way the model's rotary frequencies change",
            "a shorter window",
        )
    cache, logits, depths = cache_to_crop(model), list[Tensor](), list[Tensor]()
    first = policy.planes
    for piece in window[None].to(model.device).split(PIECE, dim=1):
        depth = torch.ones_like(piece)
        depth[0, 0] = first
        counted = policy.by_token, policy.by_forward, policy.tokens, policy.forwards
        while True:
            # The last round alone is what decoding reads.
            policy.by_token, policy.by_forward, policy.tokens, policy.forwards = counted
            with policy.reading(depth):
                piece_logits = model(piece, past_key_values=cache, use_cache=True).logits[0]
            wanted = torch.where(entropy(piece_logits) > threshold, policy.planes, 1)
            settled = torch.equal(wanted[:-1], depth[0, 1:])
            depth[0, 1:], first = wanted[:-1], int(wanted[-1])
            if settled:
                break
            cache.crop(-piece.shape[1])
        logits.append(piece_logits)
        depths.append(depth[0])
    return torch.cat(logits), torch.cat(depths)


def shuffled(depths: Int[Tensor, " tokens"], generator: torch.Generator) -> Int[Tensor, " tokens"]:
    """Return the same depths at random positions; the first token keeps its own."""
    order = 1 + torch.randperm(len(depths) - 1, generator=generator).to(depths.device)
    return torch.cat([depths[:1], depths[order]])
