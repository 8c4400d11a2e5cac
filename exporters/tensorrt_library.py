"""Finds the TensorRT library of a flavour and drives it through Polygraphy, in its own words.

Polygraphy decides at its first import which of the two libraries it speaks to, so a process builds for
one flavour. Everything the library says is caught here: errors become one line, warnings a log entry.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from secateur.runtime.errors import SecateurError, UserError

Flavour = Literal["tensorrt", "tensorrt-rtx"]

MODULES: dict[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Python module of each flavour."""

INSTALL: dict[str, str] = {
    "tensorrt": (
        "install it with: pip install 'secateur[tensorrt]' --extra-index-url https://pypi.nvidia.com "
        "(the builder comes from NVIDIA's index; PyPI has the Python bindings only)"
    ),
    "tensorrt-rtx": "install it with: pip install 'secateur[tensorrt-rtx]'",
}

OLDEST = (10, 15)
"""The first version of ``tensorrt`` whose parser knows every operator of the dialect."""

_HARMLESS = ("Int64 binding", "logger passed into createInferBuilder", "'colored' module")
_PARSER_ERROR = re.compile(
    r"In node -?\d+ with name: (?P<node>.*?) and operator: (?P<op>\S*) \(.*?\): \w+: (?P<why>.*)"
)
_SOURCE = re.compile(r"^\S+\.(?:cpp|h):\d+:\s*|^Invalid Node - \S+\s+|\s+In \S+ at /[^\s)]+|\s*\[checkMacros\.cpp::.*$")
_ASSERTION = re.compile(r'^(?:\(\w+\): \w+: )?(?:Assertion failed: .*?: |.*&& ")(?P<why>[^"]+)"?$')

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Library:
    """A loaded flavour: its Python module ``trt`` and Polygraphy's loaders ``loaders`` for it."""

    flavour: Flavour
    trt: Any
    loaders: Any

    @property
    def version(self) -> str:
        return str(self.trt.__version__)


def load_library(flavour: str) -> Library:
    """Import a flavour's library and Polygraphy. Raises UserError with the command that installs what is missing."""
    if flavour not in MODULES:
        raise UserError(f"no TensorRT flavour {flavour!r}", where="--target", available=MODULES)
    where = f"--target {flavour}"
    try:
        trt = importlib.import_module(MODULES[flavour])
    except ModuleNotFoundError as error:
        if error.name != MODULES[flavour]:
            raise _broken(flavour, error) from error
        raise UserError("the library is not installed", where=where, fix=INSTALL[flavour]) from None
    except (ImportError, OSError) as error:
        raise _broken(flavour, error) from error
    try:
        settings: Any = importlib.import_module("polygraphy.config")
    except ModuleNotFoundError:
        raise UserError("Polygraphy, which drives it, is not installed", where=where, fix=INSTALL[flavour]) from None
    is_rtx = flavour == "tensorrt-rtx"
    if "polygraphy.backend.trt" not in sys.modules:
        settings.USE_TENSORRT_RTX = is_rtx
    elif is_rtx != bool(settings.USE_TENSORRT_RTX):
        other = "tensorrt" if is_rtx else "tensorrt-rtx"
        raise SecateurError(f"this process builds for {other}", where=where, fix="build in a process of its own")
    library = Library("tensorrt-rtx" if is_rtx else "tensorrt", trt, importlib.import_module("polygraphy.backend.trt"))
    if not is_rtx and _numbers(library.version) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UserError(
            f"{flavour} {library.version} is too old: rotary embeddings and cache updates need {oldest}", where=where,
            fix=INSTALL[flavour],
        )  # fmt: skip
    return library


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _broken(flavour: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"the library does not load: {reason}", where=f"--target {flavour}", fix=INSTALL[flavour])


@dataclass
class Speech:
    """What the library said while it worked, in order, without line breaks."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def parser_error(self) -> tuple[str | None, str]:
        """(node as ``name (Op)`` or None, reason) of the first error that names a node, else of the first one."""
        for text in self.errors:
            match = _PARSER_ERROR.search(text)
            if match and match["op"]:
                return f"{match['node'] or 'unnamed node'} ({match['op']})", _plain(match["why"])
        return None, _plain(self.errors[0]) if self.errors else "no reason given"

    def last_error(self) -> str:
        """The builder's last words."""
        return _plain(self.errors[-1]) if self.errors else "no reason given"


def _plain(text: str) -> str:
    """A message without the source positions and failed conditions around it."""
    text = _SOURCE.sub("", text).strip()
    match = _ASSERTION.match(text)
    return match["why"] if match else text


class _Ear(logging.Handler):
    """Sorts Polygraphy's log records into a :class:`Speech`."""

    def __init__(self, speech: Speech) -> None:
        super().__init__(logging.WARNING)
        self.speech = speech

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(re.sub(r"^\s*\[.\]\s*", "", record.getMessage()).split())
        if record.levelno >= logging.CRITICAL or any(phrase in text for phrase in _HARMLESS):
            return  # CRITICAL is Polygraphy's own summary ("could not parse"), after the error itself
        kind = self.speech.errors if record.levelno >= logging.ERROR else self.speech.warnings
        kind.append(text)
        _log.debug("%s", text)


@contextmanager
def listening() -> Iterator[Speech]:
    """Catch what TensorRT and Polygraphy would print, for the time of one parse or build."""
    talker = importlib.import_module("polygraphy.logger").G_LOGGER
    python_logger = logging.getLogger("Polygraphy")
    before = (talker.use_python_logging_system, talker.colors, python_logger.propagate, python_logger.level)
    speech = Speech()
    ear = _Ear(speech)
    talker.use_python_logging_system, talker.colors = True, False
    talker.once_logged = set()  # Polygraphy says a warning once per process; each build has its own
    python_logger.propagate = False
    python_logger.setLevel(logging.WARNING)
    python_logger.addHandler(ear)
    try:
        yield speech
    finally:
        python_logger.removeHandler(ear)
        talker.use_python_logging_system, talker.colors = before[:2]
        python_logger.propagate = before[2]
        python_logger.setLevel(before[3])
