"""Which of a directory's files says how media are processed and how a conversation is written.

Checkpoints of several ages hold the same settings in several files. The order is that of transformers 5, and a test
holds the two to each other. A bundle carries one file of each kind, so that it leaves nothing to choose.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from secateur.runtime.errors import BundleError, UserError

NESTED = "processor_config.json"
"""Holds the settings of every processor of a checkpoint, each under a name of its own."""
PARTS: Mapping[str, tuple[str, ...]] = {
    "image": ("image_processor",),
    "video": ("video_processor",),
    "audio": ("feature_extractor", "audio_processor"),
}
"""Kind of media -> names of its settings there; the first that is there is taken."""
FILES: Mapping[str, tuple[str, ...]] = {
    "image": ("preprocessor_config.json",),
    "video": ("video_preprocessor_config.json", "preprocessor_config.json"),
    "audio": ("preprocessor_config.json",),
}
"""Kind of media -> older files of its settings, read where the nested file has none; the first that is there counts."""
_USUAL = frozenset({NESTED, *(name for names in FILES.values() for name in names)})
TEMPLATE = "chat_template.jinja"
OLD_TEMPLATE = "chat_template.json"
TEMPLATE_FOLDER = "additional_chat_templates"
TOKENIZER_CONFIG = "tokenizer_config.json"


class Settings(NamedTuple):
    """What a file says of one kind of media, that file's name, and its place there, for errors."""

    values: dict[str, Any]
    file: str
    where: str


class Template(NamedTuple):
    """A chat template, and the name of the file it stands in. ``text`` is None where several have names and none is
    the default one."""

    text: str | None
    file: str


def list_settings(directory: Path, kind: str) -> list[Settings]:
    """Everything a directory says of processing media of a ``kind`` (image, video, audio); the first is what counts.

    Raises BundleError for a file that is not a JSON object.
    """
    whole, found = read_json(directory / NESTED), []
    named = next((part for part in PARTS[kind] if part in whole), None)
    if named is not None and whole[named] is not None:
        if not isinstance(whole[named], dict):
            raise BundleError(f"{named} is {whole[named]!r}, not an object", where=str(directory / NESTED))
        found.append(Settings(whole[named], NESTED, f"{NESTED}, {named}"))
    # The two older files of videos are one choice: the second stands in where the first is not there.
    older = next((name for name in FILES[kind] if (directory / name).is_file()), None)
    if older is not None:
        found.append(Settings(read_json(directory / older), older, older))
    return found


def find_settings(directory: Path, kind: str) -> Settings:
    """What counts of :func:`list_settings`; no values where nothing is said."""
    return next(iter(list_settings(directory, kind)), Settings({}, FILES[kind][0], FILES[kind][0]))


@contextmanager
def blame_file(where: str) -> Iterator[None]:
    """Errors about settings, which go by the usual name of their file, name the place where they stand instead."""
    try:
        yield
    except (UserError, BundleError) as error:
        name, _, text = str(error).partition(": ")
        if name not in _USUAL:
            raise
        raise type(error)(text, where=where) from None


def list_templates(directory: Path) -> list[Template]:
    """The chat templates for a conversation without tools, the first of them the one that counts.

    Raises BundleError for a file that cannot be read, and for an old file beside a folder of several templates, which
    transformers refuses as well.
    """
    found = []
    if isinstance(said := read_json(directory / NESTED).get("chat_template"), (str, dict)):
        found.append(_pick(said, NESTED))
    folder = {path.stem: path for path in sorted((directory / TEMPLATE_FOLDER).glob("*.jinja"))}
    old = directory / OLD_TEMPLATE
    if old.is_file():
        if folder:
            raise BundleError(
                f"{OLD_TEMPLATE} beside {TEMPLATE_FOLDER}/, and nothing says which counts", where=str(old),
                fix=f"move its template to {TEMPLATE}",
            )  # fmt: skip
        if isinstance(said := read_json(old).get("chat_template"), (str, dict, list)):
            found.append(_pick(said, OLD_TEMPLATE))
    if (path := directory / TEMPLATE).is_file():
        found.append(Template(_read_text(path), TEMPLATE))
    elif folder:
        texts = {name: _read_text(path) for name, path in folder.items()}
        found.append(_pick(texts, f"{TEMPLATE_FOLDER}/{'default.jinja' if 'default' in texts else ''}"))
    if isinstance(said := read_json(directory / TOKENIZER_CONFIG).get("chat_template"), (str, dict, list)):
        found.append(_pick(said, TOKENIZER_CONFIG))
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; an absent file is an empty object. Raises BundleError for anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"not JSON ({error})", where=str(path)) from None
    if not isinstance(value, dict):
        raise BundleError("not a JSON object", where=str(path))
    return value


def _pick(said: str | dict[str, Any] | list[Any], file: str) -> Template:
    """The default one of several templates, which are an object by name or a list of objects with a name each."""
    if isinstance(said, list):
        said = {str(entry.get("name")): entry.get("template") for entry in said if isinstance(entry, dict)}
    text = said if isinstance(said, str) else said.get("default")
    return Template(text if isinstance(text, str) else None, file)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"the chat template is not UTF-8 ({error.reason})", where=str(path)) from None
