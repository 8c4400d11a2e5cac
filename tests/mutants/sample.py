"""The sample: mutants drawn once, which stay the same while the code around them changes.

Drawn are lines, uniformly among all lines of the walked files that some operator changes; then one of the operators
that apply on the line, and one of its places there, uniformly as well.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .mutations import Place, list_operators, list_places, mutate

ROOT = Path(__file__).parents[2]
SAMPLE = Path(__file__).with_name("sample.json")
WALKED = ("passes/**/*.py", "runtime/**/*.py", "exporters/lowering*.py")
SEED = 13


@dataclass(frozen=True)
class Mutant:
    """One change: on ``line``, which reads ``text``, the ``occurrence``-th place of ``operator``."""

    id: str
    file: str
    line: int
    text: str
    operator: str
    occurrence: int

    @property
    def folder(self) -> str:
        return self.file.partition("/")[0]


def list_files(root: Path) -> list[str]:
    return sorted({str(path.relative_to(root)) for pattern in WALKED for path in root.glob(pattern)})


def draw(root: Path, files: list[str], count: int, seed: int) -> tuple[list[Mutant], int]:
    """``count`` mutants of ``files``, and how many lines there are to draw from.

    A line on which every change is refused by `mutate` is passed over, and counted still.
    """
    generator = random.Random(seed)
    sources = {file: (root / file).read_text(encoding="utf-8") for file in files}
    lines: dict[tuple[str, int], list[Place]] = {}
    for file, source in sources.items():
        for place in list_places(source, list_operators()):
            lines.setdefault((file, place.line), []).append(place)
    order = sorted(lines)
    generator.shuffle(order)
    found: list[Mutant] = []
    for file, line in order:
        if len(found) == count:
            break
        if (place := _draw_place(sources[file], lines[file, line], generator)) is not None:
            text = sources[file].splitlines()[line - 1].strip()
            found.append(Mutant(f"m{len(found) + 1:03d}", file, line, text, place.operator, place.on_line))
    return found, len(lines)


def _draw_place(source: str, places: list[Place], generator: random.Random) -> Place | None:
    operators = sorted({place.operator for place in places})
    generator.shuffle(operators)
    for operator in operators:
        here = [place for place in places if place.operator == operator]
        generator.shuffle(here)
        for place in here:
            if mutate(source, place) is not None:
                return place
    return None


def find(mutant: Mutant, source: str) -> str | None:
    """``source`` with the mutant's change; None when no line reads as its line did.

    Of several lines with that text it is the one nearest to where it stood.
    """
    lines = [number for number, line in enumerate(source.splitlines(), 1) if line.strip() == mutant.text]
    places = [
        place
        for place in list_places(source, (mutant.operator,))
        if place.line in lines and place.on_line == mutant.occurrence
    ]
    if not places:
        return None
    return mutate(source, min(places, key=lambda place: abs(place.line - mutant.line)))


def write(mutants: list[Mutant], lines: int, seed: int, path: Path = SAMPLE) -> None:
    rows = ",\n".join(f"  {json.dumps(asdict(mutant), ensure_ascii=False)}" for mutant in mutants)
    head = json.dumps({"seed": seed, "lines": lines})[1:-1]
    path.write_text(f'{{{head}, "mutants": [\n{rows}\n]}}\n', encoding="utf-8")


def read(path: Path = SAMPLE) -> tuple[list[Mutant], dict[str, int]]:
    """The mutants, and how they were drawn: ``seed`` and number of ``lines``."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    return [Mutant(**row) for row in stored.pop("mutants")], stored


def group(mutants: list[Mutant]) -> Iterator[tuple[str, list[Mutant]]]:
    """By folder, in the order of `WALKED`."""
    for folder in (pattern.partition("/")[0] for pattern in WALKED):
        yield folder, [mutant for mutant in mutants if mutant.folder == folder]
