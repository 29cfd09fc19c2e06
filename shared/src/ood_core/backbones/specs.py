"""Paths in the specs of backbones: what is saved with one works from any folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, unquote

__all__ = ["located", "lost_paths", "names_file", "relative_to"]

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors")


def located(spec: str, folder: str | Path = ".") -> str:
    """A spec with the paths that it names made absolute; names on a hub and published tags stay as they are.

    Args:
        spec: of a backbone.
        folder: what relative paths start from.

    Example:
        >>> located("timm:test_vit"), located("hf:openai/clip-vit-base-patch16")
        ('timm:test_vit', 'hf:openai/clip-vit-base-patch16')
        >>> located("timm:test_vit/best.pt", "/runs")
        'timm:test_vit//runs/best.pt'
    """
    return _with_paths(spec, lambda path: os.path.abspath(Path(folder, Path(path).expanduser())), folder)


def relative_to(spec: str, folder: str | Path) -> str:
    """A located spec with paths as they are seen from a folder, for what is moved together with them.

    Example:
        >>> relative_to("timm:test_vit//runs/best.pt", "/runs/detector")
        'timm:test_vit/../best.pt'
    """
    return _with_paths(spec, lambda path: os.path.relpath(path, os.path.abspath(folder)), "/")


def lost_paths(spec: str) -> list[str]:
    """Paths in a spec at which there is nothing.

    Example:
        >>> lost_paths("hf:/nowhere+edit:/gone")
        ['/nowhere', '/gone']
    """
    found: list[str] = []

    def note(path: str) -> str:
        found.append(path)
        return path

    _with_paths(spec, note)
    return [path for path in found if not Path(path).expanduser().exists()]


def names_file(name: str) -> bool:
    """Whether a name behind an architecture is that of a file of weights, not of a published tag.

    Example:
        >>> names_file("runs/best.pt"), names_file("openai")
        (True, False)
    """
    return "/" in name or name.lower().endswith(_SUFFIXES) or Path(name).expanduser().is_file()


def _with_paths(spec: str, change: Callable[[str], str], folder: str | Path = ".") -> str:
    """A spec with every path on this machine changed."""
    named, plus, edit = spec.partition("+edit:")
    library, colon, name = named.partition(":")
    query = ""
    if library == "timm":
        name, _, query = name.partition("?")
    if name.startswith("local-dir:"):
        name = f"local-dir:{change(name.removeprefix('local-dir:'))}"
    elif library == "hf" and _is_folder(name, folder):
        name = change(name)
    elif library in ("timm", "open_clip") and not name.startswith("hf-hub:"):
        architecture, slash, file = name.partition("/")
        if file and (library == "timm" or names_file(file)):
            name = f"{architecture}{slash}{change(_from_root(file, folder))}"
    parts = [_option_with_path(part, change) for part in query.split("&")]
    query = f"?{'&'.join(parts)}" if query else ""
    return f"{library}{colon}{name}{query}{plus}{change(edit) if edit and edit != 'unsaved' else edit}"


def _is_folder(name: str, folder: str | Path) -> bool:
    """Whether a name is a folder's: names on a hub have one slash and start with a letter."""
    return name.startswith((".", "~", "/")) or name.count("/") > 1 or Path(folder, name).is_dir()


def _from_root(file: str, folder: str | Path) -> str:
    """ "NAME/tmp/best.pt" is written for /tmp/best.pt, too, if there is no such file below the working folder."""
    rooted = f"/{file}"
    there = Path(folder, Path(file).expanduser()).is_file()
    return rooted if not there and Path(rooted).is_file() else file


def _option_with_path(part: str, change: Callable[[str], str]) -> str:
    key, _, value = part.partition("=")
    return f"{key}={quote(change(unquote(value)), safe='/~')}" if key == "checkpoint_path" and value else part
