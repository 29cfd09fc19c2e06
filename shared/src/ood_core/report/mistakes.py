"""The part of the report with pictures: the most confident mistakes, and how the methods explain them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
from PIL import Image

from ood_core.report.charts import swatch
from ood_core.report.figures import Run, confident_mistakes, scores_by_source
from ood_core.report.markup import NO_SCORES, escaped, scroll_box, short, with_unit

_NO_IMAGE = '<div class="none">no image</div>'
_THUMBNAIL, _EXPLANATION = 192, 1280
# Characters of explanation pictures, so that a report stays fit for a mail.
_MOST = 1_300_000


def mistakes(run: Run, count: int, explained: int) -> str:
    """Those of the best detector: `count` of either kind, the first `explained` ones with explanation pictures."""
    detector = run.detectors[0]
    scores = scores_by_source(run.table, detector)
    known = scores.pop("id", np.empty(0))
    unknown = np.concatenate([*scores.values(), np.empty(0)])
    highest, lowest = confident_mistakes(run.table, detector, count)
    above = [(row, f"above {_share(known < row[detector])} of ID") for _, row in highest.iterrows()]
    below = [(row, f"below {_share(unknown > row[detector])} of OOD") for _, row in lowest.iterrows()]
    body = ""
    for heading, found in (
        ("OOD images with the highest scores", above),
        ("ID images with the lowest scores", below),
    ):
        shots = "".join(_shot(run, row, row[detector], rank) for row, rank in found)
        body += f'<h3>{heading}</h3><div class="shots">{shots or NO_SCORES}</div>'
    first = [row for pair in zip(above[:explained], below[:explained], strict=False) for row, _ in pair]
    return f"""<section><h2>Most confident mistakes of {escaped(detector)}</h2>{body}
{_explanations(run, first)}</section>"""


def _share(mask: np.ndarray) -> str:
    return with_unit(mask.mean()) if len(mask) else "none"


def _shot(run: Run, row: pd.Series, score: float, rank: str) -> str:
    opened = _open(run, row)
    image = _picture(opened, row["id"], _THUMBNAIL) if opened is not None else ""
    label = "" if pd.isna(row["label"]) else f"<span>{escaped(row['label'])}</span>"
    return f"""<figure>{image or _NO_IMAGE}<figcaption><b>{_source(run, row)}</b>{label}
<span class="muted">{short(row["id"])}</span>
<span>{score:.5g}</span><span class="muted">{rank}</span></figcaption></figure>"""


def _source(run: Run, row: pd.Series) -> str:
    place = run.sets.index(row["source"]) if row["source"] in run.sets else None
    return "ID" if place is None else f"{swatch(place)} {escaped(row['source'])}"


# An image that cannot be opened, shown or explained must not cost the report.


def _open(run: Run, row: pd.Series) -> Image.Image | None:
    try:
        return run.open_image(row["source"], row["id"]) if run.open_image else None
    except Exception:
        return None


def _picture(image: Image.Image, about: str, side: int) -> str:
    """An `img` of a JPEG data URI, at most `side` pixels wide and high; empty if the image cannot be shown."""
    try:
        small = image.convert("RGB")
        small.thumbnail((side, side))
        small.save(memory := io.BytesIO(), "JPEG", quality=82, optimize=True)
    except Exception:
        return ""
    size = f'width="{small.width}" height="{small.height}"'
    data = base64.b64encode(memory.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escaped(about)}" {size}>'


def _explanations(run: Run, rows: Iterable[pd.Series]) -> str:
    """Every picture that a method makes of these images, as long as the page stays small."""
    blocks: dict[str, str] = {}
    size, more = 0, ""
    for row, detector, picture in _explained(run, rows):
        size += len(picture)
        if size > _MOST:
            more = '<p class="muted">Further pictures are left out to keep this page small.</p>'
            break
        heading = f"<h4>{_source(run, row)}: {short(row['id'], 60)}</h4>"
        blocks[heading] = blocks.get(heading, "") + _why(f"{detector}: score {row[detector]:.5g}", picture)
    body = "".join(heading + pictures for heading, pictures in blocks.items())
    return f"<h3>How the methods came to their scores</h3>{body}{more}" if body else ""


def _explained(run: Run, rows: Iterable[pd.Series]) -> Iterator[tuple[pd.Series, str, str]]:
    """(row, detector, its picture) of the methods that have one."""
    for row in rows:
        image = _open(run, row) if run.explain_image else None
        for detector in run.detectors if image is not None else ():
            about = f"How {detector} came to its score of {row['id']}"
            explained = _explain(run, detector, image)
            if explained is not None and (picture := _picture(explained, about, _EXPLANATION)):
                yield row, detector, picture


def _explain(run: Run, detector: str, image: Image.Image | None) -> Image.Image | None:
    try:
        return run.explain_image(detector, image) if run.explain_image and image else None
    except Exception:
        return None


def _why(caption: str, picture: str) -> str:
    box = scroll_box(picture, caption)
    return f'<figure class="why"><figcaption>{escaped(caption)}</figcaption>\n{box}</figure>'
