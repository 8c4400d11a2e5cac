"""Loops in TensorRT-RTX engines: `python -m secateur.tools.bench loops`.

A stage of k dependent steps over a table of N x N beside one attention layer, as an ONNX Scan and with its steps
written out, each built in a process of its own: some end it. No GPU is needed. The table is in docs/lint.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
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


def write_graph(path: Path, steps: int, count: int, dialect: str) -> None:
    """``max_min`` over tokens ``[1,N,64]`` and, beside it, attention of four heads over as many rows."""
    import torch

    from secateur.compiler import ops
    from secateur.compiler.function import trace_function
    from secateur.exporters.dialects import DIALECTS
    from secateur.exporters.onnx import export_program, save_model
    from secateur.exporters.weights import WeightLayout
    from secateur.passes.drop_noops import drop_noops
    from secateur.passes.methods.select import max_min

    def both(tokens: Any, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
        return max_min(tokens, steps + 1).keep, ops.attention(q, k, v, 0.125, False)

    heads = {name: torch.zeros(1, 4, count, 64, dtype=torch.float16) for name in "qkv"}
    feeds = {"tokens": torch.zeros(1, count, 64), **heads}
    program = drop_noops(trace_function("stage", both, feeds, ("keep", "seen")))
    save_model(export_program(program, DIALECTS[dialect], WeightLayout({}, b"", {})), path)


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


def draw(rows: list[dict[str, Any]]) -> Table:
    table = Table("steps", "of tokens", "Scan", "written out")
    for row in rows:
        shown = [
            f"{one['bytes'] / 1e6:.1f} MB, {one['seconds']:.1f} s" if "bytes" in one else one["failed"]
            for one in (row["plain"], row["tensorrt"])
        ]
        table.add_row(str(row["steps"]), f"{row['tokens']:,}", *shown)
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m secateur.tools.bench loops", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("tensorrt_rtx") is None:
        sys.stderr.write("loops: tensorrt-rtx is not installed (pip install 'secateur[tensorrt-rtx]')\n")
        sys.exit(2)
    rows = []
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        for steps, count in CASES:
            notes.print(f"{steps} steps of {count} tokens")
            row: dict[str, Any] = {"steps": steps, "tokens": count}
            for dialect in ("plain", "tensorrt"):
                path = Path(folder) / f"{dialect}.onnx"
                write_graph(path, steps, count, dialect)
                row[dialect] = build_apart(path)
            rows.append(row)
    results.print(draw(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
