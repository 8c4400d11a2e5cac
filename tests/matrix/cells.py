"""The cells of the matrix: what is compiled and compared, for which row, layout, keep ratio, batch and backend."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from secateur.compiler.recipe import Recipe
from secateur.passes.needs import needs_sound, needs_weights
from secateur.passes.signals import NEED_CLS
from secateur.passes.vocabulary import bind_stage

Kind = Literal["parity", "identity", "engine"]
KEEPS, BATCHES, FRAMES = (0.5, 0.1), (1, 3), 4
ENGINE_DTYPES = ("fp16", "bf16")


@dataclass(frozen=True)
class Cell:
    """One thing to show. ``parity``: the ONNX Runtime bundle equals the eager oracle; ``identity``: at keep 1.0 it
    equals the unpruned model; ``engine``: every program builds with TensorRT-RTX in ``dtype``.

    ``keep`` None is the row's published ratio.
    """

    kind: Kind
    recipe: str
    layout: str
    keep: float | None = None
    batch: int = 1
    images: int = 1
    dtype: str = "fp32"

    def __str__(self) -> str:
        keep = "" if self.keep is None else f"-{self.keep:g}"
        return f"{self.recipe}-{self.layout}-{self.kind}{keep}-b{self.batch}-i{self.images}-{self.dtype}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Tower(NamedTuple):
    """What a layout's tower has: a CLS token; ``merges``: several patches become one token behind it; ``read_last``:
    the projector reads its last layer, so that there is none behind it to score with; ``linear``: the projector is."""

    has_cls: bool
    merges: bool = False
    read_last: bool = False
    linear: bool = False


def lacks(recipe: Recipe, tower: Tower) -> str | None:
    """Why a row does not apply to a layout; None where it does."""
    if needs_weights(recipe):
        return "it waits for a file of learned weights"
    if needs_sound(recipe):
        return "it compares what is seen with what is heard, and nothing is heard"
    if tower.merges and any(stage.site.kind == "vision.layer" for stage in recipe.stages):
        return "its stages stand between layers of the tower, behind which patches are put together"
    nexts = [s for stage in recipe.stages for s, o in stage.signals.items() if o.get("layer") == "next"]
    if tower.has_cls and tower.read_last and nexts:
        return f"{nexts[0]} is that of the layer behind the one the projector reads, which is the last"
    for index, stage in enumerate(recipe.stages):
        for signal in bind_stage(stage, where=f"{recipe.name}: stages[{index}]").signals:
            if signal == "probe_slopes" and tower.linear:
                return "probe_slopes are the same for every token behind a linear projector"
            if signal in NEED_CLS and not tower.has_cls:
                return f"{signal} needs a CLS token"
    return None


def image_counts(recipe: Recipe) -> tuple[int, ...]:
    """Images per row a recipe is compiled for: one, and four where it compares or shares between images (frames)."""
    windows = [stage.window for stage in recipe.stages if stage.scope == "window"]
    frames = any(
        stage.site.kind == "decoder.layer" and stage.site.layer == 0 and stage.scope in ("window", "whole")
        for stage in recipe.stages
    )
    single = () if any(window > 1 for window in windows) else (1,)
    return (*single, max([FRAMES, *windows])) if frames or windows else single


def list_cells(recipes: Iterable[Recipe], layouts: dict[str, Tower], engines: bool = True) -> list[Cell]:
    """Every cell, row by row. ``layouts`` maps a layout to its tower."""
    cells = []
    for recipe, (layout, tower) in itertools.product(recipes, layouts.items()):
        if lacks(recipe, tower):
            continue
        if not recipe.stages:
            cells += [Cell("parity", recipe.name, layout, None, batch) for batch in BATCHES]
        for images, keep, batch in itertools.product(image_counts(recipe), KEEPS, BATCHES):
            if recipe.stages:
                cells.append(Cell("parity", recipe.name, layout, keep, batch, images))
        if recipe.stages and recipe.identity_at_one:
            cells.append(Cell("identity", recipe.name, layout, 1.0, 1, image_counts(recipe)[-1]))
        if engines:
            cells.append(Cell("engine", recipe.name, layout, None, 2, image_counts(recipe)[-1], "fp16"))
    return cells


def sample(
    recipes: Sequence[Recipe], layouts: dict[str, Tower], seed: int, others: int = 8, identities: int = 2
) -> list[Cell]:
    """A part of the matrix that ``make test`` has time for, compared on ONNX Runtime.

    On the first layout every row is compared once, on each further one about ``others`` rows. Rows are dealt out in a
    seeded order to the pairs of keep ratio and batch in turn, so that every pair of values of any two of layout, keep
    ratio and batch comes up. Rows that look at frames get four of them, with a batch of one.
    """
    rng = random.Random(seed)
    cells = []
    for number, (layout, tower) in enumerate(layouts.items()):
        fitting = [r for r in recipes if r.stages and not lacks(r, tower)]
        rng.shuffle(fitting)
        settings = itertools.cycle(itertools.product(KEEPS, BATCHES))
        for recipe in fitting if number == 0 else fitting[:others]:
            images = image_counts(recipe)
            if (len(images) > 1 and number == 0) or 1 not in images:
                cells.append(Cell("parity", recipe.name, layout, rng.choice(KEEPS), 1, images[-1]))
            else:
                keep, batch = next(settings)
                cells.append(Cell("parity", recipe.name, layout, keep, batch))
        same = [r for r in fitting if r.identity_at_one and 1 in image_counts(r)]
        cells += [Cell("identity", r.name, layout, 1.0) for r in same[-identities:]]
    return cells


def sample_engines(recipes: Sequence[Recipe], layouts: dict[str, Tower], seed: int, each: int = 2) -> list[Cell]:
    """``each`` rows per layout whose programs are built, in one of the engine types each."""
    rng = random.Random(seed)
    cells = []
    for (layout, tower), dtype in zip(layouts.items(), itertools.cycle(ENGINE_DTYPES)):
        fitting = [r for r in recipes if r.stages and not lacks(r, tower) and 1 in image_counts(r)]
        cells += [Cell("engine", r.name, layout, None, 2, 1, dtype) for r in rng.sample(fitting, each)]
    return cells
