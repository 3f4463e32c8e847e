"""One decoder layer after the other: every matrix quantized for the inputs that will reach it.

A matrix is solved at the moment when its input arrives (`layerwise.py`), by what the recipe asks for
(`registry.py`); a solver of layers follows. A finished layer is written to the work folder, and read from
there the next time.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitassay.errors import BitassayError
from bitassay.models.opened import is_opened, present, weights_of
from bitassay.models.walk import decoder_layers, matrices, module_name, walk
from bitassay.quantization.codes.quantize import check_weight, quantize_tensor
from bitassay.quantization.codes.tensor import QuantizedTensor
from bitassay.quantization.runtime.experts import expert_inputs, expert_matrix, warn_of_few
from bitassay.quantization.runtime.model import decode_experts
from bitassay.quantization.shapes import Hessian, Matrix
from bitassay.quantization.solvers.layerwise import (
    Arguments,
    Hidden,
    first_inputs,
    hessian_of,
    input_groups,
    products_in,
    run_layer,
    solve_groups,
)
from bitassay.quantization.solvers.registry import matrix_solver, solvers_of
from bitassay.quantization.solvers.solver import Layer, Matrices, Model, Solution
from bitassay.quantization.work import (
    KeptTensors,
    WorkingCopy,
    layer_part,
    read_part,
    tuned_part,
    write_part,
)
from bitassay.record.memory import release_freed_memory
from bitassay.record.progress import Progress
from bitassay.record.run import RunFolder

LATENT = "latent"  # of a matrix in a part: its weights before their last rounding


def quantize_calibrated(work: WorkingCopy) -> Mapping[str, QuantizedTensor]:
    """Quantize every matrix that has a scheme layer by layer, then all layers together."""
    linears, used, schemes = walk(work.model).linears, solvers_of(work.recipe), work.schemes
    if any(solver.layer or solver.model for solver, _ in used):
        _check_experts(linears, [name for name in schemes if schemes[name] is not None], work.progress)
    solutions = quantize_layers(work)
    if work.folder is not None and is_opened(work.model):
        kept = kept_layers(work, work.folder)
        for solver, spec in used:
            if solver.model is not None:
                kept = _moved_in_folder(work, work.folder, kept, partial(solver.model, spec))
        return kept
    names = [name for name in matrices(work.model) if name in solutions]
    for solver, spec in used:
        if solver.model is not None:
            movable = {name: solutions.pop(name) for name in list(solutions) if name in linears}
            solutions |= solver.model(spec, _together(work, list(movable), movable.pop))
    return {name: solutions[name].tensor for name in names}


def _together(work: WorkingCopy, linears: list[str], take: Callable[[str], Solution]) -> Model:
    name, folder = work.recipe.name, work.folder
    return Model(name, work.base, work.model, linears, take, work.text, folder, work.progress)


def kept_layers(work: WorkingCopy, folder: RunFolder) -> KeptTensors:
    """Return the matrices of all finished layers, which are read when they are asked for."""
    shapes = {name: (w.shape[0], w.shape[1]) for name, w in matrices(work.model).items()}
    parts = [layer_part(index) for index in range(len(decoder_layers(work.model)))]
    return KeptTensors(folder, parts, shapes)


def _moved_in_folder(
    work: WorkingCopy,
    folder: RunFolder,
    kept: KeptTensors,
    solve: Callable[[Model], Iterable[tuple[str, Solution]]],
) -> KeptTensors:
    """Move the linears of all layers together; each layer's result is a part beside its first one."""
    known = walk(work.model).linears
    linears = [name for name in kept if name in known]

    if (weights := weights_of(work.model)) is not None:
        decode_experts(work.model, weights, kept, [name for name in kept if name not in known])

    def take(name: str) -> Solution:
        return Solution(kept[name], kept.beside(name, LATENT))

    parts = list(kept.names)
    moved = solve(_together(work, linears, take))
    for part, solutions in itertools.groupby(moved, lambda item: kept.part_of[item[0]]):
        tensors = {name: solution.tensor for name, solution in solutions}
        place = parts.index(part)
        parts[place] = tuned_part(int(part.rpartition("-")[2]))
        rest = {name: kept[name] for name in kept.names[part] if name not in tensors}
        write_part(folder, parts[place], rest | tensors, {})
    return KeptTensors(folder, parts, kept.shapes)


def _check_experts(linears: Collection[str], quantized: list[str], progress: Progress) -> None:
    """Raise BitassayError where learned and tune would have nothing to move."""
    experts = [name for name in quantized if name not in linears]
    if experts and len(experts) == len(quantized):
        raise BitassayError(
            "learned and tune move the weights of linears, and only experts are quantized", "gptq alone"
        )
    if experts:
        progress(f"learned and tune move linears; the {len(experts)} matrices of experts stay as solved")


def quantize_layers(work: WorkingCopy) -> dict[str, Solution]:
    """Quantize every matrix that has a scheme layer by layer, in the working copy too. Those of an
    opened model are in its work folder alone."""
    folder, layers, what = work.folder, decoder_layers(work.model), f"quantizing by {work.recipe.name}"
    prefix, used = module_name(work.model, layers), solvers_of(work.recipe)
    learning = [(solver.layer, spec) for solver, spec in used if solver.layer is not None]
    keeps_unrounded = any(solver.model is not None for solver, _ in used)
    stays_in_folder = folder is not None and is_opened(work.model)
    stream = first_inputs(work.model, work.text)
    hidden, arguments = stream
    targets, base_arguments = stream.second() if learning else (None, arguments)
    del stream  # the first layer's input need not stay
    finished = [folder is not None and folder.has_tensors(layer_part(index)) for index in range(len(layers))]
    solutions: dict[str, Solution] = {}
    for index, layer in enumerate(layers):
        work.progress(what, index, len(layers))
        name = f"{prefix}.{index}"
        if stays_in_folder and all(finished[index:]):
            break
        with present(work.model, name):
            solving = _LayerWork(work, name, goes_on=bool(learning) or keeps_unrounded)
            if folder is not None and all(finished[index:]):  # no layer is left that reads this one's output
                solving.read(folder, layer_part(index))
            else:
                if targets is not None:
                    targets = solving.output(layer, targets, base_arguments[index])
                if folder is not None and finished[index]:
                    solving.read(folder, layer_part(index))
                else:
                    solving.run(layer, hidden, arguments[index])
                    for solve, spec in learning if solving.linears else ():
                        assert targets is not None
                        short = {key: key.removeprefix(f"{name}.") for key in solving.linears}
                        linears = {short[key]: solving.solutions[key] for key in short}
                        # Nothing holds the states beyond this call.
                        found = solve(
                            spec,
                            Layer(name, layer, linears, hidden, targets, arguments[index], work.progress),
                        )
                        moved = {f"{name}.{key}": solution for key, solution in found.items()}
                        solving.solutions |= moved
                        solving.put(moved)
                    solving.forget_unrounded(solving.linears if keeps_unrounded else ())
                    if folder is not None:
                        solving.write(folder, layer_part(index))
                hidden = solving.output(layer, hidden, arguments[index])
        if not stays_in_folder:
            solutions |= solving.solutions
        del solving
        release_freed_memory()
    work.progress(what, len(layers), len(layers))
    return solutions


class _LayerWork:
    def __init__(self, work: WorkingCopy, layer: str, goes_on: bool):
        self.model, self.progress, self.solver = work.model, work.progress, matrix_solver(work.recipe)
        self.calibration, self.goes_on = work.recipe.text, goes_on
        within = [name for name in work.schemes if name.startswith(f"{layer}.")]
        self.schemes = {name: scheme for name in within if (scheme := work.schemes[name])}
        modules = dict(work.model.named_modules())
        self.linears = {n: part for n in self.schemes if isinstance(part := modules.get(n), nn.Linear)}
        self.slices = [name for name in self.schemes if name not in self.linears]
        for parameter in dict.fromkeys(name.rpartition(".")[0] for name in self.slices):
            owner, _, key = parameter.rpartition(".")
            fused = modules[owner].get_parameter(key)
            modules[owner].register_parameter(key, nn.Parameter(fused.clone(), requires_grad=False))
        self.solutions: dict[str, Solution] = {}

    def output(self, layer: nn.Module, hidden: Hidden, arguments: Arguments) -> Hidden:
        """Return the layer's output as it is now."""
        with products_in(self.calibration.precision, self.model.device):
            return run_layer(layer, hidden, arguments)

    def run(self, layer: nn.Module, hidden: Hidden, arguments: Arguments) -> None:
        """Quantize every matrix for the input that reaches it: linears in the order of their calls, then
        experts, each when its tokens arrive, for which all samples run through the layer at once."""

        def reached(name: str, inputs: Float[Tensor, "rows _"]) -> None:
            if name in self.schemes and name not in self.solutions:
                self.solve((name,), hessian_of(inputs))

        with products_in(self.calibration.precision, self.model.device):
            groups = input_groups(layer, hidden, arguments, self.linears)
            self._round_unreached(set(self.linears) - {name for group in groups for name in group})
            solve_groups(layer, hidden, arguments, self.linears, groups, self.solve)
            if not self.slices:
                return
            every = self.calibration.every_expert
            with torch.no_grad(), expert_inputs(self.model, reached, every=every) as load:
                arguments.call(layer, hidden)
            warn_of_few(
                {name: counts for name, counts in load.items() if counts.any()}, progress=self.progress
            )
            self._round_unreached(set(self.slices) - set(self.solutions))
            self.put(self.slices)

    def _round_unreached(self, names: set[str]) -> None:
        """Round matrices to nearest that no token reaches, so that their Hessians are unknown: of experts
        that are never chosen, and of modules that a text alone does not use, such as cross attention."""
        unreached = [name for name in self.schemes if name in names]
        for name in unreached:
            weight = self.weight(name)
            self.solutions[name] = Solution(quantize_tensor(weight, self.schemes[name], name), weight.float())
        self.put(unreached)
        if linears := [name for name in unreached if name in self.linears]:
            others = f" and {len(linears) - 1} more" if linears[1:] else ""
            self.progress(f"{linears[0]}{others}: rounded to nearest, since no token gets there")

    def weight(self, name: str) -> Matrix:
        """Return the matrix as the working copy holds it now."""
        return self.linears[name].weight if name in self.linears else expert_matrix(self.model, name)

    def put(self, names: Iterable[str]) -> None:
        """Give the working copy the dequantized weights, in its dtype."""
        for name in names:
            weight = self.solutions[name].tensor.dequantize()
            if name in self.linears:
                linear = self.linears[name]
                linear.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)
            else:
                self.weight(name).copy_(weight)

    def solve(self, names: tuple[str, ...], hessian: Hessian) -> None:
        """Quantize matrices that read the same input; those of one scheme in one go."""
        by_scheme: dict[str, list[str]] = {}
        for name in names:
            check_weight(self.weight(name), self.schemes[name], name)
            by_scheme.setdefault(self.schemes[name].model_dump_json(), []).append(name)
        with products_in(None, self.model.device):
            for members in by_scheme.values():
                weights = {name: self.weight(name) for name in members}
                scheme = self.schemes[members[0]]
                self.solutions |= self.solver(Matrices(weights, hessian, scheme, self.progress))
            self.put(names)
        if not self.goes_on:
            self.forget_unrounded(())

    def forget_unrounded(self, keep: Collection[str]) -> None:
        """Drop what nothing goes on from, which would be a second copy of the layer in fp32."""
        for name, solution in self.solutions.items():
            if name not in keep:
                self.solutions[name] = Solution(solution.tensor)

    def write(self, folder: RunFolder, part: str) -> None:
        """Keep the finished layer."""
        unrounded = {f"{name}/{LATENT}": solution.unrounded for name, solution in self.solutions.items()}
        tensors = {name: solution.tensor for name, solution in self.solutions.items()}
        write_part(folder, part, tensors, {key: w for key, w in unrounded.items() if w is not None})

    def read(self, folder: RunFolder, part: str) -> None:
        """Read the finished layer, and put it into the working copy."""
        shapes = {name: (len(w), w.shape[1]) for name in self.schemes for w in (self.weight(name),)}
        tensors, unrounded = read_part(folder, part, shapes)
        for name, tensor in tensors.items():
            self.solutions[name] = Solution(tensor, unrounded.get(f"{name}/{LATENT}")).to(self.model.device)
        self.put(tensors)
