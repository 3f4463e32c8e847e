"""GPTQ by llm-compressor: its default act-order (static), damping and observer, asymmetric."""

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from peer import arguments, decoder_linears, stored_bits, timed, write
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

BATCH = 8

given = arguments()
weights = {"num_bits": given.bits, "group_size": given.group, "strategy": "group", "symmetric": False}
gptq = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in given.tokens]
loader = DataLoader(samples, batch_size=BATCH)
seconds = timed(
    lambda: oneshot(model=model, dataset=loader, recipe=gptq, num_calibration_samples=len(samples))
)
linears = decoder_linears(model)


def codes(layer: torch.nn.Linear) -> torch.Tensor:
    """Signed codes less the zero point [out, groups, group]. In memory the weights are those of fp32 scales;
    a 16-bit checkpoint, which the bits are counted for, rounds these."""
    grouped = layer.weight.detach().reshape(*layer.weight_scale.shape, given.group)
    return (grouped / layer.weight_scale[..., None]).round()


def decoded(layer: torch.nn.Linear) -> torch.Tensor:
    return (codes(layer) * layer.weight_scale.half().float()[..., None]).reshape(layer.weight.shape)


def checkpoint_bits(layer: torch.nn.Linear) -> int:
    code = (codes(layer) + layer.weight_zero_point[..., None]).reshape(layer.weight.shape).to(torch.int8)
    zero = layer.weight_zero_point.to(torch.int8)
    packed = [pack_to_int32(code, given.bits), pack_to_int32(zero, given.bits, packed_dim=0)]
    return stored_bits([*packed, layer.weight_scale.half()])


write(
    given.out,
    "llmcompressor",
    {
        "method": "gptq",
        "actorder": str(gptq.actorder),
        "dampening_frac": gptq.dampening_frac,
        "sym": False,
        "batch_size": BATCH,
        "samples": len(samples),
    },
    seconds,
    {name: decoded(layer) for name, layer in linears.items()},
    bits=given.bits,
    groups=sum(layer.weight_scale.numel() for layer in linears.values()),
    zero_bits=given.bits,
    checkpoint_bits=sum(checkpoint_bits(layer) for layer in linears.values()),
)
