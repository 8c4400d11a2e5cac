"""SEATS where there is sound: means of their own for what is seen and what is heard."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.compiler.budget import Budget, visual_lengths
from secateur.compiler.pipeline import Geometry, choose_keep, explain, load_recipe, plan_for, plan_job, read_source
from secateur.compiler.recipe import Recipe, Site, Stage, Term
from secateur.compiler.trace import Source
from secateur.runtime.errors import UserError
from secateur.tools.geometry import read_mean_keep

MODEL = Path(__file__).parents[2] / "demo/omni/model"
CLIP = Geometry(image_size=(112, 112), frames=8, fps=2.0, audio_seconds=4)
SEEN, HEARD, LAYERS = 64, 100, 8


@pytest.fixture(scope="module")
def source() -> Source:
    return read_source(MODEL, CLIP)


def test_a_pair_is_one_mean_of_both_kinds(source: Source) -> None:
    recipe, rates = load_recipe("seats").with_rates((0.06, 0.35)), (0.06, 0.35)
    keep = choose_keep(source, CLIP, recipe, Budget(rates=rates))
    lengths = visual_lengths(plan_for(source, CLIP, recipe, keep), SEEN + HEARD, LAYERS)
    wanted = (0.06 * SEEN + 0.35 * HEARD) / (SEEN + HEARD)
    assert sum(lengths) / LAYERS / (SEEN + HEARD) == pytest.approx(wanted, abs=0.5 / (SEEN + HEARD))
    assert Budget(rates=rates).weigh(SEEN, HEARD).mean_keep == pytest.approx(wanted)


def test_the_published_pair_is_the_default_where_there_is_sound(source: Source) -> None:
    row = load_recipe("seats")
    assert row.rates == (0.1, 0.45)
    asked = plan_for(source, CLIP, row, choose_keep(source, CLIP, row, Budget(rates=(0.1, 0.45))))
    assert [s.length_out for s in plan_for(source, CLIP, row, None).stages] == [s.length_out for s in asked.stages]
    deaf = Geometry(image_size=(112, 112), frames=8, fps=2.0)
    assert "audio.out" not in str(plan_for(source, deaf, row, None))


def test_windows_share_in_proportion_to_the_rates(source: Source) -> None:
    job = plan_job(source, CLIP, load_recipe("seats").with_rates((0.1, 0.9)), 0.1)
    first = next(s for s in job.decoder_stages if s.planned.length_out < SEEN + HEARD)
    layout = first.planned.layout
    assert layout is not None
    assert (layout.modalities.count(0), layout.modalities.count(1)) == (SEEN, HEARD)
    # Two seconds of video, then their sound, and so on: the order of the prompt.
    assert layout.modalities[:82] == (0,) * 32 + (1,) * 50
    assert {f for f, kind in zip(layout.frames, layout.modalities, strict=True) if kind} == {0, 1, 2, 3}
    assert "rates=[0.1, 0.9]" in str(first.planned)


def test_explain_counts_both_kinds() -> None:
    found = explain("seats", MODEL, mean_keep=(0.06, 0.35), geometry=CLIP)
    assert (found.audio_tokens, found.grids, found.media_tokens) == (HEARD, 4, SEEN + HEARD)
    assert found.row == "64 visual tokens (4 grids of 16), 100 audio tokens, 64 text tokens"
    assert f"layers 0-4: {found.visual_tokens[0]} audio-visual + 64 text" in str(found)


@pytest.mark.parametrize(
    ("text", "value"), [("0.4", 0.4), ("0.06,0.35", (0.06, 0.35)), (" 0.1, 0.2", (0.1, 0.2)), (None, None)]
)
def test_the_option_takes_one_number_or_two(text: str | None, value: object) -> None:
    assert read_mean_keep(text) == value


@pytest.mark.parametrize("text", ["a", "", "0.1,", "0.1,0.2,0.3"])
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--mean-keep: .* is neither a number nor two"):
        read_mean_keep(text)


def test_a_pair_is_for_recipes_that_tell_them_apart() -> None:
    with pytest.raises(UserError, match="recipe fastv: the recipe does not tell what is seen from what is heard"):
        explain("fastv", MODEL, mean_keep=(0.1, 0.2), geometry=CLIP)
    with pytest.raises(UserError, match=r"--mean-keep: 1\.5 is out of"):
        Budget(rates=(0.1, 1.5))
    with pytest.raises(UserError, match="--keep and --mean-keep are given together"):
        Budget(keep=0.5, rates=(0.1, 0.2))


def test_sound_needs_the_whole_row() -> None:
    """A recipe that chooses image by image inside the decoder has no place for sound between the images."""
    score = Term("last_query_attention_mean")
    recipe = Recipe("x", "", "", (Stage(Site("decoder.layer", 2), Term("top_k"), score=score, scope="image"),))
    with pytest.raises(UserError, match="stage 0 has scope 'image', but sound lies beside or between the images"):
        plan_for(read_source(MODEL, CLIP), CLIP, recipe, 0.5)
