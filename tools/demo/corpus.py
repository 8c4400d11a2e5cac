"""Training scenes as arrays, made once and kept in the work folder.

`load_corpus` gives images, per-patch labels and every question of every scene; a second call with the
same arguments reads the file of the first.
"""

import pickle
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from secateur.tools.demo.scenes import DRAWN_DIGITS, Question, make_scene


@dataclass(frozen=True, eq=False)
class Corpus:
    """`images` uint8 [S, 112, 112, 3]; `digit`, `colour`, `owner` int8 [S, 196] (-1 is background), `ink` float16
    [S, 196]; `asked` every question per scene. `owner` is the index of the object under the patch."""

    images: np.ndarray
    digit: np.ndarray
    colour: np.ndarray
    owner: np.ndarray
    ink: np.ndarray
    asked: list[tuple[Question, ...]]

    def __len__(self) -> int:
        return len(self.images)


def summarise_scene(seed: int, split: str, counts: tuple[int, ...], drawn: tuple[int, ...]) -> tuple:
    """One scene as the row of a corpus."""
    scene = make_scene(seed, split, counts, drawn)
    digit, colour = scene.patch_labels
    labels = [values.astype(np.int8) for values in (digit, colour, scene.patch_object)]
    return (scene.image, *labels, scene.patch_coverage.astype(np.float16), scene.asked)


def load_corpus(
    folder: Path,
    first_seed: int,
    size: int,
    split: str,
    counts: tuple[int, ...] = (2, 3, 4),
    drawn: tuple[int, ...] = DRAWN_DIGITS,
    workers: int = 2,
) -> Corpus:
    """Scenes `first_seed` .. `first_seed + size - 1` of a split, from the folder's file or made now."""
    path = folder / f"{split}-{first_seed}-{size}-{''.join(map(str, counts))}-of-{len(drawn)}.pickle"
    if path.exists():
        return Corpus(*pickle.loads(path.read_bytes()))
    make = partial(summarise_scene, split=split, counts=counts, drawn=drawn)
    with ProcessPoolExecutor(workers) as pool:
        rows = list(pool.map(make, range(first_seed, first_seed + size), chunksize=64))
    columns = list(zip(*rows, strict=True))
    fields: list[Any] = [*(np.stack(column) for column in columns[:5]), list(columns[5])]
    folder.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(".partial")
    partial_path.write_bytes(pickle.dumps(fields, protocol=5))
    partial_path.replace(path)
    return Corpus(*fields)
