"""`secateur inspect`: what a bundle is, from its manifest alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.runtime.errors import UserError
from secateur.runtime.schema import PROGRAMS
from secateur.runtime.sizes import size_text

if TYPE_CHECKING:
    from rich.table import Table

    from secateur.runtime.schema import Engines, GeometrySizes, Manifest, Port, Requires


def inspect(
    bundle: Annotated[Path, typer.Argument(help="A directory that `secateur compile` made.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the manifest and the derived numbers as JSON.")
    ] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Instead: the layers its engines are made of, as far as they open here.")
    ] = False,
    program: Annotated[
        str | None, typer.Option(help="With --layers: vision, prefill or decode alone.", metavar="NAME")
    ] = None,
) -> dict[str, Any]:
    """Show a bundle's model, recipe, geometry, programs, ports, segments and files.

    Reads only the manifest; `secateur verify` looks at the files. With --layers the graphs are parsed again by the
    library the engines were built with, on any machine; engines open only where their GPU is.

    \b
      secateur inspect BUNDLE --json
      secateur inspect BUNDLE --layers --program prefill
    """
    from secateur.runtime.manifest import read_manifest

    manifest = read_manifest(bundle)
    if layers:
        return _show_layers(bundle, manifest, program, as_json)
    if program is not None:
        raise UserError("goes with --layers", where="--program", fix=f"say --layers --program {program}")
    facts = describe(manifest)
    if as_json:
        typer.echo(json.dumps(facts, indent=1, ensure_ascii=False))
        return facts
    from secateur.tools.console import results

    tables = [_overview(manifest, facts)]
    for number, one in enumerate(manifest.each_variant()):
        own = [_stages(one), draw_segments(one, facts["geometries"][number]), draw_programs(one), _ports(one)]
        for table in own:
            if manifest.variants:
                table.title = f"{table.title} of geometry {number}"
        tables += own
    for table in (*tables, _files(manifest)):
        results.print(table)
        results.print()
    return facts


def _show_layers(bundle: Path, manifest: Manifest, program: str | None, as_json: bool) -> dict[str, Any]:
    from secateur.tools.console import results
    from secateur.tools.engine_layers import draw_layers, list_layers

    found = list_layers(bundle, manifest, program)
    facts = {"bundle": str(bundle), "target": manifest.target, "programs": found}
    if as_json:
        typer.echo(json.dumps(facts, indent=1, ensure_ascii=False))
        return facts
    for drawn in draw_layers(found):
        results.print(drawn, markup=False, soft_wrap=isinstance(drawn, str))
        results.print()
    return facts


def describe(manifest: Manifest) -> dict[str, Any]:
    """The manifest as plain data, and what follows from it: cache bytes per segment, of every geometry and beside them
    of the first, and the size on disk."""
    geometries = [_caches(one) for one in manifest.each_variant()]
    return {
        "manifest": manifest.model_dump(mode="json"),
        **geometries[0],
        "geometries": geometries,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
    }


def _caches(manifest: Manifest) -> dict[str, Any]:
    from secateur.runtime.kv import cache_bytes

    total, layers = cache_bytes(manifest), sum(s.capacity * (s.last_layer - s.first_layer) for s in manifest.segments)
    per_row = total // layers if layers else 0
    return {
        "forecast": forecast_of(manifest),
        "cache_bytes": total,
        "segment_cache_bytes": {
            s.name: per_row * s.capacity * (s.last_layer - s.first_layer) for s in manifest.segments
        },
    }


def forecast_of(manifest: Manifest) -> dict[str, int] | None:
    """What a geometry's bundle was expected to take, in bytes; None where nothing was foretold."""
    return manifest.forecast.model_dump() | {"device": manifest.forecast.device} if manifest.forecast else None


def flops_text(count: float) -> str:
    """FLOPs for people: ``1.23 G``."""
    for unit in ("", "k", "M", "G"):
        if count < 1000:
            return f"{count:.3g} {unit}".strip()
        count /= 1000
    return f"{count:.3g} T"


def make_table(*columns: str, title: str) -> Table:
    """The look of every table this command line prints."""
    from rich.table import Column, Table

    # Long names fold: what is cut off cannot be copied.
    folded = [Column(name, overflow="fold") for name in columns]
    return Table(*folded, title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)


def _overview(m: Manifest, facts: dict[str, Any]) -> Table:
    from rich.text import Text

    g = m.geometry
    table = make_table("what", "value", title=m.name or m.model.source)
    table.show_header = False
    for what, value in (
        ("model", f"{m.model.architecture} from {m.model.source}, licence {m.model.license or 'not stated'}"),
        ("decoder", f"{m.model.layers} layers of {m.model.hidden_size}, "
                    f"{m.model.kv_heads} KV heads of {m.model.head_dim}"),
        ("recipe", f"{m.recipe.name}, keep {m.recipe.keep:g}, positions {m.recipe.positions}, cache {m.recipe.cache}"),
        ("paper", f"{m.recipe.title} {m.recipe.link}".strip()),
        *((f"geometry {number}" if m.variants else "geometry", one.words)
          for number, one in enumerate(m.each_variant())),
        ("visual tokens", _tokens_text(g)),
        *([("tokens of sound", f"{g.audio_tokens}")] if g.audio_tokens else []),
        ("target", f"{m.target}, {m.dtype}, opset {m.opset}, dialect {m.dialect}"
                   + (f", {m.provider}" if m.provider else "") + (f", SM {m.sm}" if m.sm else "")),
        *([("engines", _engines_text(m.engines))] if m.engines else []),
        *([("requires", _requires_text(m.requires))] if m.requires else []),
        *((what + of, text) for of, one in _numbered(m) for what, text in _preprocessing_texts(one)),
        *([("text", _text_text(m))] if m.tokenizer else []),
        *(("note", note) for note in dict.fromkeys(note for one in m.each_variant() for note in one.notes)),
        ("caches", ", ".join(size_text(one["cache_bytes"]) for one in facts["geometries"])),
        *((f"forecast{of}", text) for of, text in _forecasts(m, facts)),
        ("on disk", size_text(facts["bytes"])),
        ("made by", f"secateur {m.secateur}; " + ", ".join(f"{k} {v}" for k, v in sorted(m.versions.items()))),
    ):  # fmt: skip
        table.add_row(what, Text(value))
    return table


def _engines_text(e: Engines) -> str:
    said = [{"inputs": "weights are inputs", "plan": "weights inside", "stripped": "weights by a refit"}[e.weights]]
    said += [f"built for SM {', '.join(map(str, e.architectures))}"] if e.architectures else []
    said += ["also for later versions"] if e.version_compatible else []
    said += ["also for other GPUs from Ampere on"] if e.hardware_compatible else []
    said += ["kernels for scores inside"] if e.score_plugins else []
    said += [f"optimization level {e.opt_level}"] if e.opt_level is not None else []
    said += [f"workspace {size_text(e.workspace)}"] if e.workspace is not None else []
    return ", ".join(said)


def _requires_text(r: Requires) -> str:
    said = [f"{r.library} {r.version}" + ("" if r.exact else " or newer")]
    said += [f"SM {', '.join(map(str, r.architectures))}"] if r.architectures else []
    said += [", ".join(f"{domain} {opset}" for domain, opset in r.domains.items())]
    said += ["caches bound in place" if r.caches == "in_place" else "caches in place or copied"]
    return "; ".join([*said, *(f"{name}={value}" for name, value in r.options.items())])


def _numbered(m: Manifest) -> list[tuple[str, Manifest]]:
    """Every geometry, and its number where there are several."""
    return [(f" {number}" if m.variants else "", one) for number, one in enumerate(m.each_variant())]


def _preprocessing_texts(m: Manifest) -> list[tuple[str, str]]:
    """What becomes of pictures, a video and sound, a line for each."""
    p = m.preprocessing
    if p is None:
        return []
    lines = [("pixels", ", ".join(map(_step_text, steps))) for steps in p.images]
    if p.video is not None:
        chosen = f"{p.video.frames} frames" + (", the last one among them" if p.video.ends else "")
        lines.append(("pixels", f"{chosen}: " + ", ".join(map(_step_text, p.video.steps))))
    if p.sound is not None:
        s = p.sound
        lines.append(
            ("sound", f"{s.samples} samples at {s.sampling_rate} Hz, {s.mel_bins} mel bins, {s.frames} frames")
        )
    return lines


def _step_text(step: Any) -> str:
    """``resize 336x336 bicubic``."""
    said = step.model_dump()
    words = [said.pop("op").replace("_", " ")]
    if "grid" in said:
        return f"{words[0]} {'x'.join(map(str, said['grid']))}"
    if "height" in said:
        words.append(f"{said['height']}x{said['width']}")
    if "edge" in said:
        words.append(str(said["edge"]))
    return " ".join([*words, *([said["filter"]] if "filter" in said and words[0] != "tiles" else [])])


def _text_text(m: Manifest) -> str:
    assert m.tokenizer is not None
    t = m.tokenizer
    parts = [t.model, *dict.fromkeys((*t.normalizers, *t.pre_tokenizers, *t.decoders))]
    said = [f"tokenizer {', '.join(parts)}", f"{t.added_tokens} added tokens"]
    said += [f"{len(t.before)} put before"] if t.before else []
    said += [f"{len(t.behind)} put behind"] if t.behind else []
    template = m.prompt.template if m.prompt else None
    return "; ".join([*said, template or "no chat template"])


def _forecasts(m: Manifest, facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Which geometry, and what it is expected to take."""
    lines = []
    for number, one in enumerate(facts["geometries"]):
        if (told := one["forecast"]) is not None:
            parts = ", ".join(f"{size_text(told[n])} {n}" for n in ("weights", "caches", "activations", "buffers"))
            lines.append((f" {number}" if m.variants else "", f"{size_text(told['device'])} on the device: {parts}"))
    return lines


def _tokens_text(g: GeometrySizes) -> str:
    if g.sizes:
        each = "; ".join(f"{one.height}x{one.width}: {one.tokens}, {one.features}" for one in g.sizes)
        return f"of each image, and how many enter the decoder: {each}"
    behind = f", with {g.extra_rows} row(s) behind each image" if g.extra_rows else ""
    return f"{g.tokens_per_image} per {_grid_text(g)}, {g.features_per_image - g.extra_rows} enter the decoder{behind}"


def _grid_text(g: GeometrySizes) -> str:
    return f"grid of {g.frames // g.images} frames, of which there are {g.images}" if g.frames else "image"


def _stages(m: Manifest) -> Table:
    from rich.text import Text

    table = make_table("stage", "site", "score", "select", "merge", "scope", "tokens", title="Stages")
    for s in m.recipe.stages:
        tokens = f"{s.groups}x{s.length_in} -> {s.groups}x{s.length_out}"
        table.add_row(*(Text(t or "-") for t in (s.name, s.site, s.score, s.select, s.merge, s.scope, tokens)))
    return table


def draw_segments(m: Manifest, facts: dict[str, Any]) -> Table:
    """Tokens and cache bytes per run of layers; ``facts`` as :func:`describe` gives them."""
    table = make_table("segment", "layers", "tokens", "visual", "cached", "capacity", "caches", title="Segments")
    for s in m.segments:
        table.add_row(
            # As a range with both ends: the manifest's ``last_layer`` is exclusive.
            s.name, f"{s.first_layer}-{s.last_layer - 1}", str(s.length), str(s.length - m.geometry.fixed_tokens),
            str(s.length - s.evicted), str(s.capacity), size_text(facts["segment_cache_bytes"][s.name]),
        )  # fmt: skip
    return table


def draw_programs(m: Manifest) -> Table:
    """FLOPs per program, with and without the recipe."""
    table = make_table("program", "file", "FLOPs", "unpruned", "left", title="Programs")
    for name in PROGRAMS:
        p = m.programs[name]
        left = f"{p.flops / p.unpruned_flops:.0%}" if p.unpruned_flops else "-"
        table.add_row(name, p.engine or p.graph, flops_text(p.flops), flops_text(p.unpruned_flops), left)
    return table


def _ports(m: Manifest) -> Table:
    table = make_table("program", "", "port", "type", "shape", title="Ports")
    for name in PROGRAMS:
        program = m.programs[name]
        for kind, ports in (("in", program.inputs), ("out", program.outputs)):
            for label, port in _fold_layers(ports):
                table.add_row(name, kind, label, port.dtype, str(port.shape).replace(" ", ""))
    return table


def _fold_layers(ports: list[Port]) -> list[tuple[str, Port]]:
    """One line for caches of neighbouring layers with the same shape: ``past_key.0-7``."""
    folded: dict[tuple[str, tuple[int, ...]], list[tuple[int, Port]]] = {}
    for port in ports:
        match = re.fullmatch(r"((?:past|present)_(?:key|value))\.(\d+)", port.name)
        key = (match[1] if match else port.name, tuple(port.shape))
        folded.setdefault(key, []).append((int(match[2]) if match else -1, port))
    lines = []
    for (stem, _), members in folded.items():
        first, last = members[0][0], members[-1][0]
        label = stem if first < 0 else f"{stem}.{first}" + (f"-{last}" if last > first else "")
        lines.append((label, members[0][1]))
    return lines


def _files(m: Manifest) -> Table:
    table = make_table("file", "size", "SHA-256", title="Files")
    for path, entry in sorted(m.files.items()):
        table.add_row(path, size_text(entry.bytes), entry.sha256[:16] + "…")
    return table
