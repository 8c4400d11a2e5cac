"""Loops and steps written out: `python -m secateur.tools.bench loops`, in TensorRT-RTX engines; with ``--plain`` in
ONNX Runtime and OpenVINO.

A stage of k dependent steps over a table of N x N beside one attention layer, as an ONNX Scan and with its steps
written out, each built in a process of its own: some end it. No GPU is needed. The tables are in docs/lint.md and
docs/other-toolchains.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from secateur.tools.console import notes, results

CASES = ((15, 256), (16, 256), (56, 576), (288, 576), (288, 2880))
"""Steps, and tokens they choose from."""
_CHILD = """
import sys
from secateur.exporters.tensorrt import build_engine
from secateur.runtime.errors import SecateurError
try:
    print("built", build_engine(sys.argv[1], sys.argv[1] + ".engine").bytes)
except SecateurError as error:
    print("refused", " ".join(str(error).split())[-41:])
"""


def write_graph(path: Path, steps: int, count: int, dialect: str, half: bool = True) -> None:
    """``max_min`` over tokens ``[1,N,64]`` and, beside it, attention of four heads over as many rows."""
    import torch

    from secateur.compiler import ops
    from secateur.compiler.function import trace_function
    from secateur.exporters.dialects import DIALECTS
    from secateur.exporters.lowering_scan import lower_as_scan
    from secateur.exporters.onnx import export_program, save_model
    from secateur.exporters.weights import WeightLayout
    from secateur.passes.drop_noops import drop_noops
    from secateur.passes.methods.select import max_min

    def both(tokens: Any, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
        return max_min(tokens, steps + 1).keep, ops.attention(q, k, v, 0.125, False)

    kind = torch.float16 if half else torch.float32
    heads = {name: torch.zeros(1, 4, count, 64, dtype=kind) for name in "qkv"}
    feeds = {"tokens": torch.zeros(1, count, 64), **heads}
    program = drop_noops(trace_function("stage", both, feeds, ("keep", "seen")))
    # No dialect that TensorRT reads has the Scan.
    scans = {**DIALECTS["plain"].lowerings, torch.ops.higher_order.scan: lower_as_scan}
    chosen = replace(DIALECTS["plain"], lowerings=scans) if dialect == "scan" else DIALECTS[dialect]
    save_model(export_program(program, chosen, WeightLayout({}, b"", {})), path)


def build_apart(path: Path) -> dict[str, Any]:
    """What comes of a graph: bytes, or why not; and the seconds it took, those of imports included."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _CHILD, str(path)], capture_output=True, text=True)
    told = next((line for line in done.stdout.splitlines() if line.startswith(("built", "refused"))), "")
    kind, _, rest = told.partition(" ")
    found: dict[str, Any] = {"seconds": time.perf_counter() - start}
    if kind == "built":
        return found | {"bytes": int(rest)}
    return found | {"failed": rest or f"the process ended with {done.returncode}"}


def measure_plain(path: Path, feeds: dict[str, Any]) -> dict[str, Any]:
    """Bytes of a graph; of ONNX Runtime and OpenVINO, on one thread, seconds to load it and the best of five runs."""
    import onnxruntime as ort
    import openvino

    how = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_NUM_THREADS": 1}
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1

    def load_onnxruntime() -> Any:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda given: session.run(None, given)

    found: dict[str, Any] = {"bytes": path.stat().st_size}
    for name, load in {
        "onnxruntime": load_onnxruntime,
        "openvino": lambda: openvino.Core().compile_model(str(path), "CPU", how),
    }.items():
        start = time.perf_counter()
        run = load()
        found[f"{name}_load"] = time.perf_counter() - start
        times = []
        for _ in range(5):
            start = time.perf_counter()
            run(feeds)
            times.append(time.perf_counter() - start)
        found[f"{name}_run"] = min(times)
    return found


def compare_plain() -> tuple[list[dict[str, Any]], Table]:
    """The cases as a loop and unrolled."""
    import numpy as np

    table = Table("steps", "of tokens", "form", "graph", *(f"{n}, {w}" for n in ("ONNX Runtime", "OpenVINO")
                                                           for w in ("load", "run")))  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        for steps, count in CASES[2:4]:
            noise = np.random.default_rng(0)
            feeds = {n: noise.standard_normal((1, 4, count, 64)).astype(np.float32) for n in "qkv"}
            feeds["tokens"] = noise.standard_normal((1, count, 64)).astype(np.float32)
            for dialect in ("plain", "plain-unrolled"):
                path = Path(folder) / f"{dialect}.onnx"
                write_graph(path, steps, count, dialect, half=False)
                row = {"steps": steps, "tokens": count, "dialect": dialect, **measure_plain(path, feeds)}
                rows.append(row)
                times = [
                    f"{row[f'{n}_{w}'] * 1e3:.1f} ms" for n in ("onnxruntime", "openvino") for w in ("load", "run")
                ]
                table.add_row(str(steps), str(count), dialect, f"{row['bytes'] / 1e3:.0f} kB", *times)
    return rows, table


def draw(rows: list[dict[str, Any]]) -> Table:
    table = Table("steps", "of tokens", "Scan", "written out")
    for row in rows:
        shown = [
            f"{one['bytes'] / 1e6:.1f} MB, {one['seconds']:.1f} s" if "bytes" in one else one["failed"]
            for one in (row["scan"], row["tensorrt"])
        ]
        table.add_row(str(row["steps"]), f"{row['tokens']:,}", *shown)
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m secateur.tools.bench loops", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--plain", action="store_true", help="ONNX Runtime and OpenVINO, a loop and unrolled")
    options = parser.parse_args(arguments)
    if options.plain:
        rows, table = compare_plain()
        results.print(table)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
        return
    if importlib.util.find_spec("tensorrt_rtx") is None:
        sys.stderr.write("loops: tensorrt-rtx is not installed (pip install 'secateur[tensorrt-rtx]')\n")
        sys.exit(2)
    rows = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        for steps, count in CASES:
            notes.print(f"{steps} steps of {count} tokens")
            row: dict[str, Any] = {"steps": steps, "tokens": count}
            for dialect in ("scan", "tensorrt"):
                path = Path(folder) / f"{dialect}.onnx"
                write_graph(path, steps, count, dialect)
                row[dialect] = build_apart(path)
            rows.append(row)
    results.print(draw(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
