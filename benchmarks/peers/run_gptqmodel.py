"""GPTQ by GPTQModel: act-order with static groups, its default damping, asymmetric.

Weights are read from the checkpoint that it saves: in the model at hand its layers hold zero points of the
older format, one less than what they compute with.
"""

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it refuses to start with one, its default on two cores

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.quantization import GPTQConfig
from peer import arguments, decoded, decoder_linears, stored_bits, timed, write

BATCH = 8

given = arguments()
config = GPTQConfig(
    bits=given.bits, group_size=given.group, sym=False, desc_act=True, static_groups=True, device="cpu"
)
model = GPTQModel.load(given.model, config, dtype=getattr(torch, given.dtype))
samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in given.tokens]
seconds = timed(lambda: model.quantize(samples, batch_size=BATCH))
model.save(str(given.out / "checkpoint"))
saved = GPTQModel.load(
    str(given.out / "checkpoint"), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16
)
packed = decoder_linears(saved.model, BaseQuantLinear)
write(
    given.out,
    "gptqmodel",
    {
        "method": "gptq",
        "desc_act": True,
        "static_groups": True,
        "sym": False,
        "damp_percent": config.damp_percent,
        "mse": config.mse,
        "batch_size": BATCH,
        "samples": len(samples),
        "dtype": given.dtype,
    },
    seconds,
    {name: decoded(layer) for name, layer in packed.items()},
    bits=given.bits,
    groups=sum(layer.scales.numel() for layer in packed.values()),
    zero_bits=given.bits,
    checkpoint_bits=sum(
        stored_bits([layer.qweight, layer.qzeros, layer.scales.half(), layer.g_idx])
        for layer in packed.values()
    ),
)
