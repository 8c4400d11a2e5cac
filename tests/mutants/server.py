"""A process that has the libraries loaded and runs one test file after another, each in a child forked from it.

Started in the copy of the tree that holds the mutant; it never imports ours itself, so every child loads the files as
they lie there then. A line of JSON on standard input is an order, the answer a line on standard output. What a test
file has made a child load from the libraries in `WARM` is loaded here after it, and so is there for the next.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from typing import Any

import hypothesis  # noqa: F401  # every child wants it
import pytest

WARM = (
    "PIL", "jinja2", "numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "pydantic", "rich", "safetensors",
    "tokenizers", "torch", "transformers", "typer", "yaml",
)  # fmt: skip
MEMORY = 4 * 2**30
"""Bytes of data a child may hold."""


class Recorder:
    """pytest plugin: the first failure, and what was loaded."""

    def __init__(self) -> None:
        self.failed = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid


CHILDREN: set[int] = set()


def main() -> None:
    signal.signal(signal.SIGTERM, _end)
    for line in sys.stdin:
        order = json.loads(line)
        sys.stdout.write(json.dumps(run(order)) + "\n")
        sys.stdout.flush()
        gc.collect()
        gc.freeze()


def _end(*_: object) -> None:
    for pid in CHILDREN:
        _kill(pid)
    os._exit(1)


def run(order: dict[str, Any]) -> dict[str, Any]:
    """Run ``order["arguments"]`` of pytest within ``cpu`` and ``wall`` seconds: exit code, seconds, first failure."""
    reader, writer = os.pipe()
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _work(order, writer)
    CHILDREN.add(pid)
    os.close(writer)
    parent, late = os.getppid(), False
    while not select.select([reader], [], [], 0.5)[0]:
        if os.getppid() != parent:  # whoever gave the order is gone
            _end()
        if time.monotonic() - start > order["wall"]:
            late = True
            break
    answer = json.loads(_read(reader) or "{}") if not late else {}
    os.close(reader)
    if late:
        _kill(pid)
    _, status, usage = os.wait4(pid, 0)
    _kill(pid)  # what its tests started and left
    CHILDREN.discard(pid)
    code = os.waitstatus_to_exitcode(status)
    late = late or code in (-signal.SIGXCPU, -signal.SIGKILL)
    for name in answer.pop("loaded", []):
        try:
            importlib.import_module(name)
        except Exception:
            continue  # loads only in the state that a test had made
    return {"code": code, "late": late, "seconds": usage.ru_utime + usage.ru_stime, "failed": "", **answer}


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _read(reader: int) -> str:
    """A line, or what there is of it when the child died."""
    text = b""
    while not text.endswith(b"\n") and (part := os.read(reader, 1 << 16)):
        text += part
    return text.decode()


def _work(order: dict[str, Any], writer: int) -> None:
    """The child: never returns."""
    code = 3
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (order["cpu"], order["cpu"] + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        before = set(sys.modules)
        recorder = Recorder()
        code = int(pytest.main(order["arguments"], plugins=[recorder]))
        loaded = [name for name in list(sys.modules) if name not in before and name.partition(".")[0] in WARM]
        os.write(writer, json.dumps({"failed": recorder.failed, "loaded": loaded}).encode() + b"\n")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
