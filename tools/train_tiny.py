"""Train the embedded backbone ("tiny") and write its weights and model card into the package.

    uv run python tools/train_tiny.py --packs ../shared/data --work ~/.cache/ood-tiny
    uv run python tools/train_tiny.py --packs ../shared/data --work ~/.cache/ood-tiny-2 --continue --muon-lr 0.01

Resumes from its last checkpoint in --work; the data order and every random draw depend on (seed, step) only, so a
resumed run continues exactly as an uninterrupted one on the same machine. One line of figures a minute goes to
standard output and to WORK/log.csv. `--continue` starts from finished weights instead of random ones, with a new
schedule; give such a run another --seed. Matrix products are in bfloat16 where the processor has them, in float32
elsewhere.

Recipe (`tools/tiny/recipe.py` has every number). Image tower: cross-entropy of the cosine to a learned class matrix of
200 photograph classes and the generated "MATERIAL SHAPE" classes. Patches of the value path are to show what is at
their place: in mosaics of four photographs the class of the tile, in scenes the object there is and beside it every
class alike; of a single photograph only the best patches have to show its class. Text tower: learns the same matrix
from the class names in several templates. What is exported is a running average of the weights.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import measure_tiny
import torch
from ood_core import create_backbone
from ood_core.backbones import resolve_dtype
from ood_core.files import write_atomically
from ood_core.tiny import ByteTokenizer, TinyConfig
from tiny.data import augment, load_training_data, sample_batch
from tiny.export import exportable, model_card, write_weights
from tiny.losses import image_losses, text_loss
from tiny.model import Trainee, build_optimizer
from tiny.recipe import SCENE_NAMES, TEMPLATES, Recipe, learning_rate_factor
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

PACKAGE = Path(__file__).resolve().parents[1] / "shared/src/ood_core/tiny"


class Training:
    """One run: what a checkpoint holds, and the steps from there to the end."""

    def __init__(self, packs: Path, work: Path, device: str, recipe: Recipe, start: Path | None = None) -> None:
        self.packs, self.work, self.device, self.recipe = packs, work, device, recipe
        self.start, self.precision = start, resolve_dtype("auto", torch.device(device))
        work.mkdir(parents=True, exist_ok=True)
        self.images, self.labels, self.masks, self.names = load_training_data(packs, work, recipe)
        self.photo_classes = len(self.names) - len(SCENE_NAMES)
        self.photos = int((self.labels < self.photo_classes).sum())
        torch.manual_seed(recipe.seed)
        tokenizer = ByteTokenizer()
        self.texts = torch.stack([tokenizer([t.format(name) for name in self.names]) for t in TEMPLATES])
        self.model = self.trainee(start)
        self.teacher = self.trainee(PACKAGE / "model.safetensors").eval() if recipe.distill_weight else None
        self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(recipe.average), use_buffers=True)
        self.optimizer = build_optimizer(self.model, recipe, self.precision)
        self.step, self.seconds = 0, 0.0
        self.checkpoint, self.csv = work / "checkpoint.pt", work / "log.csv"
        if self.checkpoint.exists():
            self.load()

    def trainee(self, start: Path | None) -> Trainee:
        """A model with random weights or with the finished ones in `start`."""
        model = Trainee(TinyConfig(), len(self.names), self.recipe.logit_scale).to(self.device)
        if start is not None:
            rows = sample_batch(0, self.labels, self.photos, replace(self.recipe, batch=512))
            images, _ = augment(self.images[rows].to(self.device), self.masks[:0], 64, 0, self.recipe)
            model.continue_from(start, images, self.texts.to(self.device))
        return model

    def load(self) -> None:
        saved = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if saved["recipe"] != asdict(self.recipe):
            raise SystemExit(f"{self.checkpoint} is of another recipe: remove it or give another --work.")
        self.model.load_state_dict(saved["model"])
        self.averaged.load_state_dict(saved["averaged"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        if self.csv.exists():  # steps behind the checkpoint are run again
            head, *lines = self.csv.read_text().splitlines(keepends=True)
            kept = [line for line in lines if int(line.split(",")[0]) <= self.step]
            write_atomically(self.csv, lambda path: path.write_text("".join([head, *kept])))
        print(f"resumed at step {self.step} of {self.recipe.steps}", flush=True)

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "recipe": asdict(self.recipe),
        }
        write_atomically(self.checkpoint, lambda path: torch.save(state, path))

    def train_step(self) -> dict[str, Tensor]:
        """One update; the detached losses."""
        recipe, device = self.recipe, self.device
        rows = sample_batch(self.step, self.labels, self.photos, recipe)
        size = recipe.small if self.step < recipe.small_share * recipe.steps else 64
        masks = self.masks[rows[rows >= self.photos] - self.photos]  # a batch ends with its scenes
        x, objects = augment(self.images[rows].to(device), masks.to(device), size, self.step, recipe)
        for group, lr in zip(self.optimizer.param_groups, (recipe.muon_lr, recipe.adamw_lr), strict=True):
            group["lr"] = lr * learning_rate_factor(self.step, recipe)
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            parts = image_losses(self.model, x, objects, self.labels[rows].to(device), recipe, self.teacher)
            if self.step % recipe.text_every == 0:
                rng = torch.Generator().manual_seed(recipe.seed * 9_000_003 + self.step)
                chosen = torch.randint(len(self.names), (recipe.texts,), generator=rng)
                tokens = self.texts[torch.randint(len(TEMPLATES), (recipe.texts,), generator=rng), chosen]
                parts["text_loss"] = text_loss(self.model, tokens.to(device), chosen.to(device))
        self.optimizer.zero_grad(set_to_none=True)
        sum(parts.values()).backward()
        self.optimizer.step()
        self.averaged.update_parameters(self.model)
        self.step += 1
        return {name: part.detach() for name, part in parts.items()}

    def run(self, stop_at: int | None, save_every: float) -> None:
        """Train to the end or to `stop_at`, with a line of figures a minute."""
        logged = saved = last = time.monotonic()
        window: list[dict[str, Tensor]] = []
        while self.step < min(self.recipe.steps, stop_at or self.recipe.steps):
            window.append(self.train_step())
            now = time.monotonic()
            self.seconds, last = self.seconds + now - last, now
            if now - logged > 60:
                self.log(window, len(window) * self.recipe.batch / (now - logged))
                logged, window = now, []
            if now - saved > save_every:
                self.save()
                saved = time.monotonic()
        self.save()

    def log(self, window: list[dict[str, Tensor]], speed: float) -> None:
        line = {"step": self.step, "samples": self.step * self.recipe.batch, "seconds": round(self.seconds, 1)}
        for name in ("image_loss", "patch_loss", "distill_loss", "text_loss"):
            values = [parts[name].item() for parts in window if name in parts]
            line[name] = round(sum(values) / len(values), 4) if values else math.nan
        line["images_per_second"] = round(speed, 1)
        fresh = not self.csv.exists()
        with self.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, line)
            if fresh:
                writer.writeheader()
            writer.writerow(line)
        print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)

    def finish(self, out: Path) -> None:
        """Look at the held-out photographs once; write weights, history and model card."""
        clip = exportable(self.averaged.module)
        backbone = create_backbone("tiny", dtype="float32")
        backbone.model.load_state_dict(clip.state_dict())
        figures = measure_tiny.measure(backbone, self.packs, "val", ood=True)
        print(json.dumps(figures, indent=2), flush=True)
        history = self.history(figures["top1"]["photographs"])
        write_weights(clip, out, history)
        card = model_card(history, figures)
        write_atomically(out / "MODEL_CARD.md", lambda path: path.write_text(card, encoding="utf-8"))

    def history(self, top1: dict[str, float]) -> dict:
        """The finished runs that these weights come from, this one last, and how often `val` was looked at so far."""
        before = json.loads((self.start or PACKAGE / "model.safetensors").with_name("config.json").read_text())
        before = before.get("training", {"val_looks": 0, "runs": []})
        run = asdict(self.recipe) | {
            "schedule": f"constant for {100 * self.recipe.steady:.0f} %, then linearly to 0",
            "hours": round(self.seconds / 3600, 2),
            "hardware": torch.cuda.get_device_name()
            if self.device == "cuda"
            else f"{torch.get_num_threads()} CPU cores",
            "dtype": str(self.precision).removeprefix("torch."),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "photographs": self.photos,
            "scene_classes": len(SCENE_NAMES),
            "top1": top1,
        }
        earlier = before["runs"] if self.recipe.start else []
        return {"val_looks": before["val_looks"] + 1, "runs": [*earlier, run]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--packs", required=True, help="folder with tiny-imagenet.parquet and tiny-imagenet-more.parquet"
    )
    parser.add_argument("--work", required=True, help="folder for the decoded data, checkpoint and log")
    parser.add_argument("--out", default=str(PACKAGE), help="where the weights go (default: into the package)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    numbers = [field for field in fields(Recipe) if field.name != "start"]
    for field in numbers:
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default, help="default: %(default)s")
    parser.add_argument(
        "--continue",
        dest="start",
        type=Path,
        nargs="?",
        const=PACKAGE,
        help="from the weights in a folder, the package's by default",
    )
    parser.add_argument("--save-every", type=float, default=240, help="seconds between checkpoints")
    parser.add_argument("--stop-at", type=int, help="stop after this step (to try the resuming)")
    args = parser.parse_args()
    start = args.start and args.start / "model.safetensors"
    digest = hashlib.sha256(start.read_bytes()).hexdigest() if start else ""
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in numbers}, start=digest)
    training = Training(Path(args.packs), Path(args.work).expanduser(), args.device, recipe, start)
    training.run(args.stop_at, args.save_every)
    if training.step == training.recipe.steps:
        training.finish(Path(args.out))


if __name__ == "__main__":
    main()
