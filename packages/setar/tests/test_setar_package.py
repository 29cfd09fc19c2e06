import doctest
import importlib
import pkgutil
import subprocess
import sys

import ood_setar
import pytest

MODULES = [module.name for module in pkgutil.iter_modules(ood_setar.__path__)]


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_command_answers(option):
    done = subprocess.run([sys.executable, "-m", "ood_setar", option], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = f"ood-setar {ood_setar.__version__}" if option == "--version" else "usage: ood-setar"
    assert done.stdout.startswith(expected)
    assert not done.stderr


def test_help_names_every_verb(capsys):
    from ood_setar.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for verb in ("search", "finetune", "apply", "evaluate", "show"):
        assert f"\n    {verb} " in text or f"\n    {verb}\n" in text


def test_an_unknown_argument_is_a_usage_error(capsys):
    from ood_setar.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["nonsense"])
    assert stop.value.code == 2
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["ood_setar", "ood_setar.cli"])
def test_import_is_light(module):
    heavy = ("torch", "triton", "transformers", "open_clip", "timm", "sklearn", "matplotlib")
    done = python(f"import sys, {module}; print(sorted(set({heavy!r}) & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_public_names_are_found_and_others_are_not():
    assert set(ood_setar.__all__) <= set(dir(ood_setar))
    assert all(getattr(ood_setar, name) is not None for name in ood_setar.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = ood_setar.nonsense


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_a_docstring_and_lists_names_that_exist(name):
    module = importlib.import_module(f"ood_setar.{name}")
    assert module.__doc__
    for public in getattr(module, "__all__", ()):
        assert getattr(module, public).__doc__


def test_examples_of_the_docstrings():
    results = {name: doctest.testmod(importlib.import_module(f"ood_setar.{name}"), verbose=False) for name in MODULES}
    assert {name for name, result in results.items() if result.failed} == set()
    with_examples = {name for name, result in results.items() if result.attempted}
    assert with_examples >= {"functional", "search", "edit", "_published"}
