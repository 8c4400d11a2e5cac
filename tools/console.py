"""Where the command line talks: results on standard output, everything else on standard error."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

# Results. Looked up at every print, so redirecting sys.stdout works.
results = Console(highlight=False)

# Progress, warnings, errors. One console for all of them, so that a line logged while a progress bar
# is shown appears above the bar. Never wrapped: a line stays one line for whoever greps it.
notes = Console(stderr=True, highlight=False, soft_wrap=True)


def first_lines(lines: Sequence[str], name: str, count: int = 8) -> list[str]:
    """At most ``count`` lines, each behind ``name``, and how many more there are."""
    more = [f"{name}  … and {len(lines) - count} more"] if len(lines) > count else []
    return [f"{name}  {line}" for line in lines[:count]] + more


def say_error(line: str) -> None:
    """Print ``error: line`` on standard error, in red where there are colours."""
    notes.print(Text.assemble(("error: ", "bold red"), (line, "red")))


class NotesHandler(logging.Handler):
    """Writes log records to `notes`, one line each; from warnings on, the level stands before it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = Text(self.format(record))
            if record.levelno > logging.INFO:
                text = Text.assemble((f"{record.levelname.lower()}: ", "yellow"), text)
            notes.print(text)
        except Exception:
            self.handleError(record)


def set_up_logging() -> None:
    """Send the package's log records to `notes`, progress included, until told to be quiet."""
    logger = logging.getLogger("secateur")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, NotesHandler) for handler in logger.handlers):
        logger.addHandler(NotesHandler())


@contextmanager
def quiet_compiler() -> Iterator[None]:
    """For dozens of compilations: what each phase took is said under ``--verbose`` only."""
    logger = logging.getLogger("secateur.compiler")
    before = logger.level
    if not logging.getLogger("secateur").isEnabledFor(logging.DEBUG):
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
