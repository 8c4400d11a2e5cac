"""Which tokens of a clip survived, second by second: video above, sound below, what was pruned greyed out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from secateur.tools.demo.ask import Bundle
from secateur.tools.demo.omni.architecture import (
    AUDIO_TOKENS,
    AUDIO_TOKENS_PER_SECOND,
    SIDE,
    TOKENS_PER_GRID,
    VIDEO_TOKENS,
)
from secateur.tools.demo.omni.clips import FRAMES_PER_SECOND, SECONDS
from secateur.tools.demo.omni.inputs import hear_mels
from secateur.tools.demo.omni.questions import Asked
from secateur.tools.demo.omni.run import split_places
from secateur.tools.demo.pictures import INK, LINE, MARGIN, RIGHT, WRONG, grey_out

FRAME = 224  # pixels a frame is drawn wide and high
SOUND = (9 * AUDIO_TOKENS_PER_SECOND, 72)  # width and height of a second of sound
GAP = 6


def pick_second(kept: Sequence[NDArray[np.int64]], second: int, tokens: int) -> list[NDArray[np.int64]]:
    """Of every stage's survivors those of one second that has ``tokens`` tokens, counted from its first."""
    return [chosen[chosen // tokens == second] % tokens for chosen in kept]


def draw_sound(mels: NDArray[np.float32]) -> Image.Image:
    """A spectrogram, low tones below, of log-mels float32 [128, T]."""
    level = np.clip((mels - mels.min()) / max(float(np.ptp(mels)), 1e-6), 0, 1)[::-1, :, None]
    dark, light = np.array((20.0, 20.0, 90.0)), np.array((255.0, 190.0, 40.0))
    return Image.fromarray(np.round(dark + level * (light - dark)).astype(np.uint8))


def draw_strip(asked: Asked, kept: Sequence[NDArray[np.int64]]) -> Image.Image:
    """Four seconds beside each other: the first frame of each over its sound. ``kept``: places left by each stage."""
    split = [split_places(places) for places in kept]
    mels = hear_mels(asked.wave)
    steps = mels.shape[1] // SECONDS
    sheet = Image.new("RGB", (SECONDS * (SOUND[0] + GAP) - GAP, FRAME + GAP + SOUND[1]), "white")
    for second in range(SECONDS):
        frame = Image.fromarray(asked.frames[FRAMES_PER_SECOND * second]).resize(
            (FRAME, FRAME), Image.Resampling.NEAREST
        )
        sound = draw_sound(mels)
        sound = sound.crop((second * steps, 0, (second + 1) * steps, mels.shape[0])).resize(SOUND)
        if kept:
            frame = grey_out(frame, pick_second([seen for seen, _ in split], second, TOKENS_PER_GRID), (SIDE, SIDE))
            heard = pick_second([heard for _, heard in split], second, AUDIO_TOKENS_PER_SECOND)
            sound = grey_out(sound, heard, (1, AUDIO_TOKENS_PER_SECOND))
        sheet.paste(frame, (second * (SOUND[0] + GAP), 0))
        sheet.paste(sound, (second * (SOUND[0] + GAP), FRAME + GAP))
    return sheet


def draw_clip(name: str, bundles: Sequence[Bundle], questions: Sequence[Asked]) -> Image.Image:
    """A strip per question about the clip (down) and bundle (across), with question and answer underneath."""
    rows = []
    for index, asked in enumerate(questions):
        if asked.name == name:
            rows.append([(draw_strip(asked, b.asked[index].kept), b, asked, b.asked[index]) for b in bundles])
    width, height = rows[0][0][0].size
    cell = (width + MARGIN, height + 2 * LINE + 2 * MARGIN)
    sheet = Image.new("RGB", (len(bundles) * cell[0] + MARGIN, len(rows) * cell[1] + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for row, panels in enumerate(rows):
        for column, (strip, bundle, asked, told) in enumerate(panels):
            x, y = MARGIN + column * cell[0], MARGIN + row * cell[1]
            sheet.paste(strip, (x, y))
            seen, heard = split_places(told.kept[-1]) if told.kept else (range(VIDEO_TOKENS), range(AUDIO_TOKENS))
            left = f"{len(seen)} of {VIDEO_TOKENS} video, {len(heard)} of {AUDIO_TOKENS} audio tokens"
            pen.text((x, y + height + 4), f"{bundle.label}: {left}", fill=INK, font_size=16)
            verdict = "right" if told.right else f"wrong, expected {asked.answer}"
            line = f"{asked.text} {told.text[:30] or 'no answer'} ({verdict})"
            pen.text((x, y + height + 4 + LINE), line, fill=RIGHT if told.right else WRONG, font_size=16)
    return sheet
