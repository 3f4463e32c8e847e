"""Kinds of parameters that several verbs share."""

from typing import Annotated

from cyclopts import Parameter

Names = Annotated[list[str], Parameter(consume_multiple=True, negative=())]
Numbers = Annotated[list[int], Parameter(consume_multiple=True, negative=())]
