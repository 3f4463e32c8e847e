"""The studies of replication on a tiny model: rows, controls, costs, planes, what the run says. Cells are done
inside this process."""

import json
import math
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch

import bitassay
from bitassay.data.windows import Protocol, token_windows
from bitassay.errors import BitassayError
from bitassay.evaluation.controls import beats
from bitassay.evaluation.divergence import TokenScores, window_logits
from bitassay.evaluation.quality import evaluate, text_difference
from bitassay.quantization.pipeline import quantize
from bitassay.quantization.recipe.recipe import BASE
from bitassay.quantization.recipe.replication import Chosen
from bitassay.studies import speculation
from bitassay.studies.cells import CellRunner
from bitassay.studies.claims import judged
from bitassay.studies.costs import facts_of, window_reader, with_costs
from bitassay.studies.replication import study as replication
from bitassay.studies.replication.run import CLAIMS, grade, run_replication
from bitassay.studies.replication.study import STUDIES, Group, Study, arranged, replication_plan
from bitassay.studies.speculation import check_speculation
from bitassay.studies.variants import Findings, Reading, Variant, VariantPlan
from groups import EVEN, MESHED, W2, average, group
from workers import in_process

WHOLE = group("both", EVEN, MESHED)
SMALL = Study(
    "small",
    "a few groups",
    (
        Group(BASE),
        group("w2", W2),
        group("offset-2", W2, average("offset")),
        group("damped-2", W2, {"coefficients": "mean"}),
        group("damped-dense", None, {"coefficients": "mean", "layers": [2]}),
        WHOLE,
        Group("plane-1", WHOLE.recipe, Reading()),
        Group("gated-3", WHOLE.recipe, Reading(threshold=3.0)),
    ),
    drafts=(3,),
)
PROTOCOL = Protocol(windows=5, window_tokens=48)
HOW = {"protocol": PROTOCOL, "dtype": "float32"}


@cache
def windows_of(protocol):
    """The text is tokenized once."""
    return token_windows(bitassay.load("stories260k").tokenizer, protocol)


def windows(_model, protocol):
    return windows_of(protocol)


@pytest.fixture(scope="module")
def here():
    """Cells inside this process, drafts of few words, and the study `small`."""
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch)
        for module in ("cells", "speculation"):
            patch.setattr(f"bitassay.studies.{module}.model_windows", windows)
        patch.setattr("bitassay.studies.speculation.NEW_TOKENS", 6)
        patch.setattr("bitassay.studies.speculation.TEXTS", 3)
        patch.setattr(replication, "BLOCK", 3)
        patch.setitem(STUDIES, "small", SMALL)
        yield


@pytest.fixture(scope="module")
def done(here, tmp_path_factory):
    """A run of `small`; tests must not change its folder."""
    return run_replication("small", "stories260k", out=tmp_path_factory.mktemp("run") / "r", **HOW)


@pytest.mark.parametrize("layers", [12, 24, 30, 32])
def test_as_many_layers_at_the_ends_as_are_chosen(layers):
    plans = {g.name: g.recipe.replication for g in STUDIES["phase3"].groups if g.recipe is not None}
    counts = {name: plans[f"residual-{name}"].counts(layers) for name in ("first", "last", "error")}
    twice = counts["first"].count(2)
    assert counts["first"] == [2] * twice + [1] * (layers - twice) == counts["last"][::-1]
    assert sorted(counts["error"]) == sorted(counts["first"])


@pytest.fixture(scope="module")
def window(stories):
    return token_windows(stories.tokenizer, PROTOCOL)[0][0]


def row(run, group, role=None):
    rows = [one for one in run["rows"] if one["group"] == group and role in (None, one["role"])]
    return rows[0]


def test_every_way_to_replicate_is_a_row_somewhere():
    plans = [g.recipe.replication for s in STUDIES.values() for g in s.groups if g.recipe is not None]
    plans = [plan for plan in plans if plan is not None]
    said = {(p.how, p.of) for p in plans}
    assert said == {("serial", "layer"), ("serial", "block"), ("parallel", "layer"), ("parallel", "linear")}
    fields = {
        "nothing",
        "scale",
        "clip",
        "offset",
        "noise",
        "seed",
        "rotation",
        "residual",
        "digits",
        "inputs",
    }
    assert {p.differ for p in plans} == fields
    ways = {p.coefficients if isinstance(p.coefficients, str) else "list" for p in plans}
    assert ways == {"plain", "mean", "fitted", "list"}
    layers = {p.layers if isinstance(p.layers, str) else type(p.layers).__name__ for p in plans}
    assert layers == {"all", "progressive", "middle", "Chosen", "Between", "tuple", "dict"}
    assert {p.layers.by for p in plans if isinstance(p.layers, Chosen)} == {"error", "kl", "massive"}
    assert any(p.stop is not None and p.stop.budget is not None for p in plans)
    assert any(g.recipe.rotation is not None for s in STUDIES.values() for g in s.groups if g.recipe)


@pytest.mark.parametrize("layers", [5, 30])
@pytest.mark.parametrize("name", STUDIES)
def test_variants_are_each_measured_once(name, layers):
    variants, places = arranged(STUDIES[name].groups, layers)
    assert (variants[0].recipe, places[0].variant) == (None, variants[0].name)
    assert len({variant.name for variant in variants}) == len(variants)
    recipes = {(v.recipe.recipe_id, v.reading) for v in variants if v.recipe is not None}
    assert len(recipes) == len(variants) - 1
    for replica in (place for place in places if place.role == "replica"):
        kinds = {k for p in places if p.group == replica.group for k in p.role.split(", ")}
        recipe = next(v.recipe for v in variants if v.name == replica.variant)
        wanted = {"replica", "single", "equal-bits"} | (
            {"equal-flops"} if recipe.weights or recipe.activations else set()
        )
        wanted |= {"rescaled"} if recipe.replication.coefficients == "fitted" else set()
        assert kinds == wanted


def test_a_plan_survives_its_file():
    plan, _ = replication_plan("planes", "stories260k", 5, PROTOCOL)
    assert VariantPlan.of(json.loads(json.dumps(plan.to_dict()))) == plan


def test_figures_are_those_of_evaluate(done, stories):
    run, _ = done
    found = row(run, "offset-2", "replica")
    recipe = SMALL.groups[2].recipe
    wanted = evaluate(bitassay.quantize(stories, recipe), against=stories, protocol=PROTOCOL).quality
    for name, value in wanted.to_dict().items():
        assert found[name] == pytest.approx(value, abs=1e-5), name


def test_controls_stand_below_their_replica_and_are_compared_with_it(done):
    run, _ = done
    rows = [one for one in run["rows"] if one["group"] == "offset-2"]
    assert [one["role"] for one in rows] == ["replica", "single", "equal-bits, equal-flops"]
    assert rows[1] | {"group": "w2", "role": "plain"} == row(run, "w2")
    for control in rows[1:]:
        [pair] = [p for p in run["pairs"] if (p["group"], p["role"]) == ("offset-2", control["role"])]
        assert pair["kl"] == pytest.approx(rows[0]["kl_mean"] - control["kl_mean"])
        assert pair["beats"] == beats(tuple(pair["kl_ci"]))
    ratios = {p["role"]: p["read_ratio"] for p in run["pairs"] if p["group"] == "damped-2"}
    assert ratios["single, equal-bits"] == pytest.approx(0.5, rel=0.01)
    assert ratios["equal-flops"] == pytest.approx(1, rel=0.05)
    assert (rows[0]["beats_single"], rows[0]["beats_equal_bits"]) == (True, False)
    assert rows[0]["beats_equal_flops"] == rows[0]["beats_equal_bits"]
    assert (rows[1]["controls"], rows[1]["beats_single"]) == ([], None)
    assert row(run, "damped-dense", "single, equal-bits")["kl_mean"] == 0
    dense = row(run, "damped-dense", "replica")
    assert (dense["controls"], dense["beats_equal_flops"]) == (["single", "equal-bits"], None)


@pytest.mark.parametrize(
    ("pair", "wanted"),
    [((-2, -1), True), ((1, 2), False), ((-1, 2), None), ((0, 2), None), ((-1, 0), None), (None, None)],
)
def test_only_an_interval_without_zero_decides(pair, wanted):
    assert beats(pair) is wanted


def test_grades_are_the_documents():
    said = [(0.49, "excellent"), (0.5, "good"), (1.5, "acceptable"), (-3, "excellent")]
    assert all(grade(delta, bits) == word for (delta, word), bits in product(said, (1.25, 2.28, 16)))
    # Three planes of 1 bit store 3.75.
    assert [grade(9.9, bits) for bits in (1.25, 1.85, 2.28, 3.75)] == ["acceptable for 1 bit"] * 2 + [
        None
    ] * 2
    assert grade(10, 1.25) is None


def test_what_a_token_costs(stories):
    """Shared codes are read and computed in each pass, merged ones once, grids of inputs computed n times."""
    plain = facts_of(quantize(stories, group("x", W2).recipe))
    twice = facts_of(quantize(stories, group("x", W2, {}).recipe))
    head = 2 * stories.config.vocab_size * stories.config.hidden_size
    for key in ("flop_per_token", "bytes_per_token"):
        assert twice[key] - head == pytest.approx(2 * (plain[key] - head), rel=1e-3)
    assert (twice["passes"], twice["bits_per_weight"]) == (2, plain["bits_per_weight"])
    merged = facts_of(quantize(stories, group("x", W2, average("offset")).recipe))
    assert merged["flop_per_token"] == plain["flop_per_token"]
    assert merged["bits_per_weight"] == pytest.approx(2 * plain["bits_per_weight"])
    grids = average("inputs", copies=4)
    rounded = facts_of(quantize(stories, group("x", W2, grids, activations={"format": "int4"}).recipe))
    assert rounded["flop_per_token"] - head == pytest.approx(4 * (plain["flop_per_token"] - head), rel=1e-3)
    assert rounded["bytes_per_token"] == plain["bytes_per_token"]
    dense = facts_of(stories)
    half = facts_of(bitassay.load("stories260k", dtype="bfloat16"))
    assert dense == half
    assert dense["bytes_per_token"] == dense["flop_per_token"]


def test_passes_that_stop_are_counted(stories, window):
    stop = {"copies": 3, "coefficients": [1, 0.8, 0.8], "stop": {"norm": 0.4, "cosine": 0.05}}
    model = quantize(stories, group("x", W2, stop).recipe)
    read = window_reader(stories, model, None)
    first = read(window).passes
    assert 1 < first < 3
    assert read(window[:6]).passes != first  # each window by itself
    assert read(window).passes == first
    never = stop | {"stop": {"norm": 0, "cosine": 0, "budget": 0}}
    model = quantize(stories, group("x", W2, never).recipe)
    assert window_reader(stories, model, None)(window).passes == 1
    plain = facts_of(quantize(stories, group("x", W2).recipe))
    stopped = with_costs(facts_of(model), {"passes": 1.0})
    for cost in ("passes", "flop_per_token", "bytes_per_token"):
        assert stopped[cost] == pytest.approx(plain[cost], rel=1e-3)


def test_planes_are_read_as_deep_as_asked(stories, window):
    model, window = quantize(stories, WHOLE.recipe), window[:24]

    def read(**how):
        return window_reader(stories, model, Reading(**how))(window)

    whole, first, never = window_logits(model, window), read(), read(threshold=99.0)
    gated = read(threshold=3.0)
    drawn = read(threshold=3.0, seed=1)
    assert drawn.bytes == pytest.approx(gated.bytes)
    assert not torch.allclose(drawn.logits, gated.logits, atol=0.01)
    assert torch.equal(read(threshold=3.0, seed=1).logits, drawn.logits)
    assert not torch.equal(read(threshold=3.0, seed=2).logits, drawn.logits)
    torch.testing.assert_close(read(threshold=-1.0, seed=1).logits, whole)
    every = read(layers=Chosen(by="error", share=1.0))
    assert torch.equal(every.logits, whole)
    assert not torch.allclose(first.logits, whole, atol=0.1)
    torch.testing.assert_close(read(threshold=-1.0).logits, whole)
    part = read(layers=Chosen(by="error", share=0.4))
    assert first.bytes < part.bytes < every.bytes
    assert first.bytes < gated.bytes < every.bytes
    # A text begins with all planes; the rest of this one is read by plane 1 alone.
    assert never.bytes - first.bytes == pytest.approx((every.bytes - first.bytes) / len(window))
    assert every.bytes == pytest.approx(facts_of(model)["bytes_per_token"], rel=1e-6)


def test_planes_in_a_run(done):
    run, _ = done
    one, gate, both = (row(run, name) for name in ("plane-1", "gated-3", "both"))
    assert one["bytes_per_token"] < gate["bytes_per_token"] < both["bytes_per_token"]
    assert one["kl_mean"] > gate["kl_mean"] > both["kl_mean"]
    [drafts] = run["drafts"]
    assert (drafts["identical"], drafts["texts"], drafts["draft_tokens"]) == (3, 3, 3)
    assert 0 < drafts["acceptance"] < 1 < drafts["speed_bound"] * 3


def test_drafts_are_compared_with_both_planes(stories, monkeypatch):
    """Another text than that of all planes is seen."""
    monkeypatch.setattr(speculation, "NEW_TOKENS", 4)
    monkeypatch.setattr(speculation, "TEXTS", 2)
    plan, _ = replication_plan("planes", "stories260k", 5, PROTOCOL, dtype="float32")
    honest = speculation.speculate
    monkeypatch.setattr(
        speculation,
        "speculate",
        lambda *a, **k: replace(found := honest(*a, **k), output_ids=found.output_ids[::-1]),
    )
    assert [text["identical"] for text in check_speculation(plan, WHOLE.recipe, 2)["texts"]] == [False, False]


def test_a_run_goes_on_and_ends_the_same(done, here, tmp_path, monkeypatch):
    worked, work = [], CellRunner.work

    def stops(self, cell, folder):
        worked.append(cell.name)
        if len(worked) == 2:
            raise KeyboardInterrupt
        work(self, cell, folder)

    monkeypatch.setattr(CellRunner, "work", stops)
    with pytest.raises(KeyboardInterrupt):
        run_replication("small", "stories260k", out=tmp_path / "r", jobs=1, **HOW)
    run, _ = run_replication("small", "stories260k", out=tmp_path / "r", jobs=1, **HOW)
    assert worked == ["text-00", "text-01", "text-01", "drafts-00"]
    for name in ("rows", "pairs", "claims"):
        assert run[name] == done[0][name]


def test_groups_alone(here, tmp_path):
    run, _ = run_replication("small", "stories260k", out=tmp_path / "r", only=("damped-2",), **HOW)
    assert [one["group"] for one in run["rows"]] == [BASE, *["damped-2"] * 3]
    assert run["drafts"] == []
    with pytest.raises(BitassayError, match="'damped-3'; the nearest are"):
        replication_plan("small", "stories260k", 5, only=("damped-3",))


def scores(kl):
    """Three windows of about that divergence."""
    return [
        TokenScores(
            torch.full((4,), 2.0 + kl + jitter),
            torch.full((4,), kl * (1 + jitter) + jitter),
            torch.ones(4, dtype=torch.bool),
        )
        for jitter in (0.0, 1e-4, 2e-4)
    ]


def claims(study, given):
    """The verdicts where variants have these divergences, and all others 1."""
    variants, _ = arranged(STUDIES[study].groups, 30)
    plan = VariantPlan(study, "stories260k", variants, PROTOCOL)
    text = {variant.name: scores(given.get(variant.name, 1.0)) for variant in variants}
    return judged(Findings(plan, {v.name: v for v in variants}, text), CLAIMS[study])


@pytest.mark.parametrize("study", list(STUDIES))
def test_claims_are_of_variants_that_there_are(study):
    assert set(CLAIMS) == set(STUDIES) - {"small"}
    rows = claims(study, {"base": 0.5, "Baseline": 0.5})
    assert rows
    assert not any(one["not_measured"] for one in rows)


@pytest.mark.parametrize(
    ("study", "words", "given", "wanted"),
    [
        ("phase2", "one grid of step", {}, "supported"),
        ("phase2", "one grid of step", {"offset-2": 1.3}, "not supported"),
        ("phase2", "one grid of step", {"offset-2": 1.1}, "not decidable at this n"),
        ("phase2", "residual codes are better", {"residual-2": 0.5, "residual-2-meshed": 0.4}, "supported"),
        (
            "phase2",
            "residual codes are better",
            {"residual-2": 0.5, "residual-2-meshed": 1.4},
            "not supported",
        ),
        ("phase1", "leave the trained map", {"w2": 0.5, "w2-gptq": 0.5}, "supported"),
        ("phase1", "leave the trained map", {"w2": 0.5, "w2-gptq": 1.5}, "not supported"),
        ("uses", "four are as good as 6 bits", {"w16a6": 3, "w2a6": 3}, "supported"),
        ("uses", "four are as good as 6 bits", {"w16a4-grids-4": 1.5}, "not supported"),
        ("planes", "mixed bits of that average", {"layers-40%": 1.5}, "not supported"),
    ],
)
def test_a_prediction_turns_round_with_what_was_measured(study, words, given, wanted):
    [found] = [one for one in claims(study, given) if words in one["claim"]]
    assert found["verdict"] == wanted


def test_a_share_of_nothing_is_none():
    none, some = scores(0.0), scores(1.0)
    none = [one._replace(kl=torch.zeros(4)) for one in none]
    assert text_difference(none, some).kl_fraction is None
    assert math.isclose(text_difference(some, none).kl_fraction, -1)
    assert text_difference(scores(1.0), scores(1.5)).kl_fraction == pytest.approx(0.5, abs=1e-3)


def test_the_first_variant_is_the_base():
    plan = VariantPlan("x", "stories260k", (Variant("b"), Variant("v")), None)
    assert (plan.base, plan.blocks) == ("b", [])
