"""`secateur run`: ask a bundle a question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.runtime.errors import UserError, refuse_idle

if TYPE_CHECKING:
    from secateur.runtime.results import Generation


def run(
    bundle: Annotated[Path, typer.Argument(help="A directory that `secateur compile` made.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="The question; once per row of the batch.")],
    image: Annotated[
        list[str] | None, typer.Option("--image", "-i", help="An image file; repeat for more, row by row.")
    ] = None,
    video: Annotated[
        list[str] | None,
        typer.Option(help="A directory of frames, a GIF, .npy [frames, height, width, 3], or, with PyAV, any file."),
    ] = None,
    video_fps: Annotated[
        float | None, typer.Option(help="Frames a second of videos that do not say it, such as directories.")
    ] = None,
    audio: Annotated[
        list[str] | None, typer.Option(help="A WAV file, or, with soundfile, any file; of a video, its sound.")
    ] = None,
    allow_network: Annotated[
        bool, typer.Option("--allow-network", help="Fetch images, videos and sound given as addresses.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it is generated.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print text, tokens and metrics as JSON.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(help="Stop after this many tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token, above 0 draws.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among this many likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the likeliest tokens of this mass.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.")] = None,
    seed: Annotated[int | None, typer.Option(help="Make sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text or special token; repeat for more.")] = None,
    generation: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option of transformers' GenerationConfig; repeat for more."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads per operator; all cores if not given.")] = None,
    max_image_pixels: Annotated[
        int | None, typer.Option(min=1, help="The most pixels of an image or frame; 89 million if not given.")
    ] = None,
    full_check: Annotated[bool, typer.Option("--full-check", help="Also hash the weights before running.")] = False,
) -> list[Any]:
    """Answer a prompt about images, a video or sound.

    `secateur inspect` says what a bundle takes. A prompt that does not name its media is put into the checkpoint's chat
    template behind them. Images and frames are resized to the compiled size, frames chosen evenly, sound resampled.
    Options that are not given are as the checkpoint's generation_config.json says.
    With --stream and --json every piece is a line of JSON, and the last line is the result.

    \b
      secateur run BUNDLE --image photo.png --prompt "What is in the picture?" --stream
      secateur run BUNDLE --video frames/ --video-fps 25 --audio sound.wav --prompt "What happens?"
    """
    from secateur.runtime.pictures import MAX_PIXELS
    from secateur.runtime.session import Session

    if len(prompt) > 1 and not as_json:
        refuse_idle(
            "several answers are printed when all are there", "leave it out, or add --json", stream=stream or None
        )
    bound = max_image_pixels or MAX_PIXELS
    if max_image_pixels is not None:
        from PIL import Image

        # Pillow's own bound, of this process.
        Image.MAX_IMAGE_PIXELS = max(max_image_pixels, Image.MAX_IMAGE_PIXELS or 0)
    with Session(bundle, threads=threads, verify="full" if full_check else "graphs", max_image_pixels=bound) as session:
        pieces = session.stream(
            list(prompt),
            _per_row("image", list(image or []), prompt),
            _per_row("video", list(video or []), prompt),
            _per_row("audio", list(audio or []), prompt),
            video_fps=video_fps,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop or None,
            generation=_parse_options(generation or []),
            allow_network=allow_network,
        )
        live = stream and len(prompt) == 1
        with pieces:
            for piece in pieces:
                if stream and as_json:
                    typer.echo(json.dumps({"row": piece.row, "piece": str(piece)}, ensure_ascii=False))
                elif live:
                    typer.echo(str(piece), nl=False)
    answers = pieces.generations
    if as_json:
        typer.echo(json.dumps([describe(answer) for answer in answers], indent=None if stream else 1))
    elif live:
        typer.echo()
    else:
        for answer in answers:
            typer.echo(answer.text)
    _summarize(answers)
    return answers


def describe(answer: Generation) -> dict[str, Any]:
    """A generation as plain data."""
    return {
        "text": answer.text,
        "tokens": answer.tokens,
        "finish_reason": answer.finish_reason,
        "metrics": answer.metrics.as_json(),
    }


def _parse_options(written: list[str]) -> dict[str, Any]:
    """``name=value``, the value in JSON; one that is not JSON is text."""
    found: dict[str, Any] = {}
    for one in written:
        name, equals, value = one.partition("=")
        if not equals or not name:
            raise UserError(f"{one!r} is not NAME=VALUE", where="--generation", fix="such as no_repeat_ngram_size=3")
        if name in found:
            raise UserError(f"{name} is given twice", where="--generation", fix="leave one of them out")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found


def _per_row(kind: str, files: list[str], prompts: list[str]) -> list[list[str]]:
    """Deal files out in order; images of a number that does not divide are left to the session's own message."""
    if kind != "image" and len(files) > len(prompts):
        raise UserError(
            f"{len(files)} files for {len(prompts)} prompt(s)", where=f"--{kind}", fix="a prompt takes one at most"
        )
    each = -(-len(files) // len(prompts))
    return [files[row * each : (row + 1) * each] for row in range(len(prompts))]


def _summarize(answers: list[Generation]) -> None:
    import logging

    from secateur.runtime.sizes import size_text

    metrics = answers[0].metrics
    visual = " -> ".join(str(count) for count in metrics.visual_tokens.values())
    logging.getLogger(__name__).info(
        "%d tokens, the first after %.0f ms, then %.1f ms each; visual tokens by segment: %s; caches %s",
        sum(len(answer.tokens) for answer in answers),
        metrics.ttft_s * 1e3,
        metrics.tpot_s * 1e3,
        visual,
        size_text(metrics.cache_bytes),
    )
