"""The cells of the matrix: what is compiled and compared, for which row, layout, keep ratio, batch and backend."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from secateur.compiler.geometry import Geometry
from secateur.compiler.recipe import Recipe

from .applies import Tower, lacks

Kind = Literal["parity", "identity", "engine"]
KEEPS, BATCHES, FRAMES, SEVERAL = (0.5, 0.1), (1, 3), 4, 2
"""``SEVERAL``: images of every row in a batch, so that no program can take images for rows."""
TEXT_TOKENS, NEW_TOKENS = 24, 4
ENGINE_DTYPES = ("fp16", "bf16")
OTHERS = 3
"""Layouts with few rows compared of which a sample builds engines."""


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


@dataclass(frozen=True)
class Layout:
    """A model layout. ``write`` makes the model directory and returns it; ``tower``: what rows can ask of its tower.

    ``media`` are the fields of the geometry that say what a row holds; without frames: one image, several in a batch,
    or as many as a recipe looks at together or takes apart. ``rows`` are the recipes whose bundles are compared, the
    first of them in every sample; empty: all. Engines are built of every row that applies. ``axes``: position ids have
    several axes, so that a recipe which numbers anew what is left changes the model even where it keeps all tokens.
    """

    name: str
    title: str
    tower: Tower
    write: Callable[[Path], Path]
    media: Mapping[str, Any] = field(default_factory=dict, hash=False)
    rows: tuple[str, ...] = ()
    axes: bool = False

    @property
    def shows_images(self) -> bool:
        """Whether its rows hold images, as many as one likes, and no video."""
        return not self.media.get("frames")

    def geometry(self, batch: int = 1, images: int = 1) -> Geometry:
        sizes = {"text_tokens": TEXT_TOKENS, "new_tokens": NEW_TOKENS, **self.media}
        return Geometry(batch=batch, **({"images": images} if self.shows_images else {}), **sizes)

    def same_at_one(self, recipe: Recipe) -> bool:
        """Whether at keep 1.0 the recipe must leave the model as it is."""
        return bool(recipe.stages) and recipe.identity_at_one and not (self.axes and recipe.positions == "compact")

    def image_counts(self, recipe: Recipe) -> tuple[int, ...]:
        """Numbers of images a row holds in the recipe's cells; a video counts as one."""
        return image_counts(recipe) if self.shows_images else (1,)

    def images(self, batch: int, count: int = 1) -> int:
        """How many images a row of a cell holds, ``count`` of them being what its recipe is for."""
        return SEVERAL if batch > 1 and count == 1 and self.shows_images else count


def image_counts(recipe: Recipe) -> tuple[int, ...]:
    """Images per row a recipe is compiled for: one, four where it compares or shares between images (frames), and
    otherwise several where it takes a row's images apart in the decoder."""
    windows = [stage.window for stage in recipe.stages if stage.scope == "window"]
    decoder = [stage for stage in recipe.stages if stage.site.kind == "decoder.layer"]
    frames = any(stage.site.layer == 0 and stage.scope in ("window", "whole") for stage in decoder)
    single = () if any(window > 1 for window in windows) else (1,)
    if frames or windows:
        return (*single, max([FRAMES, *windows]))
    return (1, SEVERAL) if any(stage.scope == "image" for stage in decoder) else single


def list_cells(recipes: Iterable[Recipe], layouts: Mapping[str, Layout], engines: bool = True) -> list[Cell]:
    """Every cell, row by row. Bundles are compared on the layout's own rows; engines are built of every row."""
    cells = []
    for recipe, layout in itertools.product(recipes, layouts.values()):
        if lacks(recipe, layout.tower):
            continue
        counts = layout.image_counts(recipe)
        if not layout.rows or recipe.name in layout.rows:
            if not recipe.stages:
                cells += [
                    Cell("parity", recipe.name, layout.name, None, batch, layout.images(batch)) for batch in BATCHES
                ]
            compared = [
                Cell("parity", recipe.name, layout.name, keep, batch, layout.images(batch, count))
                for count, keep, batch in itertools.product(counts, KEEPS, BATCHES)
                if recipe.stages
            ]
            cells += dict.fromkeys(compared)  # one image and several are the same in a batch
            if layout.same_at_one(recipe):
                cells.append(Cell("identity", recipe.name, layout.name, 1.0, 1, counts[-1]))
        if engines:
            keep = engine_keep(recipe, layout)
            cells += [Cell("engine", recipe.name, layout.name, keep, 2, counts[-1], dtype) for dtype in ENGINE_DTYPES]
    return cells


def engine_keep(recipe: Recipe, layout: Layout) -> float | None:
    """None, the published ratio; another where that is a mean over layers of which the first ones keep all tokens:
    too many of them, in a decoder of few layers."""
    late = all(stage.site.kind == "decoder.layer" and stage.site.layer for stage in recipe.stages)
    return KEEPS[-1] if layout.tower.hears and recipe.rates is not None and late else None


def list_pairs(recipes: Iterable[Recipe], layouts: Mapping[str, Layout]) -> list[tuple[Recipe, Layout]]:
    """What bundles are compared of, whether or not the row applies to the layout."""
    pairs = itertools.product(recipes, layouts.values())
    return [(recipe, layout) for recipe, layout in pairs if not layout.rows or recipe.name in layout.rows]


def sample(
    recipes: Sequence[Recipe], layouts: Mapping[str, Layout], seed: int, others: int = 4, identities: int = 2
) -> list[Cell]:
    """A part of the matrix that ``make test`` has time for, compared on ONNX Runtime.

    On the first layout every row is compared once, on each further one that has them all about ``others`` rows, on one
    that has a few the first of them and another. Rows are dealt out in a seeded order to the pairs of keep ratio and
    batch in turn, so that every pair of values of any two of layout, keep ratio and batch comes up; a layout with few
    rows has one batch, the next one the other, as each batch is traced anew. Rows that look at frames get four of them,
    with a batch of one.
    """
    rng = random.Random(seed)
    cells = []
    batches = itertools.cycle(BATCHES)
    for number, layout in enumerate(layouts.values()):
        fitting = [r for r, _ in list_pairs(recipes, {layout.name: layout}) if r.stages and not lacks(r, layout.tower)]
        rng.shuffle(fitting)
        same = [r for r in fitting if layout.same_at_one(r) and 1 in layout.image_counts(r)]
        if layout.rows:
            batch = next(batches)
            keeps = KEEPS if number % 4 < 2 else KEEPS[::-1]
            fitting.sort(key=lambda recipe: recipe.name != layout.rows[0])
            cells += [
                Cell("parity", recipe.name, layout.name, keep, batch, layout.images(batch))
                for recipe, keep in zip(fitting, keeps, strict=False)
            ]
            continue
        dealt = itertools.cycle(itertools.product(KEEPS, BATCHES))
        for recipe in fitting if number == 0 else fitting[:others]:
            images = layout.image_counts(recipe)
            if (len(images) > 1 and number == 0) or 1 not in images:
                cells.append(Cell("parity", recipe.name, layout.name, rng.choice(KEEPS), 1, images[-1]))
            else:
                keep, batch = next(dealt)
                cells.append(Cell("parity", recipe.name, layout.name, keep, batch, layout.images(batch)))
        cells += [Cell("identity", r.name, layout.name, 1.0) for r in same[-identities:]]
    return cells


def sample_engines(
    recipes: Sequence[Recipe], layouts: Mapping[str, Layout], seed: int, each: int = 1, others: int = OTHERS
) -> list[Cell]:
    """``each`` rows per layout whose bundles are compared for every row, and one on ``others`` of the rest: their
    programs are built, in one of the engine types each."""
    rng = random.Random(seed)
    few = [name for name, layout in layouts.items() if layout.rows]
    drawn = {name for name, layout in layouts.items() if not layout.rows} | {*rng.sample(few, min(others, len(few)))}
    cells = []
    for layout, dtype in zip([o for n, o in layouts.items() if n in drawn], itertools.cycle(ENGINE_DTYPES)):
        fitting = [r for r in recipes if r.stages and not lacks(r, layout.tower)]
        for recipe in rng.sample([r for r in fitting if layout.image_counts(r)[0] == 1], 1 if layout.rows else each):
            images = layout.image_counts(recipe)[0]
            cells.append(Cell("engine", recipe.name, layout.name, engine_keep(recipe, layout), 2, images, dtype))
    return cells
