"""Progress of a long command on standard error: a bar for the step at work, gone when it is done."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from secateur.tools.console import notes

Tell = Callable[[str, int, int], None]
"""(what, done, total): a total of 0 stands for a step whose length is unknown."""


@contextmanager
def show_progress() -> Iterator[Tell]:
    """Yield a function that is told what is being done and how far it is.

    ``step: part`` stands for a part of a step; parts may nest, and each has its bar until it is done. Shown on a
    terminal only, and not under --quiet. The lines logged meanwhile appear above the bars; they are what remains.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[share]}"), TimeElapsedColumn())
    quiet = not logging.getLogger("secateur").isEnabledFor(logging.INFO)
    with Progress(*columns, console=notes, transient=True, disable=quiet or not notes.is_terminal) as progress:
        bars: dict[str, TaskID] = {}

        def tell(what: str, done: int, total: int) -> None:
            step, _, part = what.partition(": ")
            finished = [name for name in bars if name.partition(": ")[0] != step]
            if part and 0 < total <= done:
                finished.append(what)
            else:
                if what not in bars:
                    bars[what] = progress.add_task(what, share="")
                share = f"{done / total:4.0%}" if total else ""
                progress.update(bars[what], total=total or None, completed=done, share=share)
            for name in finished:
                if name in bars:
                    progress.remove_task(bars.pop(name))

        yield tell
