"""Audits of real servers on 127.0.0.1: honest ones pass, others do not, nothing is lost and no key leaks."""

import copy
import json
import logging

import numpy as np
import pytest
import torch

from audit.conftest import serving
from bitassay.audit.asking import texts
from bitassay.audit.client import AnswerError, Endpoint, Target
from bitassay.audit.judge import Reference
from bitassay.audit.run import audit
from bitassay.audit.session import Options
from bitassay.errors import BitassayError
from bitassay.models.identity import identity
from bitassay.report.pages import write_report
from bitassay.verification.ledger import Binding, update_ledger

SMALL = {"tokens": 16, "requests": 4, "calibration_requests": 20, "alpha": 0.05, "seed": 3}


def rounded(model, bits):
    """A copy with matrices rounded per row."""
    changed = copy.deepcopy(model)
    for name, weight in changed.named_parameters():
        if weight.ndim == 2 and ".layers." in name:
            scale = weight.data.float().abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
            weight.data = ((weight.data.float() / scale).round() * scale).to(weight.dtype)
    return changed


@pytest.fixture(scope="module")
def reference(model):
    return Reference(copy.deepcopy(model).float(), model)


@pytest.fixture(scope="module")
def swapped(model, tmp_path_factory):
    """A server that says it serves the model, and serves it in 4 bits."""
    with serving(rounded(model, 4), tmp_path_factory.mktemp("swapped"), claim=identity(model)) as (url, _):
        yield url


def at(url, **options):
    return Target(Endpoint(url + "/v1", sleep=lambda _: None, **options), "stories")


@pytest.fixture(scope="module")
def calibrated(served, reference, tmp_path_factory):
    """By level: the run of an honest server that was calibrated on another one, and its folder."""

    def run(level):
        out = tmp_path_factory.mktemp("audit") / level
        return audit(at(served[0]), reference, Options(level=level, out=out, **SMALL), honest=[at(served[0])])

    known = {}
    return lambda level: known.setdefault(level, None) or known.__setitem__(level, run(level)) or known[level]


LEVELS = ["prompt-logprobs", "logprobs", "prompt-chosen", "chosen", "tokens", "text", "sampled"]


@pytest.mark.parametrize(
    "level", LEVELS[:1] + [pytest.param(level, marks=pytest.mark.slow) for level in LEVELS[1:]]
)
def test_a_swapped_model_is_refused_and_an_honest_one_is_not(level, calibrated, swapped, reference, tmp_path):
    from bitassay.audit.judge import read_audit_profile

    run, folder = calibrated(level)
    assert run["decision"]["status"] == "PASS"
    assert run["receipts"]["valid"] == 4
    profile = read_audit_profile(folder / "profile.json")
    other, _ = audit(
        at(swapped), reference, Options(level=level, out=tmp_path / "run", **SMALL), profile=profile
    )
    write_report(other, tmp_path / "report.html")
    assert other["decision"]["status"] in (tmp_path / "report.html").read_text()
    weak = ("tokens", "text", "sampled")
    assert other["decision"]["status"] == ("FAIL" if level not in weak else other["decision"]["status"])
    if level == "sampled":  # 4 answers of 16 tokens say little of weights
        return
    assert np.mean([row["score"] for row in other["rows"]]) > max(np.median(profile.scores), 0.05)


def test_a_server_that_gives_text_alone_is_judged_by_it(served, reference, tmp_path):
    class Plain(Endpoint):
        """Refuses log-probabilities and fields that OpenAI's API has not, and names no ids."""

        def post(self, path, body):
            if {"logprobs", "prompt_logprobs", "return_token_ids", "echo"} & body.keys():
                raise AnswerError("status-400", "unknown field")
            if not isinstance(body.get("prompt"), str):
                raise AnswerError("status-400", "text only")
            value = super().post(path, body)
            return {"choices": [{"text": value["choices"][0]["text"]}]}

    target = Target(Plain(served[0] + "/v1", sleep=lambda _: None), "stories")
    run, _ = audit(target, reference, Options(out=tmp_path / "run", **(SMALL | {"requests": 2})))
    assert run["settings"]["asked_by"]["level"] == "text"
    assert [row["given"] for row in run["probes"] if row["evidence"] == "temperature 0 repeats"] == [True]
    assert all(row["score"] is not None for row in run["rows"])


def test_without_a_profile_nothing_is_decided(served, reference, tmp_path):
    run, _ = audit(at(served[0]), reference, Options(out=tmp_path / "run", **(SMALL | {"requests": 1})))
    assert run["decision"]["status"] == "INCONCLUSIVE"
    given = {row["evidence"]: row["given"] for row in run["probes"]}
    assert all(given.values()) is False
    assert given.pop("system_fingerprint") is False
    assert all(given.values()), given


def test_the_same_command_goes_on(served, reference, tmp_path, monkeypatch):
    options = Options(out=tmp_path / "run", concurrency=1, **(SMALL | {"requests": 3}))
    post, asked = Endpoint.post, []

    def breaks(self, path, body):
        asked.append(body)
        if breaks.at is not None and len(asked) > breaks.at:
            raise KeyboardInterrupt
        return post(self, path, body)

    monkeypatch.setattr(Endpoint, "post", breaks)
    breaks.at = None
    audit(at(served[0]), reference, Options(out=tmp_path / "other", **(SMALL | {"requests": 3})))
    whole = len(asked)
    asked.clear()
    breaks.at = whole - 2
    with pytest.raises(KeyboardInterrupt):
        audit(at(served[0]), reference, options)
    kept = len(list((tmp_path / "run" / "parts").glob("answer-0-*")))
    assert kept == 1
    asked.clear()
    breaks.at = None
    run, _ = audit(at(served[0]), reference, options)
    assert len(asked) == 3 - kept
    assert all(row["score"] is not None for row in run["rows"])


def test_a_ledger_counts_every_answer_once(served, calibrated, reference, tmp_path):
    from bitassay.audit.judge import read_audit_profile

    profile = read_audit_profile(calibrated("prompt-logprobs")[1] / "profile.json")
    options = [Options(out=tmp_path / name, ledger=tmp_path / "ledger", **SMALL) for name in ("a",)]
    options += [Options(out=tmp_path / "b", ledger=tmp_path / "ledger", **(SMALL | {"seed": 4}))]
    first, again, more = (
        audit(at(served[0]), reference, each, profile=profile)[0] for each in (options[0], *options)
    )
    assert first["sequence"]["n_requests"] == again["sequence"]["n_requests"] == 4
    assert more["sequence"]["n_requests"] == 8
    assert {first["decision"]["status"], more["decision"]["status"]} == {"PASS"}
    assert more["decision"]["tests"]["sequence"]["level"] == 0.025


def test_a_profile_of_something_else_is_refused(calibrated, served, model, reference, tmp_path):
    from bitassay.audit.judge import read_audit_profile

    profile = read_audit_profile(calibrated("prompt-logprobs")[1] / "profile.json")
    with pytest.raises(BitassayError, match="of 16 positions"):
        audit(
            at(served[0]), reference, Options(out=tmp_path / "a", **(SMALL | {"tokens": 12})), profile=profile
        )
    other = copy.copy(model)
    other.identity = identity(model).with_recipe("0" * 64, "w4")
    with pytest.raises(BitassayError, match="another reference"):
        audit(at(served[0]), Reference(other, model), Options(out=tmp_path / "b", **SMALL), profile=profile)
    with pytest.raises(BitassayError, match="do not fit the reference's 512"):
        audit(at(served[0]), reference, Options(out=tmp_path / "d", **(SMALL | {"tokens": 500})))
    ledger = tmp_path / "ledger"
    update_ledger(ledger, [], Binding(profile="0" * 64))
    for known in ({"profile": profile}, {"honest": [at(served[0])]}):
        with pytest.raises(BitassayError, match="ledger of another profile"):
            audit(at(served[0]), reference, Options(out=tmp_path / "e", ledger=ledger, **SMALL), **known)
    assert not (tmp_path / "e").exists()
    few = Options(out=tmp_path / "c", **(SMALL | {"calibration_requests": 5}))
    with pytest.raises(BitassayError, match="5 honest answers are too few"):
        audit(at(served[0]), reference, few, honest=[at(served[0])])


def test_no_key_is_in_any_file_log_or_error(model, reference, tmp_path, monkeypatch, caplog, capsys):
    key = "sk-very-secret-1234567890"
    monkeypatch.setenv("SOME_KEY", key)
    with serving(model, tmp_path / "server", api_key=key) as (url, _), caplog.at_level(logging.DEBUG):
        one = Options(out=tmp_path / "run", **(SMALL | {"requests": 2}))
        run, folder = audit(at(url, key_env="SOME_KEY"), reference, one)
        write_report(run, folder / "report.html")
        with pytest.raises(BitassayError, match="status-401") as refused:
            audit(at(url), reference, Options(out=tmp_path / "other", **SMALL))
    said = [caplog.text, str(refused.value), *capsys.readouterr()]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if key.encode() in path.read_bytes()]
    assert not [text for text in said if key in text]


def test_texts_are_drawn_anew_and_repeat_with_their_seed(model):
    one, again, other = (texts(model.tokenizer, "c4-train-new", (seed, 1), 3, 20) for seed in (1, 1, 2))
    assert one == again
    assert not {text.ids for text in one} & {text.ids for text in other}
    assert all(len(text.ids) == 20 for text in one)


def test_the_command_line(bitassay_command, served, tmp_path, calibrated):
    url = served[0] + "/v1"
    words = [
        "audit",
        url,
        "--model",
        "stories",
        "--reference",
        "stories260k",
        "--tokens",
        "16",
        "--requests",
        "3",
    ]
    out = ["--out", str(tmp_path / "run"), "--alpha", "0.05", "--format", "json"]
    profile = calibrated("prompt-logprobs")[1] / "profile.json"
    said = bitassay_command(*words, *out, "--profile", str(profile))
    assert said.status == 0, said.err
    assert json.loads(said.out)["decision"]["status"] == "PASS"
    assert (tmp_path / "run" / "report.html").exists()
    for wrong, why in (
        (["--evidence", "guess"], "prompt-logprobs"),
        (["--requests", "3", "--budget", "100"], "say the same"),
        (["--profile", "x", "--calibrate-from", url], "leave one of them out"),
        (["--key-env", "NOT_SET_ANYWHERE"], "not set"),
    ):
        said = bitassay_command("audit", url, "--model", "stories", "--reference", "stories260k", *wrong)
        assert said.status in (2, 3)
        assert why in said.err
    assert (
        bitassay_command("audit", "http://a:b@c/v1", "--model", "m", "--reference", "stories260k").status == 2
    )
    torch.set_num_threads(1)
