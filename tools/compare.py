"""`secateur compare`: two runs over the same rows, and the first pass that changes numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.tools.geometry import read_size

if TYPE_CHECKING:
    from rich.table import Table

    from secateur.compiler.compare import Comparison

DEMO = "demo"


def compare(
    a: Annotated[str, typer.Argument(help="oracle, fx, plain, onnxruntime, or the directory of a bundle.")],
    b: Annotated[str, typer.Argument(help="The run to hold against it; one of the same.")],
    model: Annotated[
        Path | None, typer.Option(help="The model; needed by every run that is not a bundle, and to tell ties.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A name or a recipe file; a bundle's own if not given.", metavar="NAME|FILE")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Fraction of the visual tokens left; the published one if not given.")
    ] = None,
    text_tokens: Annotated[int | None, typer.Option(help="As in compile; a bundle's own, or 64.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="As in compile; a bundle's own, or 64.")] = None,
    images: Annotated[int | None, typer.Option(help="As in compile; a bundle's own, or 1.")] = None,
    image_size: Annotated[
        str | None, typer.Option(help="As in compile; a bundle's own, or 448x448.", metavar="HxW")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="As in compile; a bundle's own, or 0.")] = None,
    fps: Annotated[float | None, typer.Option(help="As in compile; a bundle's own, or 2.")] = None,
    audio_seconds: Annotated[int | None, typer.Option(help="As in compile; a bundle's own, or 0.")] = None,
    audio_in_video: Annotated[bool | None, typer.Option(help="As in compile; a bundle's own, or yes.")] = None,
    batch: Annotated[int | None, typer.Option(help="As in compile; a bundle's own, or 1.")] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="How many rows; all of DATA, or 8 random ones.")] = None,
    data: Annotated[
        str | None, typer.Option(help="JSONL of image and question, or demo; random rows if not given.", metavar="DATA")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random rows; 0 if not given.")] = None,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 4,
    force_keep: Annotated[bool, typer.Option(help="Hold the choice of tokens equal before comparing numbers.")] = True,
    passes: Annotated[
        bool | None,
        typer.Option(help="Look for the first pass that changes numbers; by itself only where runs differ."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Store both outputs and the report in this new directory.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of one operator.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> Any:
    """Compare two runs of a recipe: which tokens they keep, what they compute, what they answer.

    oracle is the unmodified Hugging Face model with the recipe's stages under hooks, fx the pruned programs in
    PyTorch, plain and onnxruntime bundles compiled on the spot. Choices that differ are told from ties; numbers
    are compared with the choice held equal. Exit code 1 when the runs differ beyond that.

    \b
      secateur compare oracle onnxruntime --model MODEL_DIR --recipe fastv
      secateur compare oracle BUNDLE --model MODEL_DIR --data questions.jsonl --out compared
      secateur compare BUNDLE OTHER_BUNDLE
    """
    from secateur.compiler import pipeline
    from secateur.tools.progress import show_progress

    with show_progress() as tell:
        found = pipeline.compare(
            a, b, model_dir=model, recipe=recipe, keep=keep,
            geometry=_read_geometry(
                [a, b], batch=batch, images=images, text_tokens=text_tokens, new_tokens=new_tokens, frames=frames,
                image_size=read_size(image_size), fps=fps, audio_seconds=audio_seconds, audio_in_video=audio_in_video,
            ),
            questions=questions, data=_read_data(data, questions), seed=seed, new_tokens=answer_tokens,
            force_keep=force_keep, passes=passes, out=out, threads=threads, progress=tell,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=1))
    else:
        _print(found, out)
    if not found.passed:
        raise typer.Exit(1)
    return found


def _read_data(data: str | None, count: int | None) -> Any:
    if data != DEMO:
        return None if data is None else Path(data)
    from secateur.tools.sweep.data import read_demo

    return read_demo(count or 32).asked


def _read_geometry(runs: list[str], **named: Any) -> Any:
    """None if no option was given; what was not is a bundle's own, else the default."""
    from secateur.compiler.pipeline import Geometry, make_geometry
    from secateur.runtime.manifest import read_manifest

    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    if not given:
        return None
    fields = given
    for run in runs:
        if Path(run).is_dir():
            own = [vars(Geometry.of(one)) for one in read_manifest(Path(run)).each_variant()]
            fields = next((sizes for sizes in own if sizes.items() >= given.items()), own[0]) | given
    return make_geometry(fields, given)


def draw(found: Comparison) -> list[Table]:
    """What was compared, as tables."""
    from secateur.tools.inspect import make_table

    tables = []
    if found.parity.stages:
        table = make_table("stage", "equal", "tied", "different", "overlap", "lowest", title="Kept tokens")
        for name, overlap in found.parity.stages.items():
            facts = overlap.as_json()
            counts = [str(facts[verdict]) for verdict in ("equal", "tied", "different")]
            table.add_row(name, *counts, f"{facts['jaccard']:.3f}", f"{facts['lowest_jaccard']:.3f}")
        tables.append(table)
    table = make_table("what", "largest difference", "relative", "worst at", title="Numbers")
    for kind in found.parity.scales:
        difference = found.parity.kind(kind)
        table.add_row(kind, f"{difference.largest:.1e}", f"{difference.relative:.1e}", found.parity.worst_of(kind))
    tables.append(table)
    if found.footprints:
        table = make_table("pass", "held against", "largest difference", "at", "", title="Passes")
        for step in found.footprints:
            where, size = step.parity.worst
            at, found_out = where if size else "", "changes" if step.changes else ""
            table.add_row(step.name, step.against, f"{size:.1e}", at, found_out)
        tables.append(table)
    return tables


def _print(found: Comparison, out: Path | None) -> None:
    from secateur.tools.console import first_lines, results

    for table in draw(found):
        results.print(table)
        results.print()
    rows, equal = len(found.answers.differ_at), found.answers.equal
    lines = first_lines(found.parity.say_incomparable(), "unlike ") if found.comparable else []
    lines.append(f"answers  {equal} of {rows} equal, token by token")
    first = [(row, at) for row, at in enumerate(found.answers.differ_at) if at is not None]
    if first:
        lines[-1] += f"; row {first[0][0]} differs from token {first[0][1]} on"
    if found.footprints is not None:
        lines.append(f"passes   {_name_pass(found)}")
    if out is not None:
        lines.append(f"stored   {out}")
    lines.append(f"verdict  {found.a} and {found.b}: {found.verdict}")
    for line in lines:
        results.print(line, soft_wrap=True, markup=False)


def _name_pass(found: Comparison) -> str:
    if found.first_pass == "trace":
        return "the traced model already computes something else"
    if found.first_pass:
        return f"{found.first_pass} is the first that changes numbers"
    return "none changes numbers" + (
        "" if found.passed else ": look at the export, the backend, or how a bundle was made"
    )
