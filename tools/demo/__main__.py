"""`python -m secateur.tools.demo`: compile the demo model unpruned and pruned, ask it questions, show what was pruned.

Writes bundles, a picture per image and demo.json into build/demo.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from secateur.runtime.errors import UserError
from secateur.runtime.session import Session
from secateur.tools.console import notes, results, set_up_logging
from secateur.tools.demo import ask
from secateur.tools.demo.pictures import draw_picture
from secateur.tools.demo.show import draw_table

RECIPES = ("visionzip", "fastv")
KEEP = 0.25
TEXT_TOKENS, NEW_TOKENS = 32, 8


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    from secateur.tools.cli import fail

    set_up_logging()
    try:
        run(options)
    except (Exception, KeyboardInterrupt) as error:
        if options.debug:
            raise
        sys.exit(fail(error))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m secateur.tools.demo", description=__doc__)
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=list(RECIPES),
        metavar="NAME",
        help="rows, or YAML files, to compare (%(default)s)",
    )
    parser.add_argument("--keep", type=float, default=KEEP, help="share of visual tokens left (%(default)s)")
    parser.add_argument("--model", type=Path, default=Path("demo/model"), help="Hugging Face directory (%(default)s)")
    parser.add_argument("--questions", type=Path, default=Path("demo/questions.json"), help="what to ask (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="where everything goes (%(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="rounds of timing; 0 leaves times out (%(default)s)")
    parser.add_argument("--threads", type=int, help="threads of ONNX Runtime; all cores if not given")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of the table")
    parser.add_argument("--debug", action="store_true", help="show the traceback when something fails")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, object]:
    """Compile, ask, time, draw; returns the figures."""
    questions = ask.read_questions(options.questions)
    with ExitStack() as stack, _progress() as progress:
        paths = compile_bundles(options, progress)
        bundles = [
            ask.Bundle(label, stack.enter_context(Session(path, threads=options.threads)))
            for label, path in paths.items()
        ]
        asking = progress.add_task("ask", total=len(bundles) * len(questions))
        for bundle in bundles:
            ask.ask_bundle(bundle, questions, lambda: progress.advance(asking))
        if options.repeat > 0:
            timing = progress.add_task("time", total=(options.repeat + 1) * len(questions))
            ask.time_bundles(bundles, questions, options.repeat, lambda: progress.advance(timing))
        images = list(dict.fromkeys(question.image for question in questions))
        drawing = progress.add_task("draw", total=len(images))
        for image in images:
            draw_picture(image, bundles, questions).save(options.out / f"{image.stem}.png")
            progress.advance(drawing)
        figures = ask.report(bundles, questions)
        table = draw_table(bundles, questions)
    text = json.dumps(figures, indent=1, ensure_ascii=False)
    (options.out / "demo.json").write_text(text + "\n", encoding="utf-8")
    if options.json:
        sys.stdout.write(text + "\n")
    else:
        results.print(table)
    notes.print(f"pictures of what was pruned: {options.out}/{images[0].stem}.png and {len(images) - 1} more")
    return figures


def compile_bundles(options: argparse.Namespace, progress: Progress) -> dict[str, Path]:
    """Label -> bundle, the unpruned one first."""
    task = progress.add_task("load the compiler", total=1 + len(options.recipes))
    from secateur.compiler.pipeline import RECIPES, Geometry, compile, load_recipe

    if not 0 < options.keep <= 1:
        raise UserError(f"keep ratio {options.keep:g} is out of (0, 1]", where="--keep")
    rows = {"none": RECIPES["none"], **{recipe: load_recipe(recipe) for recipe in options.recipes}}
    geometry = Geometry(batch=1, images=1, text_tokens=TEXT_TOKENS, new_tokens=NEW_TOKENS)
    made: dict[str, Path] = {}
    for name, recipe in ((Path(given).stem, row) for given, row in rows.items()):
        keep = options.keep if recipe.stages else None
        progress.update(task, description=f"compile {name}")
        notes.print(f"compiling {options.model} with {name}")
        out = options.out / (name if keep is None else f"{name}-{keep:g}")
        compile(options.model, out, recipe=recipe, keep=keep, geometry=geometry, force=True)
        made["unpruned" if keep is None else f"{name} {keep:g}"] = out
        progress.advance(task)
    progress.update(task, description="compile")
    return made


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=notes
    )  # fmt: skip


if __name__ == "__main__":
    main()
