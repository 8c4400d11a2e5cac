"""What a caller gives beside a prompt: images, a video, sound; as arguments, or in the parts of its messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from secateur.runtime.chat import Message
from secateur.runtime.errors import UserError
from secateur.runtime.pictures import ACCEPTED as IMAGES
from secateur.runtime.pictures import ImageLike, is_image
from secateur.runtime.video import ACCEPTED as VIDEOS
from secateur.runtime.video import VideoLike, is_video
from secateur.runtime.waveform import ACCEPTED as SOUNDS
from secateur.runtime.waveform import AudioLike, is_audio

Prompt: TypeAlias = "str | Sequence[Message]"
"""A plain prompt, or a conversation."""
KINDS = ("image", "video", "audio")
"""Types of the parts of a message that are no text."""
PARTS = {"image": ["image"], "video": ["video"], "audio": ["audio"], "video with sound": ["video", "audio"]}
"""Kind of an item of the media -> the parts of a message it is given by; the first has the placeholder."""


@dataclass(frozen=True)
class RowMedia:
    """One row's. ``video_fps`` are the frames a second of a video that does not say it, ``audio_rate`` the Hz of an
    array of samples."""

    images: Sequence[ImageLike] = ()
    videos: Sequence[VideoLike] = ()
    audio: Sequence[AudioLike] = ()
    video_fps: float | None = None
    audio_rate: int | None = None

    @property
    def kinds(self) -> list[str]:
        """One for each, images first."""
        return ["image"] * len(self.images) + ["video"] * len(self.videos) + ["audio"] * len(self.audio)


def list_media(kind: str, given: Any) -> list[Any]:
    """One row's of a kind: one alone, or a list. Frames in a list are one video."""
    kinds = {"image": (is_image, IMAGES), "video": (_is_video, VIDEOS), "audio": (is_audio, SOUNDS)}
    known, accepted = kinds[kind]
    if known(given):
        return [given]
    if not isinstance(given, (list, tuple)):
        raise UserError(
            f"a {type(given).__name__} is not {name_kind(kind)}", fix=f"give {accepted}, or a list of those"
        )
    return list(given)


def list_rows(kind: str, given: Any, single: bool) -> list[list[Any]] | None:
    """Each row's of a kind; None if nothing was given. ``single``: for one prompt, not for a list of them."""
    if given is None:
        return None
    if single:
        return [list_media(kind, given)]
    if not isinstance(given, (list, tuple)) and list_media(kind, given):
        raise UserError(
            f"one {kind} for a list of prompts", fix=f"give a list: {name_kind(kind)}, or a list of those, per prompt"
        )
    return [list_media(kind, row) for row in given]


def media_in_messages(prompt: Prompt, kind: str) -> list[Any]:
    """What a conversation carries in its parts of a kind, under the kind's name, ``path`` or ``url`` (a local file)."""
    found: list[Any] = []
    for message in [] if isinstance(prompt, str) else prompt:
        content: Any = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, (list, tuple)) else []:
            if not isinstance(part, dict) or part.get("type") != kind:
                continue
            value = next((part[key] for key in (kind, "path", "url") if part.get(key) is not None), None)
            if isinstance(value, str) and value.startswith(("http://", "https://", "data:")):
                raise UserError(f"{value[:40]} is not a local file", fix=f"download the {kind} and give its path")
            if value is not None:
                found.append(value)
    return found


def name_kind(kind: str) -> str:
    return {"image": "an image", "video": "a video", "audio": "audio"}[kind]


def count_kinds(kinds: Sequence[str]) -> str:
    """In words, in the order they come in; equal ones that follow each other are counted."""
    runs: list[tuple[str, int]] = []
    for kind in kinds:
        run = runs.pop()[1] if runs and runs[-1][0] == kind else 0
        runs.append((kind, run + 1))
    words = {"image": "image(s)", "video": "video(s)", "audio": "audio clip(s)"}
    return " and ".join(f"{count} {words[kind]}" for kind, count in runs) or "0 image(s)"


def _is_video(given: Any) -> bool:
    if not isinstance(given, (list, tuple)):
        return is_video(given)
    # A row has one video: several paths or pictures are its frames; an array of four dimensions is all of one.
    return len(given) > 1 and all(is_image(frame) and getattr(frame, "ndim", 3) == 3 for frame in given)
