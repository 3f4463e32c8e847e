"""The run-time type checker of the tests: beartype, taking an int where a float is annotated, as Python's own
checkers do (PEP 484)."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
