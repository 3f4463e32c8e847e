"""HQQ in its default settings (half-quadratic search of the zero point along the input, no calibration). It
stores scale and zero point in fp16; its groups may run from one row into the next."""

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from peer import arguments, decoder_linears, stored_bits, timed, write
from transformers import AutoModelForCausalLM

given = arguments()
config = BaseQuantizeConfig(nbits=given.bits, group_size=given.group)
linears = decoder_linears(AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32))
packed: dict[str, HQQLinear] = {}


def quantize() -> None:
    for name, linear in linears.items():
        packed[name] = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu", del_orig=False)


def decoded(layer: HQQLinear) -> torch.Tensor:
    """The matrix from the stored fp16 scales and zero points, computed in fp32."""
    meta = {**layer.meta, "compute_dtype": torch.float32}
    meta |= {key: meta[key].half().float() for key in ("scale", "zero")}
    return Quantizer.dequantize(layer.W_q, meta)


seconds = timed(quantize)
write(
    given.out,
    "hqq",
    config["weight_quant_params"],
    seconds,
    {name: decoded(layer) for name, layer in packed.items()},
    bits=given.bits,
    groups=sum(layer.meta["scale"].numel() for layer in packed.values()),
    zero_bits=16,
    checkpoint_bits=sum(
        stored_bits([layer.W_q, layer.meta["scale"].half(), layer.meta["zero"].half()])
        for layer in packed.values()
    ),
)
