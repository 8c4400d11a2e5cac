"""`python -m secateur.tools.demo`: compile the demo model unpruned and pruned, ask it questions, show what was pruned.

Writes bundles, a picture per image and demo.json into build/demo.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from secateur.runtime.session import Session
from secateur.tools.demo import ask
from secateur.tools.demo.command import compile_bundles, make_parser, show_bars, write_results
from secateur.tools.demo.pictures import draw_picture
from secateur.tools.demo.show import draw_table

RECIPES = ("visionzip", "fastv")
KEEP = 0.25
TEXT_TOKENS, NEW_TOKENS = 32, 8


def main(arguments: list[str] | None = None) -> None:
    from secateur.tools.cli import run_script

    run_script(run, parse(arguments))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(
        "secateur.tools.demo", __doc__, recipes=RECIPES, keep=KEEP, demo=Path("demo"), out=Path("build/demo")
    )
    parser.add_argument("--repeat", type=int, default=5, help="rounds of timing; 0 leaves times out (%(default)s)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, object]:
    """Compile, ask, time, draw; returns the figures."""
    questions = ask.read_questions(options.questions)
    with ExitStack() as stack, show_bars() as progress:
        paths = compile_bundles(options, progress, text_tokens=TEXT_TOKENS, new_tokens=NEW_TOKENS)
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
    write_results(options, figures, table, [image.stem for image in images])
    return figures


if __name__ == "__main__":
    main()
