"""`secateur compile`: a checkpoint and a recipe in, a bundle out."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.runtime.errors import UserError
from secateur.runtime.row_media import PARTS
from secateur.runtime.schema import PROGRAMS
from secateur.tools.engine_flags import (
    EngineWeights,
    HardwareCompatible,
    Loops,
    OptLevel,
    ScorePlugins,
    Sm,
    StripWeights,
    TimingCache,
    VersionCompatible,
    Workspace,
    read_engine_options,
)
from secateur.tools.forecast import DeviceMemory, IgnoreForecast, read_bytes, show_forecast
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
    from secateur.runtime.schema import Manifest

_log = logging.getLogger(__name__)


def compile_model(
    model_dir: Annotated[Path, typer.Argument(help="A Hugging Face directory with safetensors weights.")],
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory for the bundle; appears whole or not at all.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="A name that `secateur recipes` lists, FILE.yaml, FILE.py:NAME, or several joined by +.")
    ] = "none",
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
    geometry: Annotated[
        list[str] | None,
        typer.Option(
            help="Sizes by name, others as the options above say; given several times, all share one copy of the "
            "weights and the smallest that fits a prompt is run. A YAML file lists several.",
            metavar="KEY=VALUE,...|FILE.yaml",
        ),
    ] = None,
    target: Annotated[
        str, typer.Option(help="onnxruntime (CPU), onnxruntime-cuda, plain (standard ONNX), tensorrt or tensorrt-rtx.")
    ] = "onnxruntime",
    dtype: Annotated[
        str | None,
        typer.Option(help="fp32, fp16, bf16, or auto for the checkpoint's own; fp32 if not given, fp16 for GPUs."),
    ] = None,
    sm: Sm = None,
    engine_weights: EngineWeights = None,
    strip_weights: StripWeights = False,
    workspace: Workspace = None,
    opt_level: OptLevel = None,
    version_compatible: VersionCompatible = False,
    hardware_compatible: HardwareCompatible = False,
    timing_cache: TimingCache = None,
    score_plugins: ScorePlugins = False,
    weights: Annotated[
        str | None,
        typer.Option(
            help="stream (default): one file of what the graphs use, cast where needed. reference: hard links to the "
            "checkpoint's files, as they are. copy: copies of them."
        ),
    ] = None,
    loops: Loops = None,
    self_test: Annotated[
        str | None,
        typer.Option(
            help="What the bundle's self-test holds. auto (default): pictures, prompts, ids, pixels, and, where the "
            "programs run here in about a second, survivors, tokens and logits. full: those in any case. inputs: not "
            "those. none: no self-test."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there already.")] = False,
    dump_dir: Annotated[Path | None, typer.Option(help="Write the graphs here as text after each pass.")] = None,
    stop_after: Annotated[
        str | None, typer.Option(metavar="PASS", help="Print the graphs as this pass leaves them; write no bundle.")
    ] = None,
    device_memory: DeviceMemory = None,
    ignore_forecast: IgnoreForecast = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> dict[str, Any]:
    """Compile a model and a pruning recipe into a bundle of static-shape graphs or engines.

    \b
      secateur compile MODEL_DIR -o BUNDLE --recipe fastv --keep 0.25
      secateur compile MODEL_DIR -o BUNDLE --recipe my_recipe.yaml --text-tokens 128
      secateur compile MODEL_DIR -o BUNDLE --geometry images=1 --geometry images=2,text_tokens=128
      secateur compile QWEN_VL -o BUNDLE --recipe divprune --images 2 --image-size 448x672
      secateur compile QWEN_OMNI -o BUNDLE --frames 16 --fps 2 --image-size 336x448 --audio-seconds 8
      secateur compile MODEL_DIR -o ENGINES --recipe divprune --target tensorrt-rtx --sm 89
      secateur compile MODEL_DIR -o ENGINES --target tensorrt --dtype bf16 --workspace 8GiB --timing-cache FILE
      secateur compile MODEL_DIR -o BUNDLE --target plain --dtype auto --weights reference
      secateur compile MODEL_DIR -o BUNDLE --recipe divprune --target plain --loops unroll
      secateur compile MODEL_DIR --recipe fastv --stop-after insert_decoder_stages
    """
    if out is None and stop_after is None:
        raise UserError("no place for the bundle", where="--output", fix="name a directory: -o BUNDLE")
    from secateur.compiler import pipeline
    from secateur.tools.progress import show_progress

    given = list_given(
        image_size, batch=batch, images=images, text_tokens=text_tokens, new_tokens=new_tokens, frames=frames, fps=fps,
        audio_seconds=audio_seconds, audio_in_video=audio_in_video,
    )  # fmt: skip
    geometries = pipeline.read_geometries(list(geometry or []), given)
    engines = read_engine_options(
        engine_weights,
        strip_weights,
        workspace,
        opt_level,
        version_compatible,
        hardware_compatible,
        timing_cache,
        score_plugins,
    )
    expected: Any = pipeline.Expected(
        read_bytes(device_memory, "--device-memory"), None if as_json else show_forecast, ignore_forecast
    )
    if stop_after is not None:
        expected = None
    with show_progress() as tell:
        made = pipeline.compile(
            model_dir, out or Path(), recipe=recipe, keep=keep, mean_keep=read_mean_keep(mean_keep),
            flops_keep=flops_keep,
            geometry=geometries, target=target, dtype=dtype, sm=sm or None, engines=engines,
            weights=weights, loops=loops, force=force, dump_dir=dump_dir, stop_after=stop_after, progress=tell,
            expected=expected, self_test=self_test,
        )  # fmt: skip
    if not isinstance(made, Path):
        for flag, value in (
            ("--output", out), ("--device-memory", device_memory), ("--ignore-forecast", ignore_forecast or None),
        ):  # fmt: skip
            if value is not None:
                _log.warning("%s says nothing beside --stop-after: no bundle is written", flag)
        text = str(made)
        typer.echo(json.dumps({"stopped_after": stop_after, "text": text}, indent=1) if as_json else text)
        return {"stopped_after": stop_after, "text": text}
    summary = summarize(made)
    if as_json:
        typer.echo(json.dumps(summary, indent=1, ensure_ascii=False))
    else:
        _print_summary(made, summary)
    return summary


def summarize(bundle: Path) -> dict[str, Any]:
    """What was made, as plain data: place, bytes, tokens per segment, FLOPs per program, the next command."""
    from secateur.runtime.manifest import read_manifest
    from secateur.tools.inspect import forecast_of

    m = read_manifest(bundle)
    return {
        "bundle": str(bundle),
        "bytes": sum(entry.bytes for entry in m.files.values()),
        "recipe": m.recipe.name,
        "keep": m.recipe.keep,
        "media": m.shown,
        "target": m.target,
        "dtype": m.dtype,
        "segments": _segments(m),
        "flops": _flops(m),
        "forecast": forecast_of(m),
        "geometries": [
            {
                "geometry": one.geometry.model_dump(),
                "segments": _segments(one),
                "flops": _flops(one),
                "forecast": forecast_of(one),
            }
            for one in m.each_variant()
        ],
        "next": _next_command(bundle, m),
    }


def _segments(m: Manifest) -> list[dict[str, Any]]:
    text = m.geometry.fixed_tokens
    return [
        {"layers": [s.first_layer, s.last_layer - 1], "visual": s.length - text, "text": text, "length": s.length}
        for s in m.segments
    ]


def _flops(m: Manifest) -> dict[str, dict[str, int]]:
    return {name: {"before": m.programs[name].unpruned_flops, "after": m.programs[name].flops} for name in PROGRAMS}


def _next_command(bundle: Path, m: Manifest) -> str:
    from secateur.runtime.backends.preflight import has_driver

    if m.engines is not None and not has_driver():
        return f"secateur inspect {shlex.quote(str(bundle))} --layers"
    runs = has_driver() if m.target == "onnxruntime-cuda" else m.dtype == "fp32"
    if m.engines is None and not runs:
        return f"secateur inspect {shlex.quote(str(bundle))}"
    items, batch = m.items, m.geometry.batch
    files = {"image": "photo{}.png", "video": "video{}.gif", "audio": "sound{}.wav"}
    shown = ""
    for kind, file in files.items():
        count = batch * sum(kind in PARTS[item] for item in items)
        shown += "".join(f" --{kind} {file.format(i + 1 if count > 1 else '')}" for i in range(count))
    asked = f' --prompt "What is in the {"video" if m.geometry.frames else "picture"}?"' * batch
    return f"secateur run {shlex.quote(str(bundle))}{shown}{asked}"


def _print_summary(bundle: Path, summary: dict[str, Any]) -> None:
    from rich.text import Text

    from secateur.runtime.manifest import read_manifest
    from secateur.runtime.sizes import size_text
    from secateur.tools.console import results
    from secateur.tools.inspect import describe, draw_programs, draw_segments

    m = read_manifest(bundle)
    for one, facts in zip(m.each_variant(), describe(m)["geometries"], strict=True):
        if m.variants:
            results.print(Text(one.words), soft_wrap=True)
        results.print(draw_segments(one, facts))
        results.print()
        results.print(draw_programs(one))
        results.print()
    kind = f"{m.recipe.name}, keep {m.recipe.keep:g}, {m.target}, {m.dtype}"
    results.print(Text(f"{bundle}: {kind}, {size_text(summary['bytes'])}"), soft_wrap=True)
    results.print(Text(f"A row holds {m.shown}."), soft_wrap=True)
    results.print(Text(f"Next: {summary['next']}"), soft_wrap=True)
