"""AutoRound: sign-gradient learning of rounding and clipping, block by block, in its default settings (on a
CPU it computes in bf16)."""

import torch
from auto_round import AutoRound
from auto_round_extension.torch.qlinear_torch import QuantLinear
from peer import arguments, decoded, stored_bits, timed, write
from safetensors.torch import load_file
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
model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(given.model)
rounder = AutoRound(
    model, tokenizer, scheme="W4A16", dataset=list(given.tokens.split(BATCH)), device_map="cpu", **settings
)
seconds = timed(lambda: rounder.quantize_and_save(str(given.out / "checkpoint"), format="auto_round"))
del model, rounder  # which no longer hold the codes; the checkpoint does
(checkpoint,) = given.out.glob("checkpoint/**/model.safetensors")
stored = load_file(checkpoint)


def saved(name: str) -> QuantLinear:
    parts = {part: stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")}
    columns, rows = parts["qweight"].shape[0] * 32 // given.bits, parts["qweight"].shape[1]
    layer = QuantLinear(given.bits, given.group, columns, rows, bias=f"{name}.bias" in stored)
    layer.load_state_dict(parts | ({"bias": stored[f"{name}.bias"]} if layer.bias is not None else {}))
    return layer


packed = {
    name: saved(name) for key in stored if (name := key.removesuffix(".qweight")) != key and ".layers." in key
}
write(
    given.out,
    "auto-round",
    settings,
    seconds,
    {name: decoded(layer) for name, layer in packed.items()},
    bits=given.bits,
    groups=sum(layer.scales.numel() for layer in packed.values()),
    zero_bits=given.bits,
    checkpoint_bits=sum(
        stored_bits([layer.qweight, layer.qzeros, layer.scales.half()]) for layer in packed.values()
    ),
)
