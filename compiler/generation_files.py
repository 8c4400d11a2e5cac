"""Which generation defaults of a checkpoint count: those of their own file, or old ones inside the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from secateur.compiler.file_differences import tell_difference
from secateur.runtime.errors import UserError

GENERATION = "generation_config.json"
_ENDS = "eos_token_id"
_IDS = ("bos_token_id", "pad_token_id")
"""What else the configuration and the defaults both say of tokens: the runtime reads neither there."""


def read_generation(directory: Path) -> tuple[str | None, list[str]]:
    """The text of a bundle's ``generation_config.json``, None where nothing is said, and notes on what differs.

    Without that file, transformers takes what an older release left inside ``config.json``. Raises UserError for a
    file that is not a JSON object.
    """
    file = directory / GENERATION
    old = _read_old(directory)
    if not file.is_file():
        return (json.dumps(old, indent=2, sort_keys=True) + "\n" if old else None), []
    try:
        said = json.loads(text := file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise UserError("not a JSON object", where=str(file), fix="download the file again")
    usual = _usual_values()
    keys = [
        key
        for key, value in sorted(old.items())
        if key not in (_ENDS, *_IDS) and value != said.get(key, usual.get(key))
    ]
    ends, older = (_as_set(each.get(_ENDS)) for each in (said, old))
    if ends and not older <= ends:
        keys.append(_ENDS)
    return text, [tell_difference(GENERATION, "config.json", keys)] if keys else []


def _read_old(directory: Path) -> dict[str, Any]:
    """Generation defaults inside ``config.json``, as transformers finds them; none where it cannot read them."""
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(
            directory, config_file_name="config.json", _from_model_config=True, local_files_only=True
        ).to_diff_dict()
    except Exception:  # its validators raise exceptions of no common class; such values never counted
        return {}
    return {key: value for key, value in found.items() if not key.startswith("_") and key != "transformers_version"}


def _usual_values() -> dict[str, Any]:
    """What generation defaults are where nothing is said."""
    from transformers import GenerationConfig

    read = getattr(GenerationConfig, "_get_default_generation_params", None)
    return dict(read()) if read is not None else GenerationConfig().to_dict()


def _as_set(ids: Any) -> set[Any]:
    return set(ids) if isinstance(ids, list) else set() if ids is None else {ids}
