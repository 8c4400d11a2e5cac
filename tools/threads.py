"""The option `--threads` of the scripts beside the verbs."""

from __future__ import annotations

import argparse

from secateur.runtime.backends.cores import bound_threads
from secateur.runtime.errors import UserError


def read_threads(text: str) -> int:
    """A type for argparse: a number of threads or processes, at most as many as may run at once here."""
    try:
        return bound_threads(int(text) if text.lstrip("-").isdecimal() else text)  # type: ignore[arg-type]  # refused
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
