"""Manifests that lie, signed anew: every field of a real one changed in every way that its kind suggests.

    python -m tests.null.manifest_walk BUNDLE --seed 3 --count 2000    # two fields at a time, drawn

A bundle that was changed so either opens and answers as before, or is refused with one line. It is run in a process of
its own, whose memory is bounded: what a manifest alone makes a program allocate is found that way.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

MANIFEST = "manifest.json"
MEMORY = 2 << 30
"""Bytes of address space the walk may use beyond what it has when it begins."""
SECONDS = 10.0
"""What one bundle may take at most."""

NUMBERS = (0, -1, 1, 2, 10**9, 10**30, -(2**63), 2**31, 2**63, 1.5, 1e300, "1", None, True, [], {})
TEXTS = ("", "\0", "a\0b", "\ud800", "x" * 100_000, "../x", "{", "é\u202e", 0, None, True, [], {}, "fp16", "int32")
OTHERS = (None, 0, -1, "", "x", True, [], {}, [None], [[]], {"": 0}, [0] * 1000)

# Fields that say what the model's tokens mean, which nothing else in a bundle says: a change may change the answer.
MEANING = (
    "model.eos_token_ids", "model.pad_token_id", "model.bos_token_id", "model.image_token", "model.image_space",
    "model.image_before", "model.image_behind", "position_offset", "model.prompt_token_id", "geometry.text_tokens",
    "recipe.stages", "model.video_token_id", "model.audio_token_id",
)  # fmt: skip

Place = tuple[Any, ...]


def list_places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Every field, entry and container."""
    yield at
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inside:
        yield from list_places(entry, (*at, key))


def change(manifest: Any, at: Place) -> Iterator[tuple[str, Any]]:
    """(words, changed manifest) for every way to change what lies there."""
    old = get(manifest, at)
    for new in suggest(old):
        if type(new) is not type(old) or new != old:
            yield f"{'.'.join(map(str, at))} = {repr(new)[:60]}", put(manifest, at, new)
    if not at:
        return
    parent = get(manifest, at[:-1])
    without = copy.deepcopy(parent)
    del without[at[-1]]
    yield f"{'.'.join(map(str, at))} left out", put(manifest, at[:-1], without)
    if isinstance(parent, dict):  # its value under a neighbour's name, and the other way round
        names = sorted(parent)
        other = names[(names.index(at[-1]) + 1) % len(names)]
        swapped = {**parent, at[-1]: parent[other], other: parent[at[-1]]}
        yield f"{'.'.join(map(str, at))} swapped with {other}", put(manifest, at[:-1], swapped)
        renamed = {("x" if key == at[-1] else key): value for key, value in parent.items()}
        yield f"{'.'.join(map(str, at))} renamed", put(manifest, at[:-1], renamed)
    else:
        yield f"{'.'.join(map(str, at))} twice", put(manifest, at[:-1], [*parent, old])
        yield f"{'.'.join(map(str, at[:-1]))} reversed", put(manifest, at[:-1], parent[::-1])


def suggest(old: Any) -> tuple[Any, ...]:
    if isinstance(old, (int, float)):
        return (*NUMBERS, old + 1, old - 1, old * 2)
    if isinstance(old, str):
        return (*TEXTS, old + "x", old[:-1], old.upper())
    if isinstance(old, list):
        return (*OTHERS, old * 2, old * 1000, old[1:], old[:-1])
    return (*OTHERS, {**old, "unheard_of": 1}) if isinstance(old, dict) else (*OTHERS, *NUMBERS)


def get(value: Any, at: Place) -> Any:
    for key in at:
        value = value[key]
    return value


def put(value: Any, at: Place, new: Any) -> Any:
    """A copy with ``new`` at a place."""
    if not at:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[at[0]] = put(value[at[0]], at[1:], new)
    return copied


def write_signed(directory: Path, manifest: Any) -> None:
    """As a hostile author could: the digest is right."""
    from secateur.runtime.manifest import _digest

    unsigned = {k: v for k, v in manifest.items() if k != "manifest_sha256"} if isinstance(manifest, dict) else manifest
    if isinstance(manifest, dict):
        unsigned = {**unsigned, "manifest_sha256": _digest(unsigned)}
    (directory / MANIFEST).write_bytes(json.dumps(unsigned).encode())


def answer(directory: Path) -> list[int]:
    """Open a bundle and let it answer: the tokens."""
    from PIL import Image

    from secateur.runtime.session import Session

    pixels = np.random.default_rng(0).integers(0, 256, (10, 9, 3), dtype=np.uint8)
    with Session(directory, threads=1) as session:
        return session.generate("what?", Image.fromarray(pixels), max_new_tokens=3).tokens


def judge(directory: Path, words: str, manifest: Any, whole: list[int]) -> str | None:
    """What is wrong with how a changed manifest is taken; None if nothing is."""
    from secateur.runtime.errors import SecateurError

    start, found = time.monotonic(), None
    try:
        write_signed(directory, manifest)
        tokens = answer(directory)
        if tokens != whole and not any(field in words for field in MEANING):
            found = f"answers {tokens}, not {whole}"
    except SecateurError as error:
        if "\n" in str(error) or len(str(error)) > 2000:
            found = f"more than a line: {str(error)[:300]!r}"
    except Exception as error:
        found = f"{type(error).__name__}: {str(error)[:200]}"
    took = time.monotonic() - start
    if took > SECONDS:
        found = f"took {took:.0f} s"
    return f"{words}: {found}" if found else None


def bound_memory() -> None:
    """Threads of libraries take address space of their own, so the bound counts from what there is now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def walk(directory: Path, seed: int | None, count: int, part: int = 0, parts: int = 1) -> list[str]:
    """Change one field after the other, or with a ``seed`` ``count`` pairs of fields; what was found wrong."""
    from secateur.runtime.manifest import canonical_json

    manifest = json.loads((directory / MANIFEST).read_text())
    canonical_json(manifest)
    whole = answer(directory)
    bound_memory()
    places = [at for at in list_places(manifest) if at != ("manifest_sha256",)]
    wrong: list[str] = []
    if seed is None:
        changes = (one for at in places[part::parts] for one in change(manifest, at))
    else:
        changes = _draw(manifest, places, random.Random(seed), count)
    for words, changed in changes:
        if (said := judge(directory, words, changed, whole)) is not None:
            wrong.append(said)
    return wrong


def _draw(manifest: Any, places: list[Place], chance: random.Random, count: int) -> Iterator[tuple[str, Any]]:
    for _ in range(count):
        words, changed = chance.choice(list(change(manifest, chance.choice(places))))
        try:
            more, changed = chance.choice(list(change(changed, chance.choice(places))))
        except (KeyError, IndexError, TypeError):  # the first change took the second's place away
            more = ""
        yield f"{words}; {more}", changed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.null.manifest_walk", description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seed", type=int, help="draw two changes at a time; without it every single one")
    parser.add_argument("--count", type=int, default=1000, help="pairs to draw (%(default)s)")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1, help="walk every PARTS-th place from PART on")
    options = parser.parse_args()
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(shutil.copytree(options.bundle, Path(folder) / "bundle"))
        wrong = walk(copied, options.seed, options.count, options.part, options.parts)
    sys.stdout.write("".join(f"{line}\n" for line in wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
