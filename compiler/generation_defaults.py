"""What a checkpoint says of generating: refused where it could not be run, told where it is not applied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from secateur.runtime.errors import UserError
from secateur.runtime.generation_fields import list_left_out
from secateur.runtime.generation_options import DEFAULTS_FILE, resolve
from secateur.runtime.sampling import check_tokens


def read_generation_defaults(path: Path) -> dict[str, Any]:
    """The model directory's generation_config.json; empty where there is none."""
    file = path / DEFAULTS_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError("not a JSON object", where=str(file), fix="download the file again")
    return found


def check_generation_defaults(path: Path, vocab_size: int) -> list[str]:
    """Refuse defaults that no prompt could be answered with; notes on those that are not applied, one at most."""
    defaults = read_generation_defaults(path)
    where = str(path / DEFAULTS_FILE)
    check_tokens(resolve(defaults, where=where).sampling, vocab_size, where)
    if left_out := list_left_out(defaults):
        return [
            f"{DEFAULTS_FILE}: not applied: {', '.join(left_out)}; answers are greedy or drawn, and may differ from "
            f"transformers'"
        ]
    return []
