"""Resident memory of a session that holds several geometries: `python -m secateur.tools.bench.memory [--json FILE]`.

A decoder of 0.36 B parameters with random weights (the one latency is measured on) is compiled in float32 for two
geometries. A fresh process opens the bundle and generates in both, prefill and decode; the kernel says what it holds:
`Pss` counts every page once, those of the mapped weights included, `Rss` once for each time it is mapped.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from secateur.tools.console import results
from secateur.tools.threads import read_threads

SHARE = 1.3
"""Of the weights' size that may be resident."""
_FIELDS = ("Rss", "Pss", "Anonymous")


def compile_bundle(work: Path, recipe: str, keep: float) -> Path:
    """The bundle of two geometries, compiled once."""
    from secateur.compiler.pipeline import Geometry, compile
    from secateur.tools.bench.random_model import make_random_model
    from secateur.tools.progress import show_progress

    out = work / f"memory-{recipe}"
    if not out.is_dir():
        small = Geometry(images=1, text_tokens=64, new_tokens=8)
        with show_progress() as tell:
            compile(
                make_random_model(work / "random-model"), out, recipe=recipe, keep=keep, progress=tell,
                geometry=[small, Geometry(images=2, text_tokens=128, new_tokens=8)],
            )  # fmt: skip
    return out


def measure(bundle: Path, threads: int, repeat: int, prepack: bool, arena: bool) -> dict[str, Any]:
    """What a process of its own holds after each step."""
    command = [sys.executable, "-m", "secateur.tools.bench.memory", "--child", str(bundle)]
    command += ["--threads", str(threads), "--repeat", str(repeat), *["--prepack"] * prepack, *["--arena"] * arena]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run_child(bundle: Path, threads: int, repeat: int, prepack: bool, arena: bool) -> dict[str, Any]:
    """The work itself, in this process."""
    from secateur.runtime.backends.onnxruntime import OnnxRuntimeBackend
    from secateur.runtime.manifest import read_manifest
    from secateur.runtime.session import Session
    from secateur.tools.measure import make_workload, run_once

    manifest = read_manifest(bundle)
    weights = sum(manifest.files[path].bytes for path in manifest.weights)
    import onnxruntime  # noqa: F401  its own share belongs to the first row

    steps: list[dict[str, Any]] = [{"step": "libraries", **resident()}]
    backend = OnnxRuntimeBackend(bundle, manifest, threads=threads, prepack=prepack, arena=arena)
    with Session(bundle, backend=backend) as session:
        steps.append({"step": "bundle opened", **resident()})
        for index, one in enumerate(session.geometries):
            workload = make_workload(session, variant=index)
            times = [run_once(session, workload) for _ in range(repeat)]
            steps.append(
                {"step": f"geometry {index} run", "geometry": one.words, **resident(),
                 "prefill_s": min(t.prefill_s for t in times), "tpot_s": min(t.tpot_s for t in times)}
            )  # fmt: skip
    return {
        "bundle": bundle.name,
        "weights": weights,
        "threads": threads,
        "prepack": prepack,
        "arena": arena,
        "steps": steps,
    }


def resident() -> dict[str, int]:
    """Bytes of this process by the kernel's count."""
    text = Path("/proc/self/smaps_rollup").read_text()
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB", text, re.M))
    return {name: int(found[name]) * 1024 for name in _FIELDS}


def draw(report: dict[str, Any]) -> Table:
    from secateur.runtime.sizes import size_text
    from secateur.tools.inspect import make_table

    title = (
        f"{report['bundle']}, weights {size_text(report['weights'])}"
        + ", prepacked" * report["prepack"]
        + ", arenas" * report["arena"]
    )
    table = make_table("after", "Pss", "of the weights", "Rss", "anonymous", "prefill s", "s per token", title=title)
    for step in report["steps"]:
        times = (f"{step['prefill_s']:.2f}", f"{step['tpot_s']:.3f}") if "prefill_s" in step else ("", "")
        pss, rss, anonymous = (size_text(step[name]) for name in ("Pss", "Rss", "Anonymous"))
        table.add_row(step["step"], pss, f"{step['Pss'] / report['weights']:.2f}", rss, anonymous, *times)
    table.add_row("may hold", "", f"{SHARE:.2f}")
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m secateur.tools.bench.memory", description=__doc__)
    parser.add_argument("--bundle", type=Path, help="measure this one instead")
    parser.add_argument("--recipe", default="fastv")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--threads", type=read_threads, default=2, help="of ONNX Runtime (%(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="generations per geometry (%(default)s)")
    parser.add_argument("--prepack", action="store_true", help="let ONNX Runtime copy weights for its kernels")
    parser.add_argument("--arena", action="store_true", help="let sessions keep the memory of their largest run")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="where bundles are kept (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures here; - prints them instead of the table")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        sys.stdout.write(
            json.dumps(run_child(chosen.child, chosen.threads, chosen.repeat, chosen.prepack, chosen.arena))
        )
        return
    bundle = chosen.bundle or compile_bundle(chosen.work, chosen.recipe, chosen.keep)
    report = measure(bundle, chosen.threads, chosen.repeat, chosen.prepack, chosen.arena)
    text = json.dumps(report, indent=1)
    if str(chosen.json) == "-":
        sys.stdout.write(f"{text}\n")
        return
    if chosen.json is not None:
        chosen.json.write_text(f"{text}\n")
    results.print(draw(report))


if __name__ == "__main__":
    main()
