"""Options of several verbs that say what a prompt holds, and the geometry they come to."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from secateur.runtime.errors import UserError

ImageSize = Annotated[
    str | None,
    typer.Option(
        metavar="HxW[,HxW...]",
        help="Height and width in pixels that every image or frame is resized to, for models that take any "
        "(Qwen); fewer pixels are fewer tokens. 448x448 if not given. Or one for each image: 448x448,224x336.",
    ),
]
Frames = Annotated[
    int | None, typer.Option(help="One video per prompt instead of images: this many frames, chosen evenly.")
]
Fps = Annotated[
    float | None,
    typer.Option(help="Frames of the video in a second, 2 if not given: 16 frames at 2 are 8 seconds."),
]
AudioSeconds = Annotated[
    int | None, typer.Option(help="Seconds of sound per prompt, for models that hear (Qwen2.5-Omni); 0 for none.")
]
AudioInVideo = Annotated[
    bool | None,
    typer.Option(
        help="Whether the sound is the video's own and lies between its frames, as it does if not said, or follows "
        "them as a clip of its own."
    ),
]
Batch = Annotated[int | None, typer.Option(help="Prompts that run together; 1 if not given.")]
Images = Annotated[int | None, typer.Option(help="Images per prompt; 1 if not given.")]
NewTokens = Annotated[int | None, typer.Option(help="Room for generated tokens; 64 if not given.")]
TextTokens = Annotated[
    int | None,
    typer.Option(help="Room for every token of the prompt that stands for no image, video or sound; 64 if not given."),
]

MeanKeep = Annotated[
    str | None,
    typer.Option(
        metavar="R[,R]",
        help="Instead of --keep: fraction of the visual tokens left on average over the decoder's layers. Recipes that "
        "tell what is seen from what is heard, such as seats, take one for each: 0.06,0.35.",
    ),
]


def read_mean_keep(text: str | None) -> float | tuple[float, float] | None:
    """``0.4`` as a number, ``0.06,0.35`` as a pair."""
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 2):
        raise UserError(
            f"{text!r} is neither a number nor two",
            where="--mean-keep",
            fix="give 0.1, or 0.06,0.35 for seen and heard",
        )
    return values[0] if len(values) == 1 else (values[0], values[1])


def list_given(image_size: str | None, **sizes: Any) -> dict[str, Any]:
    """The options that were given, by the fields of ``Geometry``."""
    given = {"image_size": read_size(image_size), **sizes}
    return {name: value for name, value in given.items() if value is not None}


def read_size(text: str | None) -> Any:
    """``448x336`` as (height, width), ``448x448,224x336`` as one such pair for every image; None for None."""
    from secateur.compiler.pipeline import read_sizes

    return None if text is None else read_sizes(text, "--image-size")
