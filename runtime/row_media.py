"""What a caller gives beside a prompt: images, a video, sound; as arguments, or in the parts of its messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from secateur.runtime.chat import Message
from secateur.runtime.errors import UserError
from secateur.runtime.messages import PART_TYPES, TAKERS, Conversation, read_held, read_messages
from secateur.runtime.pictures import ImageLike, is_image
from secateur.runtime.unicode_text import check_text
from secateur.runtime.video import VideoLike, is_video
from secateur.runtime.waveform import AudioLike

Prompt: TypeAlias = "str | Sequence[Message] | Conversation"
"""A plain prompt, or a conversation."""
KINDS = ("image", "video", "audio")
"""Types of the parts of a message that are no text."""
_ARGUMENTS = {"image": "images", "video": "videos", "audio": "audio"}
"""Kind -> the argument it is given by beside a prompt."""
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
    known, accepted = TAKERS[kind]
    if _is_video(given) if kind == "video" else known(given):
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


def gather(
    prompts: Sequence[Prompt], given: Sequence[Sequence[Sequence[Any]] | None], allow_network: bool = False
) -> tuple[list[str | Conversation], list[list[list[Any]]]]:
    """Prompts in one form, and every row's media by kind (as in ``KINDS``), from ``given`` or from the messages.

    ``given`` holds for each kind every row's, or None. Media of a kind are either in the messages or beside them; what
    is beside them may be named by empty parts, as many as there are. Raises :class:`UserError` for all else. What comes
    back may be gathered again.
    """
    for kind, rows in zip(KINDS, given, strict=True):
        if rows is not None and len(rows) != len(prompts):
            raise UserError(
                f"{_ARGUMENTS[kind]} for {len(rows)} row(s), prompts for {len(prompts)}", fix="give both per row"
            )
    read: list[str | Conversation] = []
    found: list[list[list[Any]]] = [[] for _ in KINDS]
    for row, prompt in enumerate(prompts):
        before = f"row {row}, " if len(prompts) > 1 else ""
        one = _read_prompt(prompt, row, before, allow_network)
        for kind, rows, into in zip(KINDS, given, found, strict=True):
            beside = [
                read_held(each, kind, f"{before}{_ARGUMENTS[kind]}[{place}]", allow_network)
                for place, each in enumerate(rows[row] if rows is not None else ())
            ]
            into.append(_media_of(kind, beside, one, before))
        read.append(one if isinstance(one, str) else replace(one, media={}))
    return read, found


def _read_prompt(prompt: Any, row: int, before: str, allow_network: bool) -> str | Conversation:
    if isinstance(prompt, Conversation):
        return prompt
    if isinstance(prompt, str):
        return check_text(prompt, f"{before}prompt")
    if isinstance(prompt, (list, tuple)):
        return read_messages(prompt, before, allow_network)
    raise UserError(
        f"a {type(prompt).__name__} is not a prompt", where=f"row {row}", fix="give text, or a list of messages"
    )


def _media_of(kind: str, beside: list[Any], prompt: str | Conversation, before: str) -> list[Any]:
    """One row's media of a kind."""
    if isinstance(prompt, str):
        return beside
    held, places, argument = prompt.media.get(kind, []), prompt.places.get(kind, []), _ARGUMENTS[kind]
    if held and beside:
        raise UserError(
            f"{count_kinds([kind] * len(held))} in the messages ({places[0]}) and {len(beside)} beside them",
            where=before + argument,
            fix=f"give them in the messages, or by {argument} with parts {{'type': '{kind}'}} for their places",
        )
    media = held or beside
    if places and not media:
        fields = ", ".join(PART_TYPES[kind].fields)
        raise UserError(
            f"the {kind} part holds nothing",
            where=places[0],
            fix=f"give it in one of its fields {fields}, or by {argument}",
        )
    if places and len(places) != len(media):
        raise UserError(
            f"{count_kinds([kind] * len(media))}, and {len(places)} part(s) for them (the first is {places[0]})",
            where=before + argument, fix="give as many as there are parts, or leave the parts out",
        )  # fmt: skip
    return media


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
