"""Where the media of a prompt lie, and the position ids of its tokens, where those have several axes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.schema import Manifest, Media, MediaItem

Ints = NDArray[np.int64]


def media_positions(manifest: Manifest, media: Media, ids: Ints, lengths: Ints) -> tuple[Ints, Ints]:
    """Ids ``[B,N]``, ``lengths [B]`` -> ``positions [B,N]``, and that of each row's first new token ``[B]``.

    A word has the number of words before it, each item counted as its span. Tokens of an item have that of the item's
    first; the program adds their offsets on each axis.
    """
    positions = np.zeros(ids.shape, dtype=np.int64)
    behind = np.zeros(len(ids), dtype=np.int64)
    shared = not media.sound_marks_count
    for row, length in enumerate(lengths):
        items = iter(media.items)
        slot = now = reach = 0
        last: MediaItem | None = None
        while slot < length:
            token = int(ids[row, slot])
            if token == manifest.model.image_token_id:
                last = next(items)
                positions[row, slot : slot + last.tokens] = now
                reach = max(reach, now + last.reach)
                now, slot = now + last.span, slot + last.tokens
                continue
            brings_sound = shared and last is not None and last.kind == "video with sound"
            enters = shared and [token] == media.sound_before and slot + 1 < length
            if enters and _is_media(manifest, ids[row, slot + 1]):
                positions[row, slot] = now - 1
            elif [token] == media.sound_behind and brings_sound and _is_media(manifest, ids[row, slot - 1]):
                positions[row, slot] = now
            else:
                positions[row, slot] = now
                now += 1
            slot += 1
        behind[row] = max(now, reach)
    return positions, behind


def _is_media(manifest: Manifest, token: np.int64) -> bool:
    return int(token) == manifest.model.image_token_id
