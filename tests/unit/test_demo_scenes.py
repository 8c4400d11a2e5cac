"""Scenes of the demo model: deterministic, split cleanly, labelled rightly, asked about without ambiguity."""

import re
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("sklearn")

from secateur.tools.demo.architecture import PATCH_SIZE, VISUAL_TOKENS
from secateur.tools.demo.drawing import INKS, load_digit_instances
from secateur.tools.demo.language import COLOURS, KINDS, SPECIAL_TOKENS, TEMPLATES, list_words
from secateur.tools.demo.scenes import SIDE_MARGIN, held_out, make_scene

SEEDS = range(60)


def answer_from_objects(scene, question) -> str:
    """An independent reading of a question's text against the scene's objects."""
    numbers = [int(word) for word in re.findall(r"\d", question.text)]
    named = [colour for colour in COLOURS if re.search(rf"\b{colour}\b", question.text)]
    matching = [
        placed
        for placed in scene.objects
        if (not numbers or placed.digit == numbers[0]) and (not named or placed.colour == named[0])
    ]
    if question.kind == "count":
        return str(len(scene.objects))
    if question.kind == "exists":
        return "yes" if matching else "no"
    assert len(matching) == 1, question.text
    if question.kind == "digit_of_colour":
        return str(matching[0].digit)
    if question.kind == "colour_of_digit":
        return matching[0].colour
    sign = -1 if question.kind == "left_of" else 1
    shifts = [sign * (o.centre_x - matching[0].centre_x) for o in scene.objects if o is not matching[0]]
    assert all(abs(shift) >= SIDE_MARGIN for shift in shifts)
    beside = [o for o in scene.objects if sign * (o.centre_x - matching[0].centre_x) > 0]
    assert len(beside) == 1, question.text
    return str(beside[0].digit)


def test_the_same_seed_gives_the_same_scene():
    for split in ("train", "held_out"):
        first, second = make_scene(5, split), make_scene(5, split)
        assert np.array_equal(first.image, second.image)
        assert first.objects == second.objects
        assert first.asked == second.asked
    assert not np.array_equal(make_scene(5, "train").image, make_scene(5, "held_out").image)


def test_no_digit_instance_is_in_both_splits():
    for digit in range(10):
        train, held = (set(load_digit_instances(split)[digit]) for split in ("train", "held_out"))
        assert train
        assert held
        assert not train & held
    held = {index for indices in load_digit_instances("held_out").values() for index in indices}
    used = {placed.instance for seed in SEEDS for placed in make_scene(seed, "train").objects}
    assert not used & held


def test_every_answer_follows_from_the_objects():
    for seed in SEEDS:
        scene = make_scene(seed, "held_out")
        for question in scene.asked:
            assert answer_from_objects(scene, question) == question.answer


def test_digits_and_colours_are_distinct_within_a_scene():
    for seed in SEEDS:
        objects = make_scene(seed).objects
        assert 2 <= len(objects) <= 4
        assert len({placed.digit for placed in objects}) == len({placed.colour for placed in objects}) == len(objects)


def test_patch_labels_match_the_pixels():
    scene = make_scene(3, "held_out")
    assert scene.image.shape == (112, 112, 3)
    assert scene.image.dtype == np.uint8
    digits, colours = scene.patch_labels
    patches = scene.image.reshape(14, PATCH_SIZE, 14, PATCH_SIZE, 3).swapaxes(1, 2).reshape(VISUAL_TOKENS, -1, 3)
    for patch in np.argsort(-scene.patch_coverage)[:8]:
        brightest = patches[patch][patches[patch].max(1).argmax()].astype(float)
        nearest = min(COLOURS, key=lambda name: np.abs(np.array(INKS[name]) - brightest).sum())
        assert nearest == COLOURS[colours[patch]]
        assert digits[patch] in {placed.digit for placed in scene.objects}


def test_oracle_patches_lead_the_ranking():
    for seed in SEEDS:
        scene = make_scene(seed)
        ranked, oracle = scene.rank_patches(), scene.oracle_patches
        assert sorted(ranked) == list(range(VISUAL_TOKENS))
        assert set(ranked[: len(oracle)]) == set(oracle)
        assert len(oracle) <= VISUAL_TOKENS // 2
        owners = scene.patch_object[oracle]
        assert set(owners) == set(range(len(scene.objects)))


def test_held_out_questions_are_balanced_and_repeatable():
    samples = held_out(90)
    again = held_out(90)
    kinds = Counter()
    for (image, question, answer, scene), (image2, question2, answer2, _) in zip(samples, again, strict=True):
        assert (question, answer) == (question2, answer2)
        assert np.array_equal(image, image2)
        asked = next(q for q in scene.asked if (q.text, q.answer) == (question, answer))
        kinds[asked.kind] += 1
    assert kinds == dict.fromkeys(KINDS, 15)
    yes = Counter(answer for _, _, answer, _ in held_out(300) if answer in ("yes", "no"))
    assert 0.3 < yes["yes"] / yes.total() < 0.7


def test_answers_depend_on_the_question():
    for seed in SEEDS:
        assert len({answer for _, answer in make_scene(seed).questions}) >= 5


def test_the_vocabulary_covers_every_wording_and_answer():
    words = set(list_words())
    assert len(words) == len(list_words())
    assert len(words) + len(SPECIAL_TOKENS) <= 256
    for templates in TEMPLATES.values():
        for template in templates:
            text = template.format(digit=7, colour="green")
            assert set(re.findall(r"\w+|[^\w\s]", text)) <= words
    for seed in SEEDS:
        assert {answer for _, answer in make_scene(seed).questions} <= words


def test_an_unknown_split_names_the_choices():
    with pytest.raises(ValueError, match="train, held_out"):
        make_scene(0, "test")
