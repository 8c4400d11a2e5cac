"""What a manifest says of preprocessing must come to the ports: as many pixels, features and placeholders."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from secateur.runtime.schema_inputs import Patches, Stack, Step, Tiles

if TYPE_CHECKING:
    from secateur.runtime.schema import Manifest, Variant
    from secateur.runtime.schema_inputs import Preprocessing


def check_preprocessing(part: Manifest | Variant, said: Preprocessing, token: int) -> None:
    """Raise ValueError unless steps end where they must, make as many rows of ``pixel_values`` as the port has, and
    prompts get as many of the placeholder ``token`` as features enter the decoder."""
    sizes = part.geometry
    if (said.video is None) == (not said.images):
        raise ValueError("preprocessing: says steps of images and of a video, or of neither")
    if len(said.images) not in (0, 1, sizes.images):
        raise ValueError(f"preprocessing: {len(said.images)} lists of steps for {sizes.images} images")
    lists = [said.video.steps] if said.video else said.images
    for steps in lists:
        if any(isinstance(step, (Stack, Patches)) != (step is steps[-1]) for step in steps):
            raise ValueError("preprocessing: steps end with stack or patches, and only there")
    inputs = {port.name: port.shape for port in part.programs["vision"].inputs}
    if said.video is not None:
        rows = _count_rows(said.video.steps, said.video.frames)
    else:
        each = [_count_rows(steps, 1) for steps in said.images]
        rows = sum(each) if len(each) > 1 else each[0] * sizes.images
    shape = inputs["pixel_values"]
    if shape and shape[0] != sizes.batch * rows:
        raise ValueError(f"preprocessing: makes {sizes.batch * rows} rows of pixel_values, the port has {shape[0]}")
    if (said.sound is None) != ("input_features" not in inputs):
        raise ValueError("preprocessing: sound and the port input_features belong together")
    if said.sound is not None:
        made = [sizes.batch, said.sound.mel_bins, said.sound.frames]
        if inputs["input_features"] != made:
            raise ValueError(f"preprocessing: sound becomes {made}, the port is {inputs['input_features']}")
    placed = sum(run.count for one in said.placeholders for run in one.becomes if run.token == token)
    if said.placeholders and placed != sizes.features:
        raise ValueError(f"preprocessing: a prompt gets {placed} placeholders for {sizes.features} features")


def _count_rows(steps: list[Step], pictures: int) -> int:
    """Rows of ``pixel_values`` that so many pictures become."""
    for step in steps:
        if isinstance(step, Tiles):
            across = (step.height // step.tile_height) * (step.width // step.tile_width)
            pictures *= across + (step.whole != "none")
        elif isinstance(step, Patches):
            return math.prod(step.grid)
    return pictures
