"""Scenes and their questions: what is drawn where, and what one may ask about it.

A scene is a pure function of (seed, split). Digits and colours are distinct within a scene, so every
question has one answer. 'left of the 5' is asked in scenes of two digits, when the other digit's centre lies at least
`SIDE_MARGIN` pixels to the left of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from secateur.tools.demo.architecture import GRID, IMAGE_SIZE, PATCH_SIZE, VISUAL_TOKENS
from secateur.tools.demo.drawing import (
    LARGEST_DIGIT,
    SMALLEST_DIGIT,
    draw_background,
    draw_stroke,
    load_digit_instances,
    mix_ink,
)
from secateur.tools.demo.language import COLOURS, KINDS, phrase_question

SPLITS = ("train", "held_out")
DRAWN_DIGITS = tuple(range(8))  # 8 and 9 are what a tower this small confuses most at 8x8 source pixels
GAP = 6  # least distance in pixels between two digits' boxes
SIDE_MARGIN = 10
SIDES = ("left", "right")  # asked of scenes with two digits only: among more, the trained model guesses
COVERED = 0.04  # mean ink of a patch from which it counts as lying under a digit


@dataclass(frozen=True)
class Placed:
    """One digit of a scene: class, colour, source instance, and its box (left, top, side) in pixels."""

    digit: int
    colour: str
    instance: int
    left: int
    top: int
    side: int

    @property
    def centre_x(self) -> float:
        return self.left + self.side / 2


@dataclass(frozen=True)
class Question:
    """Text and one-word answer; `about` are the objects it mentions, `source` those the answer is read from."""

    kind: str
    text: str
    answer: str
    about: tuple[int, ...]
    source: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Scene:
    """An image uint8 [112, 112, 3] with what is known about it; `coverage` is float32 [objects, 196]."""

    image: np.ndarray
    objects: tuple[Placed, ...]
    coverage: np.ndarray
    asked: tuple[Question, ...]

    @property
    def questions(self) -> list[tuple[str, str]]:
        return [(question.text, question.answer) for question in self.asked]

    @property
    def patch_coverage(self) -> np.ndarray:
        """Mean ink of each patch over all digits, float32 [196]."""
        return self.coverage.sum(0)

    @property
    def patch_object(self) -> np.ndarray:
        """Index of the object under each patch, int64 [196]; -1 for background."""
        return np.where(self.coverage.max(0) >= COVERED, self.coverage.argmax(0), -1)

    @property
    def patch_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Digit class and colour index under each patch, two int64 [196]; -1 for background."""
        digits = np.array([placed.digit for placed in self.objects] + [-1])
        colours = np.array([COLOURS.index(placed.colour) for placed in self.objects] + [-1])
        return digits[self.patch_object], colours[self.patch_object]

    @property
    def oracle_patches(self) -> np.ndarray:
        """Sorted indices of the patches under digits (the `oracle-keep` ceiling), int64."""
        return np.flatnonzero(self.patch_object >= 0)

    def rank_patches(self) -> np.ndarray:
        """All 196 patches by falling ink, ties by index, int64: any fixed K may be taken from the front."""
        return np.argsort(-self.patch_coverage, kind="stable")


def place_boxes(rng: np.random.Generator, count: int) -> list[tuple[int, int, int]]:
    """Boxes (left, top, side), `GAP` apart and inside the image, by rejection."""
    while True:
        boxes: list[tuple[int, int, int]] = []
        for _ in range(40):
            side = int(rng.integers(SMALLEST_DIGIT, LARGEST_DIGIT + 1))
            left, top = (int(v) for v in rng.integers(1, IMAGE_SIZE - side, 2))
            reach = side + GAP
            if all(
                left - x >= size + GAP or x - left >= reach or top - y >= size + GAP or y - top >= reach
                for x, y, size in boxes
            ):
                boxes.append((left, top, side))
            if len(boxes) == count:
                return boxes


def find_neighbour(objects: tuple[Placed, ...], index: int, side: str) -> int | None:
    """The one object left (or right) of object `index`, or None where the answer would not be clear."""
    sign = -1 if side == "left" else 1
    shifts = {i: sign * (o.centre_x - objects[index].centre_x) for i, o in enumerate(objects) if i != index}
    if any(abs(shift) < SIDE_MARGIN for shift in shifts.values()):
        return None
    there = [i for i, shift in shifts.items() if shift > 0]
    return there[0] if len(there) == 1 else None


def ask_everything(
    rng: np.random.Generator, objects: tuple[Placed, ...], drawn: tuple[int, ...] = DRAWN_DIGITS
) -> list[Question]:
    """Every clear question about a scene once, each in a random wording; as many 'yes' as 'no'."""
    asked: list[Question] = []
    everyone = tuple(range(len(objects)))

    def ask(
        kind: str,
        answer: str,
        about: Sequence[int],
        source: Sequence[int],
        digit: int | None = None,
        colour: str | None = None,
    ) -> None:
        text = phrase_question(kind, int(rng.integers(0, 12)), digit, colour)
        asked.append(Question(kind, text, answer, tuple(about), tuple(source)))

    colour_of = {placed.digit: placed.colour for placed in objects}
    ask("count", str(len(objects)), everyone, everyone)
    for i, placed in enumerate(objects):
        ask("digit_of_colour", str(placed.digit), [i], [i], colour=placed.colour)
        ask("colour_of_digit", placed.colour, [i], [i], digit=placed.digit)
        ask("exists", "yes", [i], [i], placed.digit, placed.colour)
        for side in SIDES if len(objects) == 2 else ():
            neighbour = find_neighbour(objects, i, side)
            if neighbour is not None:
                ask(f"{side}_of", str(objects[neighbour].digit), [i], [neighbour], digit=placed.digit)
        # One 'no' per 'yes': half of them are a digit and a colour that are both there, but apart.
        digit, colour = placed.digit, placed.colour
        if rng.random() < 0.5:
            colour = str(rng.choice([other.colour for other in objects if other.colour != colour]))
        elif len(objects) < len(COLOURS) and rng.random() < 0.5:
            colour = str(rng.choice([name for name in COLOURS if name not in colour_of.values()]))
        else:
            digit = int(rng.choice([other for other in drawn if other not in colour_of]))
        related = [j for j, other in enumerate(objects) if other.digit == digit or other.colour == colour]
        ask("exists", "no", related, related, digit, colour)
    return asked


def make_scene(
    seed: int, split: str = "train", counts: tuple[int, ...] = (2, 3, 4), drawn: tuple[int, ...] = DRAWN_DIGITS
) -> Scene:
    """The scene of a seed, with a number of digits out of `counts` (at most five) from the classes `drawn`."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    count = int(rng.choice(counts))
    digits = rng.choice(drawn, count, replace=False)
    colours = rng.choice(len(COLOURS), count, replace=False)
    image = draw_background(rng)
    objects, coverage = [], np.zeros((count, VISUAL_TOKENS), np.float32)
    for i, (left, top, side) in enumerate(place_boxes(rng, count)):
        instance = int(rng.choice(load_digit_instances(split)[int(digits[i])]))
        placed = Placed(int(digits[i]), COLOURS[colours[i]], instance, left, top, side)
        stroke = draw_stroke(rng, instance, side)
        window = (slice(top, top + side), slice(left, left + side))
        image[window] += stroke[..., None] * (mix_ink(rng, placed.colour) - image[window])
        canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
        canvas[window] = stroke
        coverage[i] = canvas.reshape(GRID, PATCH_SIZE, GRID, PATCH_SIZE).mean((1, 3)).reshape(-1)
        objects.append(placed)
    image = np.clip(np.round(image), 0, 255).astype(np.uint8)
    return Scene(image, tuple(objects), coverage, tuple(ask_everything(rng, tuple(objects), drawn)))


def held_out(n: int = 1000) -> list[tuple[np.ndarray, str, str, Scene]]:
    """`n` held-out (image, question, answer, scene), the kinds of question in equal parts, one per scene."""
    samples: list[tuple[np.ndarray, str, str, Scene]] = []
    seed = 0
    while len(samples) < n:
        kind = KINDS[len(samples) % len(KINDS)]
        scene = make_scene(seed, "held_out")
        rng = np.random.default_rng([seed, len(SPLITS)])
        seed += 1
        fitting = [question for question in scene.asked if question.kind == kind]
        if fitting:
            question = fitting[int(rng.integers(len(fitting)))]
            samples.append((scene.image, question.text, question.answer, scene))
    return samples
