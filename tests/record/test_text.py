"""What strangers write reaches a terminal as text alone."""

import json

import pytest

from bitassay.record.text import check_line, escaped, one_line

UNSAFE = ["\x00", "\x07", "\x08", "\r", "\x1b", "\x7f", "\x9b", "\u061c", "\u200e", "\u2028", "\u202e", "\u2066", "\ufeff", "\ud800"]  # fmt: skip
HARMLESS = "a Ä é 你好 नमस्ते شما\u200cرا 👩\u200d🔬 \u00a0 | \\"


@pytest.mark.parametrize("letter", UNSAFE)
def test_what_could_deceive_is_spelled_out(letter):
    assert escaped(f"a{letter}b") == f"a\\u{ord(letter):04x}b"
    assert one_line(f"a{letter}b") == "a\N{REPLACEMENT CHARACTER}b"
    with pytest.raises(ValueError, match="control"):
        check_line(f"a{letter}b")


def test_text_of_any_language_stays():
    assert escaped(HARMLESS) == one_line(HARMLESS) == check_line(HARMLESS) == HARMLESS
    assert escaped("a\n\tb") == "a\n\tb"
    assert one_line("a\n\tb") == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}b"


def test_a_json_document_keeps_its_value():
    value = {"a\x9b": ["".join(UNSAFE), HARMLESS, "\n\t\\u001b"]}
    text = json.dumps(value, ensure_ascii=False, indent=2)
    assert json.loads(escaped(text)) == value
    assert not set(escaped(text)) & set(UNSAFE)
