"""Prompts for calibration: many domains, evenly chosen, and none of the text that benchmarks hold out."""

import inspect
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from bitassay.cli.calibrate import calibrate
from bitassay.data.corpora import (
    bundled_prompts,
    calibration_prompts,
    prompts_by_domain,
    prompts_from,
    read_prompts,
)
from bitassay.errors import BitassayError

HELD_OUT = {
    path.name.split(".")[0]: prompts_from(path)
    for path in sorted((Path(__file__).parents[2] / "benchmarks" / "domains").glob("*.jsonl.gz"))
}
SCRIPTS = {"japanese": "[\u3040-\u30ff]", "greek": "[\u0370-\u03ff]", "hindi": "[\u0900-\u097f]"}


def shingles(text: str) -> set[str]:
    """Every eight words in a row, whatever their case and punctuation; all words of a shorter text."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()) or [text]
    return {" ".join(words[start : start + 8]) for start in range(max(1, len(words) - 7))}


def test_shingles():
    assert shingles("One, two three-four FIVE six seven eight") == {"one two three four five six seven eight"}
    assert shingles("1 2 3 4 5 6 7 8 9") == {"1 2 3 4 5 6 7 8", "2 3 4 5 6 7 8 9"}
    assert shingles("?") == {"?"}


def test_no_prompt_is_there_twice():
    prompts = calibration_prompts()
    assert len(prompts) == len(set(prompts)) == 1340
    assert set(prompts) == set(bundled_prompts()) | {
        p for found in prompts_by_domain().values() for p in found
    }
    assert prompts == calibration_prompts()


def test_the_default_has_every_domain_equally_while_it_lasts():
    default = read_prompts(inspect.signature(calibrate).parameters["prompts"].default)
    domain_of = {prompt: domain for domain, prompts in prompts_by_domain().items() for prompt in prompts}
    counts = Counter(domain_of[prompt] for prompt in default)
    assert counts.keys() == prompts_by_domain().keys()
    sizes = {domain: len(prompts) for domain, prompts in prompts_by_domain().items()}
    assert all(counts[name] in (size, *range(max(counts.values()) - 1, size)) for name, size in sizes.items())
    assert sum(len(prompt) <= 20 for prompt in default) > 20
    assert sum(len(prompt) > 600 for prompt in default) > 10


def test_fewer_are_the_beginning_of_more_spread_over_each_domain():
    assert calibration_prompts(40) == calibration_prompts(640)[:40]
    chosen, instructions = set(calibration_prompts(240)), prompts_by_domain()["mt_bench"]
    places = [place for place, prompt in enumerate(instructions) if prompt in chosen]
    gaps = [after - before for before, after in zip(places, [*places[1:], len(instructions)], strict=True)]
    assert max(gaps) <= 3 * min(gaps)


def test_read_prompts(tmp_path):
    assert read_prompts("640") == calibration_prompts(640)
    assert read_prompts("1340") == calibration_prompts()
    for count in ("0", "1341"):
        with pytest.raises(BitassayError, match=f"--prompts {count}: the package has 1340"):
            read_prompts(count)
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    assert read_prompts(str(tmp_path / "p.txt")) == ["one", "two"]


@pytest.mark.parametrize("domain", HELD_OUT)
def test_held_out_domains_share_no_text_with_calibration(domain):
    held_out = HELD_OUT[domain]
    assert len(held_out) == len({" ".join(prompt.casefold().split()) for prompt in held_out}) >= 120
    seen = set().union(*map(shingles, calibration_prompts()))
    assert [prompt for prompt in held_out if shingles(prompt) & seen] == []
    for other, prompts in HELD_OUT.items():
        assert other == domain or not set(prompts) & set(held_out)


def test_held_out_domains():
    assert HELD_OUT.keys() == {*SCRIPTS, "code", "documents", "arithmetic", "one-word"}
    for language, script in SCRIPTS.items():
        assert all(re.search(script, prompt) for prompt in HELD_OUT[language])
        assert not any(re.search(script, prompt) for prompt in calibration_prompts())
    assert all(300 <= len(document.split()) <= 700 for document in HELD_OUT["documents"])
