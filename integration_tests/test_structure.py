"""The structure of the packages: what imports what."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / "shared/src", *sorted(ROOT.glob("packages/*/src"))]


def files():
    """Dotted name -> file of every module."""
    found = {}
    for source in SOURCES:
        for file in source.rglob("*.py"):
            parts = file.relative_to(source).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


FILES = files()


def imported(module):
    """Modules of ours that a module imports anywhere, for more than its annotations."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    annotations = {id(inner) for node in typing for one in node.body for inner in ast.walk(one)}
    names = set()
    for node in ast.walk(tree):
        if id(node) in annotations:
            continue
        if isinstance(node, ast.Import):
            names |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{one.name}" for one in node.names}
    return {known for name in names if (known := nearest(name)) not in (None, module)}


def nearest(name):
    while name and name not in FILES:
        name = name.rpartition(".")[0]
    return name or None


GRAPH = {module: imported(module) for module in FILES}


def circle_from(start):
    """A way from a module back to it, if there is one."""
    ways, seen = [[start]], set()
    while ways:
        way = ways.pop()
        for following in GRAPH[way[-1]]:
            if following == start:
                return [*way, start]
            if following not in seen:
                seen.add(following)
                ways.append([*way, following])
    return None


def test_the_graph_is_read():
    assert "ood_core.errors" in GRAPH["ood_core.registry"]
    assert "ood_core.detectors.base" in GRAPH["ood_core.fusion"]
    assert len(FILES) > 100


@pytest.mark.parametrize("module", sorted(FILES))
def test_nothing_is_imported_in_a_circle(module):
    way = circle_from(module)
    assert way is None, " -> ".join(way)


def test_the_core_imports_no_method():
    core = {module: others for module, others in GRAPH.items() if module.startswith("ood_core")}
    assert not {(one, other) for one, others in core.items() for other in others if other not in core}


def test_methods_do_not_import_each_other():
    def package(module):
        return module.partition(".")[0]

    pairs = {(package(one), package(other)) for one in GRAPH for other in GRAPH[one]}
    assert {pair for pair in pairs if pair[0] != pair[1]} <= {(name, "ood_core") for name in map(package, FILES)}


def private(name):
    return name.startswith("_") and not name.endswith("__")


def distribution(module):
    return module.partition(".")[0]


def defined(tree):
    """Every private name that a module gives to something: functions, classes, variables, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and private(node.name):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and private(node.id):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and private(node.attr):
            yield node.attr


def foreign(tree, own):
    """Private names taken from another distribution: imported, or read from something else than `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and distribution(node.module or "") in PRIVATE:
            parts = [*node.module.split("."), *(one.name for one in node.names)]
            if distribution(node.module) != own:
                yield from filter(private, parts)
        elif isinstance(node, ast.Attribute) and not itself(node.value) and node.attr in OURS - PRIVATE.get(own, set()):
            yield ast.unparse(node)


def itself(node):
    called = isinstance(node, ast.Call) and ast.unparse(node.func) == "super"
    return called or (isinstance(node, ast.Name) and node.id in ("self", "cls"))


TREES = {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in FILES.items()}
PRIVATE = {}
for name, tree in TREES.items():
    PRIVATE.setdefault(distribution(name), set()).update(defined(tree))
OURS = set().union(*PRIVATE.values())
SCRIPTS = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("tools/*.py")])


@pytest.mark.parametrize("module", sorted(FILES))
def test_private_names_stay_in_their_distribution(module):
    assert not list(foreign(TREES[module], distribution(module)))


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_benchmarks_and_tools_use_public_names(file):
    assert not list(foreign(ast.parse(file.read_text(encoding="utf-8")), file.parent.name))


def registered(kind):
    """Name -> "module:Class" of every entry point that the packages declare."""
    for file in [ROOT / "shared/pyproject.toml", *ROOT.glob("packages/*/pyproject.toml")]:
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        yield from project.get("entry-points", {}).get(kind, {}).items()


def test_a_detector_stands_in_a_file_of_its_own():
    homes = {name: place.partition(":")[0] for name, place in registered("ood.detectors")}
    assert {name: place for name, place in homes.items() if place.startswith("ood_core")} == {
        name: f"ood_core.detectors.{name}" for name, place in homes.items() if place.startswith("ood_core")
    }


FORMS = ("reference.py", "torch.py", "triton.py")
OPERATIONS = sorted({file.parent for file in FILES.values() if file.parent.parent.name == "ops"})


@pytest.mark.parametrize("folder", OPERATIONS, ids=lambda folder: folder.name)
def test_every_operation_has_the_same_files(folder):
    names = {file.name for file in folder.glob("*.py")}
    assert {"__init__.py", "reference.py", "torch.py"} <= names <= {"__init__.py", *FORMS}
    assert ("triton.py" in names) == (folder / "kernels").exists()


def kernels(tree):
    """Functions for the device that are launched; those with public names are called by them."""
    compiled = [one for one in tree.body if "triton.jit" in map(ast.unparse, getattr(one, "decorator_list", ()))]
    return [one.name for one in compiled if f"{one.name}[" in ast.unparse(tree)]


def test_every_kernel_has_its_file():
    found = {module: names for module, tree in TREES.items() if (names := kernels(tree))}
    assert len(found) == 8
    assert {module: [f"_{module.rpartition('.')[2]}"] for module in found} == found
