"""Forecasts beside what was measured: `python -m secateur.tools.bench.forecast [NAME ...] [--json FILE]`.

Models with random weights, small to middling, are compiled by `secateur compile` in a process of its own, whose peak of
resident memory is read from outside. Of TensorRT-RTX engines the bytes are compared, which needs no GPU; their device
memory only a GPU can tell. A bundle for ONNX Runtime is also opened and run in a fresh process, twice: what is resident
behind the libraries, by the kernel's count of pages (`Pss`), and how far the second run rises above that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from secateur.runtime.leftovers import held_directory
from secateur.tools.bench.compile_real import run_module
from secateur.tools.bench.memory import resident
from secateur.tools.bench.random_model import make_random_model
from secateur.tools.console import notes, results
from secateur.tools.measure import resident_mark

LAYOUTS: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 4},
    "deep": {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 24},
    "middle": {"num_hidden_layers": 8},
    "words": {"num_hidden_layers": 4, "vocab_size": 65536},
    "large": {
        "hidden_size": 1152, "intermediate_size": 4864, "num_attention_heads": 18, "num_hidden_layers": 16
    },
    "tower": {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 4},
}  # fmt: skip
"""Decoders by what is changed of the model latency is measured on; with four layers of its tower where no other is."""
TOWERS = {"tower": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}}
TARGETS = ("onnxruntime", "tensorrt-rtx")
_GEOMETRY = ("--text-tokens", "64", "--new-tokens", "8")


def measure(
    name: str, target: str, work: Path, engine_weights: str = "inputs", recipe: tuple[str, ...] = ("fastv", "0.25")
) -> dict[str, Any]:
    """Compile a layout with a recipe and the share it keeps; what was foretold and what came, in bytes."""
    from secateur.runtime.manifest import read_manifest

    model = make_random_model(
        work / f"forecast-{name}", tower=TOWERS.get(name, {"num_hidden_layers": 4}), decoder=LAYOUTS[name]
    )
    ways = ["--engine-weights", engine_weights] if target.startswith("tensorrt") else []
    for option, given in zip(("--recipe", "--keep"), recipe, strict=False):
        ways += [option, given]
    with held_directory(work, "forecast-") as folder:
        bundle = Path(folder) / "bundle"
        used = run_module(
            "secateur", "compile", str(model), "-o", str(bundle), "--target", target, *_GEOMETRY, *ways,
        )  # fmt: skip
        manifest = read_manifest(bundle)
        told = manifest.forecast
        assert told is not None
        files = [p.engine or p.graph for p in manifest.programs.values()]
        rows = [
            ("engines", told.engines, sum(manifest.files[path].bytes for path in files)),
            ("host", told.host, int(used["peak_gib"] * 2**30)),
        ]
        if target == "onnxruntime":
            ran = _run_apart(bundle)
            lasting = told.weights + told.caches + told.buffers
            rows += [("resident", lasting, ran["resident"]), ("activations", told.activations, ran["risen"])]
    weights = sum(manifest.files[path].bytes for path in manifest.weights)
    return {
        "layout": name, "target": target, "weights": weights,
        "figures": {what: {"forecast": one, "measured": other} for what, one, other in rows},
    }  # fmt: skip


def _run_apart(bundle: Path) -> dict[str, int]:
    # Blocks are given back to the kernel at once, so that its count is that of what is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "secateur.tools.bench.forecast", "--child", str(bundle)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def run_child(bundle: Path) -> dict[str, int]:
    """Generate twice in this process."""
    import onnxruntime  # noqa: F401  the libraries' own share comes before

    from secateur.runtime.session import Session
    from secateur.tools.measure import make_workload, run_once

    before = resident()["Pss"]
    with Session(bundle, threads=1) as session:
        workload = make_workload(session)
        run_once(session, workload)
        after = resident()
        Path("/proc/self/clear_refs").write_text("5")  # the mark of the peak begins anew
        run_once(session, workload)
        return {"resident": after["Pss"] - before, "risen": (resident_mark() or 0) - after["Rss"]}


def draw(reports: list[dict[str, Any]]) -> Any:
    """The table of docs/forecast.md."""
    from secateur.runtime.sizes import size_text
    from secateur.tools.inspect import make_table

    table = make_table("layout", "target", "weights", "what", "forecast", "measured", "off", title="Forecasts")
    for report in reports:
        heads = [report["layout"], report["target"], size_text(report["weights"])]
        for what, figure in report["figures"].items():
            off = figure["forecast"] / figure["measured"] - 1
            table.add_row(*heads, what, size_text(figure["forecast"]), size_text(figure["measured"]), f"{off:+.0%}")
            heads = ["", "", ""]
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m secateur.tools.bench.forecast", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(LAYOUTS)}; all if none is given")
    parser.add_argument("--target", choices=TARGETS, help="one of them only")
    parser.add_argument("--engine-weights", choices=("inputs", "plan"), default="inputs", help="%(default)s")
    parser.add_argument("--recipe", default="fastv:0.25", help="and the share it keeps (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="where models are kept (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        sys.stdout.write(json.dumps(run_child(chosen.child)))
        return
    if unknown := [name for name in chosen.names if name not in LAYOUTS]:
        parser.error(f"no layout {unknown[0]!r} (available: {', '.join(LAYOUTS)})")
    reports = []
    for name in chosen.names or LAYOUTS:
        for target in [chosen.target] if chosen.target else TARGETS:
            notes.print(f"compiling {name} for {target}")
            reports.append(measure(name, target, chosen.work, chosen.engine_weights, (*chosen.recipe.split(":"),)))
            if chosen.json is not None:
                chosen.json.write_text(json.dumps(reports, indent=1) + "\n")
    results.print(draw(reports))


if __name__ == "__main__":
    main()
