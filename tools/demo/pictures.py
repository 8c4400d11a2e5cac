"""What was pruned, as a picture: the patches that a recipe removed are greyed out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from secateur.tools.demo.ask import Bundle, Question

PANEL = 336  # pixels a panel is at least wide, so that a patch of a small image can be seen
MARGIN = 14
LINE = 20
GREY = 208
RIGHT, WRONG, INK = (0, 120, 40), (190, 30, 30), (20, 20, 20)


def count_survived(kept: Sequence[NDArray[np.int64]], tokens: int) -> NDArray[np.int64]:
    """How many stages each original patch survived, int64 [tokens]."""
    survived = np.zeros(tokens, np.int64)
    for indices in kept:
        survived[indices] += 1
    return survived


def grey_out(image: Image.Image, kept: Sequence[NDArray[np.int64]], grid: tuple[int, int]) -> Image.Image:
    """``image`` with the patches of ``grid`` (rows, columns) that did not survive every stage of ``kept`` greyed out,
    the earlier removed the paler. Its size must be a multiple of the grid's."""
    rows, columns = grid
    survived = count_survived(kept, rows * columns)
    # 0 for survivors; a patch the first stage removed nearly vanishes, one the last removed stays recognisable.
    strength = np.where(survived == len(kept), 0.0, 0.9 - 0.35 * survived / max(len(kept), 1)).reshape(grid)
    pixels = np.asarray(image.convert("RGB"), np.float64)
    spread = np.kron(strength, np.ones((pixels.shape[0] // rows, pixels.shape[1] // columns)))[..., None]
    colourless = np.repeat(pixels.mean(2, keepdims=True), 3, axis=2)
    mixed = np.where(spread > 0, (1 - spread) * colourless + spread * GREY, pixels)
    return Image.fromarray(np.round(mixed).astype(np.uint8))


def draw_picture(image: Path, bundles: Sequence[Bundle], questions: Sequence[Question]) -> Image.Image:
    """A panel per question (down) and bundle (across), with what was asked and answered underneath."""
    geometry = bundles[0].session.manifest.geometry
    side = math.isqrt(geometry.tokens_per_image)
    scale = math.ceil(PANEL / geometry.image_width)
    size = (geometry.image_width * scale, geometry.image_height * scale)
    with Image.open(image) as opened:
        enlarged = opened.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    indices = [index for index, question in enumerate(questions) if question.image == image]
    cell = (size[0] + MARGIN, size[1] + 3 * LINE + 2 * MARGIN)
    sheet = Image.new("RGB", (len(bundles) * cell[0] + MARGIN, len(indices) * cell[1] + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for row, index in enumerate(indices):
        for column, bundle in enumerate(bundles):
            x, y = MARGIN + column * cell[0], MARGIN + row * cell[1]
            asked = bundle.asked[index]
            sheet.paste(grey_out(enlarged, asked.kept, (side, side)) if asked.kept else enlarged, (x, y))
            left = len(asked.kept[-1]) if asked.kept else geometry.tokens_per_image
            y += size[1] + 4
            _write(pen, (x, y), f"{bundle.label}: {left} of {geometry.tokens_per_image} patches", INK, size[0])
            verdict = "right" if asked.right else f"wrong, expected {questions[index].answer}"
            _write(pen, (x, y + LINE), questions[index].text, INK, size[0])
            answer = f"{asked.text[:30] or 'no answer'} ({verdict})"
            _write(pen, (x, y + 2 * LINE), answer, RIGHT if asked.right else WRONG, size[0])
    return sheet


def _write(
    pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, colour: tuple[int, int, int], width: int
) -> None:
    """One line of text, small enough for ``width`` pixels."""
    size = 16.0
    while size > 8 and pen.textlength(text, font=ImageFont.load_default(size)) > width:
        size -= 0.5
    pen.text(place, text, fill=colour, font=ImageFont.load_default(size))
