"""`python -m secateur.tools.demo.omni`: compile the omni demo model unpruned and pruned, ask it about clips.

Writes bundles, a picture per shipped clip of which tokens survived in every second, and demo.json into build/demo-omni.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from secateur.runtime.errors import UserError
from secateur.runtime.session import Session
from secateur.tools.demo.ask import Bundle
from secateur.tools.demo.command import compile_bundles, make_parser, show_bars, write_results
from secateur.tools.demo.omni.clips import FRAME_SIZE, FRAMES, FRAMES_PER_SECOND, SECONDS
from secateur.tools.demo.omni.pictures import draw_clip
from secateur.tools.demo.omni.questions import held_out, load_shipped
from secateur.tools.demo.omni.run import ask_bundle, report
from secateur.tools.demo.omni.show import draw_table

RECIPES = ("seats",)
TEXT_TOKENS, NEW_TOKENS = 48, 4


def main(arguments: list[str] | None = None) -> None:
    from secateur.tools.cli import run_script

    run_script(run, parse(arguments))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(
        "secateur.tools.demo.omni", __doc__, recipes=RECIPES, keep=None, demo=Path("demo/omni"),
        out=Path("build/demo-omni"),
    )  # fmt: skip
    parser.add_argument("--clips", type=int, default=60, help="held-out clips to measure with (%(default)s)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, object]:
    """Compile, ask, draw; returns the figures."""
    if options.clips < 1:
        raise UserError(f"{options.clips} clips", where="--clips", fix="give at least 1")
    shown = load_shipped(options.questions)
    questions = [*shown, *held_out(options.clips)]
    with ExitStack() as stack, show_bars() as progress:
        paths = compile_bundles(
            options, progress, frames=FRAMES, fps=float(FRAMES_PER_SECOND), image_size=(FRAME_SIZE, FRAME_SIZE),
            audio_seconds=SECONDS, audio_in_video=True, text_tokens=TEXT_TOKENS, new_tokens=NEW_TOKENS,
        )  # fmt: skip
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
    write_results(options, figures, table, names)
    return figures


if __name__ == "__main__":
    main()
