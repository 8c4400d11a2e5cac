"""What a checkpoint says of generating: refused where it could not be run, told where it is not applied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from secateur.compiler.generation_files import GENERATION
from secateur.compiler.processor_files import take_processor_files
from secateur.runtime.generation_fields import list_left_out
from secateur.runtime.generation_options import resolve
from secateur.runtime.sampling import check_tokens


def read_generation_defaults(path: Path) -> dict[str, Any]:
    """The generation defaults that count of a model directory; empty where it says nothing."""
    return dict(json.loads(take_processor_files(path).texts.get(GENERATION, "{}")))


def find_generation_file(path: Path) -> Path:
    """The file of a model directory that its generation defaults stand in."""
    own = path / GENERATION
    return own if own.is_file() else path / "config.json"


def check_generation_defaults(path: Path, vocab_size: int) -> list[str]:
    """Refuse defaults that no prompt could be answered with; notes on those that are not applied, one at most."""
    defaults = read_generation_defaults(path)
    file = find_generation_file(path)
    where = str(file)
    check_tokens(resolve(defaults, where=where).sampling, vocab_size, where)
    if left_out := list_left_out(defaults):
        return [
            f"{file.name}: not applied: {', '.join(left_out)}; answers are greedy or drawn, and may differ from "
            f"transformers'"
        ]
    return []
