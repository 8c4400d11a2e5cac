"""`secateur calibrate`: what a recipe's scores owe to place and sinks, as a file that recipes refer to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.runtime.errors import UserError
from secateur.tools.geometry import ImageSize, read_size

if TYPE_CHECKING:
    from rich.table import Table

    from secateur.compiler.calibration import Calibration

DEMO = "demo"


def calibrate(
    model_dir: Annotated[Path, typer.Argument(help="A Hugging Face directory with safetensors weights.")],
    data: Annotated[str, typer.Argument(help="JSONL of image and question, or demo.", metavar="DATA")],
    out: Annotated[Path, typer.Option("--output", "-o", help="The calibration file (.json).")],
    recipe: Annotated[str, typer.Option(help="The recipe whose scores are measured.", metavar="NAME|FILE")] = "fastv",
    keep: Annotated[
        float | None, typer.Option(help="Fraction of the visual tokens left; the published one if not given.")
    ] = None,
    image_size: ImageSize = None,
    questions: Annotated[int | None, typer.Option(min=1, help="How many; all of a file, 100 of demo.")] = None,
    curve: Annotated[
        bool, typer.Option(help="Weights from a smooth curve through the mean scores, not place by place.")
    ] = True,
    mass: Annotated[float, typer.Option(help="Count the tokens that hold this fraction of the score.")] = 0.9,
    tau: Annotated[float, typer.Option(help="A sink dimension is this many times its row's mean square root.")] = 20.0,
    write_recipe: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Also write the recipe with what was measured.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the calibration as JSON.")] = False,
) -> Any:
    """Measure a recipe's scores on questions: weights that undo the pull of a token's place, dimensions of attention
    sinks, and how many tokens hold most of the score.

    The answers are not read. A recipe file refers to the numbers by the file's name and digest, as printed here.

    \b
      secateur calibrate MODEL_DIR questions.jsonl --recipe fastv -o fastv.calibration.json
      secateur calibrate MODEL_DIR questions.jsonl --recipe fastv -o c.json --write-recipe fastv-calibrated.yaml
    """
    for path in filter(None, (out, write_recipe)):
        if path.exists() and not (force and path.is_file()):
            raise UserError("exists already", where=str(path), fix="choose another name, or replace it with --force")
        if not path.absolute().parent.is_dir():
            raise UserError("no such directory", where=str(path.parent), fix="make it first")
    from secateur.compiler import pipeline
    from secateur.tools.progress import show_progress

    with show_progress() as tell:
        found = pipeline.calibrate(
            model_dir, _read_data(data, questions), recipe=recipe, keep=keep, questions=questions, tau=tau, mass=mass,
            curve=curve, image_size=read_size(image_size), progress=tell,
        )  # fmt: skip
    out.write_bytes(found.to_bytes())
    if write_recipe is not None:
        pipeline.write_calibrated(recipe, write_recipe, out)
    if as_json:
        typer.echo(json.dumps({"sha256": found.sha256, **found.model_dump(mode="json")}, indent=1))
        return found
    from secateur.tools.console import results

    results.print(draw(found))
    results.print()
    for line in _references(found, out):
        results.print(line, soft_wrap=True, markup=False)
    if write_recipe is not None:
        results.print(f"recipe   {write_recipe}", soft_wrap=True, markup=False)
    results.print(f"sha256   {found.sha256}", soft_wrap=True)
    return found


def _read_data(data: str, count: int | None) -> Any:
    if data != DEMO:
        return Path(data)
    from secateur.tools.sweep.data import read_demo

    return read_demo(count or 100).asked


def draw(found: Calibration) -> Table:
    """What was measured, stage by stage."""
    from secateur.tools.inspect import make_table

    recipe, data = found.recipe, found.data
    title = f"{recipe.name}, keep {recipe.keep:g}, {data.count} questions of {data.name}"
    table = make_table("stage", "site", "tokens", "weights", "hold the mass", "sink dimensions", title=title)
    for name, stage in found.stages.items():
        weights = stage.position_weights
        span = f"{min(weights):.3g} to {max(weights):.3g}" if weights else "none: a mean score is not positive"
        count = "none: a score is negative" if stage.count is None else f"{stage.count} hold {stage.mass:g}"
        dims = "" if stage.sink_dims is None else ", ".join(map(str, stage.sink_dims)) or "none"
        table.add_row(name, stage.site, str(stage.tokens), span, count, dims)
    return table


def _references(found: Calibration, out: Path) -> list[str]:
    lines = []
    for name, stage in found.stages.items():
        if stage.position_weights:
            lines.append(f"weights  {found.refer(out.name, name, 'position_weights')}")
        if stage.sink_dims:
            lines.append(f"dims     {found.refer(out.name, name, 'sink_dims')}")
    return lines
