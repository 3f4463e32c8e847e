"""AutoRound: sign-gradient learning of rounding and clipping, block by block, in its default settings (on a
CPU it computes in bf16).

Its checkpoint is what is decoded, by its own code: packed as GPTQ packs, or at 4 bits with zero points as AWQ
does. A checkpoint takes hours, so AutoRound keeps every finished block (AR_RESUME_DIR) and goes on after it,
to the same bits, and a finished checkpoint stays.
"""

import os
from pathlib import Path

import torch
from auto_round import AutoRound
from auto_round.export.export_to_awq.utils import dequantize_gemm
from auto_round_extension.torch.qlinear_torch import QuantLinear
from peer import arguments, decoded, stored_bits, timed, write
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8

given = arguments()
settings = {
    "bits": given.bits,
    "group_size": given.group,
    "sym": False,
    "iters": given.iters,
    "seqlen": given.tokens.shape[1],
    "nsamples": given.tokens.shape[0],
    "batch_size": min(BATCH, given.tokens.shape[0]),
}
took = given.out / "seconds"  # written once the checkpoint is whole


def quantize() -> None:
    os.environ["AR_RESUME_DIR"] = str(given.out / "resume")
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    texts = list(given.tokens.split(BATCH))
    rounder = AutoRound(model, tokenizer, scheme="W4A16", dataset=texts, device_map="cpu", **settings)
    seconds = timed(lambda: rounder.quantize_and_save(str(given.out / "checkpoint"), format="auto_round"))
    took.write_text(str(seconds))


def saved(name: str, stored: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A matrix [out, in], and what of it is stored: codes, zero points, scales."""
    weight, zeros, scales = parts = [stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")]
    if weight.shape[0] == scales.shape[0] * given.group:  # AWQ: a row of int32 for each column of the matrix
        return dequantize_gemm(weight, zeros, scales.float(), given.bits, given.group).T.contiguous(), parts
    columns, rows = weight.shape[0] * 32 // given.bits, weight.shape[1]
    layer = QuantLinear(given.bits, given.group, columns, rows, bias=f"{name}.bias" in stored)
    held = {"qweight": weight, "qzeros": zeros, "scales": scales}
    layer.load_state_dict(held | ({"bias": stored[f"{name}.bias"]} if layer.bias is not None else {}))
    return decoded(layer), parts


def decode(checkpoint: Path) -> None:
    stored = {
        name: part for shard in checkpoint.glob("**/*.safetensors") for name, part in load_file(shard).items()
    }
    found = {
        name: saved(name, stored)
        for key in stored
        if (name := key.removesuffix(".qweight")) != key and ".layers." in key
    }
    write(
        given.out,
        "auto-round",
        settings,
        float(took.read_text()),
        {name: weight for name, (weight, _) in found.items()},
        bits=given.bits,
        groups=sum(scales.numel() for _, (_, _, scales) in found.values()),
        zero_bits=given.bits,
        checkpoint_bits=sum(stored_bits([w, z, s.half()]) for _, (w, z, s) in found.values()),
    )


if not took.exists():
    quantize()
decode(given.out / "checkpoint")
