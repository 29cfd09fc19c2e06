"""What the data files name: sets, parts of sets, protocols and their tasks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from itertools import combinations
from typing import Any

Entry = dict[str, Any]


@cache
def catalog() -> dict[str, dict[str, Entry]]:
    """All "sets" and all "protocols", tasks among them (these have "task_of")."""
    folder = files("ood_core") / "protocols_data"
    merged: dict[str, dict[str, Entry]] = {"sets": {}, "protocols": {}}
    for file in sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda file: file.name):
        content = json.loads(file.read_text(encoding="utf-8"))
        for kind, entries in merged.items():
            entries |= content[kind]
    for name, protocol in list(merged["protocols"].items()):
        if "leave_out" in protocol:
            merged["protocols"] |= _leave_out(name, protocol, merged["sets"])
    return merged


def set_entry(name: str) -> Entry:
    """A set's entry; a subset has its own places before those of the whole, and the rest where it says nothing."""
    spec = catalog()["sets"][name]
    if "subset_of" not in spec:
        return spec
    whole, own = catalog()["sets"][spec["subset_of"]], spec.get("places", {})
    return whole | spec | {"places": {split: own.get(split, []) + rest for split, rest in whole["places"].items()}}


def tasks_of(name: str) -> list[str]:
    """The tasks of a protocol, or the protocol itself."""
    tasks = [task for task, entry in catalog()["protocols"].items() if entry.get("task_of") == name]
    return tasks or [name]


def _leave_out(name: str, protocol: Entry, sets: dict[str, Entry]) -> Iterator[tuple[str, Entry]]:
    """A task for every choice of the classes left out, which are its first OOD set."""
    for out in combinations(sets[protocol["id"]]["classes"], protocol["leave_out"]):
        task = f"{name}-{'+'.join(out)}"
        parts = {"known": f"{protocol['id']} without {'+'.join(out)}", "left out": f"{protocol['id']} {'+'.join(out)}"}
        for part, title in parts.items():
            sets[title] = _part(protocol["id"], sets, out, known=part == "known")
        own: Entry = {"id": parts["known"], "task_of": name}
        own["sets"] = {"left out": parts["left out"], **protocol.get("sets", {})}
        own |= {"ood": {"left out": "test", **protocol["ood"]}, "kinds": {"left out": "near", **protocol["kinds"]}}
        yield task, {key: value for key, value in protocol.items() if key != "leave_out"} | own


def _part(name: str, sets: dict[str, Entry], out: tuple[str, ...], *, known: bool) -> Entry:
    classes = {label: title for label, title in sets[name]["classes"].items() if (label not in out) == known}
    images = {split: count * len(classes) for split, count in sets[name]["images_per_class"].items()}
    return {"subset_of": name, "classes": classes, "class_count": len(classes), "images": images}
