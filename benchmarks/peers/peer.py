"""What the peers' scripts share. It runs under each peer's own interpreter, so it needs torch and
safetensors and nothing of bitassay.

A script takes a dense fp32 model folder, token ids, bits and group. It writes the decoder's linears as the
peer's own checkpoint decodes them (`weights.safetensors`), and how they were made and what they take
(`report.json`). A peer that rounds what enters its linears too hands back what its decoder says of the
windows of the evaluation instead (`states.safetensors`, the last hidden states).
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SCALE_BITS = 16


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="folder of a dense fp32 model")
    parser.add_argument(
        "--tokens", type=Path, required=True, help="safetensors: `tokens` and `windows` [n, length]"
    )
    parser.add_argument("--bits", type=float, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", default="float32", help="GPTQModel's arithmetic while it calibrates")
    parser.add_argument("--iters", type=int, default=200, help="AutoRound's steps for each block")
    given = parser.parse_args()
    given.bits = int(given.bits) if given.bits == int(given.bits) else given.bits
    found = load_file(given.tokens)
    given.tokens, given.windows = found["tokens"], found["windows"]
    torch.manual_seed(0)
    return given


def timed(work: Callable[[], Any]) -> float:
    """Seconds of quantization alone: the model is loaded before, and its weights are decoded after."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def decoder_linears(model: nn.Module, kind: type[nn.Module] = nn.Linear) -> dict[str, nn.Module]:
    """The modules of `kind` in the decoder's layers, by their names in the dense model."""
    return {
        name: module
        for name, module in model.named_modules()
        if ".layers." in name and isinstance(module, kind)
    }


@torch.inference_mode()
def decoded(layer: nn.Module) -> Tensor:
    """The matrix [out, in] of a layer packed as GPTQ packs: what it answers to the identity. The product of a
    code and its scale is taken in fp32; a sum of that and zeros is exact."""
    layer.scales = layer.scales.float()
    columns = layer.qweight.shape[0] * 32 // layer.bits
    weight = layer(torch.eye(columns)).float()
    return (weight if layer.bias is None else weight - layer.bias.float()).T.contiguous()


def stored_bits(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() * 8 for tensor in tensors)


def write(
    out: Path,
    package: str,
    settings: Mapping[str, Any],
    seconds: float,
    weights: Mapping[str, Tensor],
    *,
    bits: float,
    groups: int,
    zero_bits: float,
    checkpoint_bits: int,
    scale_bits: int = SCALE_BITS,
    states: Tensor | None = None,
    said: Mapping[str, Any] | None = None,
) -> None:
    """groups: how many scales there are in all; scale_bits, zero_bits: what the peer stores a scale and a
    zero point in; checkpoint_bits: all that the checkpoint holds for these matrices, with what packing
    wastes and indices that could be left out. states: [windows, length, hidden], to be judged instead of the
    weights. said: what the row should say otherwise than it was asked for."""
    count = sum(weight.numel() for weight in weights.values())
    report = {
        "version": f"{version(package)} (torch {torch.__version__}, transformers {version('transformers')})",
        "settings": dict(settings),
        "seconds": seconds,
        "bits_per_weight": bits + groups * (scale_bits + zero_bits) / count,
        "checkpoint_bits_per_weight": checkpoint_bits / count,
        "threads": torch.get_num_threads(),
        **(said or {}),
    }
    out.mkdir(parents=True, exist_ok=True)
    if states is None:
        save_file(
            {name: weight.contiguous() for name, weight in weights.items()}, out / "weights.safetensors"
        )
    else:
        save_file({"states": states.contiguous()}, out / "states.safetensors")
    (out / "report.json").write_text(json.dumps(report, indent=2))
