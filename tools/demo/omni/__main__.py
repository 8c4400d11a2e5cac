"""`python -m secateur.tools.demo.omni`: compile the omni demo model unpruned and pruned, ask it about clips.

Writes bundles, a picture per shipped clip of which tokens survived in every second, and demo.json into build/demo-omni.
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
from secateur.tools.demo.ask import Bundle
from secateur.tools.demo.omni.clips import FRAME_SIZE, FRAMES, FRAMES_PER_SECOND, SECONDS
from secateur.tools.demo.omni.pictures import draw_clip
from secateur.tools.demo.omni.questions import held_out, load_shipped
from secateur.tools.demo.omni.run import ask_bundle, report
from secateur.tools.demo.omni.show import draw_table

RECIPES = ("seats",)
TEXT_TOKENS, NEW_TOKENS = 48, 4


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
    parser = argparse.ArgumentParser(prog="python -m secateur.tools.demo.omni", description=__doc__)
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=list(RECIPES),
        metavar="NAME",
        help="rows, or YAML files, to compare (%(default)s)",
    )
    parser.add_argument("--keep", type=float, help="share of tokens left; the published one if not given")
    parser.add_argument("--model", type=Path, default=Path("demo/omni/model"), help="HF directory (%(default)s)")
    parser.add_argument(
        "--questions", type=Path, default=Path("demo/omni/questions.json"), help="what to show (%(default)s)"
    )
    parser.add_argument("--clips", type=int, default=60, help="held-out clips to measure with (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/demo-omni"), help="where all goes (%(default)s)")
    parser.add_argument("--threads", type=int, help="threads of ONNX Runtime; all cores if not given")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of the table")
    parser.add_argument("--debug", action="store_true", help="show the traceback when something fails")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, object]:
    """Compile, ask, draw; returns the figures."""
    if options.clips < 1:
        raise UserError(f"{options.clips} clips", where="--clips", fix="give at least 1")
    shown = load_shipped(options.questions)
    questions = [*shown, *held_out(options.clips)]
    with ExitStack() as stack, _progress() as progress:
        paths = compile_bundles(options, progress)
        bundles = [
            Bundle(label, stack.enter_context(Session(path, threads=options.threads))) for label, path in paths.items()
        ]
        asking = progress.add_task("ask", total=len(bundles) * len(questions))
        for bundle in bundles:
            ask_bundle(bundle, questions, lambda: progress.advance(asking))
        names = list(dict.fromkeys(asked.name for asked in shown))
        drawing = progress.add_task("draw", total=len(names))
        for name in names:
            draw_clip(name, bundles, shown).save(options.out / f"{name}.png")
            progress.advance(drawing)
        figures = report(bundles, questions, len(shown))
        table = draw_table(bundles, questions, len(shown))
    text = json.dumps(figures, indent=1, ensure_ascii=False)
    (options.out / "demo.json").write_text(text + "\n", encoding="utf-8")
    if options.json:
        sys.stdout.write(text + "\n")
    else:
        results.print(table)
    notes.print(f"pictures of what was pruned: {options.out}/{names[0]}.png and {len(names) - 1} more")
    return figures


def compile_bundles(options: argparse.Namespace, progress: Progress) -> dict[str, Path]:
    """Label -> bundle, the unpruned one first."""
    task = progress.add_task("load the compiler", total=1 + len(options.recipes))
    from secateur.compiler.pipeline import RECIPES as ROWS
    from secateur.compiler.pipeline import Geometry, compile, load_recipe

    rows = {"none": ROWS["none"], **{Path(name).stem: load_recipe(name) for name in options.recipes}}
    geometry = Geometry(
        frames=FRAMES, fps=float(FRAMES_PER_SECOND), image_size=(FRAME_SIZE, FRAME_SIZE), audio_seconds=SECONDS,
        audio_in_video=True, text_tokens=TEXT_TOKENS, new_tokens=NEW_TOKENS,
    )  # fmt: skip
    made: dict[str, Path] = {}
    for name, recipe in rows.items():
        keep = options.keep if recipe.stages else None
        progress.update(task, description=f"compile {name}")
        out = options.out / (name if keep is None else f"{name}-{keep:g}")
        compile(options.model, out, recipe=recipe, keep=keep, geometry=geometry, force=True)
        made["unpruned" if not recipe.stages else name if keep is None else f"{name} {keep:g}"] = out
        progress.advance(task)
    progress.update(task, description="compile")
    return made


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=notes
    )  # fmt: skip


if __name__ == "__main__":
    main()
