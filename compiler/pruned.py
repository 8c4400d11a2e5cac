"""The result of the pruning passes, and the job that leads to it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from secateur.compiler.geometry import Geometry
from secateur.compiler.program import ProgramSet
from secateur.compiler.recipe import PlannedRecipe
from secateur.compiler.trace import Source, Traced


@dataclass(frozen=True)
class Job:
    """What every pass may read: the model's facts, the geometry, the planned recipe and its stage functions."""

    source: Source
    geometry: Geometry
    plan: PlannedRecipe
    stages: tuple[Any, ...]
    """``passes.stage.StageFunction`` per stage, in order."""

    @cached_property
    def vision_stages(self) -> tuple[Any, ...]:
        return tuple(s for s in self.stages if not s.planned.site.kind.startswith("decoder"))

    @cached_property
    def decoder_stages(self) -> tuple[Any, ...]:
        return tuple(s for s in self.stages if s.planned.site.kind.startswith("decoder"))

    @property
    def kept_per_image(self) -> int:
        """P: tokens of one image that reach the decoder."""
        if not self.vision_stages:
            return self.source.vision.tokens_per_image
        return int(self.vision_stages[-1].planned.length_out)

    @property
    def features_per_row(self) -> int:
        """F: image tokens of a row that reach the decoder."""
        return self.kept_per_image * self.geometry.images

    @property
    def sequence(self) -> int:
        """N: slots of the prompt as prefill receives it."""
        return self.geometry.text_tokens + self.features_per_row

    @property
    def original_positions(self) -> bool:
        """Whether features removed before the decoder leave gaps in the numbering."""
        return bool(self.vision_stages) and self.plan.recipe.positions == "original"

    @property
    def position_offset(self) -> int:
        """What a new token's position lies above its slot in the first segment."""
        removed = self.source.vision.tokens_per_image * self.geometry.images - self.features_per_row
        return removed if self.original_positions else 0


@dataclass(frozen=True)
class Pruned:
    """Static programs ``vision``, ``prefill`` and ``decode`` with the recipe's stages inside."""

    job: Job
    traced: Traced
    programs: ProgramSet

    def __str__(self) -> str:
        return f"{self.job.plan}\n\n{self.programs}"
