"""What it costs where engines' weights lie: `python -m secateur.tools.bench engine_weights [--json FILE]`.

A decoder of 6 layers of 512 with random weights is built with its weights as inputs, in the plans and stripped: bytes
of every engine, seconds of the builder, and whether the parsed networks have the same layers. That needs no GPU. Where
there is one that runs the engines, each bundle is opened in a process of its own, and told are the device memory that
it takes with its caches and both programs, and the times of prefill and of a step of decoding.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from secateur.compiler.pipeline import (
    EngineOptions,
    Geometry,
    build,
    check_target,
    export,
    load_recipe,
    prune,
    read_source,
    trace_model,
)
from secateur.exporters.engine_options import WEIGHTS
from secateur.exporters.gpu import find_architecture
from secateur.exporters.tensorrt_network import parsed_layer_types
from secateur.runtime.errors import SecateurError
from secateur.runtime.manifest import PROGRAMS, read_manifest
from secateur.tools.console import notes, results

DECODER = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 2,
}  # fmt: skip
TOWER = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
IMAGE_SIZE = 168
_REPEAT = 20


def measure(target: str, dtype: str, sm: int | None, folder: Path) -> dict[str, Any]:
    """Build all ways below ``folder``; per way ``programs`` (bytes, seconds), or why it was not built."""
    from secateur.tools.bench.random_model import make_random_model

    model = make_random_model(folder / "model", IMAGE_SIZE, TOWER, DECODER)
    traced = trace_model(read_source(model), Geometry(text_tokens=64, new_tokens=64), dtype)
    pruned = prune(traced, load_recipe("fastv"))
    exported = export(pruned, "tensorrt")
    ways: dict[str, Any] = {}
    for way in WEIGHTS:
        seconds: dict[str, float] = {}
        try:
            goal = check_target(target, dtype, sm, engines=EngineOptions(weights=way))
            bundle = build(pruned, exported, goal, folder / way, progress=_clock(seconds))
        except SecateurError as error:
            ways[way] = {"refused": str(error)}
            continue
        ways[way] = _describe(bundle, target, way, seconds)
    gpu = find_architecture()
    report = {"target": target, "dtype": dtype, "gpu": gpu, "ways": ways}
    if gpu is not None:
        for way in ways:
            if "refused" not in ways[way]:
                ways[way]["device"] = _run_in_child(folder / way)
    return report


def _clock(seconds: dict[str, float]) -> Callable[[str, int, int], None]:
    """A progress that notes how long the builder was at work on each program."""
    begun: dict[str, float] = {}

    def tell(what: str, done: int, total: int) -> None:
        name, _, part = what.removeprefix("engine ").partition(": ")
        if part == "Building engine":
            begun.setdefault(name, time.perf_counter())
            seconds[name] = time.perf_counter() - begun[name]

    return tell


def _describe(bundle: Path, target: str, way: str, seconds: dict[str, float]) -> dict[str, Any]:
    manifest = read_manifest(bundle)
    programs = {}
    for name in PROGRAMS:
        program = manifest.programs[name]
        types = parsed_layer_types(bundle / program.graph, flavour=target, weights=way)
        programs[name] = {
            "bytes": manifest.files[str(program.engine)].bytes, "seconds": seconds[name], "types": dict(types),
            "outside": sum(manifest.tensors[weight].bytes for weight in program.weights),
        }  # fmt: skip
    return {"programs": programs}


def _run_in_child(bundle: Path) -> dict[str, Any]:
    """Memory and times of one bundle, or why it does not run."""
    command = [sys.executable, "-m", "secateur.tools.bench.engine_weights", "--child", str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run_once_opened(bundle: Path) -> dict[str, Any]:
    """Bytes of device memory that opening the bundle and its first request take, and median seconds after that."""
    from secateur.runtime.session import Session
    from secateur.tools.measure import make_workload, run_once, time_bundles

    before = _free_bytes()
    with Session(bundle) as session:
        workload = make_workload(session)
        run_once(session, workload)
        taken = before - _free_bytes()
        times = time_bundles([session], [workload], repeat=_REPEAT, warmup=2)[0].summary()
    return {"bytes": taken, "prefill": times["prefill"]["p50"], "step": times["tpot"]["p50"]}


def _free_bytes() -> int:
    runtime: Any = importlib.import_module("cuda.bindings.runtime")  # comes with the extras for TensorRT
    status, free, _ = runtime.cudaMemGetInfo()
    if int(status):
        raise SecateurError(f"the GPU does not say how much memory is free: {status}")
    return int(free)


def draw(report: dict[str, Any]) -> list[Table | str]:
    title = f"Weights of engines, {report['target']}, {report['dtype']}"
    columns = ("weights", "program", "engine MB", "outside MB", "seconds", "layers that differ from plan")
    table = Table(*columns, title=title, box=None, pad_edge=False)
    said: list[Table | str] = [table]
    device = Table("weights", "device MB", "prefill ms", "step ms", title="On the GPU", box=None, pad_edge=False)
    plan = report["ways"]["plan"].get("programs", {})
    for way, found in report["ways"].items():
        for name, one in found.get("programs", {}).items():
            own, other = Counter(one["types"]), Counter(plan[name]["types"] if plan else one["types"])
            changed = ", ".join(
                f"{kind} {own[kind] - other[kind]:+}" for kind in sorted({*own, *other}) if own[kind] != other[kind]
            )
            sizes = (f"{one[key] / 1e6:.2f}" for key in ("bytes", "outside"))
            table.add_row(way, name, *sizes, f"{one['seconds']:.1f}", changed or "none")
        if "refused" in found:
            said.append(f"{way}: not built: {found['refused']}")
        if (ran := found.get("device")) is not None:
            if "failed" in ran:
                said.append(f"{way}: does not run: {ran['failed']}")
            else:
                times = (f"{1e3 * ran[key]:.2f}" for key in ("prefill", "step"))
                device.add_row(way, f"{ran['bytes'] / 1e6:.1f}", *times)
    if report["gpu"] is None:
        return [*said, "No GPU is here: device memory and times were not measured."]
    return [*said, device]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m secateur.tools.bench engine_weights", description=__doc__)
    parser.add_argument("--target", default="tensorrt-rtx", choices=("tensorrt", "tensorrt-rtx"))
    parser.add_argument("--dtype", default="fp16", choices=("fp16", "bf16"))
    parser.add_argument("--sm", type=int, help="of tensorrt-rtx; that of the GPU here where there is one, else 89")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        sys.stdout.write(json.dumps(run_once_opened(chosen.child)))
        return
    sm = chosen.sm or (find_architecture() if chosen.target == "tensorrt-rtx" else None)
    with tempfile.TemporaryDirectory(prefix="engine-weights-") as folder:
        notes.print("building three engines in each of three ways")
        report = measure(chosen.target, chosen.dtype, sm, Path(folder))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(report, indent=1) + "\n")
    for drawn in draw(report):
        results.print(drawn, markup=False, soft_wrap=isinstance(drawn, str))


if __name__ == "__main__":
    main()
