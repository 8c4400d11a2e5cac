"""Geometries as users write them: ``images=2,text_tokens=128``, or a YAML file with a list of mappings. Sizes of
several images follow each other: ``image_size=448x448,224x336``.

    - {images: 1, text_tokens: 64}
    - {images: 2, text_tokens: 128, image_size: 448x448}
    - {image_size: [448x448, 224x336], text_tokens: 128}

Sizes that are left out are those of the plain options.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from secateur.compiler.geometry import Geometry
from secateur.compiler.yaml_text import parse_yaml
from secateur.runtime.errors import UserError

FIELDS = {field.name: field for field in fields(Geometry)}
_BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}


def list_geometries(given: Geometry | Sequence[Geometry] | None) -> tuple[Geometry, ...]:
    """What ``compile(geometry=...)`` takes as a tuple: one, several, or None for the usual one."""
    if given is None or isinstance(given, Geometry):
        return (given or Geometry(),)
    if not given:
        raise UserError("an empty list of geometries", where="geometry", fix="give at least one, or None")
    for one in given:
        if not isinstance(one, Geometry):
            raise UserError(
                f"a {type(one).__name__} is no Geometry", where="geometry", fix="give secateur.Geometry(...)"
            )
    return tuple(given)


def read_geometries(texts: Sequence[str], given: Mapping[str, Any]) -> tuple[Geometry, ...]:
    """The geometries that ``--geometry`` options name; the one of the plain options alone if there are none.

    Each text is ``key=value,...`` or the path of a ``.yaml`` file. ``given`` are the plain options that were given, by
    field: a geometry has those it does not say itself, as far as they go with what it says. Raises UserError that names
    the option or file, the entry and the field, also where a plain option says nothing in any of them.
    """
    entries: list[tuple[dict[str, Any], str]] = []
    for text in texts:
        if Path(text).suffix in (".yaml", ".yml"):
            entries += _read_file(Path(text))
        else:
            entries.append((_read_fields(_split(text), f"--geometry {text}"), f"--geometry {text}"))
    if not entries:
        return (make_geometry(given, given),)
    found, used = [], set[str]()
    for own, where in entries:
        shared = {name: value for name, value in given.items() if name not in own and not _is_other(name, own, given)}
        try:
            found.append(make_geometry({**shared, **own}, own))
        except UserError as error:
            raise UserError(str(error).removeprefix("geometry: "), where=where) from None
        used |= {name for name in shared if found[-1].lack(name) is None}
    if idle := sorted(given.keys() - used):
        flag = f"--{idle[0].replace('_', '-')}"
        raise UserError("says nothing: every --geometry has its own, or no use for it", where=flag, fix="leave it out")
    return tuple(found)


def make_geometry(fields: Mapping[str, Any], said: Mapping[str, Any]) -> Geometry:
    """A geometry of ``fields``. Raises UserError for one of ``said``, those a user named, that says nothing in it."""
    made = Geometry(**{name: value for name, value in fields.items() if not _is_idle(name, fields, said)})
    for name in said:
        if (lack := made.lack(name)) is not None:
            raise UserError(f"{name} is {said[name]}, but {lack[0]}", where="geometry", fix=lack[1])
    return made


def _is_idle(name: str, fields: Mapping[str, Any], said: Mapping[str, Any]) -> bool:
    """Whether a field that was not named here has no use beside the others."""
    if name in said or name not in ("fps", "audio_in_video"):
        return False
    return not fields.get("frames") or (name == "audio_in_video" and not fields.get("audio_seconds"))


def _is_other(name: str, own: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Whether a plain option is of the kind of media that a geometry of its own does not have."""
    if name == "images":
        return bool(own.get("frames"))
    return name == "frames" and "images" in own


def _split(text: str) -> dict[Any, Any]:
    where, values = f"--geometry {text}", dict[Any, Any]()
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals and key and [*values][-1:] == ["image_size"]:  # the next of several sizes
            values["image_size"] += f",{key}"
            continue
        if not equals or not key or not value:
            raise UserError(
                f"{part.strip()!r} is not key=value", where=where, available=FIELDS,
                fix="write images=2,text_tokens=128, or name a .yaml file",
            )  # fmt: skip
        name = key.replace("-", "_")
        if name in values:
            raise UserError(f"{name} is given twice", where=where)
        values[name] = value
    return values


def _read_file(path: Path) -> list[tuple[dict[str, Any], str]]:
    where = f"--geometry {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"cannot be read ({reason})", where=where) from None
    listed = parse_yaml(text, where)
    if not isinstance(listed, list) or not listed:
        raise UserError(
            "must be a list of mappings", where=where, fix="write one line per geometry: - {images: 1, text_tokens: 64}"
        )
    found = []
    for number, values in enumerate(listed):
        entry = f"{where}: [{number}]"
        if not isinstance(values, dict):
            raise UserError(f"{values!r} is not a mapping", where=entry, available=FIELDS)
        named = {str(key).replace("-", "_"): value for key, value in values.items()}
        if len(named) < len(values):
            raise UserError("a field is given twice", where=entry)
        found.append((_read_fields(named, entry), entry))
    return found


def _read_fields(values: Mapping[Any, Any], where: str) -> dict[str, Any]:
    for name in values:
        if name not in FIELDS:
            raise UserError(f"no such field {name!r}", where=where, available=FIELDS)
    return {name: _read_value(name, value, f"{where}: {name}") for name, value in values.items()}


def _read_value(name: str, value: Any, where: str) -> Any:
    """A value as its field holds it, from text or from YAML."""
    text = str(value).strip().lower()
    if name == "image_size":
        return read_sizes(value, where)
    if name == "audio_in_video":
        if text not in _BOOLEANS:
            raise UserError(f"no choice {value!r}", where=where, available=("true", "false"))
        return _BOOLEANS[text]
    if name == "fps":
        if not isinstance(value, bool) and re.fullmatch(r"\d+(\.\d*)?|\.\d+", text):
            return float(text)
        raise UserError(f"{value!r} is not a number", where=where, fix="write 2 or 0.5")
    if isinstance(value, bool) or not re.fullmatch(r"-?\d+", text):
        raise UserError(f"{value!r} is not a whole number", where=where)
    return int(text)


def read_sizes(value: Any, where: str) -> Any:
    """``448x336``, or one such pair for every image: several with commas between them, or a list of them. A list of
    two numbers is one pair."""
    if isinstance(value, list) and len(value) == 2 and all(type(side) is int for side in value):
        return tuple(value)
    parts = value if isinstance(value, list) else str(value).split(",")
    found = [re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", str(part).strip().lower()) for part in parts]
    sizes = tuple((int(match[1]), int(match[2])) for match in found if match is not None)
    if not sizes or len(sizes) < len(found):
        raise UserError(
            f"{value!r} is not height x width", where=where,
            fix="write 448x448, in pixels, or one for each image: 448x448,224x336",
        )  # fmt: skip
    return sizes if len(sizes) > 1 else sizes[0]
