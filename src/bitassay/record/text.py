"""Text of strangers, made safe to print: names and versions in their files could move a terminal's cursor,
recolour it, or turn the order of letters around."""

import re

# C0 and C1 controls but for tab and line feed, marks and overrides of direction, line and paragraph
# separators, the byte order mark, and halves of surrogate pairs, which cannot be encoded.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def escaped(text: str) -> str:
    """Return `text` with characters that could deceive spelled as in JSON, such as \\u001b; line feeds
    and tabs stay. A JSON document keeps its value."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: str) -> str:
    """Return `text` without such characters, line feeds and tabs: a replacement character for each."""
    return re.sub(r"[\n\t]", "\N{REPLACEMENT CHARACTER}", _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text))


def check_line(text: str) -> str:
    """Return `text`. Raises ValueError where `one_line` would change it."""
    if one_line(text) != text:
        raise ValueError("it has control characters")
    return text
