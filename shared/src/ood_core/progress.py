"""The bar that long computations show on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(what: str, total: int, done: int, show: bool | None) -> Iterator[Callable[[dict[str, float]], Any]]:
    """Show a bar; what it yields advances it by one and puts figures beside it.

    Args:
        what: is counted, e.g. "epoch".
        total: how many there are.
        done: how many are finished already.
        show: None shows it on a terminal only.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda figures: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=done)

        def tell(figures: dict[str, float]) -> None:
            text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            bar.update(task, advance=1, description=text)

        yield tell
