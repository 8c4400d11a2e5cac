"""The result of the pruning passes, and the job that leads to it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from secateur.compiler.geometry import Geometry
from secateur.compiler.plan_recipe import PlannedRecipe
from secateur.compiler.program import ProgramSet
from secateur.compiler.trace import Source, Traced


@dataclass(frozen=True)
class Job:
    """What every pass may read: the model's facts, the geometry, the planned recipe and its stage functions."""

    source: Source
    geometry: Geometry
    plan: PlannedRecipe
    stages: tuple[Any, ...]
    """``passes.stage.StageFunction`` per stage, in order."""
    sizes: tuple[Job, ...] = ()
    """Where images are of several sizes: for each the job of its images up to the decoder. The stages above that stand
    there count the tokens of all of them together."""

    @cached_property
    def vision_stages(self) -> tuple[Any, ...]:
        return tuple(s for s in self.stages if s.planned.site.kind not in ("decoder.layer", "audio.out"))

    @cached_property
    def audio_stages(self) -> tuple[Any, ...]:
        return tuple(s for s in self.stages if s.planned.site.kind == "audio.out")

    @cached_property
    def decoder_stages(self) -> tuple[Any, ...]:
        return tuple(s for s in self.stages if s.planned.site.kind.startswith("decoder"))

    @property
    def kept_per_image(self) -> int:
        """P: patches of one image that reach the decoder; of a tile, where no stage chooses before it."""
        if not self.vision_stages:
            return self.source.vision.tokens_per_image
        return int(self.vision_stages[-1].planned.length_out)

    @property
    def kept_per_item(self) -> int:
        """Visual tokens of one item (an image, or a video with extra rows of its own) that reach the decoder."""
        if not self.removes_before_decoder:
            return self.source.vision.tokens_per_item
        grids = 1 if self.source.vision.tiles is not None else self.source.vision.grids_per_item
        return self.kept_per_image * grids

    @property
    def features_per_item(self) -> int:
        """P + E: placeholders of one item in the prompt as prefill receives it."""
        return self.kept_per_item + self.source.vision.extra_rows

    @property
    def features_per_row(self) -> int:
        """F: tokens of a row's media that reach the decoder, the items' extra rows included."""
        return self.features_per_item * self.source.vision.items + self.source.audio_tokens

    @property
    def media_order(self) -> tuple[int, ...]:
        """Of every media token that enters the decoder, its place among what is seen, followed by what is heard."""
        if self.source.media is None:
            return tuple(range(self.features_per_row))
        return self.source.media.order(self.source.vision.tokens_per_image, self.kept_per_image)

    @property
    def items_left(self) -> list[int]:
        """Tokens of every item of a row's media that enter the decoder."""
        media = self.source.media
        if media is None:
            return [self.features_per_item] * self.source.vision.items
        if self.sizes:
            sounds = [item.tokens for item in media.items if item.kind == "audio"]
            return [*(self.sizes[size].kept_per_image for size in self.source.vision.size_of), *sounds]
        whole, left = self.source.vision.tokens_per_image, self.kept_per_image
        sizes, runs = [], list(media.runs)
        for item in media.items:
            room, kept = item.tokens, 0
            while room:
                heard, count = runs.pop(0)
                taken = min(count, room)
                if taken < count:
                    runs.insert(0, (heard, count - taken))
                room -= taken
                kept += taken if heard else taken * left // whole
            sizes.append(kept)
        return sizes

    @property
    def sequence(self) -> int:
        """N: slots of the prompt as prefill receives it."""
        return self.geometry.text_tokens + self.features_per_row

    @property
    def removes_before_decoder(self) -> bool:
        return any(not s.planned.observes for s in self.vision_stages)

    @property
    def original_positions(self) -> bool:
        """Whether features removed before the decoder leave gaps in the numbering."""
        return bool(self.vision_stages) and self.vision_stages[-1].planned.positions == "original"

    @property
    def carries(self) -> bool:
        """Whether a score of the vision side is read inside the decoder (signal ``carried``)."""
        if not self.decoder_stages:
            return False
        # A part of a composed recipe hands nothing on to the next.
        part = self.decoder_stages[0].planned.part
        told = any(s.bound.score is not None and s.planned.part == part for s in self.vision_stages + self.audio_stages)
        for stage in self.decoder_stages:
            if stage.planned.part != part:
                return False
            if "carried" in stage.signals:
                return told
            if stage.bound.score is not None:
                return False
        return False

    @property
    def position_offset(self) -> int:
        """What a new token's position lies above its slot in the first segment, where ids count slots."""
        removed = self.source.vision.tokens_per_item - self.kept_per_item
        return removed * self.source.vision.items if self.original_positions else 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever uses the bundle should know."""
        facts = self.source.vision
        return tuple(
            note for note in (facts.every_image, facts.single_image * ((self.geometry.images or 1) == 1)) if note
        )


@dataclass(frozen=True)
class Pruned:
    """Static programs ``vision``, ``prefill`` and ``decode`` with the recipe's stages inside."""

    job: Job
    traced: Traced
    programs: ProgramSet

    def __str__(self) -> str:
        return f"{self.job.plan}\n\n{self.programs}"
