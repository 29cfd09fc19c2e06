"""Medical benchmarks as they lie on users' disks, and any images with some classes held out.

A layout has one source with every image that any of its tasks uses, and tasks that are rows of it: what to train on,
what to test on, what is unknown. So the embeddings are extracted once, and all folds and tasks take their share:

    layout = find_layout("isic-4", "/data")
    features = extract(backbone, layout.source, {"pyramid"}, cache="cache", on_error="record")
    for task in layout.tasks:
        parts = task.features(features)  # "train", "test" and the OOD sets, joined by id
        detector.fit(parts["train"])

`task.rows` are the row numbers themselves; `task.train`, `task.test` and `task.ood` the same images as sources.
"""

from ood_hvl.layouts.isic import isic_4
from ood_hvl.layouts.leave_out import leave_classes_out
from ood_hvl.layouts.nct_crc import OOD_TRIPLES, nct_crc
from ood_hvl.layouts.registry import find_layout, inspect_layout, list_layouts
from ood_hvl.layouts.sd198 import skin_40
from ood_hvl.layouts.survey import Layout
from ood_hvl.layouts.tasks import FOLDS, Task, folds

__all__ = [
    "FOLDS",
    "OOD_TRIPLES",
    "Layout",
    "Task",
    "find_layout",
    "folds",
    "inspect_layout",
    "isic_4",
    "leave_classes_out",
    "list_layouts",
    "nct_crc",
    "skin_40",
]
