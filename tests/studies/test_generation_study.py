"""The generation job: texts are kept, a run goes on, and the page shows all of it."""

import csv
import json

import pytest

from bitassay.errors import BitassayError
from bitassay.report.pages import page_of, write_rating_sheet, write_report
from bitassay.report.tables import render
from bitassay.studies import generation as study
from bitassay.studies.generation import generation

SMALL = {"prompts": 4, "max_new_tokens": 6, "batch": 3}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return generation("stories260k", ["w8", "w2"], out=tmp_path_factory.mktemp("run") / "g", **SMALL)


def test_the_run_has_texts_and_figures_of_every_model(done):
    run, folder = done
    assert json.loads((folder / "run.json").read_text()) == json.loads(json.dumps(run))
    assert [row["recipe"] for row in run["rows"]] == ["base", "w8", "w2"]
    assert run["rows"][0]["identical_fraction"] == 1
    assert run["rows"][1]["prefix_tokens"] > run["rows"][2]["prefix_tokens"]
    for texts in run["texts"].values():
        assert len(texts) == 4
        assert all(
            one["text"].startswith(one["prefix"]) and one["tokens"] >= one["prefix_tokens"] for one in texts
        )


def test_an_interrupted_run_goes_on_with_the_same_texts(done, tmp_path, monkeypatch):
    calls = []
    write = study.continuations

    def stops(*arguments, **options):
        calls.append(options["done"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*arguments, **options)

    monkeypatch.setattr(study, "continuations", stops)
    with pytest.raises(KeyboardInterrupt):
        generation("stories260k", ["w8", "w2"], out=tmp_path / "g", **SMALL)
    (tmp_path / "g" / "parts" / "texts-00-00003.json").unlink()  # as if the base had been stopped half-way
    run, _ = generation("stories260k", ["w8", "w2"], out=tmp_path / "g", **SMALL)
    assert run["texts"] == done[0]["texts"]
    assert calls == [0, 0, 3, 0, 0]


def test_another_plan_is_refused(done):
    with pytest.raises(BitassayError, match="max_new_tokens"):
        generation("stories260k", ["w8", "w2"], out=done[1], **SMALL | {"max_new_tokens": 7})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"recipes": ["w8", "w8"]}, "two rows would be called 'w8'"),
        ({"recipes": []}, "nothing to compare"),
        ({"recipes": ["w8"], "prompts": 0}, "prompts is 0"),
        ({"recipes": ["w8"], "prompts": 801}, "801 prompts were asked for"),
        ({"recipes": ["w8"], "max_new_tokens": 10**4}, "10001 tokens do not fit its 512 positions"),
    ],
)
def test_bad_plans(options, match, tmp_path):
    with pytest.raises(BitassayError, match=match):
        generation("stories260k", out=tmp_path / "g", **options)
    assert not (tmp_path / "g").exists()


def test_prompts_of_ones_own_and_a_candidate(tmp_path):
    (tmp_path / "p.txt").write_text("Once upon a time\nThe dog\n")
    run, _ = generation(
        "stories260k",
        candidates=("stories260K",),
        out=tmp_path / "g",
        prompts=2,
        max_new_tokens=4,
        prompts_file=tmp_path / "p.txt",
    )
    assert run["prompts"] == ["Once upon a time", "The dog"]
    assert run["rows"][1]["identical_fraction"] == 1


def test_the_page_and_the_sheet(done, tmp_path):
    run = json.loads(json.dumps(done[0]))
    run["prompts"][0] = "<script>alert(1)</script>"
    run["texts"]["w8"][0] |= {"text": "same <b>other", "prefix": "same "}
    write_report(run, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "<script" not in page
    assert "same <mark>&lt;b&gt;other</mark>" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert run["rows"][0]["bleu_signature"] in page
    write_rating_sheet(run, tmp_path / "ratings.csv")
    rows = list(csv.DictReader((tmp_path / "ratings.csv").open()))
    assert [(row["sample"], row["model"]) for row in rows[:4]] == [
        ("1", "base"),
        ("1", "w8"),
        ("1", "w2"),
        ("2", "base"),
    ]
    table = render(*page_of(run).csv, "csv").splitlines()
    assert table[0].startswith("recipe,prompts,prefix_tokens,prefix_tokens_ci_low,prefix_tokens_ci_high")
    assert len(table) == 3
