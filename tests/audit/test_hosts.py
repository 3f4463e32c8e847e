"""Suspects by words, and that an audit names the one that answers."""

import copy
from dataclasses import replace

import pytest

from audit.conftest import serving
from bitassay.audit.asking import Asking, Text, prompt_of
from bitassay.audit.client import Endpoint, Target
from bitassay.audit.judge import Reference
from bitassay.audit.run import audit
from bitassay.audit.session import Options, retokenized
from bitassay.audit.suspects import check_suspects, is_recipe, suspect
from bitassay.errors import BitassayError

CHAT = Asking("logprobs", "chat", "generation", 20, 12, 8, True)
OTHER = "{% for message in messages %}<{{ message.role }}> {{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def reference(model):
    return Reference(copy.deepcopy(model).float(), model)


class Hides(Endpoint):
    """A host that does not say which prompt it read."""

    def post(self, path, body):
        value = super().post(path, body)
        value["choices"][0].pop("prompt_token_ids", None)
        return value


def test_words_change_prompts_as_they_say(model, tmp_path):
    words, text = model.tokenizer, Text("Once upon a time", (1, 2, 3, 4, 5, 6))
    (tmp_path / "system").write_text("Be brief.\n")
    (tmp_path / "template").write_text(OTHER)
    ids = prompt_of(text, "chat", words)

    def said(word, asking=CHAT):
        return suspect(word, lambda recipe: model).prompt(words, asking, text, ids)

    assert "Be brief. Once" in words.decode(said(f"system={tmp_path}/system"))
    assert "<user> Once" in words.decode(said(f"template={tmp_path}/template"))
    assert said("context=3") == list(ids[-3:])
    assert said("context=50%") == list(ids[-round(len(ids) / 2) :])
    plain = said(f"system={tmp_path}/system", replace(CHAT, form="ids"))
    assert plain[-len(ids) :] == list(ids)
    assert len(plain) > len(ids)
    bos = words.bos_token_id
    begun = suspect(f"system={tmp_path}/system", lambda recipe: model).prompt(
        words, replace(CHAT, form="ids"), text, (bos, 5, 6)
    )
    assert begun[0] == bos
    assert begun[-2:] == [5, 6]
    assert bos not in begun[1:]
    assert suspect("temperature=0.8", lambda recipe: model).rule.temperature == 0.8
    assert suspect("top_p=1", lambda recipe: model).rule.top_p == 1
    assert [is_recipe(word) for word in ("w8", "a/b.yaml", "kv8", "system=x")] == [True, True, False, False]


@pytest.mark.parametrize(
    "word",
    ["context=0", "context=101%", "context=-1", "context=", "temperature=hot", "temperature=0", "top_p=1.5"],
)
def test_values_that_are_none_are_refused(word, model):
    with pytest.raises(BitassayError):
        suspect(word, lambda recipe: model)


def test_files_that_cannot_be_used_are_refused(model, tmp_path):
    (tmp_path / "large").write_bytes(b"a" * 2**17)
    (tmp_path / "broken").write_text("{% for %}")
    for name in ("missing", "large"):
        with pytest.raises(BitassayError, match=name):
            suspect(f"system={tmp_path}/{name}", lambda recipe: model)
    broken = suspect(f"template={tmp_path}/broken", lambda recipe: model)
    with pytest.raises(BitassayError, match="template"):
        broken.prompt(model.tokenizer, CHAT, Text("a", (1,)), (1,))


def test_the_host_that_answers_is_the_nearest(model, reference, tmp_path):
    """A host whose template puts a system prompt before every message, asked by messages."""
    system = "The cat sat on the mat and was happy. "
    (tmp_path / "system").write_text(system)
    (tmp_path / "other").write_text("A dog ran away from the house.")
    host = copy.copy(model)
    host.tokenizer = copy.deepcopy(model.tokenizer)
    host.tokenizer.chat_template = system + "{{ messages[0].content }} "
    words = [f"system={tmp_path}/{name}" for name in ("other", "system")] + ["context=4", "kv4"]
    suspects = {word: suspect(word, lambda recipe: copy.deepcopy(model)) for word in words}
    with serving(host, tmp_path / "store") as (url, _):
        target = Target(Hides(url + "/v1", sleep=lambda _: None), "stories")
        small = Options(tokens=8, requests=3, alpha=0.05, seed=1, chat=True, level="logprobs")
        run, _ = audit(target, reference, replace(small, out=tmp_path / "run"), suspects=suspects)
        assert run["settings"]["asked_by"]["form"] == "chat"
        assert run["suspects"][0]["suspect"] == words[1]
        assert run["suspects"][0]["distance"] < 0.1 < run["suspects"][1]["distance"]
        shows = Target(Endpoint(url + "/v1"), "stories")
        with pytest.raises(BitassayError, match="read other tokens"):
            audit(shows, reference, replace(small, out=tmp_path / "shown"))


def test_evidence_that_says_nothing_of_a_suspect_is_refused(model):
    given = Asking("prompt-logprobs", "ids", "prompt_logprobs", 20, 12, 1, True)
    for word, asking in (("context=4", given), ("temperature=0.8", CHAT), ("top_p=1", given)):
        with pytest.raises(BitassayError, match=word):
            check_suspects(asking, {word: suspect(word, lambda recipe: model)})
    check_suspects(CHAT, {"context=4": suspect("context=4", lambda recipe: model)})


@pytest.mark.slow
def test_a_rule_of_sampling_is_named(model, reference, tmp_path):
    class Cold(Endpoint):
        def post(self, path, body):
            return super().post(path, body | ({"temperature": 0.3} if body["temperature"] else {}))

    words = ["temperature=0.3", "top_p=1", "temperature=2"]
    suspects = {word: suspect(word, lambda recipe: model) for word in words}
    with serving(model, tmp_path / "store") as (url, _):
        target = Target(Cold(url + "/v1", sleep=lambda _: None), "stories")
        options = Options(tokens=16, requests=4, seed=1, level="sampled", out=tmp_path / "run")
        run, _ = audit(target, reference, options, suspects=suspects)
    assert run["suspects"][0]["suspect"] == "temperature=0.3"
    assert run["suspects"][0]["seen"] is None


def test_text_is_split_behind_its_prompt(model):
    words = model.tokenizer
    ids = words("Once upon a time there was a little girl").input_ids
    before, after = ids[:5], ids[5:]
    text = words.decode(ids)[len(words.decode(before)) :]
    assert [each.token for each in retokenized(words, before, text)] == after
