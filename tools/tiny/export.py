"""Finished weights: their shipped form, their files and the model card."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
from ood_core.files import write_atomically, write_json
from ood_core.tiny import TinyConfig, build_model
from ood_core.tiny.model import MEAN, STD
from safetensors.torch import save_file

from tiny.model import Trainee
from tiny.recipe import SCENE_NAMES, TEMPLATES, Recipe


def exportable(model: Trainee) -> open_clip.CLIP:
    """The shipped form: the stem's batch norms folded, the scale bounded, rounded to half precision."""
    clip = build_model(TinyConfig())
    trained = model.eval().cpu().clip
    state = {k: v for k, v in trained.state_dict().items() if not k.startswith("visual.conv1")}
    state |= {f"visual.conv1.{k}": v for k, v in trained.visual.conv1.folded().state_dict().items()}
    state["logit_scale"] = state["logit_scale"].clamp(max=math.log(100))
    clip.load_state_dict(state)
    return clip.half().float().eval()


def write_weights(clip: open_clip.CLIP, folder: Path, history: dict[str, Any]) -> None:
    """fp16 safetensors and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.half().contiguous() for k, v in clip.state_dict().items()}
    write_atomically(folder / "model.safetensors", lambda path: save_file(tensors, path))
    write_json(folder / "config.json", {"model": asdict(TinyConfig()), "mean": MEAN, "std": STD, "training": history})


def model_card(history: dict[str, Any], figures: dict[str, Any]) -> str:
    """The card as Markdown, every figure from `tools/measure_tiny.py`."""

    def rows(part: dict[str, dict[str, float]]) -> str:
        return "".join(
            f"| {name} |" + "".join(f" {100 * value:.1f} |" for value in values.values()) + "\n"
            for name, values in part.items()
        )

    runs = "".join(
        f"  {number}. {run['samples']:,} images ({run['small']} pixels for {100 * run['small_share']:.0f} %, then 64), "
        f"{run.get('scene_classes', 64)} scene classes, "
        f"Muon {run['muon_lr']:g} and AdamW {run['adamw_lr']:g}, {run['schedule']}, seed {run['seed']}, "
        f"{run['hours']:.2f} hours on {run['hardware']} in {run['dtype']}, torch {run['torch']}, {run['date']}\n"
        for number, run in enumerate(history["runs"], 1)
    )
    return f"""# Model card: tiny

A small CLIP for 64 x 64 pixel images that `ood-core` ships so that everything runs without a network. It knows 200
kinds of photographs a little and {len(SCENE_NAMES)} kinds of generated objects well: enough to try, test and compare
methods, not enough for any real decision.

- Architecture: `open_clip.CLIP`; image tower: residual convolutional stem, then 4 transformer blocks of width 192 over
  an 8 x 8 grid with class token; text tower: 4 causal blocks of width 192 over UTF-8 bytes, context 77; embedding
  width 192.
- Data: {history["runs"][-1]["photographs"]:,} photographs of 200 classes (Tiny-ImageNet, training split; class names in
  {len(TEMPLATES)} templates) and
  {Recipe.scenes_per_class * len(SCENE_NAMES):,} scenes of `ood_core.data.scenes` ("MATERIAL SHAPE"). No medical,
  texture, natural-scene, flower, digit, cartoon or sketch images. The terms of the photographs (ImageNet) allow
  non-commercial research and education.
- Training (`tools/train_tiny.py` does it again), each run continuing from the weights of the one before:
{runs}
Zero-shot top-1 in percent, with the text tower and the template "a photo of a {{}}" (patches: value path of the last
block):

| images | image embedding | single patch | mean of patches |
|---|---|---|---|
{rows(figures["top1"])}
The photographs are the 10,000 of the split `val` (200 classes, in the second row the 5,000 of
the protocol's 100 classes); none was trained on. They were looked at
{history["val_looks"]} times in all, once after each finished run, the discarded ones included. The scenes are 50 new
ones of each of the demo's 8 known classes, told apart among those 8. A run with 64 scene classes has seen the demo's
near-OOD combinations, one with 56 has not.

Share of patches in percent that show the image's class, among the 100 classes of `tiny-imagenet-100`; rank 1 is the
patch with the highest cosine to that class:

| | rank 1-16 | rank 17-32 | rank 33-64 |
|---|---|---|---|
{rows({"photographs": figures["right_by_rank"]})}
The same on the scenes, where the object is known; classes among which a patch is judged:

| classes | on the object | off the object |
|---|---|---|
{rows(figures["scenes"])}

AUROC in percent of the zero-shot scores on the protocol `tiny-imagenet-100` (`docs/benchmarks.md` has every detector
and the intervals). The near-OOD classes are among the 200 that were trained on; the far sets are unlike them.

| score | near OOD | far OOD, mean of 8 sets |
|---|---|---|
{rows(figures["auroc"])}"""
