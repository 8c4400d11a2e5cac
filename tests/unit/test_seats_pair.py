"""SEATS where there is sound: means of their own for what is seen and what is heard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from secateur.compiler.budget import Budget, visual_lengths
from secateur.compiler.pipeline import Geometry, choose_keep, explain, load_recipe, plan_for, plan_job, read_source
from secateur.compiler.recipe import Recipe, Site, Stage, Term
from secateur.compiler.trace import Source
from secateur.runtime.errors import UserError
from secateur.tools.geometry import read_mean_keep

from . import tiny_qwen, tiny_qwen_more
from .transcriptions.draw import draw_signals

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


# -- images beside a sound --------------------------------------------------------------------------------

QWEN3 = "qwen3_omni_moe_thinker"
TINY: dict[str, Callable[[Path, int], Path]] = {
    "qwen2_5_omni": lambda path, layers: tiny_qwen.write_config(path, kind="qwen2_5_omni_thinker", layers=layers),
    "qwen3_omni": lambda path, layers: tiny_qwen_more.write_config(path, QWEN3, layers=layers),
}
BESIDE = {
    "one image": Geometry(image_size=(448, 448), audio_seconds=4),
    "two images": Geometry(images=2, image_size=(448, 448), audio_seconds=4),
    "five images": Geometry(images=5, image_size=(448, 448), audio_seconds=8),
    "images of several sizes": Geometry(image_size=((448, 448), (224, 224), (224, 448), (224, 224)), audio_seconds=4),
}
OWN = {"qwen2_5_omni": "seats", "qwen3_omni": "seats_qwen3_omni"}
PORTS = ("random_omni", "visionzip_omni", "fastv_omni")


def left_of_kinds(source: Source, geometry: Geometry, recipe: Recipe) -> list[tuple[int, int]]:
    """What a recipe leaves of what is seen and of what is heard in every layer, at the pair of its rates, for
    attention drawn at random."""
    assert recipe.rates is not None
    job = plan_job(source, geometry, recipe, choose_keep(source, geometry, recipe, Budget(rates=recipe.rates)))
    media = source.at(geometry).media
    assert media is not None
    kinds, left = torch.tensor(media.layout.modalities), torch.arange(len(media.layout.modalities))
    found = [(int((kinds == 0).sum()), int((kinds == 1).sum()))] * source.decoder_layers
    for stage in job.decoder_stages:
        signals = draw_signals(stage, 1, seed=stage.planned.index, carried=torch.rand(1, len(left)))
        if "source" in signals:
            signals["source"] = left.unsqueeze(0)
        left = left[stage(signals).keep[0]]
        now = int((kinds[left] == 0).sum()), int((kinds[left] == 1).sum())
        first = stage.planned.site.layer or 0
        found[first:] = [now] * (len(found) - first)
    return found


@pytest.mark.parametrize(
    ("family", "name", "media"),
    [(family, row, media) for family, row in OWN.items() for media in BESIDE]
    + [(family, row, "images of several sizes") for family in OWN for row in PORTS],
)
def test_the_pair_is_met_for_images_beside_a_sound(tmp_path: Path, family: str, name: str, media: str) -> None:
    source, geometry = read_source(TINY[family](tmp_path, 24)), BESIDE[media]
    tokens = source.at(geometry).vision.tokens_per_row, source.at(geometry).audio_tokens
    found = left_of_kinds(source, geometry, load_recipe(name).with_rates((0.3, 0.65)))
    for kind, rate in enumerate((0.3, 0.65)):
        mean = sum(counts[kind] for counts in found) / len(found)
        assert mean == pytest.approx(rate * tokens[kind], abs=1.0)


def test_two_images_and_a_sound_keep_of_each_what_its_rate_says(tmp_path: Path) -> None:
    """2 x 784 tokens seen and 100 heard: the last step leaves 22.07 % of 42 % and of 91 %."""
    source = read_source(TINY["qwen2_5_omni"](tmp_path, 28))
    geometry = Geometry(images=2, image_size=(784, 784), audio_seconds=4)
    found = left_of_kinds(source, geometry, load_recipe("seats").with_rates((0.3, 0.65)))
    assert found[22] == (145, 20)
    assert found[23] == (0, 0)


@pytest.mark.parametrize("family", TINY)
def test_every_image_lies_beside_a_part_of_the_sound(tmp_path: Path, family: str) -> None:
    """So that what compares the two in a window finds both."""
    source = read_source(TINY[family](tmp_path, 8))
    for geometry in BESIDE.values():
        media = source.at(geometry).media
        assert media is not None
        moments = [(kind, moment) for moment, kind in zip(*media.layout, strict=True)]
        assert {moment for kind, moment in moments if kind} == {moment for kind, moment in moments if not kind}
        assert moments == sorted(moments)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("seconds", [4, 16])
def test_no_window_loses_its_budget_where_a_video_and_its_sound_differ_in_length(
    tmp_path: Path, family: str, seconds: int
) -> None:
    """A video of 8 seconds. Attention drawn at random is much alike from window to window, and so are the budgets."""
    source = read_source(TINY[family](tmp_path, 24))
    geometry = Geometry(image_size=(224, 224), frames=16, fps=2.0, audio_seconds=seconds)
    recipe = load_recipe(OWN[family])
    job = plan_job(source, geometry, recipe, None)
    stage = [s for s in job.decoder_stages if s.planned.score is not None and s.planned.score.of][-1]
    assert stage.planned.layout is not None
    moments = stage.planned.layout.frames
    assert max(moments) == 7
    signals = draw_signals(stage, 1, seed=0)
    keep = signals["source"][0, stage(signals).keep[0]]
    frames = 1 if family == "qwen3_omni" else 2
    windows = [0] * (8 // frames)
    for i in keep.tolist():
        windows[moments[i] // frames] += 1
    assert max(windows) - min(windows) <= 0.1 * len(keep) / len(windows) + 1
