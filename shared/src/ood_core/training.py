"""The training loop of every method that learns: batches, schedule, checkpoints, progress, several processes.

A method brings its parameters, its optimiser and a function from row numbers to losses; the loop does the rest.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ood_core.errors import DataError, UsageError
from ood_core.files import write_atomically
from ood_core.options import Options, flat_options
from ood_core.progress import progress_bar

__all__ = ["Epochs", "Keeping", "train"]

History = list[dict[str, float]]
Losses = Mapping[str, Tensor | tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Epochs(Options):
    """How batches are drawn, and what else happens in an epoch.

    Attributes:
        per_step: step the rate with every batch; `learning_rate` is then given fractions of epochs.
        drop_last: leave out the last, smaller batch of an epoch, if it is not the only one.
        whole_batch: `losses` also gets the rows of all processes, as `batch`, for draws among them.
        before_epoch: gets the epoch and the row numbers that `losses` will be asked for in this process, in order, so
            that they can be made ready meanwhile, see `LiveViews.prepare`.
        after_epoch: epoch -> figures that join its history.
    """

    per_step: bool = False
    drop_last: bool = False
    whole_batch: bool = False
    before_epoch: Callable[[int, list[Tensor]], None] | None = None
    after_epoch: Callable[[int], Mapping[str, float]] | None = None


@dataclass(frozen=True)
class Keeping(Options):
    """The checkpoint of a training.

    Attributes:
        checkpoint: file (safetensors) written after every epoch; None keeps nothing.
        resume: go on from `checkpoint` if it is there.
        recipe: everything the result depends on, kept in the checkpoint; another one is refused.
    """

    checkpoint: str | Path | None = None
    resume: bool = True
    recipe: Mapping[str, Any] | None = None


@flat_options
def train(
    parameters: Mapping[str, nn.Parameter],
    losses: Callable[..., Losses],
    *,
    size: int,
    epochs: int,
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    learning_rate: Callable[[float], float],
    seed: int,
    in_epoch: Epochs = Epochs(),
    keeping: Keeping = Keeping(),
    progress: bool | None = None,
) -> History:
    """Minimise the sum of `losses` over shuffled batches.

    The order of an epoch depends on (seed, epoch) only, so a run that goes on from its checkpoint ends as one that
    was never stopped. Under `accelerate launch` or `torchrun` every process takes its share of each batch; gradients
    are summed, so the result is that of one process. Terms that are no mean over the batch may simply be returned:
    every process scales all terms by its share of the batch.

    Args:
        parameters: what is learned, by name; changed in place, and all that a checkpoint holds besides the
            optimiser's state.
        losses: (row numbers int64 [b], epoch) -> named scalars, whose sum is minimised. A pair (sum, count) counts
            as their quotient over the whole batch (0 without a count), where it is no mean over its rows.
        size: number of training rows.
        epochs: passes over them.
        batch_size: rows per step, over all processes.
        optimizer: of `parameters`; a group's "lr_scale", if it has one, is a factor of its rate.
        learning_rate: epoch (from 0) -> rate; stepped once per epoch.
        seed: of the order.
        in_epoch: how batches are drawn, see `Epochs`.
        keeping: the checkpoint, see `Keeping`.
        progress: a bar on stderr; None shows it on a terminal only.

    Returns:
        Per epoch the mean of every loss, their sum "loss", and "learning_rate".

    Raises:
        UsageError: no rows, or a checkpoint of another recipe or of more epochs.
        DataError: a loss or parameter that is no longer finite, or an unreadable checkpoint.

    Example:
        >>> w = nn.Parameter(torch.ones(1))
        >>> history = train({"w": w}, lambda rows, epoch: {"square": w.square().sum()}, size=4, epochs=2, batch_size=2,
        ...     optimizer=torch.optim.SGD([w], lr=0.1), learning_rate=lambda epoch: 0.1, seed=0)
        >>> [round(epoch["loss"], 4) for epoch in history]
        [0.82, 0.3359]
    """
    if size < 1:
        raise UsageError("There is nothing to train on: give at least one labelled image.")
    rank, world = _join_processes(next(iter(parameters.values())).device)
    file = Path(keeping.checkpoint) if keeping.checkpoint else None
    settings = {"size": size, "batch_size": batch_size, "seed": seed, "drop_last": in_epoch.drop_last}
    shapes = {name: list(value.shape) for name, value in parameters.items()}
    learned = {"parameters": shapes, "optimizer": type(optimizer).__name__}
    described = json.loads(json.dumps({**settings, **learned, **(keeping.recipe or {})}))
    history: History = []
    if file is not None and keeping.resume and file.exists():
        history = _restore(file, described, parameters, optimizer, epochs)
    with progress_bar("epoch", epochs, len(history), False if rank else progress) as tell:
        for epoch in range(len(history), epochs):
            batches = _batches(size, batch_size, seed * 1_000_003 + epoch, drop_last=in_epoch.drop_last)
            if in_epoch.before_epoch is not None:
                in_epoch.before_epoch(epoch, [mine for rows in batches if len(mine := _share(rows, rank, world))])
            sums: dict[str, float] = {}
            for number, rows in enumerate(batches):
                rate = learning_rate(epoch + number / len(batches) if in_epoch.per_step else epoch)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group.get("lr_scale", 1.0)
                found = partial(losses, batch=rows) if in_epoch.whole_batch else losses
                means = _step(parameters, found, optimizer, rows, epoch, rank, world)
                _check_finite(means, parameters, epoch, rate)
                sums = {name: sums.get(name, 0.0) + value for name, value in means.items()}
            averages = {name: value / len(batches) for name, value in sums.items()}
            history.append(averages | {"loss": sum(averages.values()), "learning_rate": rate})
            if in_epoch.after_epoch is not None:
                history[-1].update(in_epoch.after_epoch(epoch))
            tell(history[-1])
            if file is not None and rank == 0:
                _save(file, described, parameters, optimizer, history)
            if file is not None and world > 1:
                dist.barrier()  # nobody reads the file before it is there
    return history


def _batches(size: int, batch_size: int, seed: int, *, drop_last: bool) -> list[Tensor]:
    """The shuffled rows of an epoch, batch by batch."""
    batches = list(torch.randperm(size, generator=torch.Generator().manual_seed(seed)).split(batch_size))
    if drop_last and len(batches) > 1 and len(batches[-1]) < batch_size:
        batches.pop()
    return batches


def _step(
    parameters: Mapping[str, nn.Parameter],
    losses: Callable[[Tensor, int], Losses],
    optimizer: torch.optim.Optimizer,
    rows: Tensor,
    epoch: int,
    rank: int,
    world: int,
) -> dict[str, float]:
    """One update; the losses over the whole batch."""
    optimizer.zero_grad(set_to_none=True)
    mine = _share(rows, rank, world)
    share = len(mine) / len(rows)
    found = losses(mine, epoch) if len(mine) else {}
    counts = _whole_counts(found, world)
    parts = {n: v[0] / counts[n].clamp(min=1) if isinstance(v, tuple) else v * share for n, v in found.items()}
    if parts:
        # Into these alone: the caller may have other tensors that require gradients.
        torch.stack(list(parts.values())).sum().backward(inputs=list(parameters.values()))
    means = {name: value.item() for name, value in parts.items()}
    for parameter in parameters.values():
        # Zero, not absent: the optimiser then does the same in any number of processes.
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if world > 1:
            dist.all_reduce(gradient)
        parameter.grad = gradient
    if world > 1:
        everyone: list[dict[str, float]] = [{}] * world
        dist.all_gather_object(everyone, means)
        means = {name: sum(one.get(name, 0.0) for one in everyone) for name in everyone[0]}
    optimizer.step()
    return means


def _share(rows: Tensor, rank: int, world: int) -> Tensor:
    """A process's rows of a batch; one smaller than their number is the first's, so that names and shapes agree."""
    return rows[rank::world] if len(rows) >= world else rows[: len(rows) if rank == 0 else 0]


def _whole_counts(losses: Losses, world: int) -> dict[str, Tensor]:
    """The counts of pairs, over all processes."""
    counts = {name: value[1] for name, value in losses.items() if isinstance(value, tuple)}
    if world > 1:  # also without rows: the others wait
        everyone: list[dict[str, float]] = [{}] * world
        dist.all_gather_object(everyone, {name: count.item() for name, count in counts.items()})
        counts = {n: c.new_tensor(sum(one.get(n, 0) for one in everyone)) for n, c in counts.items()}
    return counts


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def _check_finite(losses: dict[str, float], parameters: Mapping[str, nn.Parameter], epoch: int, rate: float) -> None:
    """Refuse to go on with a loss or parameter that is no number."""
    broken = [f"parameter {name!r}" for name, value in parameters.items() if not value.isfinite().all()]
    if not all(map(_finite, losses.values())):
        broken.insert(0, "loss")
    if broken:
        raise DataError(
            f"The {broken[0]} is no longer finite in epoch {epoch + 1} ({losses}): lower the learning rate "
            f"({rate:g} now)."
        )


def _join_processes(device: torch.device) -> tuple[int, int]:
    """(rank, number of processes) as the launcher's environment says."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not dist.is_initialized():
        # Losses are gathered on the CPU: with NCCL alone they would all be sent by way of the first GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        # Its threads would otherwise outlive the interpreter now and then, and abort a process that has done its work.
        atexit.register(_leave_processes)
    return dist.get_rank(), dist.get_world_size()


def _leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- checkpoints


def _save(
    file: Path,
    recipe: dict[str, Any],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    history: History,
) -> None:
    tensors = {f"parameter.{name}": value.detach().contiguous() for name, value in parameters.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v.contiguous() for k, v in state.items() if isinstance(v, Tensor)}
    metadata = {"recipe": json.dumps(recipe), "history": json.dumps(history)}
    write_atomically(file, lambda path: save_file(tensors, path, metadata))


def _restore(
    file: Path,
    recipe: dict[str, Any],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    epochs: int,
) -> History:
    try:
        with safe_open(file, "pt") as saved:
            metadata = saved.metadata()
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
        found, history = json.loads(metadata["recipe"]), json.loads(metadata["history"])
    except Exception as error:
        raise DataError(
            f"{file} is no checkpoint of a training ({type(error).__name__}: {error}): remove it to start anew."
        ) from error
    if found != recipe:
        changed = sorted(key for key in {*found, *recipe} if found.get(key) != recipe.get(key))
        raise UsageError(
            f"{file} is of a training with other settings ({', '.join(changed[:5])}): remove it, or give another "
            "checkpoint file."
        )
    if len(history) > epochs:
        raise UsageError(f"{file} holds {len(history)} epochs, more than the {epochs} asked for: remove it.")
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(tensors[f"parameter.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return history
