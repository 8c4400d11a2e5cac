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

    Shown on a terminal only, and not under --quiet. The lines logged meanwhile appear above the bar; they are what
    remains.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[share]}"), TimeElapsedColumn())
    quiet = not logging.getLogger("secateur").isEnabledFor(logging.INFO)
    with Progress(*columns, console=notes, transient=True, disable=quiet or not notes.is_terminal) as progress:
        current: tuple[str, TaskID] | None = None

        def tell(what: str, done: int, total: int) -> None:
            nonlocal current
            if current is None or current[0] != what:
                if current is not None:
                    progress.remove_task(current[1])
                current = what, progress.add_task(what, share="")
            share = f"{done / total:4.0%}" if total else ""
            progress.update(current[1], total=total or None, completed=done, share=share)

        yield tell
