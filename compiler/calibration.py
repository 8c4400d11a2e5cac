"""Calibration files: what `secateur calibrate` measured of a model, and how a recipe refers to it.

    options: {weights: "file:fastv.calibration.json#stage0.position_weights@3f9a0c1d7b20"}

Behind ``file:`` stands a path, counted from the recipe file's own directory, behind ``#`` the stage and its field, and
behind ``@`` at least eight digits of the file's SHA-256: a file that was made anew is not taken without a word.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from secateur.compiler.learned import WeightsFile, read_weights
from secateur.compiler.plan_recipe import PlannedStage
from secateur.compiler.recipe import Term
from secateur.runtime.errors import UserError
from secateur.runtime.manifest import hash_file

_REFERENCE = re.compile(r"file:([^#]+)#(\w+)\.(\w+)(?:@([0-9a-f]*))?")
_DIGITS = 12
_SHORTEST = 8
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Fields(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class CalibratedModel(_Fields):
    source: str
    config_sha256: Digest


class CalibratedRecipe(_Fields):
    """The recipe that ran: its name, keep ratio and the plan's text; ``sha256`` is the text's."""

    name: str
    keep: float
    plan: list[str]
    sha256: Digest


class CalibrationData(_Fields):
    """``sha256`` covers the questions' texts and images, in order."""

    name: str
    count: Annotated[int, Field(ge=1)]
    sha256: Digest


class StageCalibration(_Fields):
    """What was measured of one stage that scores.

    ``mean_score`` is the mean over questions and groups of the score at each place among the tokens that enter.
    ``position_weights``, for ``position_bias``, is its inverse, at most 1; None where a mean is not positive. With
    ``curve`` it is the inverse of a curve through the means: a parabola, fitted to their logarithms.
    ``count`` is how many of the highest scores hold the fraction ``mass`` of all, on average; None where a score is
    negative. ``sink_dims``, for ``sink_mask``, lists the dimensions of the stream in which the prompt's first token,
    RMS-normalised, exceeds ``tau`` in most prompts; None outside the decoder.
    """

    site: str
    tokens: Annotated[int, Field(ge=1)]
    mean_score: list[Finite]
    curve: bool
    position_weights: list[Finite] | None
    mass: float
    count: int | None
    tau: float
    sink_dims: list[Annotated[int, Field(ge=0)]] | None


class Calibration(_Fields):
    schema_version: Literal[1] = 1
    secateur: str
    model: CalibratedModel
    recipe: CalibratedRecipe
    data: CalibrationData
    stages: dict[str, StageCalibration]

    def to_bytes(self) -> bytes:
        """The file's content; the same calibration gives the same bytes."""
        return self.model_dump_json(indent=1).encode() + b"\n"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def refer(self, path: str, stage: str, field: str) -> str:
        """The text that stands for a field in a recipe file."""
        return f"file:{path}#{stage}.{field}@{self.sha256[:_DIGITS]}"


PER_TOKEN = ("mean_score", "position_weights")
_VALUES = (*PER_TOKEN, "sink_dims")


@dataclass(frozen=True)
class Origin:
    """Where numbers came from: a calibration file's path as it was written, its whole digest, the field, and what they
    hold for."""

    path: str
    sha256: str
    stage: str
    field: str
    config_sha256: str
    model: str
    tokens: int


class Calibrated(tuple[float, ...]):
    """Numbers out of a calibration file, as an option's value. They print as the reference to them."""

    origin: Origin

    def __new__(cls, values: Sequence[float], origin: Origin) -> Calibrated:
        made = super().__new__(cls, values)
        made.origin = origin
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self), self.origin

    @property
    def reference(self) -> str:
        """As a recipe file says it."""
        return self._refer(self.origin.path)

    def __repr__(self) -> str:
        # Without the folder: manifests hold no paths of the machine they were made on.
        return self._refer(Path(self.origin.path).name)

    def _refer(self, path: str) -> str:
        origin = self.origin
        return f"file:{path}#{origin.stage}.{origin.field}@{origin.sha256[:_DIGITS]}"


def read_calibration(path: Path) -> tuple[Calibration, str]:
    """A calibration file and its SHA-256. Raises UserError in one line for anything that is not one."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read it: {error.strerror}", where=str(path)) from None
    try:
        return Calibration.model_validate_json(raw), hashlib.sha256(raw).hexdigest()
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"not a calibration file: {field + ': ' if field else ''}{first['msg']}",
            where=str(path),
            fix="make it with secateur calibrate",
        ) from None


def resolve_references(data: Any, folder: Path, where: str) -> Any:
    """A recipe file's content with the references among its terms' options replaced by what they stand for: numbers of
    a calibration file, or a file of learned weights."""
    if isinstance(data, list):
        return [resolve_references(entry, folder, where) for entry in data]
    if not isinstance(data, dict):
        return data
    found = {}
    for key, value in data.items():
        if key == "options" and isinstance(value, dict):
            found[key] = {
                name: _resolve(given, folder, f"{where}: options.{name}") if _refers(given) else given
                for name, given in value.items()
            }
        else:
            found[key] = resolve_references(value, folder, where)
    return found


def read_reference(text: str, folder: Path = Path(), where: str = "calibration") -> Calibrated:
    """The numbers that ``file:PATH#STAGE.FIELD@DIGEST`` stands for; ``folder`` is where the path counts from."""
    parts = _REFERENCE.fullmatch(text)
    if parts is None:
        raise UserError(
            f"{text!r} refers to nothing", where=where,
            fix="write file:PATH#STAGE.FIELD@DIGEST, such as calibrate says, or file:NAME.safetensors",
        )  # fmt: skip
    path, stage, field, digest = parts.groups()
    calibration, sha256 = read_calibration(folder / path)
    if len(digest or "") < _SHORTEST or not sha256.startswith(digest):
        raise UserError(
            f"{path} has another digest" if digest else f"the digest of {path} is missing",
            where=where,
            fix=f"end the reference with @{sha256[:_DIGITS]} if this is the calibration you mean",
        )
    if stage not in calibration.stages:
        raise UserError(f"no stage {stage!r} in {path}", where=where, available=calibration.stages)
    found = calibration.stages[stage]
    if field not in _VALUES:
        raise UserError(f"no field {field!r} in {path}", where=where, available=_VALUES)
    values = getattr(found, field)
    if not values:
        raise UserError(f"{path} has no {field} for {stage}: none were found", where=where)
    if field in PER_TOKEN and len(values) != found.tokens:
        raise UserError(
            f"{field} of {stage} in {path} has {len(values)} numbers for {found.tokens} tokens", where=where
        )
    model = calibration.model
    return Calibrated(values, Origin(path, sha256, stage, field, model.config_sha256, model.source, found.tokens))


def write_value(value: Any) -> Any:
    """An option's value as a recipe file says it."""
    return value.reference if isinstance(value, (Calibrated, WeightsFile)) else value


def list_calibrated(stage: PlannedStage) -> Iterator[tuple[str, Calibrated]]:
    """Every calibrated option of a stage's functions, with where it stands."""
    for where, value in _list_options(stage):
        if isinstance(value, Calibrated):
            yield where, value


def _list_options(stage: PlannedStage) -> Iterator[tuple[str, Any]]:
    waiting: list[Term] = [term for term in (stage.score, stage.select, stage.merge) if term is not None]
    while waiting:
        term = waiting.pop()
        waiting += term.of
        for name, value in term.options.items():
            yield f"{stage.name}: {term.name}.{name}", value


def check_calibrated(stages: Sequence[PlannedStage], config: Path) -> None:
    """``config`` is the model's ``config.json``. Raises UserError for numbers of another model, or for another number
    of tokens."""
    for stage in stages:
        for where, value in list_calibrated(stage):
            origin = value.origin
            if origin.config_sha256 != hash_file(config):
                raise UserError(
                    f"{origin.path} was made for another model ({origin.model})", where=where,
                    fix="calibrate this one: secateur calibrate MODEL_DIR DATA",
                )  # fmt: skip
            if origin.field in PER_TOKEN and origin.tokens != stage.length_in:
                raise UserError(
                    f"{origin.path} holds {origin.tokens} places, {stage.length_in} tokens enter here", where=where,
                    fix="calibrate with the images per prompt and the keep ratio that you compile with",
                )  # fmt: skip


def digests_of(stages: Sequence[PlannedStage]) -> dict[str, str]:
    """File name -> SHA-256 of every calibration that stages use."""
    found = {Path(v.origin.path).name: v.origin.sha256 for s in stages for _, v in list_calibrated(s)}
    return dict(sorted(found.items()))


def digests_of_weights(stages: Sequence[PlannedStage]) -> dict[str, str]:
    """File name -> SHA-256 of every file of learned weights that stages use."""
    found = {v.name: v.sha256 for s in stages for _, v in _list_options(s) if isinstance(v, WeightsFile)}
    return dict(sorted(found.items()))


def _resolve(text: str, folder: Path, where: str) -> Calibrated | WeightsFile:
    # A reference to a calibration says which of the file's fields is meant.
    learned = "#" not in text and text.partition("@")[0].endswith(".safetensors")
    return read_weights(text, folder, where) if learned else read_reference(text, folder, where)


def _refers(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("file:")
