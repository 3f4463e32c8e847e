"""Mixtures of experts: quantized slice by slice, calibrated on the tokens that reach each expert.

A layer's router sends token t to its k best experts E(t) with shares g; expert e is an MLP:

    y_t = sum_{e in E(t)} g_te * W2_e h,    h = act(gate) * up,    [gate; up] = W1_e x_t

transformers keeps all W1_e in one 3-D parameter, and all W2_e in another. Each slice is quantized with scales
of its own, under the name `<parameter>.<expert>`. Routers stay as they are.

`expert_inputs` runs the fused module expert by expert for a while, as transformers' own `eager`
implementation does, and shows the input of every slice to a tap. An expert that few tokens reach has a poor
Hessian, one that none reaches has none: such a slice is rounded to nearest, and `warn_of_few` says so. With
`every=True` each token is shown to every expert (the output is still the routed one): no expert goes short,
but all see inputs that they would never answer.

`QuantizedExperts` is the real model's module: it keeps codes and dequantizes the experts that were reached.
Left out: a norm after each expert (Muse Spark), and expert parallelism.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from bitassay.models.hooks import forwarded, hooked
from bitassay.models.walk import fused_experts, is_fused_experts
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.record.progress import Progress, silent

FEW_TOKENS = 256  # below that, the Hessian of a slice says little about most of its input columns

Multiply = Callable[[str, int, Float[Tensor, "rows _"]], Float[Tensor, "rows _"]]
"""`x W^T + b` for a parameter's own name, an expert, and the inputs `x` of that slice."""
Load = dict[str, Int[Tensor, " _"]]
"""For each module of fused experts, by full name, how many tokens each expert got."""
Routes = dict[str, Int[Tensor, "_ _"]]
"""For each module of fused experts, by full name, the experts `[tokens, k]` of every token."""


def one_by_one(
    experts: nn.Module,
    x: Float[Tensor, "tokens hidden"],
    chosen: Int[Tensor, "tokens k"],
    shares: Float[Tensor, "tokens k"],
    multiply: Multiply,
) -> Float[Tensor, "tokens hidden"]:
    """Return the output of a fused module expert by expert, in the order of transformers' `eager`."""
    y = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        place, token = torch.where((chosen == expert).T)
        out = multiply("down_proj", expert, _inner(experts, x[token], expert, multiply))
        y.index_add_(0, token, (out * shares[token, place, None]).to(y.dtype))
    return y


def _inner(experts: nn.Module, x: Tensor, expert: int, multiply: Multiply) -> Tensor:
    """Return `act(gate) * up`, or `act(up)` where nothing is gated."""
    h = multiply("gate_up_proj" if experts.has_gate else "up_proj", expert, x)
    return experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)  # type: ignore[operator]


def _linear(experts: nn.Module, parameter: str, expert: int, x: Tensor, matrix: Tensor) -> Tensor:
    bias = experts.get_parameter(f"{parameter}_bias")[expert] if experts.has_bias else None
    return nn.functional.linear(x, matrix, bias)


def dense_matrix(experts: nn.Module, parameter: str, expert: int) -> Float[Tensor, "_ _"]:
    """Return the slice of one expert as `[out, in]`."""
    matrix = experts.get_parameter(parameter)[expert]
    return matrix.T if experts.is_transposed else matrix


def expert_matrix(model: PreTrainedModel, name: str) -> Float[Tensor, "_ _"]:
    """Return the slice of that name in `matrices(model)`, a view `[out, in]` of the model's own memory."""
    parameter, _, expert = name.rpartition(".")
    owner, _, key = parameter.rpartition(".")
    return dense_matrix(model.get_submodule(owner), key, int(expert)).detach()


def matrix_of(model: PreTrainedModel, name: str) -> Float[Tensor, "_ _"]:
    """Return the matrix of that name in `matrices(model)`, as the model holds it now."""
    owner = owner_of(model, name)
    if owner == name:
        return model.get_submodule(name).get_parameter("weight").detach()
    return expert_matrix(model, name)


def owner_of(model: PreTrainedModel, name: str) -> str:
    """Return the full name of the module that holds the matrix of that name in `matrices(model)`."""
    try:
        model.get_submodule(name)
    except AttributeError:  # the slice of an expert: owner, parameter and number
        return name.rsplit(".", 2)[0]
    return name


@contextmanager
def expert_products(
    module: nn.Module,
    product: Callable[[str, Float[Tensor, "rows _"], Callable[[], Float[Tensor, "rows _"]]], Tensor],
    *,
    every: bool = False,
) -> Iterator[Load]:
    """Take the output of each expert's slice that gets inputs `x` from `product(name, x, plain)` within the
    context: by the slice's name within `module`, a decoder layer or a model; `plain()` is what it would be.
    Yields the tokens routed to each expert so far. every: show all tokens to every expert first."""
    fused = {name: part for name, part in module.named_modules() if is_fused_experts(part)}
    load: Load = {}

    def patched(name: str, experts: nn.Module) -> Callable[..., Tensor]:
        count = experts.get_parameter("down_proj").shape[0]
        load[name] = torch.zeros(count, dtype=torch.int64)

        def plain(parameter: str, expert: int, x: Tensor) -> Tensor:
            return _linear(experts, parameter, expert, x, dense_matrix(experts, parameter, expert))

        def multiply(parameter: str, expert: int, x: Tensor) -> Tensor:
            return product(f"{name}.{parameter}.{expert}", x, lambda: plain(parameter, expert, x))

        def forward(x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
            load[name] += torch.bincount(chosen.flatten(), minlength=count).cpu()
            if every:
                for expert in range(count):
                    multiply("down_proj", expert, _inner(experts, x, expert, multiply))
            return one_by_one(experts, x, chosen, shares, plain if every else multiply)

        return forward

    with forwarded((experts, patched(name, experts)) for name, experts in fused.items()):
        yield load


@contextmanager
def expert_inputs(
    module: nn.Module, tap: Callable[[str, Float[Tensor, "rows _"]], None], *, every: bool = False
) -> Iterator[Load]:
    """Call `tap(name, x)` just before the inputs `x` of an expert's slice are multiplied, within the context;
    otherwise like `expert_products`. A tap that writes to the slice quantizes it in passing."""

    def product(name: str, x: Tensor, plain: Callable[[], Tensor]) -> Tensor:
        tap(name, x)
        return plain()

    with expert_products(module, product, every=every) as load:
        yield load


def warn_of_few(load: Load, minimum: int = FEW_TOKENS, progress: Progress = silent) -> None:
    """Say which experts got fewer than `minimum` tokens."""
    for name, tokens in load.items():
        few = [(expert, count) for expert, count in enumerate(tokens.tolist()) if count < minimum]
        if few:
            each = ", ".join(f"{expert} ({count})" for expert, count in few)
            unreached = "" if all(count for _, count in few) else "; those with none are rounded to nearest"
            progress(f"{name}: calibrated on fewer than {minimum} tokens: expert {each}{unreached}")


@torch.inference_mode()
def routes(model: PreTrainedModel, tokens: Int[Tensor, "batch tokens"], names: list[str]) -> Routes:
    """Return the experts that the routers of `model` choose in the modules `names`."""
    chosen: Routes = {}

    def keep(name: str) -> RemovableHandle:
        def hook(_: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
            chosen[name] = args[1].cpu()

        return model.get_submodule(name).register_forward_pre_hook(hook)

    with hooked(keep(name) for name in names):
        model(tokens.to(model.device), use_cache=False)
    return chosen


def changed_fraction(base: Int[Tensor, "tokens k"], other: Int[Tensor, "tokens k"]) -> float:
    """Return the fraction of tokens whose set of experts differs, in whatever order routers list them."""
    return (base.sort(1).values != other.sort(1).values).any(1).double().mean().item()


_DENSE = "_left_alone_"  # in the names of slices that are not quantized


class QuantizedExperts(nn.Module):
    """A fused module with codes instead of slices; otherwise it has what the fused module has."""

    def __init__(self, experts: nn.Module, tensors: dict[str, dict[int, QuantizedTensor]]):
        """`tensors`: by the parameter's own name, then by expert. `experts` loses those parameters."""
        super().__init__()
        self.tensors, self.dtype = tensors, experts.get_parameter("down_proj").dtype
        self.is_transposed, self.has_post_expert_norm = experts.is_transposed, False
        self.has_gate, self.has_bias = experts.has_gate, experts.has_bias
        if experts.has_gate:
            self._apply_gate = experts._apply_gate
        else:
            self.act_fn = experts.act_fn
        self.counts = {parameter: experts.get_parameter(parameter).shape[0] for parameter in tensors}
        for parameter, slices in tensors.items():
            for expert in set(range(self.counts[parameter])) - set(slices):
                matrix = dense_matrix(experts, parameter, expert).detach().clone()
                self.register_parameter(
                    f"{parameter}{_DENSE}{expert}", nn.Parameter(matrix, requires_grad=False)
                )
            delattr(experts, parameter)
        for name, parameter in experts.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def matrix(self, parameter: str, expert: int) -> Float[Tensor, "_ _"]:
        """Return a slice `[out, in]` in the model's dtype, exactly as the fake model holds it."""
        if parameter not in self.tensors:
            return dense_matrix(self, parameter, expert)
        if expert in self.tensors[parameter]:
            return self.tensors[parameter][expert].dequantize().to(self.dtype)
        return self.get_parameter(f"{parameter}{_DENSE}{expert}")

    def forward(
        self,
        x: Float[Tensor, "tokens hidden"],
        chosen: Int[Tensor, "tokens k"],
        shares: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens hidden"]:
        def multiply(parameter: str, expert: int, rows: Tensor) -> Tensor:
            return _linear(self, parameter, expert, rows, self.matrix(parameter, expert))

        return one_by_one(self, x, chosen, shares, multiply)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """Save parameters by the fused module's names, dense where any slice is; codes alone are left out."""
        kept = {name for name in self._parameters if _DENSE in name}
        for name in set(self._parameters) - kept:
            destination[prefix + name] = self.get_parameter(name).detach()
        for parameter, count in self.counts.items():
            if len(self.tensors[parameter]) < count:
                dense = torch.stack([self.matrix(parameter, expert) for expert in range(count)])
                destination[prefix + parameter] = dense.transpose(1, 2) if self.is_transposed else dense

    def _apply(self, fn, recurse: bool = True):
        """Follow `model.to(device)` and `model.to(dtype)`; the codes keep their dtypes."""
        super()._apply(fn, recurse)
        device = next(iter(next(iter(self.tensors.values())).values())).packed.device
        moved = fn(torch.empty(0, dtype=self.dtype, device=device))
        self.dtype = moved.dtype
        self.tensors = {
            parameter: {expert: tensor.to(moved.device) for expert, tensor in slices.items()}
            for parameter, slices in self.tensors.items()
        }
        return self


def put_experts(model: PreTrainedModel, tensors: dict[str, QuantizedTensor], packed: bool) -> None:
    """Put quantized slices, by their names in `matrices(model)`, into a model that shares its parameters."""
    for name, experts in fused_experts(model).items():
        by_parameter: dict[str, dict[int, QuantizedTensor]] = {}
        for key in [key for key in tensors if key.startswith(f"{name}.")]:
            parameter, _, expert = key.removeprefix(f"{name}.").partition(".")
            by_parameter.setdefault(parameter, {})[int(expert)] = tensors[key]
        if by_parameter and packed:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, QuantizedExperts(experts, by_parameter))
            continue
        for parameter, slices in by_parameter.items():
            value = experts.get_parameter(parameter).detach()
            dense = with_slices(experts, lambda slices=slices: slices, value.clone)
            experts.register_parameter(parameter, nn.Parameter(dense, requires_grad=False))


def with_slices(
    experts: nn.Module, slices: Callable[[], dict[int, QuantizedTensor]], read: Callable[[], Tensor]
) -> Tensor:
    """Return a fused parameter, which `read` gives, with what the codes of `slices` stand for in it."""
    dense = read()
    for expert, tensor in slices().items():
        matrix = tensor.dequantize().to(dense.dtype)
        dense[expert] = matrix.T if experts.is_transposed else matrix
    return dense
