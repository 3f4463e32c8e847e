"""Write docs/api.md, the reference of the Python API, from the docstrings: `python docs/reference.py`.

With `--check` nothing is written. The exit status is 1 where the page is not up to date, where a public
function or class has no docstring, or where the first line of a function's docstring is no sentence (a verb
first, a full stop last). Public is every name without underscore at the top level of a module; the command
line has its own help. Sources are parsed, never imported.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"
PACKAGE = ROOT / "src" / "bitassay"
ROOMS = "models data quantization engines evaluation bench verification audit studies search report "
ROOMS += "record testing"
Function = ast.FunctionDef | ast.AsyncFunctionDef
INTRODUCTION = """# API reference

Made from the docstrings by `python docs/reference.py`; `make check` compares it with them. The names that
`import bitassay` gives come first, then every room with its modules.
"""
# First words of descriptions that have no verb in front.
NO_VERBS = set(
    re.findall(
        r"\w+",
        "a an the this these those what which whether where when how why who as of in for from by at with "
        "like one all each every its their and but if no none not same our it they true false to",
    )
)


class Item(NamedTuple):
    """A public function, class or method."""

    module: str
    name: str
    node: Function | ast.ClassDef
    members: list["Item"]

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self.node) or ""

    @property
    def signature(self) -> str:
        if isinstance(self.node, ast.ClassDef):
            return f"class {self.name}"
        arguments = re.sub(r"\s+", " ", ast.unparse(self.node.args))
        returns = f" -> {ast.unparse(self.node.returns)}" if self.node.returns else ""
        return f"{self.name}({arguments}){returns}"


def items(path: Path) -> list[Item]:
    """Return the public functions and classes of a file, in its order."""
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    return list(_public(ast.parse(path.read_text(encoding="utf-8")), module))


def _public(tree: ast.Module | ast.ClassDef, module: str) -> Iterator[Item]:
    for node in tree.body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        decorators = " ".join(map(ast.unparse, node.decorator_list))
        if any(word in decorators for word in ("overload", "validator", "serializer", "attack(")):
            continue  # an attack is described where it is registered
        members = list(_public(node, module)) if isinstance(node, ast.ClassDef) else []
        yield Item(module, node.name, node, members)


def problems(item: Item) -> Iterator[str]:
    """Yield what is wrong with the docstring of an item, and with those of its methods."""
    first = item.docstring.split("\n\n")[0].replace("\n", " ")
    where = f"{item.module}.{item.name} (line {item.node.lineno})"
    is_described = isinstance(item.node, ast.ClassDef) or "property" in str(
        [ast.unparse(decorator) for decorator in item.node.decorator_list]
    )
    if not item.docstring:
        yield f"{where}: no docstring"
    elif not re.match(r".+?[.:](\s|$)", first):
        yield f"{where}: the first line is no sentence: {first:.60}"
    elif not is_described and first.split()[0].lower().rstrip(",") in NO_VERBS:
        yield f"{where}: the first line does not begin with a verb: {first:.60}"
    for member in item.members:
        if member.docstring:
            yield from problems(member._replace(name=f"{item.name}.{member.name}"))


def page(modules: dict[str, list[Item]]) -> str:
    """Return the text of docs/api.md."""
    lines = [INTRODUCTION, "## bitassay\n"]
    found = {item.name: item for each in modules.values() for item in each}
    homes = _homes()
    for name, home in homes.items():
        item = next((item for item in modules.get(home, []) if item.name == name), found.get(name))
        if item is not None:
            lines += _section(item, f"bitassay.{name}", level=3)
    for room in ROOMS.split():
        lines.append(f"## {room}\n")
        for module, each in modules.items():
            if each and module.split(".")[1] == room:
                lines.append(f"### {module}\n")
                lines += [line for item in each for line in _entry(item)]
                lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _homes() -> dict[str, str]:
    """Return the module of each name of the API, from bitassay/__init__.py."""
    for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME":
            return ast.literal_eval(node.value)
    raise SystemExit("bitassay/__init__.py has no _HOME")


def _section(item: Item, title: str, level: int) -> list[str]:
    """Return an item with all of its docstring."""
    lines = [f"{'#' * level} {title}\n", "```python", item.signature, "```\n", item.docstring, ""]
    for member in item.members:
        if member.docstring:
            lines.append(f"- `{member.signature}`: {_first(member)}")
    return [*lines, ""] if item.members else lines


def _entry(item: Item) -> list[str]:
    """Return an item as one line: its name and the first paragraph of its docstring."""
    arguments = "" if isinstance(item.node, ast.ClassDef) else f"({', '.join(_names(item.node))})"
    kind = "class " if isinstance(item.node, ast.ClassDef) else ""
    return [f"- **`{kind}{item.name}{arguments}`** {_first(item)}"]


def _names(node: Function) -> list[str]:
    arguments = node.args
    return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def _first(item: Item) -> str:
    return re.sub(r"\s+", " ", item.docstring.split("\n\n")[0])


def main(arguments: list[str]) -> int:
    """Write the page, or with `--check` compare it and the docstrings."""
    files = sorted(PACKAGE.rglob("*.py"))
    modules = {str(each[0].module): each for path in files if (each := items(path))}
    modules = {name: each for name, each in modules.items() if name.split(".")[1:2] != ["cli"]}
    text = page(modules)
    if arguments != ["--check"]:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    wrong = [problem for each in modules.values() for item in each for problem in problems(item)]
    print("\n".join([*wrong, f"{len(wrong)} docstrings to write or to mend"]))
    is_current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
    if not is_current:
        print(f"{PAGE.relative_to(ROOT)} is not what the docstrings say; run: python docs/reference.py")
    return 0 if is_current and not wrong else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
