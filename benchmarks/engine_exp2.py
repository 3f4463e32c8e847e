"""exp2 of the VeriLLM documents between engines: one proves, another verifies, in every direction.

Each engine continues windows of WikiText-2 greedily, and every engine, itself among them, prefills what was
written. Cells are compared as in exp2: hidden states of the sampled layers at generated positions, rounded to
fp16, by the rules `documents` (Pe < .05, Pm > .75, Pw > .5, |mean| < .01); a verifier accepts above 90 %.
`distance` is the relative distance |x - y| / |y|, the geometric mean over cells. transformers computes in
float32; of a GGUF file, on its dequantized weights.

Run: python benchmarks/engine_exp2.py ENGINE:MODEL ENGINE:MODEL ... [--trials 3] [--prompt-tokens 300]
[--tokens 200] [--work DIR] [--format json], such as llama.cpp:model.gguf transformers:model.gguf
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

import torch

import bitassay
from bitassay.data.corpora import corpus
from bitassay.engines.engine import engine_of
from bitassay.engines.taps import tap_layers
from bitassay.models.identity import tokenizer
from bitassay.record.environment import environment
from bitassay.verification.detectors.verillm import DOCUMENTS, accept_rate, cell_statistics

THRESHOLD = 0.9


def loaded(place: str):
    engine, _, model = place.partition(":")
    return bitassay.load(model, engine=engine)


def generated(states: dict[int, torch.Tensor], prompt: list[int]) -> torch.Tensor:
    """States of the generated positions, [layers, positions, hidden]."""
    return torch.stack([states[layer][len(prompt) :].float() for layer in sorted(states)])


def prompts_of(model, count: int, tokens: int) -> list[list[int]]:
    """Windows of WikiText-2, evenly spaced."""
    ids = tokenizer(model)(corpus("wikitext2-raw").text[:400_000], verbose=False).input_ids
    step = len(ids) // count
    return [ids[start * step : start * step + tokens] for start in range(count)]


def proofs(place: str, arguments: argparse.Namespace) -> list[tuple[list[int], list[int], torch.Tensor]]:
    """Prompt, output and states of each trial; made once."""
    kept = arguments.work / f"proofs-{arguments.places.index(place)}.pt"
    if not kept.exists():
        model = loaded(place)
        layers, found = tap_layers(model), []
        for prompt in prompts_of(model, arguments.trials, arguments.prompt_tokens):
            (made,) = engine_of(model).generate([prompt], max_new_tokens=arguments.tokens, layers=layers)
            found.append((prompt, list(made.output_ids), generated(made.states, prompt)))
        torch.save(found, kept)
    return torch.load(kept, weights_only=True)


def rows_of(verifier: str, arguments: argparse.Namespace) -> list[dict]:
    """What one verifier says of every prover."""
    model = loaded(verifier)
    layers, rows = tap_layers(model), []
    for prover in arguments.places:
        rates, distances, exponents = [], [], []
        for prompt, output, states in proofs(prover, arguments):
            (read,) = engine_of(model).prefill([prompt], [output], layers=layers)
            own = generated(read.states, prompt)
            cells = cell_statistics(states, own, DOCUMENTS, "fp16")
            rates.append(accept_rate(cells, DOCUMENTS))
            exponents.append(cells.Pe.mean().item())
            relative = (states - own).norm(dim=-1) / own.norm(dim=-1)
            distances.append(relative.log().mean().item())
        rows.append(
            {
                "prover": prover,
                "verifier": verifier,
                "accept_rate": fmean(rates),
                "Pe": fmean(exponents),
                "accepted_trials": sum(rate > THRESHOLD for rate in rates),
                "trials": len(rates),
                "distance": torch.tensor(distances).mean().exp().item(),
            }
        )
    return rows


def main(arguments: argparse.Namespace) -> dict:
    arguments.work.mkdir(parents=True, exist_ok=True)
    for place in arguments.places:
        proofs(place, arguments)
    rows = []
    for number, verifier in enumerate(arguments.places):
        kept = arguments.work / f"verifier-{number}.json"
        if not kept.exists():
            kept.write_text(json.dumps(rows_of(verifier, arguments)))
        rows += json.loads(kept.read_text())
    return {"rows": rows, "environment": environment()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("places", nargs="+")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--work", type=Path, default=Path("runs/engine-exp2"))
    parser.add_argument("--format", choices=["table", "json"], default="table")
    given = parser.parse_args()
    result = main(given)
    print(json.dumps(result, indent=2) if given.format == "json" else "\n".join(map(str, result["rows"])))
