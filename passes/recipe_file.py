"""Recipes by name, composed, and as YAML files: read with errors that name the field, and written back.

    name: mine
    stages:
      - site: decoder.layer[2/32]
        score: {name: last_query_attention_mean, options: {heads: max}}
        select: top_k
        share: 0.5
        signals: {last_query_attention: {projections: previous}}

A term without options may be its bare name. The table of papers and a file give the same :class:`Recipe`.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from secateur.compiler.calibration import resolve_references, write_value
from secateur.compiler.compose import compose
from secateur.compiler.recipe import Cache, Evidence, Part, Positions, Recipe, Rounds, Scope, Setting, Stage, Term
from secateur.compiler.schedule import Exponential
from secateur.compiler.site import Site
from secateur.compiler.yaml_text import parse_yaml
from secateur.passes.recipe_module import recipe_from_file
from secateur.passes.recipes import get_recipe
from secateur.runtime.errors import UserError

_CONFIG = ConfigDict(extra="forbid", strict=True, frozen=True)


class _TermFields(BaseModel):
    model_config = _CONFIG
    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    of: list[_TermFields] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _accept_bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    def term(self) -> Term:
        return Term(self.name, _freeze(self.options), tuple(inner.term() for inner in self.of))


class _StageFields(BaseModel):
    model_config = _CONFIG
    site: str
    select: _TermFields | None = None
    score: _TermFields | None = None
    merge: _TermFields | None = None
    share: float | None = Field(None, ge=0, le=1)
    count: int | None = Field(None, ge=1)
    scope: Scope = "image"
    window: int = Field(1, ge=1)
    signals: dict[str, dict[str, Any]] = Field(default_factory=dict)
    rounds: Rounds = "nearest"


class _SettingFields(BaseModel):
    model_config = _CONFIG
    model: str
    keep: float = Field(gt=0, le=1)
    note: str = ""


class _ScheduleFields(BaseModel):
    model_config = _CONFIG
    name: Literal["exponential"]
    entry: float | None = Field(None, gt=0)
    drop: float | None = Field(None, ge=0, lt=1)


class _RecipeFields(BaseModel):
    model_config = _CONFIG
    name: str = Field(min_length=1)
    title: str = ""
    link: str = ""
    positions: Positions = "original"
    cache: Cache = "ragged"
    evidence: Evidence = "reconstructed"
    notes: str = ""
    identity_at_one: bool = True
    collapses: bool = False
    settings: list[_SettingFields] = Field(default_factory=list)
    schedule: _ScheduleFields | None = None
    stages: list[_StageFields]


_FIELDS: dict[str, type[BaseModel]] = {
    "": _RecipeFields, "stages": _StageFields, "score": _TermFields, "select": _TermFields, "merge": _TermFields,
    "of": _TermFields, "settings": _SettingFields, "schedule": _ScheduleFields,
}  # fmt: skip
_CHOICES = {
    "scope": get_args(Scope), "rounds": get_args(Rounds), "positions": get_args(Positions), "cache": get_args(Cache),
    "evidence": get_args(Evidence), "name": ("exponential",),
}  # fmt: skip
_SHOWN = {dict: "a mapping", list: "a list", type(None): "empty"}


def load_recipe(text: str) -> Recipe:
    """The recipe that ``text``, as written behind ``--recipe``, stands for.

    A row of the table or of an installed package by its name, ``FILE.yaml``, or ``FILE.py:NAME``; behind a row with
    learned weights their file, ``echoingpixels:weights=FILE.safetensors``. Several joined by
    ``+`` are stacked, ``:keep=R`` behind one of them gives the fraction of the tokens that enter it that it leaves:
    ``divprune:keep=0.5+fastv:keep=0.5``.
    """
    if ("+" not in text and ":keep" not in text) or Path(text).is_file():
        return _load_one(text)
    parts = []
    for piece in map(str.strip, text.split("+")):
        name, colon, ratio = piece.rpartition(":keep")
        if not (name if colon else piece):
            raise UserError("a part has no name", where=f"--recipe {text}", fix="write it as divprune:keep=0.5+fastv")
        recipe = _load_one(name if colon else piece)
        parts.append(Part(recipe, _read_keep(ratio, text) if colon else recipe.default_keep))
    return compose(text, parts)


def _read_keep(text: str, where: str) -> float:
    try:
        return float(text.removeprefix("=") if text.startswith("=") else "")
    except ValueError:
        raise UserError(
            f"':keep{text}' has no number", where=f"--recipe {where}", fix="write it as fastv:keep=0.5"
        ) from None


def _load_one(text: str) -> Recipe:
    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        return recipe_from_yaml(_read_text(path), where=text, folder=path.parent)
    if module := re.fullmatch(r"(.+\.py)(?::(.*))?", text):
        return recipe_from_file(Path(module[1]), module[2])
    if weighted := re.fullmatch(r"([^:]+):weights=(.*)", text):
        from secateur.passes.needs import with_weights  # imports torch

        return with_weights(get_recipe(weighted[1]), Path(weighted[2]), f"--recipe {text}")
    return get_recipe(text)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read it: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError:
        raise UserError("not a text file in UTF-8", where=str(path)) from None


def recipe_from_yaml(text: str, where: str = "recipe", folder: Path = Path()) -> Recipe:
    """The recipe written in ``text``; every name in it is looked up. ``where`` opens the error messages; paths of
    calibration files count from ``folder``."""
    try:
        fields = _RecipeFields.model_validate(resolve_references(parse_yaml(text, where), folder, where))
    except ValidationError as error:
        raise _describe(error, where) from None
    stages = [_read_stage(stage, f"{where}: stages[{index}]") for index, stage in enumerate(fields.stages)]
    settings = tuple(Setting(s.model, s.keep, s.note) for s in fields.settings)
    schedule = Exponential(fields.schedule.entry, fields.schedule.drop) if fields.schedule else None
    plain = fields.model_dump(exclude={"stages", "settings", "schedule"})
    return Recipe(stages=tuple(stages), settings=settings, schedule=schedule, **plain)


def recipe_to_yaml(recipe: Recipe) -> str:
    """Text that :func:`recipe_from_yaml` reads back as an equal recipe."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes what occurs twice twice, not as a reference."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    return str(yaml.dump(recipe_to_data(recipe), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100))


def recipe_to_data(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain lists and dictionaries, in the layout of a recipe file; of a composed one, its parts."""
    if recipe.parts:
        parts = [{"keep": part.keep, "recipe": recipe_to_data(part.recipe)} for part in recipe.parts]
        return {"name": recipe.name, "parts": parts}
    return {
        "name": recipe.name,
        "title": recipe.title,
        "link": recipe.link,
        "positions": recipe.positions,
        **({"cache": recipe.cache} if recipe.cache != "ragged" else {}),
        "evidence": recipe.evidence,
        "notes": recipe.notes,
        "identity_at_one": recipe.identity_at_one,
        "collapses": recipe.collapses,
        "settings": [{"model": s.model, "keep": s.keep, "note": s.note} for s in recipe.settings],
        **({"schedule": _write_schedule(recipe.schedule)} if recipe.schedule else {}),
        "stages": [_write_stage(stage) for stage in recipe.stages],
    }


def digest_recipe(recipe: Recipe) -> str:
    """SHA-256 of what a recipe says, and of the text of those of its functions that are not this package's."""
    from secateur.passes.check_function import every_term  # imports torch
    from secateur.passes.methods.own import digest_own
    from secateur.passes.vocabulary import bind_stage

    bound = [bind_stage(stage, f"recipe {recipe.name}") for stage in recipe.stages]
    own = digest_own(term.function for stage in bound for term in every_term(stage))
    text = json.dumps(recipe_to_data(recipe), sort_keys=True) + own
    return hashlib.sha256(text.encode()).hexdigest()


def _write_schedule(schedule: Exponential) -> dict[str, Any]:
    late = {"drop": schedule.drop} if schedule.drop is not None else {}
    return {"name": "exponential", "entry": schedule.entry, **late}


def _write_stage(stage: Stage) -> dict[str, Any]:
    terms = {"score": stage.score, "select": stage.select, "merge": stage.merge}
    return {
        "site": stage.site.written,
        **{role: _write_term(term) for role, term in terms.items() if term},
        **({"count": stage.count} if stage.count is not None else {"share": stage.share} if stage.select else {}),
        **({"rounds": stage.rounds} if stage.rounds != "nearest" else {}),
        "scope": stage.scope,
        **({"window": stage.window} if stage.scope == "window" else {}),
        "signals": {name: dict(options) for name, options in stage.signals.items()},
    }


def _write_term(term: Term) -> dict[str, Any]:
    of = {"of": [_write_term(inner) for inner in term.of]} if term.of else {}
    return {"name": term.name, "options": {k: write_value(v) for k, v in term.options.items()}, **of}


def _read_stage(fields: _StageFields, where: str) -> Stage:
    from secateur.passes.vocabulary import bind_stage  # imports torch, which listing the table does not need

    if fields.select is not None and (fields.share is None) == (fields.count is None):
        raise UserError("give either a share or a count", where=where)
    stage = Stage(
        site=Site.parse(fields.site, where=f"{where}.site"),
        select=fields.select.term() if fields.select else None,
        score=fields.score.term() if fields.score else None,
        merge=fields.merge.term() if fields.merge else None,
        share=1.0 if fields.share is None else fields.share,
        count=fields.count,
        scope=fields.scope,
        window=fields.window,
        signals=_freeze(fields.signals),
        rounds=fields.rounds,
    )
    bind_stage(stage, where=where)
    return stage


def _freeze(value: Any) -> Any:
    """Lists as tuples, which is how rows are written."""
    if isinstance(value, dict):
        return {key: _freeze(inner) for key, inner in value.items()}
    return tuple(map(_freeze, value)) if isinstance(value, list) else value


def _describe(error: ValidationError, where: str) -> UserError:
    """The first misfit as one line: the path of the field, what is wrong, and the choices."""
    first = error.errors()[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    owner = _RecipeFields if len(first["loc"]) <= 1 else _FIELDS[_owner_name(first["loc"])]
    place = f"{where}: {path}" if path else where
    if first["type"] == "extra_forbidden":
        return UserError("no such field", where=place, available=owner.model_fields)
    if first["type"] == "missing":
        return UserError("this field is missing", where=place)
    field = str(first["loc"][-1]) if first["loc"] else ""
    if first["type"] == "literal_error":
        return UserError(f"no choice {first['input']!r}", where=place, available=_CHOICES[field])
    wanted = first["msg"].removeprefix("Input should be ").replace("dictionary", "mapping")
    if first["type"] == "model_type":
        wanted = f"a mapping with the fields {', '.join((_FIELDS.get(field) or owner).model_fields)}"
    given = first["input"]
    return UserError(f"must be {wanted}, not {_SHOWN.get(type(given)) or repr(given)}", where=place)


def _owner_name(location: tuple[int | str, ...]) -> str:
    return next((str(part) for part in reversed(location[:-1]) if part in _FIELDS), "")
