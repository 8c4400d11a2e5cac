"""The steps a manifest says, run by an interpreter of the page (tests/host), make what the runtime makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from tests.host.pixels import run_images, run_video
from tests.host.resize import FILTERS, resize
from tests.host.sound import run_sound

from secateur.runtime import audio, images, patches, schema
from secateur.runtime.pixel_steps import describe_inputs, find_passes
from secateur.runtime.row_media import RowMedia
from secateur.runtime.schema_inputs import BestResolution, Fit, NearestGrid, Preprocessing, Step, WholeTiles
from secateur.runtime.tower_inputs import open_tower_inputs

SMALL = {"size": {"height": 48, "width": 64}}
PINPOINTS = {"image_grid_pinpoints": [[48, 96], [96, 48], [96, 96]]}
PATCH = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
SOUND = {"feature_extractor": {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 16}}


def outline(family: str = "", media: bool = False, **sizes: Any) -> schema.Manifest:
    """What a manifest says of media; ``sizes`` are the geometry's."""
    given = {
        "batch": 1, "images": 1, "text_tokens": 8, "new_tokens": 1, "tokens_per_image": 1, "features_per_image": 1,
        "sequence": 9,
    }  # fmt: skip
    own = schema.Media(items=[]) if media else None
    return schema.Manifest.model_construct(
        model=schema.Model.model_construct(family=family), geometry=schema.GeometrySizes(**given | sizes), media=own
    )


def pixels(kind: str, made: tuple[int, int], **config: Any) -> tuple[dict[str, Any], schema.Manifest]:
    return {"image_processor_type": kind, **config}, outline(image_height=made[0], image_width=made[1])


def tiles(kind: str, family: str, count: int, tokens: int = 1, **config: Any) -> tuple[dict[str, Any], schema.Manifest]:
    """For images of 60x110."""
    given = outline(family, image_height=60, image_width=110, tiles=count, tokens_per_tile=tokens)
    return {"image_processor_type": kind, **config}, given


def of_patches(kind: str, *sizes: tuple[int, int], frames: int = 0, **config: Any) -> Any:
    """Images of these sizes, or a video of the first."""
    tokens = [high * wide // 28**2 for high, wide in sizes]
    each = [schema.ImageSize(height=h, width=w, tokens=t, features=t) for (h, w), t in zip(sizes, tokens, strict=True)]
    given = outline(
        media=True, image_height=sizes[0][0], image_width=sizes[0][1], images=frames // 2 or len(sizes),
        tokens_per_image=tokens[0], features_per_image=tokens[0], frames=frames, fps=2.0 if frames else 0.0,
        sizes=each if len(sizes) > 1 else [],
    )  # fmt: skip
    part = "video_processor" if frames else "image_processor"
    return {part: {f"{part}_type": kind, **PATCH, **config}}, given


def filmed(kind: str, **config: Any) -> tuple[dict[str, Any], schema.Manifest]:
    given = outline(image_height=48, image_width=64, frames=4, fps=2.0, images=4)
    return {"video_processor": {"video_processor_type": kind, **SMALL, **config}}, given


CASES: dict[str, tuple[dict[str, Any], schema.Manifest]] = {
    "CLIPImageProcessor": pixels("CLIPImageProcessor", (224, 224)),
    "shorter edge, crop": pixels("CLIPImageProcessor", (40, 70), size={"shortest_edge": 50},
                                 crop_size={"height": 40, "width": 70}),
    "no crop": pixels("CLIPImageProcessor", (50, 60), size={"shortest_edge": 50}, do_center_crop=False),
    "as it is": pixels("CLIPImageProcessor", (50, 60), do_resize=False, do_center_crop=False, do_rescale=False,
                       do_normalize=False),
    "scaled only": pixels("SiglipImageProcessor", (48, 64), **SMALL, do_normalize=False, rescale_factor=0.01),
    "colours shown": pixels("SiglipImageProcessor", (48, 64), **SMALL, do_convert_rgb=False),
    "LlavaImageProcessor": pixels("LlavaImageProcessor", (48, 48), size={"shortest_edge": 48}, crop_size=48),
    "padded": pixels("LlavaImageProcessor", (48, 48), size={"shortest_edge": 48}, crop_size=48, do_pad=True),
    "SiglipImageProcessor": pixels("SiglipImageProcessor", (224, 224)),
    "LlavaNextImageProcessor": pixels("LlavaNextImageProcessor", (224, 224)),
    "LlavaOnevisionImageProcessor": pixels("LlavaOnevisionImageProcessor", (48, 64), **SMALL),
    "GotOcr2ImageProcessor": pixels("GotOcr2ImageProcessor", (48, 64), **SMALL),
    "SmolVLMImageProcessor": pixels("SmolVLMImageProcessor", (64, 64), size={"longest_edge": 130},
                                    max_image_size={"longest_edge": 64}),
    "Gemma3ImageProcessor": pixels("Gemma3ImageProcessor", (48, 64), **SMALL),
    "tiles of LLaVA-NeXT": tiles("LlavaNextImageProcessor", "llava_next", 5, 16, size={"shortest_edge": 48},
                                 crop_size=48, **PINPOINTS),
    "tiles of LLaVA-OneVision": tiles("LlavaOnevisionImageProcessor", "onevision", 5, 16,
                                      size={"height": 48, "width": 48}, **PINPOINTS),
    "tiles of InternVL": tiles("GotOcr2ImageProcessor", "internvl", 3, size={"height": 48, "width": 48}, max_patches=3),
    "one tile of InternVL": tiles("GotOcr2ImageProcessor", "internvl", 1, size={"height": 48, "width": 48},
                                  max_patches=1),
    "tiles of SmolVLM": tiles("SmolVLMImageProcessor", "smolvlm", 7, size={"longest_edge": 130},
                              max_image_size={"longest_edge": 48}),
    "Qwen2VLImageProcessor": of_patches("Qwen2VLImageProcessor", (56, 84)),
    "images of two sizes": of_patches("Qwen2VLImageProcessor", (56, 84), (84, 28), do_rescale=False),
    "patches as they are": of_patches("Qwen2VLImageProcessor", (56, 84), do_resize=False),
    "LlavaOnevisionVideoProcessor": filmed("LlavaOnevisionVideoProcessor"),
    "Qwen2VLVideoProcessor": of_patches("Qwen2VLVideoProcessor", (56, 84), frames=4),
    "Qwen3VLVideoProcessor": of_patches("Qwen3VLVideoProcessor", (56, 84), frames=6),
}  # fmt: skip
SHAPES = {"no crop": (50, 60), "as it is": (50, 60), "patches as they are": (56, 84)}
"""Of pictures that nothing makes as large as they have to be."""


def draw(seed: int, high: int, wide: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (high, wide, 3), dtype=np.uint8))


def tower_of(directory: Path, name: str) -> Any:
    config, manifest = CASES[name]
    (directory / "processor_config.json").write_text(
        json.dumps(config if {"image_processor", "video_processor"} & {*config} else {"image_processor": config})
    )
    return open_tower_inputs(directory, manifest)


@pytest.mark.parametrize("name", CASES)
def test_every_processor_makes_the_pixels_of_its_steps(name: str, tmp_path: Path) -> None:
    tower = tower_of(tmp_path, name)
    told = describe_inputs(tower)
    said = json.loads(told.model_dump_json())
    assert Preprocessing.model_validate_json(told.model_dump_json()) == told
    sizes = CASES[name][1].geometry
    for seed, shape in enumerate([SHAPES[name]] if name in SHAPES else [(60, 110), (57, 104), (131, 47), (30, 30)]):
        if sizes.frames:
            film = [draw(frame, *shape) for frame in range(11)]
            made, wanted = run_video(said, film), tower(RowMedia(videos=[film])).pixel_values
        else:
            shown = [draw(seed + index, *shape) for index in range(sizes.images)]
            made, wanted = run_images(said, shown), tower(RowMedia(shown)).pixel_values
        assert (made.dtype, made.shape) == (wanted.dtype, wanted.shape)
        np.testing.assert_allclose(made, wanted, rtol=0, atol=1e-6)


def test_no_processor_and_no_step_is_left_out(tmp_path: Path) -> None:
    assert {*images.DEFAULTS, *patches.DEFAULTS} <= {*CASES}
    steps: set[type] = set()
    rules: set[type] = set()
    for name in CASES:
        told = describe_inputs(tower_of(tmp_path, name))
        for each in [*told.images, *([told.video.steps] if told.video else [])]:
            steps |= {type(step) for step in each}
            rules |= {type(step.unless) for step in each if isinstance(step, Fit)}
    assert steps == {*get_args(get_args(Step)[0])}
    assert rules == {BestResolution, NearestGrid, WholeTiles}


@pytest.mark.parametrize("kind", ["palette", "levels", "colour", "turned", "grey"])
@pytest.mark.parametrize("name", ["SiglipImageProcessor", "colours shown"])
def test_files_with_transparency_and_turned_ones(name: str, kind: str, tmp_path: Path) -> None:
    path, picture = tmp_path / "picture.png", draw(7, 40, 50)
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.save(path := tmp_path / "picture.jpg", exif=exif)
    elif kind == "grey":
        picture.convert("L").save(path)
    elif kind == "levels":
        picture.putalpha(picture.getchannel("R"))
        picture.save(path)
    elif kind == "palette":
        picture.quantize(8).save(path, transparency=3)
    else:
        picture.paste((1, 2, 3), (5, 5, 20, 20))
        picture.save(path, transparency=(1, 2, 3), pnginfo=PngImagePlugin.PngInfo())
    tower = tower_of(tmp_path, name)
    said = json.loads(describe_inputs(tower).model_dump_json())
    np.testing.assert_allclose(run_images(said, [path]), tower(RowMedia([path])).pixel_values, rtol=0, atol=1e-6)


def test_sound(tmp_path: Path) -> None:
    assert {*audio.DEFAULTS} == {"WhisperFeatureExtractor"}
    (tmp_path / "processor_config.json").write_text(
        json.dumps({**SOUND, "image_processor": {"image_processor_type": "Qwen2VLImageProcessor"}})
    )
    clip = np.random.default_rng(2).normal(0, 0.1, 31000).astype(np.float32)
    for padding in ("max_length", "longest"):
        manifest = outline(media=True, image_height=28, image_width=28, audio_seconds=2, audio_tokens=1, sequence=10)
        media = schema.Media(items=[], sound_padding=padding)
        tower = open_tower_inputs(tmp_path, manifest.model_copy(update={"media": media}))
        sound = json.loads(describe_inputs(tower).model_dump_json())["sound"]
        heard = tower(RowMedia([draw(0, 28, 28)], audio=[clip])).input_features
        assert heard is not None
        np.testing.assert_allclose(run_sound(sound, clip), heard[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("filter", [*FILTERS, "nearest"])
def test_resizing_is_pillows(filter: str) -> None:
    passes = find_passes()
    for seed, (high, wide, to_high, to_wide) in enumerate(
        [(70, 45, 21, 33), (120, 30, 20, 20), (40, 30, 30, 25), (20, 15, 10, 10), (9, 7, 31, 12), (64, 64, 64, 20)]
    ):
        picture = draw(seed, high, wide)
        wanted = picture.resize((to_wide, to_high), Image.Resampling[filter.upper()])
        np.testing.assert_array_equal(resize(np.asarray(picture), to_high, to_wide, filter, passes), wanted)
