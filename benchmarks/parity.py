"""The largest difference between the logits of a fake and a real model, for every shipped recipe that needs
no calibration and every further format, in fp32 and with the bf16 kernels.

In fp32 both compute the same products, so the difference should be 0. In bf16 a decode step of the real model
runs on the packed codes and rounds elsewhere; beside it stands what bf16 costs the fake model itself (against
fp32). Run: python benchmarks/parity.py [MODEL]
"""

import json
import sys

import torch

import bitassay
from bitassay.quantization.recipe.recipe import Recipe, WeightScheme, shipped_recipes
from bitassay.quantization.runtime.model import with_tensors
from bitassay.record.environment import environment

MODEL = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
EXTRA = [
    Recipe(name="fp8_e5m2-channel", weights=WeightScheme(format="fp8_e5m2")),
    Recipe(name="int8-tensor", weights=WeightScheme(format="int8", granularity="tensor")),
    Recipe(name="int4-g128", weights=WeightScheme(format="int4", granularity="g128")),
    Recipe(name="int3-channel-asymmetric", weights=WeightScheme(format="int3", symmetric=False)),
    Recipe(name="binary-g64-mean", weights=WeightScheme(format="binary", granularity="g64", symmetric=False)),
]

base, base16 = bitassay.load(MODEL), bitassay.load(MODEL, dtype="bfloat16")
ids = base.tokenizer(
    "The assay tells how pure a metal is, and the hallmark proves it.", return_tensors="pt"
).input_ids
rows = []
for recipe in [*(recipe for recipe in shipped_recipes().values() if not recipe.is_calibrated), *EXTRA]:
    fake = bitassay.quantize(base, recipe)
    real = with_tensors(base, fake.quantization, packed=True)
    fake16 = with_tensors(base16, fake.quantization)
    real16 = with_tensors(base16, fake.quantization, packed=True)
    with torch.inference_mode():
        logits = [model(ids).logits.float() for model in (fake, real, fake16, real16)]
    rows.append(
        {
            "recipe": recipe.name,
            "fp32_fake_against_real": (logits[0] - logits[1]).abs().max().item(),
            "bf16_fake_against_real": (logits[2] - logits[3]).abs().max().item(),
            "bf16_fake_against_fp32_fake": (logits[2] - logits[0]).abs().max().item(),
            "largest_logit": logits[0].abs().max().item(),
        }
    )
    print(rows[-1], file=sys.stderr)
print(json.dumps({"rows": rows, "environment": environment()}, indent=2))
