"""`secateur profile`: how long a bundle takes, and against another one."""

from __future__ import annotations

import json
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from secateur.runtime.schema import Manifest

_MS = ("p50", "p90", "p99")


def profile(
    bundle: Annotated[Path, typer.Argument(help="A directory that `secateur compile` made.")],
    against: Annotated[Path | None, typer.Option(help="Another bundle to run in turn with this one.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Runs that count.")] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before them that do not.")] = 3,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens to generate; all the capacity if not given.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text that fills the bucket if not given.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Random pixels if not given.")] = None,
    geometry: Annotated[
        int, typer.Option(min=0, help="Which of the bundle's geometries, in the order `inspect` lists them.")
    ] = 0,
    threads: Annotated[int | None, typer.Option(help="Threads per operator; all cores if not given.")] = None,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too, in a process of its own.")] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything here as JSON; - prints it.")
    ] = None,
) -> dict[str, Any]:
    """Measure preprocessing, vision, prefill, time to first token, time per token, memory and caches.

    With --against the two bundles run in turn, and the ratio of their times stands beside the ratio of
    their FLOPs: what the pruning promised and what the clock says.

    \b
      secateur profile BUNDLE --against UNPRUNED_BUNDLE --repeat 20
    """
    report = profile_bundles(
        [bundle] if against is None else [bundle, against],
        repeat=repeat,
        warmup=warmup,
        new_tokens=new_tokens,
        prompt=prompt,
        images=list(image or []),
        geometry=geometry,
        threads=threads,
        memory=memory,
    )
    text = json.dumps(report, indent=1, ensure_ascii=False)
    if json_file is not None and str(json_file) == "-":
        typer.echo(text)
        return report
    if json_file is not None:
        json_file.write_text(text + "\n", encoding="utf-8")
    from secateur.tools.console import results

    for table in draw(report):
        results.print(table)
        results.print()
    return report


def profile_bundles(
    paths: list[Path],
    *,
    repeat: int = 20,
    warmup: int = 3,
    new_tokens: int | None = None,
    prompt: str | None = None,
    images: list[Path] | None = None,
    geometry: int = 0,
    threads: int | None = None,
    memory: bool = True,
) -> dict[str, Any]:
    """The report as plain data: seconds, bytes, FLOPs; ``ratios`` are the second bundle over the first.

    ``geometry`` is which of the first bundle's is measured; of the second it is the same one, else its first.
    """
    from secateur.runtime.backends.cores import bound_threads
    from secateur.runtime.kv import cache_bytes
    from secateur.runtime.manifest import read_manifest
    from secateur.runtime.session import Session
    from secateur.tools import measure

    threads = bound_threads(threads)
    # Memory first: afterwards the page cache is warm for every bundle alike.
    manifests = [read_manifest(path) for path in paths]
    wanted = manifests[0].variant(geometry).words
    variants = [geometry, *(_find(manifest, wanted) for manifest in manifests[1:])]
    peaks = [
        measure.measure_memory(path, threads=threads, new_tokens=new_tokens, variant=variant) if memory else None
        for path, variant in zip(paths, variants, strict=True)
    ]
    with ExitStack() as stack:
        sessions = [stack.enter_context(Session(path, threads=threads)) for path in paths]
        workloads = [
            measure.make_workload(session, prompt, images or [], new_tokens, variant)
            for session, variant in zip(sessions, variants, strict=True)
        ]
        samples = measure.time_bundles(sessions, workloads, repeat=repeat, warmup=warmup)
        described = []
        for path, session, load, sample, peak in zip(paths, sessions, workloads, samples, peaks, strict=True):
            m = session.geometries[load.variant]
            described.append(
                {
                    "bundle": path.name,
                    "recipe": m.recipe.name,
                    "keep": m.recipe.keep,
                    "target": m.target,
                    "dtype": m.dtype,
                    "geometry": m.geometry.model_dump(),
                    "visual_tokens": {s.name: s.length - m.geometry.fixed_tokens for s in m.segments},
                    "flops": {name: program.flops for name, program in m.programs.items()},
                    "times": sample.summary(),
                    "cache_bytes": cache_bytes(m),
                    "memory": peak,
                }
            )
    report: dict[str, Any] = {
        "repeat": repeat,
        "warmup": warmup,
        "new_tokens": workloads[0].new_tokens,
        "threads": threads,
        "onnxruntime": _version("onnxruntime") or _version("onnxruntime-gpu"),
        "bundles": described,
    }
    if len(described) == 2:
        report["ratios"] = measure.ratios(*described)
    return report


def _find(manifest: Manifest, words: str) -> int:
    """The geometry of the same sizes, or the first."""
    described = [one.words for one in manifest.each_variant()]
    return described.index(words) if words in described else 0


def draw(report: dict[str, Any]) -> list[Table]:
    """The report for people: times in milliseconds, one table per bundle, then the ratios."""
    from rich.table import Table

    from secateur.runtime.sizes import size_text
    from secateur.tools.inspect import flops_text

    tables = []
    for bundle in report["bundles"]:
        lengths = " -> ".join(str(count) for count in bundle["visual_tokens"].values())
        title = f"{bundle['bundle']}: {bundle['recipe']}, keep {bundle['keep']:g}, visual tokens {lengths}"
        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for column in ("", "p50 ms", "p90 ms", "p99 ms", "FLOPs"):
            table.add_column(column, justify="right" if column else "left")
        for name, times in bundle["times"].items():
            program = {"tpot": "decode"}.get(name, name)
            flops = flops_text(bundle["flops"][program]) if program in bundle["flops"] else ""
            table.add_row(name, *(f"{times[q] * 1e3:.2f}" for q in _MS), flops)
        table.add_row("caches", size_text(bundle["cache_bytes"]))
        if bundle["memory"]:
            table.add_row("peak memory", size_text(bundle["memory"]["peak"]))
            table.add_row("  before opening", size_text(bundle["memory"]["baseline"]))
        tables.append(table)
    if "ratios" in report:
        first, second = (bundle["bundle"] for bundle in report["bundles"])
        title = f"{second} over {first}"
        table = Table("", "time", "FLOPs", title=title, title_justify="left", title_style="bold", box=None)
        for name, ratio in report["ratios"].items():
            table.add_row(name, f"{ratio['time']:.2f}x", f"{ratio['flops']:.2f}x")
        tables.append(table)
    return tables


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
