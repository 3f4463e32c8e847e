"""K types of llama.cpp on the matrices whose rows they fit: our solvers beside ggml's with importances.

The models at hand have rows that 256 does not divide, so that `llama-quantize` gives most of their matrices
other types; `down_proj` has rows that it divides. For some layers of a model, each type and the same
calibration text: the output error of each way on other text, `tr(D H D^T) / tr(W H W^T)`, H of that text.

    ggml        `ggml_quantize_chunk`, what llama-quantize runs, with no importances
    ggml, imatrix    with the mean square of each input over the calibration text, as llama-imatrix gives
    nearest     our grids, errors weighed by the same importances, rounded to nearest
    gptq        our grids and GPTQ (natural: with each run's grid from the weights as updated until then)

Decoded by libggml each time. Run: python benchmarks/k_types.py LIBGGML_BASE [--model M] [--layers 4]
[--samples 32] [--out FILE.json].
"""

import argparse
import ctypes
import json
from pathlib import Path

import numpy as np
import torch
from llamacpp_types import Blocks, Traits, decoded

import bitassay
from bitassay.data.windows import Protocol
from bitassay.models.hooks import hooked, reading
from bitassay.models.positions import model_windows
from bitassay.quantization.codes.quantize import quantize_tensor
from bitassay.quantization.export.gguf_blocks import as_blocks, kind_of
from bitassay.quantization.recipe.calibration import Calibration, calibration_tokens
from bitassay.quantization.recipe.solvers import Gptq
from bitassay.quantization.recipe.weights import WeightScheme
from bitassay.quantization.solvers.gptq import gptq
from bitassay.quantization.solvers.layerwise import add_products, mirrored

FORMATS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")


def hessians(model, names, tokens):
    """Return `sum x x^T` of the inputs of some linears over a text."""
    totals = dict.fromkeys(names)

    def note(name, x):
        totals[name] = add_products(totals[name], x)

    with torch.no_grad(), hooked(reading({name: model.get_submodule(name) for name in names}, note)):
        for part in tokens.split(4):
            model(part, logits_to_keep=1)
    return {name: mirrored(total) for name, total in totals.items()}


def theirs(library, weight, kind, importance):
    """Return ggml's blocks; importance: a number a column, or None."""
    library.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    traits = library.ggml_get_type_traits(int(kind)).contents
    rows, columns = weight.shape
    source = np.ascontiguousarray(weight.numpy())
    out = np.empty((rows, columns // traits.run * traits.bytes), dtype=np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance.numpy(), dtype=np.float32)
    chunk = library.ggml_quantize_chunk
    chunk.argtypes = (ctypes.c_int, *(ctypes.c_void_p,) * 2, *(ctypes.c_int64,) * 3, ctypes.c_void_p)
    chunk.restype = ctypes.c_size_t
    pointer = None if weights is None else weights.ctypes.data
    assert chunk(int(kind), source.ctypes.data, out.ctypes.data, 0, rows, columns, pointer) == out.size
    return Blocks(kind, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--out", type=Path)
    said = parser.parse_args()
    library = ctypes.CDLL(str(Path(said.library).resolve()))
    model = bitassay.load(said.model)
    linears = [name for name, _ in model.named_modules() if name.endswith("down_proj")]
    names = [linears[round(place)] for place in np.linspace(0, len(linears) - 1, said.layers)]
    text = calibration_tokens(model, Calibration(samples=said.samples))
    other = model_windows(model, Protocol("wikitext2-raw", 1024, windows=2))[0]
    seen, held = hessians(model, names, text), hessians(model, names, other)
    rows = []
    for name in names:
        weight = model.get_submodule(name).weight.detach().float()
        importance, h = seen[name].diagonal().float() / text.numel(), held[name].double()
        length = ((weight.double() @ h) * weight).sum()
        for fmt in said.formats:
            scheme = WeightScheme(format=fmt)
            kind = kind_of(scheme.number_format)

            def lost(blocks, weight=weight, h=h, length=length):
                left = (decoded(library, blocks, weight.shape[1]) - weight).double()
                return float(((left @ h) * left).sum() / length)

            def ours(order, weight=weight, hessian=seen[name], scheme=scheme):
                return as_blocks(gptq(weight, hessian, [scheme], Gptq(order=order)).tensor())

            row = {
                "matrix": name,
                "type": kind.name,
                "ggml": lost(theirs(library, weight, kind, None)),
                "ggml, imatrix": lost(theirs(library, weight, kind, importance)),
                "nearest": lost(as_blocks(quantize_tensor(weight, scheme, name, importance))),
                "gptq": lost(ours("activation")),
                "gptq, natural": lost(ours("natural")),
            }
            rows.append(row)
            print(
                "  ".join(
                    f"{key} {value:.3g}" if isinstance(value, float) else str(value)
                    for key, value in row.items()
                ),
                flush=True,
            )
    ways = [key for key in rows[0] if key not in ("matrix", "type")]
    print("\ngeometric means of ggml with importances over each way")
    for kind in dict.fromkeys(row["type"] for row in rows):
        own = [row for row in rows if row["type"] == kind]
        means = {
            w: float(np.exp(np.mean([np.log(row["ggml, imatrix"] / row[w]) for row in own]))) for w in ways
        }
        print(kind, "  ".join(f"{way} {mean:.3f}" for way, mean in means.items()))
    if said.out is not None:
        said.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
