"""What a bundle's engines are made of: layers of the parsed networks on any machine, of the engines where they open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.runtime.errors import SecateurError, UserError
from secateur.runtime.schema import PROGRAMS

if TYPE_CHECKING:
    from rich.table import Table

    from secateur.runtime.schema import Manifest

FUSED = ("ATTENTION_INPUT", "ATTENTION_OUTPUT", "KV_CACHE_UPDATE", "NORMALIZATION", "RMS_NORMALIZATION",
         "ROTARY_EMBEDDING")  # fmt: skip
"""Layers that stand for what was many operators once; they are listed first."""


def list_layers(bundle: Path, manifest: Manifest, only: str | None = None) -> list[dict[str, Any]]:
    """Per engine of the bundle, or of the program ``only``: ``program``, ``geometry``, ``graph``, ``engine``; the
    parsed network's ``types`` (counts) and ``layers`` (type, name, ONNX node); ``engine_layers`` as the library's
    inspector tells them, or None and in ``unopened`` why. Files are compared with the manifest first.

    Raises UserError for a bundle without engines, for a program there is not, and without the library.
    """
    from secateur.exporters.tensorrt_inspector import engine_layers
    from secateur.exporters.tensorrt_network import parsed_layers
    from secateur.runtime.manifest import check_files

    if only is not None and only not in PROGRAMS:
        raise UserError(f"no program {only!r}", where="--program", available=PROGRAMS)
    if manifest.engines is None and not any(p.engine for p in manifest.programs.values()):
        raise UserError(
            f"holds no engines: its target is {manifest.target}", where=f"--layers: {bundle}",
            fix="compile with --target tensorrt-rtx or tensorrt",
        )  # fmt: skip
    check_files(bundle, manifest)
    weights = manifest.engines.weights if manifest.engines else "plan"
    found = []
    for geometry, program, graph, engine in _each_engine(manifest, only):
        layers = parsed_layers(bundle / graph, flavour=manifest.target, weights=weights)
        opened: dict[str, Any] = {"engine_layers": None, "unopened": None}
        try:
            opened["engine_layers"] = engine_layers(bundle / engine, flavour=manifest.target)
        except SecateurError as error:
            opened["unopened"] = str(error)
        found.append({
            "program": program, "geometry": geometry, "graph": graph, "engine": engine,
            "types": dict(sorted(Counter(layer.type for layer in layers).items())),
            "layers": [vars(layer) for layer in layers], **opened,
        })  # fmt: skip
    return found


def _each_engine(manifest: Manifest, only: str | None) -> Iterator[tuple[int, str, str, str]]:
    """Geometry, program, graph file and engine file, each engine once: geometries may share them."""
    seen = set()
    for geometry, one in enumerate(manifest.each_variant()):
        for name in PROGRAMS if only is None else (only,):
            program = one.programs[name]
            if program.engine is not None and program.engine not in seen:
                seen.add(program.engine)
                yield geometry, name, program.graph, program.engine


def draw_layers(found: list[dict[str, Any]]) -> list[Table | str]:
    """A table per parsed network and per opened engine, and a line for the engines that did not open."""
    from secateur.tools.inspect import make_table

    drawn: list[Table | str] = []
    for one in found:
        table = make_table("layer type", "layers", title=f"Parsed network of {one['graph']}")
        for kind, count in sorted(one["types"].items(), key=lambda item: (item[0] not in FUSED, -item[1], item[0])):
            table.add_row(kind, str(count))
        drawn.append(table)
        if one["engine_layers"] is not None:
            table = make_table("layer type", "layers", title=f"Engine {one['engine']}")
            kinds = Counter(str(layer.get("LayerType", "names only")) for layer in one["engine_layers"])
            for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0])):
                table.add_row(kind, str(count))
            drawn.append(table)
    if unopened := next((one["unopened"] for one in found if one["unopened"]), None):
        drawn.append(
            "These are the layers the parser makes of the graphs; the builder fuses further. The engines themselves "
            f"are not shown: {unopened}"
        )
    return drawn
