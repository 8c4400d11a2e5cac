"""`secateur verify`: hashes, then parity with Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.runtime.errors import refuse_idle


def verify(
    bundle: Annotated[Path, typer.Argument(help="A directory that `secateur compile` made.")],
    model_dir: Annotated[
        Path | None, typer.Argument(help="The model it was compiled from; compares results with it.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="The recipe file, when the bundle was compiled from one.", metavar="FILE.yaml|FILE.py:NAME"),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Random rows to compare, of every geometry; 8 if not given.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the random rows; 0 if not given.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of one operator.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> dict[str, Any]:
    """Check that a bundle is whole and computes here what it computed where it was made, and what the model computes.

    Every file is hashed in full, and pictures of noise are processed: where this machine's Pillow makes other pixels
    than the one that compiled the bundle, that is said, and is no failure. Then the bundle's self-test is run: pixels,
    ids and, where the bundle holds them and this machine runs its programs, features, survivors, tokens and logits;
    what differs is named, with how far it is away. With MODEL_DIR, random rows run through the
    bundle and through the unmodified Hugging Face model with the recipe's stages under hooks: first which tokens each
    stage kept (ties told apart), then, with the choice held equal, features, caches and logits. Exit code 1 when they
    differ.

    \b
      secateur verify BUNDLE
      secateur verify BUNDLE MODEL_DIR --rows 32
    """
    from rich.text import Text

    from secateur.runtime.manifest import check_files, read_manifest
    from secateur.runtime.probe import PixelDifference, find_difference
    from secateur.runtime.self_test import check as run_self_test
    from secateur.runtime.sizes import size_text
    from secateur.tools.console import notes, results

    if model_dir is None:
        refuse_idle("no model is compared without MODEL_DIR", recipe=recipe, rows=rows, seed=seed)
        manifest = read_manifest(bundle)
        check_files(bundle, manifest, "full")
        size = sum(f.bytes for f in manifest.files.values())
        facts: dict[str, Any] = {"bundle": str(bundle), "files": len(manifest.files), "bytes": size}
        pixels, tested = find_difference(bundle, manifest), run_self_test(bundle, manifest, threads)
        facts |= {"passed": tested.passed, "parity": None, "pixels": pixels.as_json() if pixels else None}
        facts["self_test"] = tested.as_json()
    else:
        from rich.progress import Progress

        from secateur.compiler.pipeline import verify as check

        with Progress(console=notes, transient=True) as bar:
            task = bar.add_task("comparing rows", total=None)
            found = check(
                bundle, model_dir, recipe=recipe, rows=rows, seed=seed, threads=threads,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )  # fmt: skip
        facts, tested = found.as_json(), found.self_test
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        results.print(f"files    {facts['files']} whole, {size_text(facts['bytes'])}")
        if facts["pixels"] is not None:
            results.print(f"pixels   {PixelDifference(**facts['pixels'])}", soft_wrap=True)
        for number, line in enumerate(tested.lines()):
            results.print(Text(f"{'' if number else 'test':8} {line}"), soft_wrap=True)
        if facts["parity"] is not None:
            results.print(_draw(facts["parity"]), soft_wrap=True)
    if not facts["passed"]:
        raise typer.Exit(1)
    return facts


def _draw(parity: dict[str, Any]) -> str:
    from secateur.tools.console import first_lines

    lines = [
        f"choices  {parity['rows']} rows: {parity['chose_equally']} equal, {parity['tied']} tied, "
        f"{parity['chose_differently']} different",
        "results  largest difference: "
        + ", ".join(f"{name} {_say(parity[name])}" for name in ("features", "hidden", "cache", "logits")),
        *first_lines(parity["incomparable"], "unlike "),
        "verdict  " + ("equal to the model" if parity["passed"] else "NOT equal to the model"),
    ]
    return "\n".join(lines)


def _say(difference: float | None) -> str:
    return "none that is finite" if difference is None else f"{difference:.1e}"
