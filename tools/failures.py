"""What the command line says when a verb fails: one line and an exit code for every exception."""

from __future__ import annotations

import errno
import signal

from secateur.runtime.errors import SecateurError

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Terminated(BaseException):
    """A signal asked the process to end. Like `KeyboardInterrupt` it passes every ``except Exception``."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


# An exception's own text is cut here: backends put whole graphs into theirs.
_LONGEST_LINE = 400
# Our own may name everything there is to choose from, the whole table of recipes for instance.
_OWN_LINE = 1200

# The extra that brings a package, by the name it is imported under.
EXTRAS = {
    "onnx": "compile",
    "onnx_ir": "compile",
    "onnxruntime": "cpu",
    "onnxscript": "compile",
    "matplotlib": "sweep",
    "polygraphy": "tensorrt-rtx",
    "safetensors": "compile",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "torch": "compile",
    "transformers": "compile",
    "yaml": "compile",
}


def describe_failure(error: BaseException) -> tuple[str, int]:
    """The line to print after ``error:`` and the exit code for ``error``.

    2 for what the user can change (input, options, a package that is not installed), 130 for an
    interrupt, 128 and the signal's number for another signal, 1 for everything else; a
    `SecateurError` brings its own.
    """
    if isinstance(error, SecateurError):
        return _on_one_line(str(error), _OWN_LINE), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(error, Terminated):
        return f"ended by {signal.Signals(error.number).name}", 128 + error.number
    if isinstance(error, ModuleNotFoundError) and (package := (error.name or "").partition(".")[0]) in EXTRAS:
        return f"{package} is not installed; pip install 'secateur[{EXTRAS[package]}]'", USER_ERROR
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" writing {error.filename}" if error.filename else ""
        return f"disk full{where}; free some space or choose another directory", 1
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}", USER_ERROR
    text = _on_one_line(": ".join(filter(None, [type(error).__name__, str(error)])))
    return f"{text}; run with --debug for the traceback", 1


def _on_one_line(text: str, longest: int = _LONGEST_LINE) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else line[:longest].rstrip() + " …"
