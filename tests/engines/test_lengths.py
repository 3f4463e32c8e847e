"""Hosts and verifiers of models that read a text otherwise as it grows, or keep a state."""

import pytest
import torch

from bitassay.engines.decode import generate, prefill
from bitassay.engines.speculative import speculate
from bitassay.engines.taps import tap_layers
from bitassay.quantization.replication.any_precision import PrecisionPolicy
from bitassay.quantization.solvers.distillation import continued
from bitassay.verification.calibrate import calibrate
from bitassay.verification.prove import prove, prove_many
from bitassay.verification.verify import verify_many
from kinds import HYBRID, ROTARY, SHORT, reread_greedy, tiny_kind

NEW = 12
# Short of the change, across it, just before and just behind it, beyond it; two that end on its either side.
FEW_HYBRIDS = ("qwen3_next", "mamba")
LENGTHS = (20, SHORT - 6, SHORT - 1, SHORT, SHORT + 1, SHORT + 16, SHORT - NEW + 1, SHORT - NEW + 2)
PROMPTS = [list(range(5 + place, 5 + place + length)) for place, length in enumerate(LENGTHS)]


def distance(a, b):
    return max(((a[layer] - b[layer]).norm(dim=-1) / b[layer].norm(dim=-1)).max().item() for layer in a)


def slow(names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", [*ROTARY, *FEW_HYBRIDS, *slow(sorted(HYBRID.keys() - {*FEW_HYBRIDS}))])
def test_a_host_says_what_reading_again_says_and_a_verifier_sees_it(name):
    model = tiny_kind(name)
    layers, prompts = tap_layers(model), PROMPTS if name in ROTARY else [*PROMPTS[:2], list(range(40, 47))]
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    made = generate(model, prompts, max_new_tokens=NEW, layers=layers)
    outputs = [one.output_ids for one in made]
    together = prefill(model, prompts, outputs, layers=layers)
    for prompt, host, verifier in zip(prompts, made, together, strict=True):
        wanted, logits = reread_greedy(model, prompt, NEW)
        assert list(host.output_ids) == wanted
        assert torch.allclose(verifier.logits, logits, atol=1e-3)
        assert distance(host.states, verifier.states) < 1e-4
        (alone,) = prefill(model, [prompt], [host.output_ids], layers=layers)
        assert distance(alone.states, verifier.states) < 1e-4


def test_longrope_is_transformers_own_generate():
    model = tiny_kind("longrope")
    for prompt, one in zip(PROMPTS, generate(model, PROMPTS, max_new_tokens=NEW), strict=True):
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        assert tokens[0, len(prompt) :].tolist() == list(one.output_ids)


@pytest.mark.parametrize("name", ["longrope", *slow(["dynamic", "qwen3_next"])])
def test_an_honest_host_passes(name):
    """Half of the outputs cross the length at which frequencies change. The profile knows the host's batches:
    where it does not, hosts of other batch sizes are refused more often than alpha says."""
    model = tiny_kind(name)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 500, (SHORT - 14 + n % 12,), generator=draw).tolist() for n in range(216)]
    honest, asked = prompts[:200], prompts[200:]
    profile = calibrate(
        model,
        model,
        honest,
        max_new_tokens=8,
        min_positions=4,
        alpha=0.01,
        batch_size=5,
        guarantee="average",
    )
    traces = prove_many(model, asked, max_new_tokens=8, batch_size=5)
    verdicts = verify_many(traces, model, profile=profile)
    assert [verdict.status for verdict in verdicts].count("FAIL") <= 1  # alpha: 0.16 of 16 on average
    other = tiny_kind(name, rms_norm_eps=1e-2)
    other.identity = model.identity
    traces = prove_many(other, asked, max_new_tokens=8)
    assert [one.status for one in verify_many(traces, model, profile=profile)].count("FAIL") >= 15


@pytest.mark.parametrize("name", ["gemma4", "gemma4 that shares keys", "gemma3n"])
def test_models_with_inputs_of_their_own_prove(name):
    model, prompts = tiny_kind(name), [list(range(5, 25)), list(range(30, 41))]
    made = generate(model, prompts, max_new_tokens=6, layers=tap_layers(model))
    seen = prefill(model, prompts, [one.output_ids for one in made], layers=tap_layers(model))
    for host, verifier in zip(made, seen, strict=True):
        assert distance(host.states, verifier.states) < 1e-4
    assert prove(model, prompts[0], max_new_tokens=4).n_prompt == 20


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("length", [SHORT - 6, SHORT - 1, SHORT + 4])
def test_drafts_change_nothing_across_the_change(name, length):
    model = tiny_kind(name)
    prompt = list(range(9, 9 + length))
    (plain,) = generate(model, [prompt], max_new_tokens=NEW)
    for draft in (1, 3):
        found = speculate(model, PrecisionPolicy(1, 1, 1, 1), prompt, max_new_tokens=NEW, draft_tokens=draft)
        assert found.output_ids == plain.output_ids


@pytest.mark.parametrize("name", [*ROTARY, "lfm2", "mamba"])
def test_text_that_a_model_writes_has_the_states_of_one_forward(name):
    model = tiny_kind(name)
    head = model.get_output_embeddings().weight
    model.bfloat16()
    start = torch.arange(5, 5 + 16)[None].repeat(2, 1)
    tokens, states = continued(model, head, start, SHORT + 6, torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    error = ((states - wanted).float().norm(dim=-1) / wanted.float().norm(dim=-1)).median()
    assert error < 0.02
