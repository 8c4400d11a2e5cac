"""`secateur explain`: what a recipe does to a model, before anything is compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.tools.engine_flags import Loops
from secateur.tools.geometry import (
    AudioInVideo,
    AudioSeconds,
    Batch,
    Fps,
    Frames,
    Images,
    ImageSize,
    MeanKeep,
    NewTokens,
    TextTokens,
    list_given,
    read_mean_keep,
)  # fmt: skip

if TYPE_CHECKING:
    from rich.table import Table

    from secateur.compiler.explain import Explanation


def explain(
    recipe: Annotated[
        str,
        typer.Argument(help="A name that `secateur recipes` lists, FILE.yaml, FILE.py:NAME, or several joined by +."),
    ],
    model_dir: Annotated[Path, typer.Argument(help="A Hugging Face directory; its config.json is enough.")],
    keep: Annotated[
        float | None, typer.Option(help="Fraction of the visual tokens left; the published one if not given.")
    ] = None,
    mean_keep: MeanKeep = None,
    flops_keep: Annotated[
        float | None, typer.Option(help="Instead: the fraction of the unpruned prefill's FLOPs.")
    ] = None,
    text_tokens: TextTokens = None,
    new_tokens: NewTokens = None,
    images: Images = None,
    image_size: ImageSize = None,
    frames: Frames = None,
    fps: Fps = None,
    audio_seconds: AudioSeconds = None,
    audio_in_video: AudioInVideo = None,
    batch: Batch = None,
    target: Annotated[
        str | None, typer.Option(help="Also forecast what a bundle for it takes, as `secateur compile` would.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="fp32, fp16 or bf16; decides bytes. fp32 if not given, fp16 for GPUs."),
    ] = None,
    loops: Loops = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> Any:
    """Show a recipe's stages, and for a model the tokens left per layer, FLOPs and cache bytes, before and after.

    No weights are read, so a directory that holds only config.json will do.

    \b
      secateur explain fastv MODEL_DIR --keep 0.25
      secateur explain my_recipe.yaml MODEL_DIR --images 2 --json
      secateur explain divprune:keep=0.5+fastv:keep=0.5 MODEL_DIR
      secateur explain pyramiddrop MODEL_DIR --mean-keep 0.4
      secateur explain fastv MODEL_DIR --target tensorrt-rtx
      secateur explain seats QWEN_OMNI --frames 16 --image-size 336x448 --audio-seconds 8
    """
    from secateur.compiler.pipeline import explain as explain_recipe
    from secateur.compiler.pipeline import make_geometry
    from secateur.tools.progress import show_progress

    given = list_given(
        image_size, batch=batch, images=images, text_tokens=text_tokens, new_tokens=new_tokens, frames=frames, fps=fps,
        audio_seconds=audio_seconds, audio_in_video=audio_in_video,
    )  # fmt: skip
    with show_progress() as tell:
        found = explain_recipe(
            recipe,
            model_dir,
            keep=keep,
            mean_keep=read_mean_keep(mean_keep),
            flops_keep=flops_keep,
            geometry=make_geometry(given, given),
            target=target,
            dtype=dtype,
            loops=loops,
            progress=tell,
        )
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=1, ensure_ascii=False))
        return found
    from secateur.tools.console import results

    for table in draw(found):
        results.print(table)
        results.print()
    return found


def draw(found: Explanation) -> list[Table]:
    """The explanation as tables."""
    from rich.text import Text

    from secateur.runtime.sizes import size_text
    from secateur.tools.forecast import draw_forecast
    from secateur.tools.inspect import flops_text, make_table

    g = found.geometry
    overview = make_table("what", "value", title=f"{found.recipe}, keep {found.keep:g}")
    overview.show_header = False
    rows: list[tuple[str, Any]] = [
        *found.paper(),
        ("positions", found.positions),
        ("cache", found.cache),
        ("model", f"{found.model}, {found.dtype}"),
        ("geometry", f"batch {g.batch}, {g.media} per row, {g.new_tokens} new tokens"),
        ("a row", found.row),
        ("mean keep", f"{found.mean_keep:.3g} of the {found.kind} tokens, averaged over the decoder's layers"),
    ]  # fmt: skip
    for what, value in rows:
        if value:
            overview.add_row(what, Text(value))
    stages = make_table("stage", "site", "", "function or signal", title="Stages")
    for stage in found.stages:
        lines = [("score", stage.score), ("select", stage.select), ("merge", stage.merge)]
        lines += [
            ("signal", name + "".join(f", {key} {value}" for key, value in options.items()))
            for name, options in stage.signals.items()
        ]
        lines.append(("tokens", f"{stage.groups}x{stage.length_in} -> {stage.groups}x{stage.length_out}, "
                                f"scope {stage.scope}"))  # fmt: skip
        heads = [(stage.name, stage.site)]
        for role, text in lines:
            if text is not None:
                name, site = heads.pop() if heads else ("", "")
                stages.add_row(name, site, role, Text(text))
    layers = make_table("layers", found.kind, "text", "length", "cached", title="Tokens per row")
    for first, last, visual in found.segments():
        slots = g.text_tokens + found.extra_tokens
        held = found.cached_tokens[first] + slots
        layers.add_row(f"{first}-{last}", str(visual), str(slots), str(visual + slots), str(held))
    cost = make_table("cost", "unpruned", "pruned", "left", title="Costs of one batch (decode: one step)")
    for name, change in found.flops.items():
        cost.add_row(f"{name} FLOPs", flops_text(change.before), flops_text(change.after), f"{change.ratio:.1%}")
    kv = found.kv_bytes
    cost.add_row("KV caches", size_text(kv.before), size_text(kv.after), f"{kv.ratio:.1%}")
    tables = [overview, stages, layers, cost] if found.stages else [overview, layers, cost]
    return tables if found.forecast is None else [*tables, draw_forecast(found.forecast)]
