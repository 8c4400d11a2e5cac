"""Questions about images, one JSON object a line.

    {"image": "kitchen.png", "question": "How many cups are there?", "answer": "3"}

``image`` is a path beside the file, or a list of them; ``answer`` may be left out. Other fields are ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from secateur.runtime.errors import UserError
from secateur.runtime.unicode_text import check_text


@dataclass(frozen=True)
class Question:
    """``where`` is the line it stands on, for error messages."""

    images: tuple[Path, ...]
    text: str
    answer: str | None
    where: str


def read_questions(path: Path, count: int | None = None) -> list[Question]:
    """The first ``count`` questions of a JSONL file; all of them for None.

    Raises UserError with the line's number for a line that is not a question or shows an image that is not there.
    """
    found: list[Question] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if count is not None and len(found) >= count:
                    break
                if line.strip():
                    found.append(_read_line(line, path.parent, f"{path}:{number}"))
    except OSError as error:
        raise UserError(f"cannot read it: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError:
        raise UserError("not a text file in UTF-8", where=str(path)) from None
    if not found:
        raise UserError("no question in it", where=str(path), fix='a line is {"image": "a.png", "question": "..."}')
    return found


def _read_line(line: str, folder: Path, where: str) -> Question:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError("not a line of JSON", where=where) from None
    if not isinstance(fields, dict):
        raise UserError("not a JSON object", where=where, fix='write {"image": "a.png", "question": "..."}')
    for name in ("image", "question"):
        if name not in fields:
            raise UserError(f"no field {name!r}", where=where, available=fields)
    named, text, answer = fields["image"], fields["question"], fields.get("answer")
    images = named if isinstance(named, list) else [named]
    if not images or not all(isinstance(image, str) for image in images):
        raise UserError("image must be a path or a list of paths", where=where)
    if not isinstance(text, str) or not isinstance(answer, (str, type(None))):
        raise UserError("question and answer must be text", where=where)
    for name in ("question", "answer"):
        check_text(fields.get(name) or "", f"{where}, {name}")
    paths = tuple(folder / image for image in images)
    for image in paths:
        if not image.is_file():
            raise UserError(f"no image {image}", where=where, fix="paths count from the file's own directory")
    return Question(paths, text, answer, where)
