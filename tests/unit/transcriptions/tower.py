"""Transcriptions of the rows in ``passes/recipes/tower_rows.py``."""

from __future__ import annotations

from . import Transcription

ROWS: dict[str, Transcription] = {}
