"""The structure of the packages: what imports what, whose private names are used, what stands where."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import measure_house  # noqa: E402

HOUSE = measure_house.House()
SCRIPTS = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("tools/*.py")])


def test_the_graph_is_read():
    assert "ood_core.errors" in HOUSE.graph["ood_core.registry"]
    assert "ood_core.detectors.base" in HOUSE.graph["ood_core.fusion"]
    assert len(HOUSE.files) > 100
    assert "_tell_precision" in HOUSE.private["ood_core"]


@pytest.mark.parametrize("module", sorted(HOUSE.files))
def test_nothing_is_imported_in_a_circle(module):
    way = HOUSE.circle(module)
    assert way is None, " -> ".join(way)


def test_the_core_imports_no_method():
    core = {module: others for module, others in HOUSE.graph.items() if module.startswith("ood_core")}
    assert not {(one, other) for one, others in core.items() for other in others if other not in core}


def test_methods_do_not_import_each_other():
    package = measure_house.distribution
    pairs = {(package(one), package(other)) for one, others in HOUSE.graph.items() for other in others}
    assert {pair for pair in pairs if pair[0] != pair[1]} <= {(name, "ood_core") for name in HOUSE.private}


@pytest.mark.parametrize("module", sorted(HOUSE.files))
def test_private_names_stay_in_their_distribution(module):
    assert not list(HOUSE.foreign(HOUSE.trees[module], measure_house.distribution(module)))


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_benchmarks_and_tools_use_public_names(file):
    assert not list(HOUSE.foreign(ast.parse(file.read_text(encoding="utf-8")), file.parent.name))


def test_what_is_measured(tmp_path):
    source = tmp_path / "shared/src/ood_core"
    source.mkdir(parents=True)
    (source / "a.py").write_text("from ood_core import b\n\n\ndef f(x: Any, *, y=1, **z):\n    'Text.'\n    return x\n")
    (source / "b.py").write_text("import ood_core.a\n\nclass C:\n    def g(self):\n        self._h = 1\n")
    other = tmp_path / "packages/one/src/ood_one"
    other.mkdir(parents=True)
    (other / "c.py").write_text("def k(c):\n    return c._h\n")
    found = measure_house.House(tmp_path).measures()
    assert found["files"] == "3"
    assert found["files in import circles"] == "2"
    assert found["private names of other distributions"] == "1"
    assert found["most parameters"] == "3 (ood_core.a.f)"
    assert found["parameters and results annotated with Any"] == "1"
    assert found["lines of a function: median / p90 / most"].startswith("1 / ")


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
