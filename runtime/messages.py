"""Conversations as clients write them, of Hugging Face's and of OpenAI's spelling, to one form, with their media."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from secateur.runtime.chat import Message
from secateur.runtime.errors import UserError
from secateur.runtime.pictures import ACCEPTED as IMAGES
from secateur.runtime.pictures import is_image
from secateur.runtime.sources import read_source
from secateur.runtime.unicode_text import check_all_text
from secateur.runtime.video import ACCEPTED as VIDEOS
from secateur.runtime.video import is_video
from secateur.runtime.waveform import ACCEPTED as SOUNDS
from secateur.runtime.waveform import is_audio

_log = logging.getLogger(__name__)


class PartType(NamedTuple):
    """What a part of this type is, and the fields it may lie in, one of which is given."""

    kind: str
    fields: tuple[str, ...]


def _hugging_face(kind: str) -> PartType:
    return PartType(kind, (kind, "url", "path", "base64"))


PART_TYPES: Mapping[str, PartType] = {
    "text": PartType("text", ("text",)),
    "input_text": PartType("text", ("text",)),
    "output_text": PartType("text", ("text",)),
    "image": _hugging_face("image"),
    "image_url": PartType("image", ("image_url",)),
    "input_image": PartType("image", ("image_url",)),
    "video": _hugging_face("video"),
    "video_url": PartType("video", ("video_url",)),
    "audio": _hugging_face("audio"),
    "audio_url": PartType("audio", ("audio_url",)),
    "input_audio": PartType("audio", ("input_audio",)),
}
"""Type of a part -> how it is read: Hugging Face's, then those of OpenAI's two interfaces and of servers like them."""
TAKERS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "image": (is_image, IMAGES), "video": (is_video, VIDEOS), "audio": (is_audio, SOUNDS),
}  # fmt: skip
"""Kind -> whether a type is one that its reader takes, and those in words."""


@dataclass(frozen=True)
class Conversation:
    """Messages whose content is text, or a list of ``{"type": "text", "text": …}`` and ``{"type": kind}``; other fields
    are as they were given."""

    messages: list[Message]
    media: Mapping[str, list[Any]] = field(default_factory=dict)
    """What the parts of a kind hold, in their order; where there is something, every part of the kind has one."""
    places: Mapping[str, list[str]] = field(default_factory=dict)
    """Where the parts of a kind stand, such as ``messages[0].content[1]``."""


def read_messages(messages: Sequence[Message], where: str = "", allow_network: bool = False) -> Conversation:
    """A conversation of plain data to one form. ``where`` is put before ``messages[0]`` in errors.

    Paths stay paths; ``file:`` and ``data:`` URLs, base64 and open files are read (:mod:`secateur.runtime.sources`),
    addresses only where ``allow_network``. Fields that are None are left out, as transformers leaves them out. Raises
    :class:`UserError` for what is no message, parts of unknown types, and text that is not Unicode.
    """
    found = Conversation([], {kind: [] for kind in TAKERS}, {kind: [] for kind in TAKERS})
    filled: dict[str, list[str]] = {kind: [] for kind in TAKERS}
    for index, message in enumerate(messages):
        at = f"{where}messages[{index}]"
        kept = _check_message(message, at)
        content = kept.get("content")
        if isinstance(content, (list, tuple)):
            parts = []
            for number, part in enumerate(content):
                place = f"{at}.content[{number}]"
                kind, rest, held = _read_part(part, place, allow_network)
                parts.append(rest)
                if kind != "text":
                    found.places[kind].append(place)
                if held is not None:
                    found.media[kind].append(held)
                    filled[kind].append(place)
            kept["content"] = parts
        check_all_text(kept, at)
        found.messages.append(kept)
    for kind, places in found.places.items():
        if filled[kind] and len(filled[kind]) < len(places):
            empty = next(place for place in places if place not in filled[kind])
            raise UserError(
                f"the {kind} part holds nothing, that of {filled[kind][0]} does", where=empty,
                fix=f"give every {kind} in its part, or all of them beside the messages",
            )  # fmt: skip
    return found


def _check_message(message: object, where: str) -> dict[str, Any]:
    kept = {key: value for key, value in message.items() if value is not None} if isinstance(message, Mapping) else {}
    content = kept.get("content")
    silent = content is None and bool(kept.get("tool_calls"))
    parts = isinstance(content, (list, tuple)) and all(isinstance(part, Mapping) for part in content)
    if not isinstance(kept.get("role"), str) or not (silent or parts or isinstance(content, str)):
        raise UserError(
            "a message must be {'role': …, 'content': …}", where=where,
            fix="content is text, or a list of {'type': 'image'} and {'type': 'text', 'text': …}",
        )  # fmt: skip
    return kept


def _read_part(part: Mapping[str, Any], where: str, allow_network: bool) -> tuple[str, dict[str, Any], Any]:
    """Its kind, the part without what it holds, and what it holds; None if nothing."""
    given = {key: value for key, value in part.items() if value is not None}
    name = given.pop("type", None)
    if not isinstance(name, str) or name not in PART_TYPES:
        what = "a part without a type" if name is None else f"a part of type {name!r:.60}"
        raise UserError(what, where=where, available=PART_TYPES)
    kind, fields = PART_TYPES[name]
    filled = [key for key in fields if key in given]
    if len(filled) > 1:
        raise UserError(f"a part with {' and '.join(filled)}", where=where, fix="give one of them")
    held = given.pop(filled[0]) if filled else None
    if kind == "text":
        if not isinstance(held, str):
            what = "no text" if held is None else f"a {type(held).__name__} for text"
            raise UserError(f"a part of type {name} with {what}", where=where, fix="write {'type': 'text', 'text': …}")
        return kind, {"type": "text", "text": held, **given}, None
    if held is None and name != kind:
        raise UserError(f"a part of type {name} without {fields[0]}", where=where, available=list(given) or None)
    if held is not None:
        held = read_held(_unwrap(held, filled[0], where), kind, where, allow_network)
    if given:
        _log.warning("%s: %s is left to the chat template", where, ", ".join(map(str, given)))
    return kind, {"type": kind, **given}, held


def _unwrap(held: Any, name: str, where: str) -> Any:
    """OpenAI's ``{"url": …, "detail": …}`` and ``{"data": …, "format": …}`` to a string."""
    key = "data" if name == "input_audio" else "url"
    if isinstance(held, Mapping) and name in ("image_url", "video_url", "audio_url", "input_audio"):
        others = {k: v for k, v in held.items() if k != key and v is not None and (k, v) != ("detail", "auto")}
        form = others.pop("format", None) if key == "data" else None
        if others:
            _log.warning("%s: %s of %s is not used", where, ", ".join(map(str, others)), name)
        held = held.get(key)
        if not isinstance(held, str):
            raise UserError(f"{name} without {key}", where=where, fix=f"write {{'{name}': {{'{key}': …}}}}")
        if key == "data" and held[:5].lower() != "data:":
            held = f"data:audio/{form or ''};base64,{held}" if form else f"data:;base64,{held}"
    elif name == "base64":
        if not isinstance(held, str):
            raise UserError(f"a {type(held).__name__} is not base64", where=where, fix="give text")
        held = held if held[:5].lower() == "data:" else f"data:;base64,{held}"
    elif name == "input_audio" and isinstance(held, str) and "," not in held:
        held = f"data:;base64,{held}"
    return held


def read_held(held: Any, kind: str, where: str, allow_network: bool) -> Any:
    """A picture, video or clip of sound, read as far as it has to be before its reader takes it; pictures in a list are
    the frames of a video."""
    if kind == "video" and isinstance(held, (list, tuple)):
        return [
            read_held(frame, "image", f"{where}, frame {number}", allow_network) for number, frame in enumerate(held)
        ]
    takes, accepted = TAKERS[kind]
    if not takes(held):
        name = {"image": "an image", "video": "a video", "audio": "audio"}[kind]
        raise UserError(f"a {type(held).__name__} is not {name}", where=where, fix=f"give {accepted}")
    return read_source(held, kind, where, allow_network)
