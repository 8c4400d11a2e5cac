"""A row's prompt as the checkpoint's own processor writes it, for whatever looks at the tokens said so far."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.schema import Manifest


def count_unpruned(manifest: Manifest, lengths: NDArray[np.int64]) -> int:
    """Tokens of the longest prompt, a placeholder for every token that media have in the unpruned model.

    ``lengths`` int64 [B]: what of each row enters the decoder.
    """
    geometry = manifest.geometry
    return int(lengths.max()) + geometry.places - geometry.patches


def spell_prompt(manifest: Manifest, ids: Sequence[int]) -> list[int]:
    """``ids`` with the checkpoint's own placeholders of videos and sound, in place of the image's.

    Where sound lies between the frames of a video, the first placeholder is the sound's: both are there, which is all
    that a penalty asks.
    """
    model, media = manifest.model, manifest.media
    own, video, audio = model.image_token_id, model.video_token_id, model.audio_token_id
    kinds = {"image": own, "video": own if video is None else video, "audio": own if audio is None else audio}
    if media is None:
        # Where tokens stand around an image, a video is images to the checkpoint too.
        as_images = model.image_before or model.image_behind or model.prompt_token_id is not None
        if not manifest.geometry.frames or as_images:
            return list(ids)
        return [kinds["video"] if token == own else token for token in ids]
    spelled: list[int] = []
    for item in media.items:
        if item.kind == "video with sound":
            spelled += [kinds["audio"], *[kinds["video"]] * (item.tokens - 1)]
        else:
            spelled += [kinds[item.kind]] * item.tokens
    rest = iter(spelled)
    return [next(rest, own) if token == own else token for token in ids]
