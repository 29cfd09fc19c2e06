import doctest
import importlib
import subprocess
import sys

import ood_iim
import pytest


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_command_answers(option):
    done = subprocess.run([sys.executable, "-m", "ood_iim", option], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = f"ood-iim {ood_iim.__version__}" if option == "--version" else "usage: ood-iim"
    assert done.stdout.startswith(expected)
    assert not done.stderr


def test_help_names_every_verb(capsys):
    from ood_iim.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for verb in ("fit", "score", "evaluate", "explain", "sweep", "import", "reproduce"):
        assert f"\n    {verb} " in text or f"\n    {verb}\n" in text


def test_an_unknown_argument_is_a_usage_error(capsys):
    from ood_iim.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["nonsense"])
    assert stop.value.code == 2
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["ood_iim", "ood_iim.cli"])
def test_import_is_light(module):
    heavy = ("torch", "triton", "transformers", "open_clip", "timm", "sklearn")
    done = python(f"import sys, {module}; print(sorted(set({heavy!r}) & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_public_names_are_found_and_others_are_not():
    assert set(ood_iim.__all__) <= set(dir(ood_iim))
    assert all(getattr(ood_iim, name) is not None for name in ood_iim.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = ood_iim.nonsense


@pytest.mark.parametrize("name", ["functional", "learner", "studies"])
def test_examples_of_the_docstrings(name):
    result = doctest.testmod(importlib.import_module(f"ood_iim.{name}"), verbose=False)
    assert result.attempted
    assert not result.failed
