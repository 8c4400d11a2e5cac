"""What the eager oracle shares with the compiled graph, found by reading its imports, and what each piece is held
against. A piece without an entry fails, and so does an entry without a piece."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from secateur.compiler.families.family import AudioTower, Family, VisionFacts
from secateur.compiler.media import MediaLayout
from secateur.compiler.plan_recipe import PlannedStage
from secateur.compiler.pruned import Job
from secateur.compiler.trace import Source
from secateur.passes.signals import PatchView, Raw, SequenceView
from secateur.passes.stage import StageFunction
from secateur.passes.tile_rows import TileMap

ROOT = Path(__file__).parents[2]
ORACLE, GRAPH = "compiler.oracle", "compiler.passlist"


def file_of(module: str) -> Path | None:
    """``compiler.oracle`` -> its file; None for what is no module of this package."""
    path = ROOT / Path(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


@cache
def tree_of(module: str) -> ast.Module:
    path = file_of(module)
    assert path is not None
    return ast.parse(path.read_text(encoding="utf-8"))


def running(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that are ever run: neither annotations nor what only a type checker reads."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.AST):
                yield child
                yield from running(child)


@cache
def imported(module: str) -> dict[str, tuple[str, str]]:
    """Of this package's names that a module runs: name here -> (module, name there), the last "" for a module."""
    nodes = list(running(tree_of(module)))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    found = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("secateur."):
            source = (node.module or "").removeprefix("secateur.")
            for alias in node.names:
                here = alias.asname or alias.name
                if here in used:
                    inner = f"{source}.{alias.name}"
                    found[here] = (inner, "") if file_of(inner) else (source, alias.name)
    return found


@cache
def reach(start: str) -> frozenset[str]:
    """The modules that a module runs, itself among them."""
    found, waiting = set(), [start]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += [source for source, _ in imported(module).values()]
    return frozenset(found)


def modules_of_oracle() -> list[str]:
    """The modules that the oracle alone consists of: what it reaches without passing through the graph's."""
    found, waiting = set(), [ORACLE]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += [source for source, _ in imported(module).values() if source not in reach(GRAPH)]
    return sorted(found)


def shared() -> set[str]:
    return {
        f"{source}.{name}" if name else source
        for module in modules_of_oracle()
        for source, name in imported(module).values()
        if source in reach(GRAPH)
    }


# -- what each is held against ----------------------------------------------------------------------------

SIGNALS = "test_shared_readings_signals.py::"
MODEL = "test_shared_readings_model.py::"
ROWS = "test_shared_readings_rows.py::"
PLAN = "test_shared_readings_plan.py::"
IN_DECODER = (
    f"{SIGNALS}test_signals_in_the_decoder_are_what_the_table_says",
    f"{MODEL}test_signals_in_the_decoder_are_those_of_transformers",
    f"{MODEL}test_signals_through_windows_and_blocks_are_those_of_transformers",
)
IN_TOWER = (
    f"{SIGNALS}test_signals_of_the_tower_are_what_the_table_says",
    f"{MODEL}test_signals_of_the_tower_are_those_of_transformers",
)
PAPERS = ("test_transcriptions.py::test_row_follows_its_paper",)
TILES = (
    f"{ROWS}test_what_tiles_have_becomes_the_images",
    "test_onevision_tiles.py::test_what_tiles_have_is_resized_as_their_picture_is",
)
COUNTS = (f"{PLAN}test_tokens_that_reach_the_decoder_are_counted",)
FACTS = (f"{PLAN}test_grids_items_and_tokens",)
SIZES = (f"{PLAN}test_images_of_several_sizes_are_found_in_the_order_of_the_prompt",)
SIDES = (f"{PLAN}test_stages_are_told_apart_by_where_they_stand",)
PLACES = (f"{PLAN}test_media_are_laid_token_by_token",)
ANSWERS = (  # unpruned models of each kind against transformers' own
    "test_media.py::test_an_unpruned_model_answers_as_transformers_does",
    "test_gemma3.py::test_an_unpruned_bundle_answers_as_transformers_does",
    "test_llava_next.py::test_an_unpruned_bundle_answers_as_transformers_does",
    "test_onevision_tiles.py::test_an_unpruned_bundle_answers_as_transformers_does",
)

SYMBOLS: dict[str, tuple[str, ...]] = {
    "compiler.rope.forget_lengths": ("test_rope.py::test_tables_are_those_of_transformers",),
    "passes.check_stages.tower_layers": IN_TOWER,
    "passes.signals.PatchView": IN_TOWER,
    "passes.signals.SequenceView": IN_DECODER,
    "passes.signals.list_raws": IN_DECODER[1:],
    "passes.signals.list_tower_raws": IN_TOWER[1:],
    "passes.signals.make_probes": IN_TOWER,
    "passes.signals.patch_signals": IN_TOWER,
    "passes.signals.sequence_signals": IN_DECODER,
    "passes.signals.tower_raw": IN_TOWER[1:],
    "passes.tile_rows.TileMap": TILES,
}
"""Imported by the oracle from modules that the pass list runs as well."""

MEMBERS: dict[str, tuple[str, ...]] = {
    "Family.image_masks": IN_DECODER[2:],
    "Family.project": (f"{MODEL}test_what_is_projected_inside_a_projector_is_what_leaves_it",),
    "Family.reference_positions": ANSWERS[:1],
    "Family.vision_forward": (f"{MODEL}test_features_are_those_of_transformers", *ANSWERS),
    "Family.vision_reference": ANSWERS,
    "AudioTower.reference": ANSWERS[:1],
    "Job.audio_stages": SIDES,
    "Job.carries": (f"{PLAN}test_the_decoder_is_handed_what_its_part_asks_for",),
    "Job.decoder_stages": SIDES,
    "Job.features_per_item": COUNTS,
    "Job.items_left": (*PLACES, *COUNTS),
    "Job.kept_per_item": COUNTS,
    "Job.media_order": PLACES,
    "Job.original_positions": COUNTS,
    "Job.position_offset": COUNTS,
    "Job.removes_before_decoder": COUNTS,
    "Job.vision_stages": SIDES,
    "MediaLayout.order": PLACES,
    "PatchView.rows": TILES,
    "PlannedStage.name": SIDES,
    "PlannedStage.observes": (f"{ROWS}test_a_stage_that_only_scores_carries_for_all",),
    "Raw.name": IN_DECODER,
    "Raw.rows": IN_DECODER[1:],
    "SequenceView.slots": IN_DECODER,
    "Source.audio_tokens": ANSWERS[:1],
    "Source.media_tokens": ANSWERS[:1],
    "Source.pad_token": ("test_gemma3.py::test_an_image_token_behind_the_vocabulary",),
    "StageFunction.run": PAPERS,
    "StageFunction.score": PAPERS,
    "StageFunction.signal_options": ("test_methods_stage.py::test_signals_are_sorted_and_options_filled_in",),
    "StageFunction.signals": ("test_methods_stage.py::test_signals_are_sorted_and_options_filled_in",),
    "TileMap.join": TILES,
    "TileMap.of": TILES[1:],
    "VisionFacts.groups": FACTS,
    "VisionFacts.image_places": SIZES,
    "VisionFacts.images": SIZES,
    "VisionFacts.items": FACTS,
    "VisionFacts.projector_merges": FACTS,
    "VisionFacts.resizes_picture": FACTS,
    "VisionFacts.tokens_per_image": FACTS,
    "VisionFacts.tokens_per_item": FACTS,
    "VisionFacts.tokens_per_row": FACTS,
}
"""Of what reaches the oracle as values: what is computed when it is asked for."""
OTHERS = {"AudioTower.forward", "Source.decoder_layers"}
"""Names by which the oracle asks for something else: what a module computes, a path of the family."""
CLASSES = (
    AudioTower, Family, Job, MediaLayout, PatchView, PlannedStage, Raw, SequenceView, Source, StageFunction, TileMap,
    VisionFacts,
)  # fmt: skip


def members() -> set[str]:
    """Properties, methods and functions kept as fields of :data:`CLASSES` by whose names the oracle asks for
    anything."""
    asked = {
        node.attr for module in modules_of_oracle() for node in running(tree_of(module))
        if isinstance(node, ast.Attribute)
    }  # fmt: skip
    found = set()
    for each in CLASSES:
        computed = {
            name for name, value in vars(each).items()
            if (not name.startswith("_") and isinstance(value, (property, cached_property, classmethod)))
            or inspect.isfunction(value)
        }  # fmt: skip
        if each in (Family, AudioTower):
            kept: Any = each
            computed = {field.name for field in fields(kept) if "Callable" in field.type or "Forward" in field.type}
        found |= {f"{each.__name__}.{name}" for name in computed & asked}
    return found


def test_the_oracle_is_made_of_modules_of_its_own() -> None:
    """Whose faults the graph cannot share: it runs none of them."""
    assert modules_of_oracle() == [
        f"compiler.{name}"
        for name in ("image_sizes", "oracle", "oracle_stages", "oracle_walk", "oracle_windows", "prompt_order",
                     "recording", "tile_slots")
    ]  # fmt: skip


def test_everything_shared_with_the_graph_is_held_against_something() -> None:
    assert shared() == set(SYMBOLS)


def test_everything_computed_of_the_plan_is_held_against_something() -> None:
    assert members() - OTHERS == set(MEMBERS)


def test_what_it_is_held_against_exists() -> None:
    named = {test for tests in (*SYMBOLS.values(), *MEMBERS.values()) for test in tests}
    for file in {test.partition("::")[0] for test in named}:
        tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        wanted = {test.partition("::")[2] for test in named if test.startswith(f"{file}::")}
        assert wanted <= defined, file
