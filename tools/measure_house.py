"""Measure the structure of the packages: sizes, circles, private names across distributions, signatures, types.

    uv run python tools/measure_house.py
    uv run python tools/measure_house.py --against 0075659

With `--against` the same is measured at another commit and shown beside. The tests of the structure use `House`, too.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parents[1]
Function = ast.FunctionDef | ast.AsyncFunctionDef


class House:
    """The source of all packages below a root, module by module."""

    def __init__(self, root: Path = ROOT) -> None:
        self.files = {}
        for source in [root / "shared/src", *sorted(root.glob("packages/*/src"))]:
            for file in sorted(source.rglob("*.py")):
                parts = file.relative_to(source).with_suffix("").parts
                self.files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
        self.texts = {module: file.read_text(encoding="utf-8") for module, file in self.files.items()}
        self.trees = {module: ast.parse(text) for module, text in self.texts.items()}

    # ---- what imports what

    def _known(self, name: str) -> str:
        while name and name not in self.files:
            name = name.rpartition(".")[0]
        return name

    @cached_property
    def graph(self) -> dict[str, set[str]]:
        """Module -> modules of ours that it imports anywhere, for more than its annotations."""
        named = {module: set(map(self._known, imported(tree))) for module, tree in self.trees.items()}
        return {module: others - {module, ""} for module, others in named.items()}

    def circle(self, start: str) -> list[str] | None:
        """A way from a module back to it, if there is one."""
        ways, seen = [[start]], set()
        while ways:
            way = ways.pop()
            for following in self.graph[way[-1]]:
                if following == start:
                    return [*way, start]
                if following not in seen:
                    seen.add(following)
                    ways.append([*way, following])
        return None

    # ---- private names

    @cached_property
    def private(self) -> dict[str, set[str]]:
        """Distribution -> the private names it gives to functions, classes, variables and attributes."""
        names: dict[str, set[str]] = {}
        for module, tree in self.trees.items():
            names.setdefault(distribution(module), set()).update(defined(tree))
        return names

    def foreign(self, tree: ast.AST, own: str) -> Iterator[str]:
        """Private names taken from another distribution: imported, or read from something else than `self`."""
        others = set().union(*self.private.values()) - self.private.get(own, set())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and distribution(node.module or "") in {*self.private} - {own}:
                yield from filter(is_private, [*node.module.split("."), *(one.name for one in node.names)])
            elif isinstance(node, ast.Attribute) and not is_itself(node.value) and node.attr in others:
                yield ast.unparse(node)

    # ---- functions

    @cached_property
    def functions(self) -> dict[str, Function]:
        """ "module.Class.name" -> definition."""
        found = {}
        for module, tree in self.trees.items():
            for path, node in walk(tree):
                if isinstance(node, Function):
                    found[f"{module}.{path}"] = node
        return found

    def measures(self) -> dict[str, str]:
        """What is measured, by its name in the table."""
        lines = {name: length(node) for name, node in self.functions.items()}
        parameters = {name: count_parameters(node) for name, node in self.functions.items()}
        public = {name: count for name, count in parameters.items() if not any(map(is_private, name.split(".")))}
        methods = {
            f"{module}.{node.name}": sum(isinstance(part, Function) for part in node.body)
            for module, tree in self.trees.items()
            for node in tree.body
            if isinstance(node, ast.ClassDef)
        }
        sizes = {module: text.count("\n") for module, text in self.texts.items()}
        circles = sum(self.circle(module) is not None for module in self.files)
        foreign = sum(len([*self.foreign(tree, distribution(module))]) for module, tree in self.trees.items())
        marks = [mark for tree in self.trees.values() for mark in annotations(tree)]
        unions = sum(isinstance(node, ast.Name) and node.id == "Any" for mark in marks for node in ast.walk(mark))
        return {
            "files": str(len(self.files)),
            "lines": f"{sum(sizes.values()):,}",
            "lines without docstrings, comments and blanks": f"{sum(map(code_lines, self.trees.values())):,}",
            "functions": f"{len(lines):,}",
            "lines of a function: median / p90 / most": spread([*lines.values()]),
            "longest function": most(lines),
            "largest file": most(sizes),
            "most methods": most(methods),
            "most parameters": most(public),
            "public functions of more than 12 parameters": str(sum(count > 12 for count in public.values())),
            "parameters and results annotated with Any": str(unions),
            "files in import circles": str(circles),
            "private names of other distributions": str(foreign),
        }


def distribution(module: str) -> str:
    return module.partition(".")[0]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def is_itself(node: ast.expr) -> bool:
    called = isinstance(node, ast.Call) and ast.unparse(node.func) == "super"
    return called or (isinstance(node, ast.Name) and node.id in ("self", "cls"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Names imported outside `if TYPE_CHECKING`."""
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = {id(inner) for node in typing for one in node.body for inner in ast.walk(one)}
    for node in ast.walk(tree):
        if id(node) not in skipped and isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif id(node) not in skipped and isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{one.name}" for one in node.names)


def defined(tree: ast.AST) -> Iterator[str]:
    """Every private name that a module gives to something."""
    for node in ast.walk(tree):
        name = ""
        if isinstance(node, Function | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            name = node.id if isinstance(node, ast.Name) else node.attr
        if is_private(name):
            yield name


def walk(node: ast.AST, path: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Definitions with their path, those within functions left out."""
    for part in getattr(node, "body", []):
        if isinstance(part, Function | ast.ClassDef):
            yield f"{path}{part.name}", part
        if isinstance(part, ast.ClassDef):
            yield from walk(part, f"{path}{part.name}.")


def length(node: Function) -> int:
    """Lines of a function without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
    return (node.end_lineno or 0) - body[0].lineno + 1


def count_parameters(node: Function) -> int:
    names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")]) + bool(node.args.vararg) + bool(node.args.kwarg)


def annotations(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        mark = node.annotation if isinstance(node, ast.arg) else getattr(node, "returns", None)
        if mark is not None:
            yield mark


def code_lines(tree: ast.AST) -> int:
    return len({part.lineno for part in ast.walk(tree) if hasattr(part, "lineno") and not is_docstring(part)})


def is_docstring(node: ast.AST) -> bool:
    value = node.value if isinstance(node, ast.Expr) else node
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def spread(values: list[int]) -> str:
    return f"{median(values):g} / {quantiles(values, n=10)[-1]:g} / {max(values)}"


def most(counts: dict[str, int]) -> str:
    name = max(counts, key=lambda one: counts[one])
    return f"{counts[name]} ({name})"


def at(commit: str) -> dict[str, str]:
    """The measures of another commit."""
    command = ["git", "archive", commit, "shared/src", "packages"]
    packed = io.BytesIO(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=packed) as archive:
        archive.extractall(folder, filter="data")
        return House(Path(folder)).measures()


EXAMPLES = {
    "detector (vim)": r"\bViM\b|detectors\.vim\b",
    "backbone (timm)": r"\bTimmBackbone\b|backbones\.timm\b",
    "protocol (openood-imagenet)": r"\bopenood-imagenet\b",
    "kernel (topk_patch_softmax)": r"ops\.topk_patch_softmax\.triton\b",
}
"""Something that there is of each kind, and how files name it."""


def named_in(pattern: str) -> list[str]:
    """Source files and settings that name something: those that a new one of its kind would touch."""
    files = [*ROOT.glob("shared/pyproject.toml"), *ROOT.glob("packages/*/pyproject.toml")]
    files += [file for file in ROOT.rglob("src/**/*") if file.suffix in (".py", ".json")]
    found = [file for file in files if re.search(pattern, file.read_text(encoding="utf-8"))]
    return sorted(str(file.relative_to(ROOT)) for file in found)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="measure this commit, too")
    args = parser.parse_args(arguments)
    now = House().measures()
    before = at(args.against) if args.against else {}
    for name, value in now.items():
        print(f"| {name} | {before[name]} | {value} |" if before else f"| {name} | {value} |")
    for kind, pattern in EXAMPLES.items():
        print(f"A {kind} is named in {', '.join(named_in(pattern))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
