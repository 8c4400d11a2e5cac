"""Checkpoints that bring code of their own (``auto_map``): it is never run; transformers' classes stand in, if any."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.compiler.families import list_model_types
from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.processor_files import FILES, NESTED, TOKENIZER_CONFIG, read_json

_log = logging.getLogger(__name__)
_KEY = "auto_map"


def check_own_code(directory: Path, config: Mapping[str, Any]) -> None:
    """Warn once of all files in ``directory`` that name code of the checkpoint's own.

    ``config`` is what its ``config.json`` says. Raises UserError if transformers has no model of this type without
    that code.
    """
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if config.get(_KEY) and model_type not in CONFIG_MAPPING:
        raise UserError(
            f"model type {model_type!r} is code of the checkpoint's own (auto_map), which is never run",
            where=str(directory / "config.json"), available=list_model_types(),
            fix="use a version of this model that transformers has classes for (often called …-hf)",
        )  # fmt: skip
    others = (TOKENIZER_CONFIG, NESTED, *dict.fromkeys(name for names in FILES.values() for name in names))
    named = [
        *(["config.json"] if _names_code(config) else []),
        *(n for n in others if _names_code(_read(directory / n))),
    ]
    if named:
        _log.warning(
            "%s: code of the checkpoint's own (auto_map in %s) was not run; transformers' classes are taken",
            directory, ", ".join(named),
        )  # fmt: skip


def _names_code(values: Mapping[str, Any]) -> bool:
    """Whether a configuration, or a part of it, has an ``auto_map`` with something in it."""
    return bool(values.get(_KEY)) or any(_names_code(part) for part in values.values() if isinstance(part, dict))


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except BundleError:
        return {}  # Whoever needs the file says what is wrong with it.
