"""bitsandbytes: NF4 at 4 bits (`--group` is its block size, scales are fp32), LLM.int8() at 8 (a scale a row;
inputs rounded by token, their columns beyond 6 kept in fp16), without calibration. LLM.int8() is judged by
what its decoder says, since it rounds inputs too."""

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peer import arguments, decoder_linears, stored_bits, timed, write
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

THRESHOLD = 6.0  # the default of transformers' BitsAndBytesConfig

given = arguments()
model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
linears = decoder_linears(model)
weights: dict[str, Tensor] = {}
kept: list[Tensor] = []  # what a checkpoint holds
states: Tensor | None = None


def nf4() -> None:
    for name, linear in linears.items():
        codes, state = quantize_4bit(linear.weight.data, blocksize=given.group, quant_type="nf4")
        kept.extend((codes, state.absmax))
        weights[name] = dequantize_4bit(codes, state)


def int8() -> None:
    for name, linear in linears.items():
        layer = bnb.nn.Linear8bitLt(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            has_fp16_weights=False,
            threshold=THRESHOLD,
        )
        layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        layer.bias = linear.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.to("cpu"))
        weights[name] = linear.weight.data  # for how many there are
        kept.extend((layer.weight.data, torch.zeros(linear.out_features)))  # codes, and fp32 scales


@torch.inference_mode()
def said(model: nn.Module) -> Tensor:
    decoder = model.get_decoder()
    return torch.cat([decoder(input_ids=window[None]).last_hidden_state for window in given.windows])


if given.bits == 4:
    seconds, settings = timed(nf4), {"quant_type": "nf4", "blocksize": given.group}
else:
    seconds, settings = timed(int8), {"threshold": THRESHOLD}
    states = said(model)
write(
    given.out,
    "bitsandbytes",
    settings,
    seconds,
    weights,
    bits=given.bits,
    groups=sum(scales.numel() for scales in kept[1::2]),
    scale_bits=32,
    zero_bits=0,
    checkpoint_bits=stored_bits(kept),
    states=states,
    said=None if states is None else {"group": None},  # LLM.int8() has a scale a row
)
