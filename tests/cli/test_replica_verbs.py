"""Every verb takes a replicated recipe: assay, bench, generate, calibrate, prove, verify."""

import json

import pytest

from bitassay.engines.decode import generate, prefill
from bitassay.engines.load import load
from bitassay.engines.sampling import Sampler
from bitassay.quantization.pipeline import quantize
from bitassay.quantization.recipe.recipe import read_recipe

MODEL = "stories260k"
TEXT = "name: twice\nweights: {format: int8, granularity: g32}\nreplication: {layers: [1, 3], coefficients: mean}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, many_prompts):
    folder = tmp_path_factory.mktemp("replica")
    (folder / "twice.yaml").write_text(TEXT)
    (folder / "once.yaml").write_text(TEXT.replace("twice", "once").partition("replication")[0])
    (folder / "many.txt").write_text("\n".join(many_prompts))
    return folder


@pytest.fixture(scope="module")
def replica(folder):
    return quantize(load(MODEL), read_recipe(folder / "twice.yaml"))


def json_of(bitassay, *words):
    done = bitassay(*map(str, words), "--format", "json")
    assert done.status == 0, done.err
    return json.loads(done.out)


def test_assay(bitassay, folder, tmp_path):
    recipes = [word for name in ("once", "twice") for word in ("--recipe", folder / f"{name}.yaml")]
    few = ["--windows", "2", "--window", "48", "--no-verify", "--repeats", "1", "--out", tmp_path / "a"]
    _, once, twice = json_of(bitassay, "assay", MODEL, *recipes, *few)["rows"]
    assert once["size_bytes"] == twice["size_bytes"]  # the same codes
    assert twice["kl_mean"] > 2 * once["kl_mean"]
    assert twice["decode_tok_s"] > 0


def test_bench(bitassay, folder, workers_here, tmp_path):
    recipes = [word for name in ("once", "twice") for word in ("--recipe", folder / f"{name}.yaml")]
    few = [
        "--batches",
        "1",
        "2",
        "--contexts",
        "16",
        "--prompt-tokens",
        "8",
        "--new-tokens",
        "3",
        "--repeats",
        "1",
    ]
    found = json_of(bitassay, "bench", MODEL, *recipes, *few, "--out", tmp_path / "b")
    facts = {row["model"]: row for row in found["models"]}
    assert facts["twice"]["kv_bytes_per_token"] * 5 == facts["once"]["kv_bytes_per_token"] * 7
    assert facts["twice"]["weight_bytes_per_token"] > facts["once"]["weight_bytes_per_token"]
    assert all(row["decode_tok_s"] > 0 for row in found["rows"])


def test_generate(bitassay, folder, replica, tmp_path):
    pytest.importorskip("sacrebleu")
    (tmp_path / "p.txt").write_text("Once upon a time\nThe dog saw\n")
    recipes = [word for name in ("once", "twice") for word in ("--recipe", folder / f"{name}.yaml")]
    few = [
        "--prompts-file",
        tmp_path / "p.txt",
        *["--prompts", "2", "--new-tokens", "12"],
        "--out",
        tmp_path / "g",
    ]
    found = json_of(bitassay, "generate", MODEL, *recipes, *few)
    assert [row["recipe"] for row in found["rows"]] == ["base", "once", "twice"]


@pytest.mark.parametrize(
    "sampler", [Sampler(), Sampler(temperature=0.9, top_p=0.9, seed=5)], ids=["greedy", "sampled"]
)
def test_words_by_the_cache_are_those_of_one_forward(replica, sampler):
    """What is fed back one token a step gives the logits that one forward over the whole text gives."""
    prompt = replica.tokenizer("Once upon a time").input_ids
    [said] = generate(replica, [prompt], max_new_tokens=24, sampler=sampler, layers=(4,))
    [again] = generate(replica, [prompt], max_new_tokens=24, sampler=sampler)
    assert said.output_ids == again.output_ids
    [read] = prefill(replica, [prompt], [said.output_ids], layers=(4,))
    assert (said.states[4] - read.states[4]).abs().max() < 1e-4 * read.states[4].abs().max()
    if sampler.temperature == 0:
        assert read.logits.argmax(-1).tolist() == list(said.output_ids)


def test_prove_and_verify(bitassay, folder):
    """A replica is proved and verified as itself, and fails where the model without copies was promised."""
    once, twice = (["--recipe", folder / f"{name}.yaml"] for name in ("once", "twice"))
    profile, trace = folder / "twice.json", folder / "own.trace"
    many = ["--prompts", folder / "many.txt", "--alpha", "0.05", "--guarantee", "average"]
    asked = ["--prompt", "Once upon a time", "--max-new-tokens", "24"]
    for made in (
        ["calibrate", MODEL, *twice, *many, "--out", profile],
        ["prove", MODEL, *twice, *asked, "--out", trace],
    ):
        assert bitassay(*map(str, made)).status == 0

    def verdict(*held):
        done = bitassay(*map(str, ["verify", trace, "--model", MODEL, *held, "--format", "json"]))
        [row] = json.loads(done.out)["rows"]
        return done.status, row["status"], {reason["code"] for reason in row["reasons"]}

    assert verdict(*twice, "--profile", profile) == (0, "PASS", {"as-honest"})
    status, said, codes = verdict(*once, "--profile", profile)
    assert (status, said) == (1, "FAIL")
    assert "other-recipe" in codes


@pytest.mark.slow
@pytest.mark.real
def test_smollm_twice_is_told_from_once(tmp_path):
    """The same 8-bit codes: run once, and one of 30 layers run twice, damped."""
    from bitassay.studies.verdicts import chosen_prompts
    from bitassay.verification.calibrate import calibrate
    from bitassay.verification.prove import prove_many
    from bitassay.verification.verify import verify_many

    base = load("smollm2-135m", dtype="bfloat16")
    (tmp_path / "r.yaml").write_text(TEXT.replace("[1, 3]", "[14]"))
    twice = quantize(base, read_recipe(tmp_path / "r.yaml"))
    once = quantize(base, read_recipe(tmp_path / "r.yaml").model_copy(update={"replication": None}))
    prompts = [ids for ids in chosen_prompts(base, 132, seed=0) if len(ids) <= 60][:44]
    assert len(prompts) == 44
    profile = calibrate(once, once, prompts[:40], max_new_tokens=12, alpha=0.1, guarantee="average")
    honest = prove_many(once, prompts[40:], max_new_tokens=12)
    claimed = prove_many(twice, prompts[40:], max_new_tokens=12, claim=once.identity)
    assert {one.status for one in verify_many(claimed, once, profile=profile)} == {"FAIL"}
    assert [one.status for one in verify_many(honest, once, profile=profile)].count("FAIL") <= 2
    [text] = generate(twice, prompts[:1], max_new_tokens=12)
    assert text.output_ids == prove_many(twice, prompts[:1], max_new_tokens=12)[0].header.output_ids
