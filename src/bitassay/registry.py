"""Registries: what this package offers under a name, and what installed packages add to it by entry points.

    SOLVERS: Registry[Solver] = Registry("solvers", {"gptq": gptq})

    # in the pyproject.toml of another package
    [project.entry-points."bitassay.solvers"]
    mine = "my_package.solver:mine"

An entry point is imported when its name is first asked for. Who installs a package trusts its code; nothing
else is imported from outside.
"""

from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from bitassay.errors import BitassayError, suggestion

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """A mapping from names to items: the package's own ones first, then those of entry points in the group
    `bitassay.KIND`. An entry point cannot replace an item of the package."""

    def __init__(self, kind: str, items: Mapping[str, T] | None = None) -> None:
        self.kind = kind
        self._items: dict[str, T] = dict(items or {})

    def register(self, name: str, item: T) -> T:
        """Add `item` under `name` and return it. Raises ValueError where the name is taken."""
        if name in self._items:
            raise ValueError(f"{self.kind}: {name!r} is registered already")
        self._items[name] = item
        return item

    def _entry_points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=f"bitassay.{self.kind}")}

    def __getitem__(self, name: str) -> T:
        """Return the item called `name`. Raises BitassayError that names the nearest one, or the entry point
        that cannot be imported."""
        if name not in self._items:
            points = self._entry_points()
            if name not in points:
                raise BitassayError(f"{self.kind}: no {name!r}; {suggestion(name, list(self))}")
            try:
                self._items[name] = points[name].load()
            except Exception as error:  # whatever a stranger's module trips over
                where = f"{name} = {points[name].value!r}"
                raise BitassayError(
                    f"{self.kind}: the entry point {where} cannot be imported ({error})",
                    "repair or uninstall the package that adds it",
                ) from error
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items or name in self._entry_points()

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._items, *self._entry_points()]))

    def __len__(self) -> int:
        return len(list(iter(self)))
