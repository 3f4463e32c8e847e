"""Replication in a recipe: what is chosen, fitted, stored, saved, and told apart."""

import json

import pytest
import torch
from pydantic import ValidationError

from bitassay.engines.load import load
from bitassay.engines.taps import record_states
from bitassay.errors import BitassayError
from bitassay.models.walk import decoder_layers
from bitassay.quantization.export.gguf_file import check_gguf, write_gguf
from bitassay.quantization.export.gguf_reload import reload_difference
from bitassay.quantization.export.plan import plan_export
from bitassay.quantization.export.save import choose_layout, save
from bitassay.quantization.pipeline import quantize
from bitassay.quantization.recipe.calibration import Calibration, calibration_tokens
from bitassay.quantization.recipe.recipe import Recipe
from bitassay.quantization.recipe.replication import ReplicationPlan
from bitassay.quantization.replication.fit import fit_parallel, fit_serial, least_squares
from bitassay.quantization.runtime.model import (
    bits_per_weight,
    parameter_count,
    quantization_of,
    size_bytes,
    with_tensors,
)
from bitassay.quantization.solvers.learned import relative_error
from bitassay.testing.tiny import tiny_model
from bitassay.verification.calibrate import calibrate
from bitassay.verification.prove import prove_many
from bitassay.verification.verify import verify

IDS = torch.randint(3, 500, (2, 20), generator=torch.Generator().manual_seed(0))
INT2 = {"format": "int2", "granularity": "g32", "scale": "absmax"}  # which is quick
FEW = {"samples": 6, "tokens": 48}
LINEAR = {"how": "parallel", "of": "linear", "differ": "residual"}


def recipe(replication=None, weights=INT2, **parts):
    return Recipe.model_validate({"name": "x", "weights": weights, "replication": replication} | parts)


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def distance(model, base):
    return ((logits(model) - logits(base)).norm() / logits(base).norm()).item()


CASES = {
    "shared": recipe({"copies": 2, "coefficients": "mean"}),
    "fitted": recipe({"copies": 2, "coefficients": "fitted"}, calibration=FEW),
    "fitted parallel": recipe(
        {"how": "parallel", "differ": "noise", "values": [0, 0.1], "coefficients": "fitted"}, calibration=FEW
    ),
    "rescaled": recipe({"copies": 1, "coefficients": "fitted", "layers": [1, 3]}, calibration=FEW),
    "seeds": recipe({"differ": "seed", "coefficients": "mean", "layers": [1, 3]}),
    "rotations": recipe({"how": "parallel", "differ": "rotation"}),
    "rotated first": recipe(
        {"how": "parallel", "differ": "offset"}, rotation={"r4": True, "without_hadamard": "blocks"}
    ),
    "block": recipe({"of": "block", "layers": [1, 2, 3], "coefficients": [1, 0.3]}),
    "residual": recipe(LINEAR),
    "digits": recipe(LINEAR | {"differ": "digits"}, weights=INT2 | {"offset": 0.5}),
    "residual by gptq": recipe(LINEAR | {"layers": {"by": "error", "share": 0.4}}, gptq={}, calibration=FEW),
    "input grids of layers": recipe({"how": "parallel", "differ": "inputs"}, activations={"format": "int4"}),
    "input grids of linears": recipe(
        {"how": "parallel", "of": "linear", "differ": "inputs", "copies": 4}, activations={"format": "int4"}
    ),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("own", CASES.values(), ids=CASES)
def test_fake_packed_and_reloaded_models_say_the_same(stories, tmp_path, own):
    model = quantize(stories, own)
    said = logits(model)
    assert not torch.allclose(said, logits(quantize(stories, own.model_copy(update={"replication": None}))))
    done = quantization_of(model)
    assert torch.equal(logits(with_tensors(stories, done, packed=True)), said)
    card = save(model, tmp_path / "saved")
    assert (card.layout, card.recipe.recipe_id) == ("bitassay", own.recipe_id)
    back = load(tmp_path / "saved")
    assert torch.equal(logits(back), said)
    assert torch.equal(logits(load(tmp_path / "saved", packed=True)), said)
    assert quantization_of(back).passes == done.passes
    assert card.bits_per_weight == bits_per_weight(model) == bits_per_weight(back)
    # The parent is untouched, and so is a replica's own parent by a second one.
    assert not any(hasattr(layer, "replicas") for layer in decoder_layers(stories))
    assert torch.equal(logits(quantize(stories, own)), said)


def test_shared_copies_are_stored_once_and_others_counted(stories, tmp_path):
    once, shared, apart = (
        quantize(stories, recipe(r))
        for r in (None, {"copies": 3}, {"differ": "seed", "coefficients": "mean"})
    )
    assert size_bytes(shared) == size_bytes(once)
    assert sum(p.numel() for p in shared.parameters()) == sum(p.numel() for p in once.parameters())
    assert bits_per_weight(shared) == bits_per_weight(once)
    assert bits_per_weight(apart) == pytest.approx(2 * bits_per_weight(once), rel=0.01)
    assert parameter_count(apart) == parameter_count(stories)
    held = {p.data_ptr() for name, p in apart.named_parameters() if "norm" in name}
    assert len(held) == len([name for name, _ in once.named_parameters() if "norm" in name])
    files = {}
    for name, model in (("once", once), ("shared", shared)):
        save(model, tmp_path / name, layout="bitassay")
        files[name] = (tmp_path / name / "model.safetensors").stat().st_size
    assert files["once"] == files["shared"]


@pytest.mark.sample(1)
@pytest.mark.parametrize("by", ["error", "kl", "massive"])
def test_layers_are_chosen_by_measure(stories, by):
    searched = {"format": "int2", "granularity": "g32"}
    own = recipe(LINEAR | {"layers": {"by": by, "share": 0.4}}, searched, calibration=FEW)
    chosen = quantize(stories, own)
    copied = {
        name.split(".")[2] for name, t in quantization_of(chosen).tensors.items() if t.residual is not None
    }
    assert len(copied) == 2
    none, both = (quantize(stories, recipe(r, searched)) for r in (None, LINEAR))
    assert distance(both, stories) < distance(chosen, stories) < distance(none, stories)
    assert bits_per_weight(none) < bits_per_weight(chosen) < bits_per_weight(both)


def test_the_worst_layer_is_chosen(stories):
    """One layer at two bits among layers of eight."""
    coarse = {"match": "model.layers.3.*", "weights": INT2}
    for by in ("error", "kl"):
        own = recipe(
            {"layers": {"by": by, "share": 0.2}}, {"format": "int8"}, overrides=[coarse], calibration=FEW
        )
        assert list(quantization_of(quantize(stories, own)).passes) == [3]


def test_counts_of_layers():
    assert ReplicationPlan(copies=3, layers="progressive").known_counts(5) == {0: 3, 1: 3, 2: 2}
    assert ReplicationPlan(copies=1, layers=(4, 1)).known_counts(5) == {}
    assert ReplicationPlan(layers="middle").known_counts(6) == {2: 2, 3: 2}
    assert list(ReplicationPlan(layers="middle").known_counts(30)) == list(range(10, 20))
    assert ReplicationPlan(copies=1, layers=(4, 1), coefficients="fitted").known_counts(5) == {1: 1, 4: 1}
    assert ReplicationPlan(layers=(4, 1)).known_counts(5) == {1: 2, 4: 2}
    assert ReplicationPlan(copies=3, layers={0: 3, 2: 1}).known_counts(5) == {0: 3}
    with pytest.raises(BitassayError, match="no layer 7"):
        ReplicationPlan(layers=(7,)).known_counts(5)


def test_least_squares_finds_the_coefficients():
    x, f, g = torch.randn(3, 2, 9, 16, generator=torch.Generator().manual_seed(0))
    assert least_squares([x, f, g], 0.5 * x + 2 * f - g) == pytest.approx([0.5, 2, -1], abs=1e-6)
    steps = fit_parallel(x, [x + f, x + g], 0.9 * x + 0.3 * f + 0.6 * g)
    assert (steps.keep[0], *steps.add) == pytest.approx((0.9, 0.3, 0.6), abs=1e-6)
    # A pass that adds nothing of use is not taken: the identity is among the choices.
    steps = fit_serial(x, [lambda x: x + f, lambda x: x + g], x + f)
    assert (*steps.keep, *steps.add) == pytest.approx((1, 1, 1, 0), abs=0.03)
    # A copy twice has one solution that is the smallest, not none.
    assert fit_parallel(x, [x + f, x + f], x + f).add == pytest.approx((0.5, 0.5), abs=1e-6)


def test_each_fitted_pass_brings_the_states_nearer():
    x, f, noise = torch.randn(3, 4, 32, 16, generator=torch.Generator().manual_seed(0))
    wanted = x + f
    run = lambda x: x + f + 0.5 * noise  # noqa: E731
    errors = []
    for count in (1, 2, 3):
        steps, state = fit_serial(x, [run] * count, wanted), x
        for keep, add in zip(steps.keep, steps.add, strict=True):
            state = keep * state + add * (run(state) - state)
        errors.append((state - wanted).square().mean().item())
    assert errors[0] >= errors[1] >= errors[2]


def test_fitted_coefficients_help_where_plain_passes_hurt(stories):
    plain, fitted, none = (
        quantize(stories, recipe(r, calibration=FEW))
        for r in ({"copies": 2}, {"copies": 2, "coefficients": "fitted"}, None)
    )
    tokens = calibration_tokens(stories, Calibration(**FEW))

    def error(model, layer):
        found = []
        for one in (model, stories):
            with record_states(one, [layer]) as recorded, torch.inference_mode():
                one(tokens, use_cache=False)
            found.append(recorded[layer][0])
        return relative_error(*found).item()

    assert error(fitted, 1) <= error(none, 1) < error(plain, 1)
    assert error(fitted, 5) < error(plain, 5)


def test_plain_layouts_and_gguf(stories, tmp_path):
    serial, residual, damped = (
        recipe(r) for r in ({"copies": 2}, LINEAR, {"copies": 2, "coefficients": "mean"})
    )
    for own in (serial, residual):
        with pytest.raises(BitassayError, match="cannot hold"):
            plan_export(stories, own, "compressed-tensors")
    assert choose_layout(tiny_model("llama"), serial, {})[0] == "bitassay"
    with pytest.raises(BitassayError, match="become layers"):
        check_gguf(stories, damped)
    # Physical copies: a deeper model, whose passes are layers.
    base = load("stories260k", dtype="bfloat16")
    for own in (serial, recipe({"copies": 2, "differ": "seed", "layers": [1]})):
        model = quantize(base, own)
        path = tmp_path / f"{own.recipe_id[:6]}.gguf"
        write_gguf(model, path)
        assert reload_difference(model, path, IDS) < 0.3
        assert reload_difference(quantize(base, recipe()), path, IDS) > 1


def test_a_planned_size_is_what_is_saved(stories):
    for own in (CASES["residual"], CASES["shared"], CASES["seeds"], CASES["residual by gptq"]):
        plan, model = plan_export(stories, own), quantize(stories, own)
        assert plan.size_bytes == pytest.approx(size_bytes(model), rel=0.01)
        assert plan.bits_per_weight == pytest.approx(bits_per_weight(model), rel=0.01)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"passes": {}}, "not those of the recipe"),
        ({"passes": {"0": {"keep": [1, 1], "add": [1, 2]}}}, "not those of the recipe"),
        ({"passes": {"0": {"keep": [1], "add": [1, 1]}}}, "coefficients"),
        ({"passes": {"0": {"keep": [1, 1], "add": [1, float("inf")]}}}, "passes"),
        ({"matrices": None}, "is not there"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(stories, tmp_path, change, why):
    save(quantize(stories, recipe({"differ": "seed", "coefficients": "mean", "layers": [0]})), tmp_path / "m")
    path = tmp_path / "m" / "bitassay.json"
    card = json.loads(path.read_text())
    if "matrices" in change:
        change = {"matrices": {n: p for n, p in card["matrices"].items() if "replicas.0.mlp.up" not in n}}
    path.write_text(json.dumps(card | change))
    with pytest.raises(BitassayError, match=why):
        load(tmp_path / "m")


def test_what_is_given_says_how_many_copies_there_are():
    assert ReplicationPlan.model_validate({"layers": {3: 2, 4: 3}}).copies == 3
    assert ReplicationPlan.model_validate({"coefficients": [1, 0.5, 0.2]}).copies == 3
    assert ReplicationPlan.model_validate({"layers": {"by": "kl", "share": 1}}).copies == 2


@pytest.mark.parametrize(
    ("start", "end", "layers", "expected"),
    [(0, 1, 5, [0, 1, 2, 3, 4]), (0.3, 0.5, 30, [9, 10, 11, 12, 13, 14]), (0.9, 0.95, 5, [4])],
)
def test_layers_between_two_shares_of_the_depth(start, end, layers, expected):
    plan = ReplicationPlan.model_validate({"of": "block", "layers": {"start": start, "end": end}})
    assert list(plan.known_counts(layers)) == expected


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"replication": {"of": "linear"}}, "cannot follow itself"),
        ({"replication": {"how": "parallel"}}, "give the same"),
        ({"replication": {"differ": "residual"}}, "no layer by itself"),
        ({"replication": LINEAR | {"coefficients": "fitted"}}, "residual"),
        ({"replication": {"how": "parallel", "differ": "seed", "stop": {}}}, "nothing can stop"),
        ({"replication": {"coefficients": "fitted", "stop": {}}}, "all passes"),
        ({"replication": {"coefficients": "mean", "stop": {}}}, "begins with 1"),
        ({"replication": {"coefficients": [0.5, 0.5], "stop": {}}}, "begins with 1"),
        ({"replication": {"copies": 2, "coefficients": [1, 0.5, 0.2]}}, "need as many"),
        ({"replication": {"layers": []}}, "none of them has as many"),
        ({"replication": {"copies": 3, "layers": {0: 2, 1: 1}}}, "none of them has as many"),
        ({"replication": {"layers": [3, 3]}}, "listed twice"),
        ({"replication": {"layers": {"start": 0.5, "end": 0.5}}}, "smaller share"),
        ({"replication": {"layers": "progressive", "coefficients": [1, 0.5]}}, "different counts"),
        ({"replication": {"copies": 2, "layers": {0: 5}}}, "above copies"),
        ({"replication": {"values": [1, 2]}}, "have none"),
        ({"replication": {"differ": "inputs", "how": "parallel"}}, "need activations"),
        ({"replication": {"differ": "inputs"}, "activations": {"format": "fp8_e4m3"}}, "need activations"),
        ({"replication": {"differ": "seed"}, "gptq": {}}, "gptq"),
        ({"replication": LINEAR, "tune": {}}, "tune"),
        ({"replication": LINEAR, "weights": None}, "no weights to round"),
        ({"replication": {"layers": {"by": "kl"}}, "weights": None}, "no weights"),
        (
            {"replication": {"differ": "offset", "how": "parallel"}, "weights": {"format": "ternary"}},
            "offset",
        ),
        ({"weights": INT2 | {"copies": {"count": 2, "differ": "seed"}}}, "says them once"),
        (
            {"mixed": {"bits": 3, "formats": ["int2", INT2 | {"copies": {"count": 2, "differ": "seed"}}]}},
            "says them once",
        ),
        (
            {"overrides": [{"match": "*", "weights": INT2 | {"copies": {"count": 2, "differ": "seed"}}}]},
            "says them once",
        ),
        ({"replication": {"coefficients": "fitted"}, "rotation": {"r1": "online"}}, "turn the stream"),
        ({"replication": {"of": "block"}, "rotation": {"r1": "online"}}, "turn the stream"),
        ({"replication": {"of": "block", "layers": [1, 3]}}, "list of neighbours"),
        ({"replication": {"of": "block", "layers": "progressive"}}, "list of neighbours"),
        ({"replication": {"of": "block", "stop": {}}}, "runs again as it is"),
        ({"replication": {"of": "block", "coefficients": "fitted"}}, "runs again as it is"),
        ({"replication": {"of": "block", "differ": "seed"}}, "runs again as it is"),
    ],
)
def test_plans_that_make_no_sense_are_refused(parts, why):
    with pytest.raises(ValidationError, match=why):
        Recipe.model_validate({"name": "x", "weights": INT2} | parts)


def test_a_verifier_tells_a_replica_from_its_original(stories):
    int8 = {"format": "int8", "granularity": "g32"}
    plain, replica = (
        quantize(stories, recipe(r, int8)) for r in (None, {"layers": [2], "coefficients": "mean"})
    )
    prompts = [
        [int(t) for t in row]
        for row in torch.randint(3, 500, (64, 8), generator=torch.Generator().manual_seed(4))
    ]
    profile = calibrate(plain, plain, prompts[:60], max_new_tokens=12, alpha=0.1, guarantee="average")
    honest = prove_many(plain, prompts[60:], max_new_tokens=12)
    claimed = prove_many(replica, prompts[60:], max_new_tokens=12, claim=plain.identity)
    assert [verify(t, plain, profile=profile).status for t in claimed] == ["FAIL"] * 4
    assert "FAIL" not in [verify(t, plain, profile=profile).status for t in honest]
    own = prove_many(replica, prompts[60:], max_new_tokens=12)
    assert verify(own[0], replica, profile=None).status != "FAIL"
    assert "other-recipe" in [reason.code for reason in verify(own[0], plain, profile=profile).reasons]
