"""What compiling costs at full size: `python -m secateur.tools.bench.compile_scale [--json FILE]`.

A model of LLaVA-1.5-7B's shape goes from its configuration to pruned ONNX graphs, without weights, in a process of its
own whose time and peak resident memory are measured from outside its first import to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from secateur.tools.console import results

SECONDS, GIBIBYTES = 60.0, 2.0
"""What it may take on two idle cores."""

LLAVA_7B: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 32000,
    "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    "text_config": {
        "model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    },
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
    },
}  # fmt: skip


def measure(recipe: str = "fastv", dialect: str = "onnxruntime") -> dict[str, Any]:
    """Seconds (wall, CPU) and peak resident GiB per phase and as a whole, and the nodes of each graph.

    Done in a child process, since a process keeps the peak of whatever it did before.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAVA_7B))
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "secateur.tools.bench.compile_scale", "--child", folder, recipe, dialect],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        whole = time.perf_counter() - begin
    report: dict[str, Any] = json.loads(done.stdout)
    report |= {"seconds": whole, "cpu_seconds": sum(p["cpu_seconds"] for p in report["phases"])}
    report["peak_gib"] = report["phases"][-1]["peak_gib"]
    return report


def run_phases(folder: str, recipe: str, dialect: str) -> dict[str, Any]:
    """The work itself, phase by phase, in this process."""
    phases: list[dict[str, Any]] = []
    wall, cpu = time.perf_counter(), 0.0

    def lap(name: str) -> None:
        nonlocal wall, cpu
        now, spent = time.perf_counter(), time.process_time()
        phases.append({"phase": name, "seconds": now - wall, "cpu_seconds": spent - cpu, "peak_gib": peak_gib()})
        wall, cpu = now, spent

    from secateur.compiler.pipeline import RECIPES, Geometry, export, prune, read_source, trace_model

    lap("import")
    source = read_source(Path(folder))
    lap("read")
    traced = trace_model(source, Geometry(), "fp16")
    lap("trace")
    pruned = prune(traced, RECIPES[recipe])
    lap("prune")
    exported = export(pruned, dialect)
    lap("export")
    nodes = {name: sum(1 for _ in model.graph.all_nodes()) for name, model in exported.models.items()}
    return {
        "recipe": recipe, "dialect": dialect, "layers": source.decoder_layers,
        "segments": [str(s) for s in pruned.programs.segments], "nodes": nodes, "weights_bytes": exported.layout.size,
        "phases": phases,
    }  # fmt: skip


def peak_gib() -> float:
    """Peak resident memory of this process so far."""
    from secateur.tools.measure import peak_resident_bytes

    return peak_resident_bytes() / 2**30


def draw(report: dict[str, Any]) -> Table:
    title = f"LLaVA-1.5-7B's shape, {report['recipe']}, {report['dialect']} dialect, no weights"
    table = Table("phase", "seconds", "CPU seconds", "peak GiB", title=title, box=None, pad_edge=False)
    rows = [*report["phases"], {**report, "phase": "all, with the start of Python"}]
    for row in rows:
        numbers = (row["seconds"], row["cpu_seconds"], row["peak_gib"])
        table.add_row(row["phase"], f"{numbers[0]:.1f}", f"{numbers[1]:.1f}", f"{numbers[2]:.2f}")
    table.add_row("may take, on idle cores", f"{SECONDS:.0f}", "", f"{GIBIBYTES:.0f}")
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m secateur.tools.bench.compile_scale", description=__doc__)
    parser.add_argument("--recipe", default="fastv")
    parser.add_argument("--dialect", default="onnxruntime")
    parser.add_argument("--json", type=Path, help="also write the figures here; - prints them instead of the table")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        sys.stdout.write(json.dumps(run_phases(*chosen.child)))
        return
    report = measure(chosen.recipe, chosen.dialect) | {"load": os.getloadavg()[0]}
    text = json.dumps(report, indent=1)
    if str(chosen.json) == "-":
        sys.stdout.write(f"{text}\n")
        return
    if chosen.json is not None:
        chosen.json.write_text(f"{text}\n")
    results.print(draw(report))


if __name__ == "__main__":
    main()
