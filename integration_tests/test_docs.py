"""The documents hold: their code runs as written, their commands parse, their links lead somewhere, the site builds."""

import csv
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from ood_core import create_backbone
from ood_core.data import scenes
from ood_core.detectors import detector_class
from ood_core.options import method_options, option_names
from ood_core.registry import BACKBONES, DETECTORS, PROTOCOLS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    str(path.relative_to(ROOT))
    for pattern in ("README.md", "CONTRIBUTING.md", "shared/README.md", "packages/*/README.md", "docs/*.md")
    for path in sorted(ROOT.glob(pattern))
]
PROGRAMS = {
    "ood": "ood_core.cli",
    "ood-iim": "ood_iim.cli",
    "ood-setar": "ood_setar.cli",
    "ood-hvl": "ood_hvl.cli",
    "ood-mofe": "ood_mofe.cli",
}
CLASSES = scenes.ID_CLASSES[:3]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file it is (`title="..."`), its text, its line, and whether it is run."""

    language: str
    title: str
    text: str
    line: int
    runs: bool


FENCE = re.compile(r"```(?P<language>\w*)(?: title=\"(?P<title>.+)\")?$")


def blocks(document):
    """The fenced blocks of a document, in order."""
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    found, start, fence = [], 0, None
    for number, line in enumerate(lines):
        if fence is None and (fence := FENCE.match(line)):
            start = number
        elif fence is not None and line == "```":
            before = next((line for line in reversed(lines[:start]) if line.strip()), "")
            text, runs = "\n".join(lines[start + 1 : number]), not before.startswith("<!-- not run: ")
            found.append(Block(fence["language"], fence["title"] or "", text, start + 1, runs))
            fence = None
    assert fence is None, f"{document}:{start + 1} opens a block that nothing closes"
    return found


# ---- the code


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folders of generated images under the names that the documents use."""
    root = tmp_path_factory.mktemp("images")
    sizes = {"train": 4, "held_out": 7, "held_out_dogs_and_cats": 7, "test": 4, "new_images": 4, "new": 1}
    for seed, (name, count) in enumerate(sizes.items()):
        scenes.write_folder(scenes.render(CLASSES, count, seed=seed), root / name)
    scenes.write_folder(scenes.textures(6), root / "dtd" / "images")
    for name in ("patient.jpg", "photo.jpg"):
        shutil.copy(next((root / "test").rglob("*.png")), root / "new" / name)
    lesions = ["nv", "mel", "bcc", "bkl"]
    scenes.write_folder(scenes.render_lesions(sorted(scenes.LESIONS)[:4], 6), root / "lesions")
    folders = sorted(folder for folder in (root / "lesions").iterdir())
    with (root / "lesions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "lesion_id"])
        for name, folder in zip(lesions, folders, strict=True):
            for number, path in enumerate(sorted(folder.iterdir())):
                rows.writerow([path.relative_to(root), name, f"{name}-{max(1, number)}"])
    return root


@pytest.fixture
def workplace(images, tmp_path, monkeypatch):
    """A copy of the folders to stand in, where every backbone is `tiny`, whatever its name."""
    shutil.copytree(images, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    look_anew()
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    for registry in REGISTRIES:
        registry.forget()


REGISTRIES = (BACKBONES, DETECTORS, PROTOCOLS)


def look_anew():
    """At what is installed; the libraries' names stand for `tiny`."""
    for registry in REGISTRIES:
        registry.forget()
    BACKBONES.entries.update(dict.fromkeys(("open_clip", "timm", "hf"), BACKBONES.entries["tiny"]))


def write_file(block, folder):
    """A titled block is a file; a `pyproject.toml` makes its folder an installed package."""
    path = folder / block.title
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text + "\n")
    if path.name == "pyproject.toml":
        project = tomllib.loads(block.text)["project"]
        info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
        groups = [
            f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in entries.items())
            for group, entries in project["entry-points"].items()
        ]
        (info / "entry_points.txt").write_text("\n".join(groups))
    importlib.invalidate_caches()
    look_anew()


WITH_CODE = [name for name in DOCUMENTS if any(block.language == "python" for block in blocks(name))]


@pytest.mark.slow
@pytest.mark.parametrize("document", WITH_CODE)
def test_code_runs_as_written(document, workplace):
    namespace = {"__name__": "__main__"}
    for block in blocks(document):
        if block.title and block.language in ("python", "toml", "json", "csv"):
            write_file(block, workplace)
        elif block.language == "python":
            code = compile("\n" * block.line + block.text, document, "exec")
            if block.runs:
                exec(code, namespace)


# ---- the commands


def commands(document):
    """Every line of a block, fenced or indented, that starts one of the programs."""
    text = (ROOT / document).read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        words = line.strip().removeprefix("uv run ")
        if words.split(" ")[0] in PROGRAMS and (line.startswith("    ") or line[0] != " "):
            yield words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_parse(document, capsys):
    for command in commands(document):
        program, *arguments = shlex.split(command, comments=True)
        parser = importlib.import_module(PROGRAMS[program])._parser()
        try:
            parser.parse_args(arguments)
        except SystemExit as error:
            assert error.code == 0, f"{document}: {command}\n{capsys.readouterr().err}"  # noqa: PT017


# ---- what is said twice, and what is counted


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def backbones_of(content):
    """Every {"spec", "fingerprint"} anywhere in a result."""
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list) else []
    if isinstance(content, dict) and {"spec", "fingerprint"} <= content.keys():
        yield content["spec"], content["fingerprint"]
    for value in values:
        yield from backbones_of(value)


def test_published_results_are_of_the_weights_that_are_shipped():
    shipped, seen = create_backbone("tiny").fingerprint, 0
    for file in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        made = {print for spec, print in backbones_of(json.loads(file.read_text())) if spec == "tiny"}
        assert made <= {shipped}, f"{file.name} is of other weights of tiny: run its benchmark again, or remove it"
        seen += len(made)
    assert seen


def test_numbers_and_pictures_come_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    for name, content in load(ROOT / "tools" / "make_docs.py").made().items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == content, f"docs/{name}: run tools/make_docs.py"


def option_rows(document):
    """The first column of the table of options, cut into names."""
    section = (ROOT / document).read_text(encoding="utf-8").partition("\n## Options\n")[2].partition("\n## ")[0]
    first = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in first for name in re.findall(r"`(\w+)`", cell)}


@pytest.mark.parametrize(
    ("document", "detector"),
    [
        ("packages/iim-smcm/README.md", "iim"),
        ("packages/hvl-med/README.md", "hvl"),
        ("packages/mofe/README.md", "mofe"),
    ],
)
def test_tables_hold_the_options_that_there_are(document, detector):
    known = set(method_options(detector_class(detector)))
    assert option_rows(document) <= known
    assert known - option_rows(document) <= {"encode_chunk"}


def test_the_table_of_setar_holds_the_options_of_its_search():
    known = set(option_names(importlib.import_module("ood_setar.search").search))
    assert option_rows("packages/setar/README.md") <= known


# ---- the links and the site

LOADED = re.compile(r"<(?:script|img|iframe|link rel=\"(?:stylesheet|icon)\")[^>]* (?:src|href)=\"([^\"]+)")
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    folder = (ROOT / document).parent
    for match in LINK.finditer((ROOT / document).read_text(encoding="utf-8")):
        target = match["target"].partition("#")[0]
        if target and "://" not in target:
            assert (folder / target).exists(), f"{document} links to {target}, which is not there"


def test_the_site_builds_without_a_network(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    for page in tmp_path.rglob("*.html"):
        for source in LOADED.findall(page.read_text(encoding="utf-8")):
            assert "//" not in source, f"{page.name} loads {source}"
