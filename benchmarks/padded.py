"""SmolLM2-135M with rows that 256 divides: the same function, for llama.cpp's K types.

Hidden states get zeros up to `--width` features, and attention heads whose weights are zero. RMS norms divide
by the mean of squares over more features, so their weights shrink by the root of the share, epsilon by it.

Run: python benchmarks/padded.py FOLDER [--model smollm2-135m] [--width 768]. It prints the largest difference
of logits in fp32, and writes the model in bf16.
"""

import argparse
from pathlib import Path

import torch
from transformers import PreTrainedModel

import bitassay
from bitassay.models.identity import tokenizer


def padded(model: PreTrainedModel, width: int) -> PreTrainedModel:
    """Return a Llama in fp32 with `width` hidden features that computes what `model` does."""
    config = model.config
    share, size = config.hidden_size / width, config.head_dim
    wider = config.to_dict() | {
        "hidden_size": width,
        "num_attention_heads": width // size,
        "num_key_value_heads": width // size * config.num_key_value_heads // config.num_attention_heads,
        "rms_norm_eps": config.rms_norm_eps * share,
    }
    made = type(model)(type(config)(**wider)).float()
    before, after = model.state_dict(), made.state_dict()
    for name, value in after.items():
        old = before[name].float()
        value.zero_()
        value[tuple(slice(0, length) for length in old.shape)] = old * share**0.5 if old.ndim == 1 else old
    made.load_state_dict(after)
    made.tie_weights()
    return made.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--width", type=int, default=768)
    said = parser.parse_args()
    model = bitassay.load(said.model)
    made = padded(model, said.width)
    tokens = torch.arange(100, 140)[None]
    with torch.inference_mode():
        print((made(tokens).logits - model(tokens).logits.float()).abs().max().item())
    made.bfloat16().save_pretrained(said.folder)
    tokenizer(model).save_pretrained(said.folder)


if __name__ == "__main__":
    main()
