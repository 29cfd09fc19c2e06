"""The last part of the report: images without a score, the data, and the environment of the run."""

from __future__ import annotations

from ood_core.report.figures import Run, failures, flatten
from ood_core.report.markup import escaped, plain_table, set_name, short


def failure_list(run: Run, most: int = 20) -> str:
    """Images without a score, by reason."""
    counted = failures(run.table, run.detectors)
    if not counted:
        return "<section><h2>Failures</h2><p>Every image has a score from every detector.</p></section>"
    rows = [
        [set_name(source), f"{images:,}", short(reason, 90), short(example, 50)]
        for source, reason, images, example in counted[:most]
    ]
    hidden = [images for _, _, images, _ in counted[most:]]
    more = f'<p class="muted">And {sum(hidden):,} more, in {len(hidden):,} rows.</p>' if hidden else ""
    body = plain_table(["Set", "Images", "Reason", "For example"], rows, "Failures")
    return f"<section><h2>Failures</h2><p>No figure counts these images.</p>{body}{more}</section>"


def provenance(run: Run) -> str:
    """What the figures were measured on, and with what."""
    data = dict(run.data)
    kinds = data.pop("set_kinds", None) or {}
    sets = {"id": data.pop("id", None), **(data.pop("ood", None) or {})}
    data.pop("notes", None)
    held = {name: dict(flatten(value)) for name, value in sets.items()}
    columns = list(dict.fromkeys(key for pairs in held.values() for key in pairs))
    rows = [
        [set_name(name), escaped(kinds.get(name, "")), *(short(pairs.get(key, "")) for key in columns)]
        for name, pairs in held.items()
    ]
    heads = ["Set", "Kind", *map(str.capitalize, columns)]
    pairs = flatten(data) + flatten(run.results.get("environment") or {})
    items = "".join(f"<div><dt>{escaped(key)}</dt><dd>{short(value, 60)}</dd></div>" for key, value in pairs)
    return f"""<section><h2>Data and environment</h2>{plain_table(heads, rows, "Data")}
<dl>{items}</dl></section>"""
