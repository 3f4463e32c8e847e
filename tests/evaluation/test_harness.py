"""The lm-eval model against lm-eval's own `hf` model, for the three kinds of requests."""

import json
import subprocess
import sys

import pytest

import bitassay
from bitassay.errors import BitassayError

pytest.importorskip("lm_eval")
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from bitassay.evaluation.harness import BitassayLM, KeptAnswers
from bitassay.record.run import RunFolder

STORY = "Once upon a time there was a girl named Lily. She liked to play outside in the sun all day. " * 3
CONTEXTS = ["She saw a big", "The dog ran to ", "One day she went to the park and", "<s> Mom said", "  "]
ENDINGS = [" dog", " cat and a ball", " tree.", "they were happy.", " ", " é中"]


def requests(kind, *arguments):
    return [Instance(kind, {}, one, place) for place, one in enumerate(arguments)]


@pytest.fixture(scope="module")
def hf(stories):
    return HFLM(pretrained=stories, tokenizer=stories.tokenizer, batch_size=3)


@pytest.fixture(scope="module")
def ours(stories):
    return BitassayLM(stories)


def test_log_likelihoods_are_those_of_hf(ours, hf):
    asked = requests(
        "loglikelihood",
        *[(STORY + context, ending) for context in CONTEXTS for ending in ENDINGS],
        *[(context, ending) for context in CONTEXTS for ending in ENDINGS],
        ("", " Once upon"),
        ("", "<s>Once"),
        (STORY * 9, " The end."),  # loses tokens on the left
        (STORY * 9, " The end of it."),
    )
    found, expected = ours.loglikelihood(asked), hf.loglikelihood(asked, disable_tqdm=True)
    for (value, greedy), (hf_value, hf_greedy), request in zip(found, expected, asked, strict=True):
        assert value == pytest.approx(hf_value, abs=5e-4), request.args
        assert greedy == hf_greedy


def test_rolling_log_likelihoods_are_those_of_hf(ours, hf):
    asked = requests("loglikelihood_rolling", (STORY,), (STORY * 12,), ("Hi",))
    assert ours.loglikelihood_rolling(asked) == pytest.approx(
        hf.loglikelihood_rolling(asked, disable_tqdm=True), abs=2e-2, rel=1e-5
    )


def test_generated_texts_are_those_of_hf(ours, hf):
    until = {"until": [".", "\n"], "max_gen_toks": 24}
    asked = requests(
        "generate_until",
        *[(STORY + context, until) for context in CONTEXTS[:3]],
        *[
            (context, {"until": ["Lily", " was"], "max_gen_toks": 16, "do_sample": False})
            for context in CONTEXTS[:3]
        ],
        (STORY * 9, {"max_gen_toks": 5}),
    )
    found = ours.generate_until(asked)
    assert found == hf.generate_until(asked, disable_tqdm=True)
    assert len(set(found)) > 4


def test_a_prompt_with_its_own_bos_gets_no_second_one(ours, stories):
    """Alone: in a batch, lm-eval's hf goes by the first prompt's beginning, whatever the others'."""
    asked = requests("generate_until", ("<s> Mom said", {"until": ["."], "max_gen_toks": 16}))
    alone = HFLM(pretrained=stories, tokenizer=stories.tokenizer, batch_size=1)
    assert ours.generate_until(asked) == alone.generate_until(asked, disable_tqdm=True)


def test_a_repetition_penalty_of_the_model_counts_as_it_does_for_hf(stories):
    model = bitassay.quantize(stories, "w8")
    model.generation_config.repetition_penalty = 1.7
    try:
        asked = requests("generate_until", (STORY, {"until": [], "max_gen_toks": 20}))
        with_penalty = BitassayLM(model).generate_until(asked)
        hf = HFLM(pretrained=model, tokenizer=model.tokenizer, batch_size=1)
        assert with_penalty == hf.generate_until(asked, disable_tqdm=True)
    finally:
        model.generation_config.repetition_penalty = None
    assert with_penalty != BitassayLM(model).generate_until(asked)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"do_sample": True, "temperature": 0.7}, "do_sample=True"),
        ({"temperature": 0.7}, "do_sample=True"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"max_gen_toks": 512}, "512 new tokens leave no room"),
    ],
)
def test_what_is_not_greedy_is_refused(ours, options, said):
    with pytest.raises(BitassayError, match=said):
        ours.generate_until(requests("generate_until", ("Once", options)))


def test_a_continuation_beyond_the_models_positions_is_refused(ours):
    with pytest.raises(BitassayError, match="cannot be scored by a model that reads 512"):
        ours.loglikelihood(requests("loglikelihood", ("Once", STORY * 10)))


def test_answers_are_kept(ours, tmp_path, monkeypatch):
    monkeypatch.setattr("bitassay.evaluation.harness.PART_REQUESTS", 4)
    asked = requests(
        "loglikelihood", *[(context, ending) for context in CONTEXTS[:3] for ending in ENDINGS[:3]]
    )
    folder, calls = RunFolder(tmp_path / "run", {}), []
    whole = ours.loglikelihood(asked)

    class Interrupted(BitassayLM):
        def loglikelihood(self, requests, disable_tqdm=False):
            calls.append(len(requests))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return super().loglikelihood(requests)

    lm = Interrupted(ours.model)
    with pytest.raises(KeyboardInterrupt):
        KeptAnswers(lm, folder, "a").loglikelihood(asked)
    found = KeptAnswers(lm, folder, "a").loglikelihood(asked)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in whole], abs=1e-4)
    assert calls == [4, 4, 4, 1]  # the first part was not asked again


@pytest.fixture
def folder(tmp_path):
    """A folder with a task of two items, `tiny`."""
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": ["cat", "dog"],
        "doc_to_target": "{{a}}",
    }
    (tmp_path / "rows.jsonl").write_text('{"q": "She saw a big", "a": 1}\n{"q": "The small", "a": 0}\n')
    (tmp_path / "tiny.yaml").write_text(json.dumps(task))
    return tmp_path


def test_lm_eval_knows_the_model_by_its_name(folder):
    tasks = TaskManager(include_path=folder, include_defaults=False)
    options = {"model_args": "pretrained=stories260k,recipe=w4,packed=True", "task_manager": tasks}
    results = simple_evaluate(model="bitassay", tasks=["tiny"], bootstrap_iters=0, **options)
    assert results["results"]["tiny"]["acc,none"] in (0, 0.5, 1)


@pytest.mark.slow
def test_lm_evals_command_line_knows_the_model(folder):
    """Slow, since lm-eval reads the YAML of all its tasks first."""
    command = [
        *(sys.executable, "-m", "bitassay.evaluation.harness", "run", "--model", "bitassay"),
        *("--model_args", "pretrained=stories260k,recipe=w4,packed=True"),
        *("--tasks", "tiny", "--include_path", str(folder), "--output_path", str(folder / "found")),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (folder / "found").rglob("results_*.json")
    content = json.loads(path.read_text())
    assert content["n-samples"]["tiny"]["effective"] == 2
    assert content["results"]["tiny"]["acc,none"] in (0, 0.5, 1)
