"""Refuse, before anything is traced, stages that do not fit each other or the tower."""

from __future__ import annotations

import math
from collections.abc import Sequence

from secateur.compiler.families.family import VisionFacts
from secateur.passes.signals import NEED_CLS, attends_in_tower, joins_tiles
from secateur.passes.stage import StageFunction
from secateur.passes.units import Pooled, sides
from secateur.runtime.errors import UserError


def check_stages(stages: Sequence[StageFunction], facts: VisionFacts, audio: VisionFacts | None = None) -> None:
    """Raises UserError that names the stage, the signal or site that does not fit, and what would."""
    scored, part = False, 0
    for index, stage in enumerate(stages):
        planned = stage.planned
        if planned.part != part:
            scored, part = False, planned.part
        if "carried" in stage.signals and not scored and stage.bound.needs("carried"):
            raise UserError(
                "signal 'carried' is what an earlier stage's score leaves, and no earlier stage has one",
                where=planned.name,
                fix="give an earlier stage a score",
            )
        scored = scored or stage.bound.score is not None
        _check_exit(stage)
        if planned.site.kind == "audio.out":
            assert audio is not None, "stages for sound are planned where there is sound"
            _check_tower_stage(stage, [s for s in stages[:index] if s.planned.site.kind == "audio.out"], audio)
        elif not planned.site.kind.startswith("decoder"):
            _check_tower_stage(stage, stages[:index], facts)


def _check_exit(stage: StageFunction) -> None:
    """A stage that leaves nothing says so twice, by its share and by its selector, and stands in the decoder."""
    planned, select = stage.planned, stage.bound.select
    removes_all = select is not None and select.name == "nothing"
    if removes_all and planned.length_out:
        raise UserError(
            f"selector 'nothing' keeps no token, but the stage shall leave {planned.length_out}",
            where=planned.name,
            fix="give it share 0, or another selector",
        )
    if planned.length_out == 0 and not removes_all:
        raise UserError(
            "this budget leaves no token",
            where=planned.name,
            fix="give a share above 0, or the selector 'nothing' if all visual tokens shall go",
        )
    if removes_all and not planned.site.kind.startswith("decoder"):
        raise UserError(
            f"no token would be left at {planned.site} for the decoder",
            where=planned.name,
            fix="put the selector 'nothing' at a decoder.layer[k] site",
        )


def tower_layers(stage: StageFunction, facts: VisionFacts) -> dict[str, tuple[int, ...]]:
    """The tower layers each attention signal of a tower-side stage reads, lowest first.

    Raises UserError for a layer the tower does not have.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name in filter(attends_in_tower, stage.signals):
        if stage.planned.site.kind == "vision.layer":
            found[name] = ((stage.planned.site.layer or 0) - 1,)
            continue
        options = stage.signal_options[name]
        named = options.get("layers", options.get("layer", ("read",)))
        found[name] = tuple(sorted({_place(layer, facts, f"{stage.planned.name}.signals.{name}") for layer in named}))
    return found


def _place(layer: str, facts: VisionFacts, where: str) -> int:
    if layer == "read":
        return _nearest_whole(facts.feature_layer, facts)
    number, _, depth = layer.partition("/")
    index = facts.feature_layer + 1 if layer == "next" else int(number)
    if depth:
        index = min(math.floor(index * facts.layers / int(depth) + 0.5), facts.feature_layer)
    if index >= facts.layers:
        raise UserError(
            f"the vision tower has no layer {index} to read",
            where=where,
            available=[f"0 to {facts.layers - 1}", f"read ({facts.feature_layer})"],
        )
    return _nearest_whole(index, facts)


def _nearest_whole(index: int, facts: VisionFacts) -> int:
    """The layer itself, or in a tower that attends in windows the nearest one whose attention spans the image: the
    later of two that are equally near."""
    if not facts.attends_whole:
        return index
    return min(facts.attends_whole, key=lambda layer: (abs(layer - index), -layer))


def _check_tower_stage(stage: StageFunction, before: Sequence[StageFunction], facts: VisionFacts) -> None:
    planned = stage.planned
    if planned.site.kind == "vision.layer" and isinstance(facts.merge, Pooled):
        (rows, columns), (left, across) = facts.merge.grid, facts.grid
        raise UserError(
            f"no stage can stand at {planned.site}: behind the projector the {rows}x{columns} patches of a frame "
            f"become {left}x{across} visual tokens, which needs them all",
            where=planned.name,
            available=["projector.out", "decoder.layer[k]"],
        )
    if planned.site.kind == "vision.layer" and facts.merge != 1 and not isinstance(facts.merge, Pooled):
        down, across = sides(facts.merge)
        raise UserError(
            f"no stage can stand at {planned.site}: behind this tower every {down} by {across} patches "
            "become one visual token, so its layers need them all",
            where=planned.name,
            available=["vision.out", "projector.out", "decoder.layer[k]"],
        )
    if facts.tiles is not None and (alone := [s for s in stage.signals if not joins_tiles(s)]):
        raise UserError(
            f"signal {alone[0]!r} does not exist for an image in tiles: the tower sees them one by one",
            where=planned.name,
            fix="use cls_attention or received_attention, or another recipe",
        )
    if facts.projector_merges and (told := [s for s in stage.signals if s in ("projector_inputs", "probe_slopes")]):
        raise UserError(
            f"signal {told[0]!r} needs one row before the projector for every visual token, and here "
            "patches are put together in the projector or behind it",
            where=planned.name,
            fix="use tokens, or another recipe",
        )
    if planned.site.kind == "vision.layer" and (planned.site.layer or 0) > facts.feature_layer:
        raise UserError(
            f"nothing reads the tower at {planned.site}: the projector takes the output of layer {facts.feature_layer}",
            where=planned.name,
            available=[f"vision.layer[0] to vision.layer[{facts.feature_layer}]", "vision.out"],
        )
    if facts.linear_projector and "probe_slopes" in stage.signals:
        raise UserError(
            "signal 'probe_slopes' is the same for every token: this projector is one linear map",
            where=planned.name,
            fix="use tokens, or another recipe",
        )
    lost = [s for s in stage.signals if s in NEED_CLS]
    if lost and not facts.has_cls:
        raise UserError(
            f"signal {lost[0]!r} needs a CLS token, which this vision tower does not have",
            where=planned.name,
            fix="use received_attention, or a recipe that does",
        )
    layers = tower_layers(stage, facts)
    for earlier in (s.planned for s in before if not s.planned.observes):
        # A layer of the tower at or behind an inner site sees the shorter stream; what stands behind the tower does not
        # change what its layers saw.
        first = (earlier.site.layer or 0) if earlier.site.kind == "vision.layer" else facts.layers
        for name, read in layers.items():
            if min(read) < first:
                raise UserError(
                    f"signal {name!r} at {planned.site} still counts the tokens that {earlier.name} removed",
                    where=planned.name,
                    fix="let the first stage that prunes use it, or choose by tokens there",
                )
