"""Prompts with images, videos and sound: placeholders expanded, media held to the geometry, a line for each mistake."""

from __future__ import annotations

import json
import logging
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.manifest import GeometrySizes, ImageSize, Manifest, Media, MediaItem, Model
from secateur.runtime.media import media_positions
from secateur.runtime.processing import Processor

NAMES = ["<pad>", "<vision>", "</vision>", "<image>", "<video>", "<audio>", "<sound>", "</sound>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
PAD, VISION, VISION_END, IMAGE, VIDEO, AUDIO, SOUND, SOUND_END = range(len(NAMES))
SIZE = (56, 84)
TOKENS = 6
"""Of an image or grid of that size: 4x6 patches, two by two."""
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<vision><image></vision>"
    "{% elif p.type == 'video' %}<vision><video></vision>{% elif p.type == 'audio' %}<sound><audio></sound>"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}/{% endfor %}a:"
)
CONFIG = {
    "image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 28 * 28, "max_pixels": 28 * 28 * 100,
    "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 4, "chunk_length": 300,
}  # fmt: skip
_VISION = [[VISION], [VISION_END]]
AROUND = {"image": _VISION, "video": _VISION, "video with sound": _VISION, "audio": [[SOUND], [SOUND_END]]}


def write_files(directory: Path, **changes: Any) -> Path:
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate([*NAMES, *ALPHABET])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(NAMES)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "preprocessor_config.json").write_text(json.dumps(CONFIG | changes))
    return directory


def make_manifest(
    kinds: list[str], *, text_tokens: int = 60, left: int = TOKENS, frames: int = 4, seconds: int = 2, **model: Any
) -> Manifest:
    """For images, or a video of 2 frames a second; sound has 25 tokens a second. ``left`` tokens of each grid enter."""
    video, sound = any("video" in kind for kind in kinds), any(k in ("audio", "video with sound") for k in kinds)
    grids = frames // 2 if video else kinds.count("image")
    counts = {
        "image": left, "video": grids * left, "audio": 25 * seconds, "video with sound": grids * left + 25 * seconds
    }  # fmt: skip
    items = [MediaItem(kind=kind, tokens=counts[kind], span=3, reach=3) for kind in kinds]  # type: ignore[arg-type]
    interleaved = "video with sound" in kinds
    return Manifest.model_construct(
        model=Model.model_construct(
            model_type="qwen", image_token="<image>", image_token_id=IMAGE, image_before=[], image_behind=[],
            pad_token_id=PAD, **{"video_token_id": VIDEO, "audio_token_id": AUDIO} | model,
        ),
        geometry=GeometrySizes(
            batch=1, images=grids, text_tokens=text_tokens, new_tokens=4, image_height=SIZE[0], image_width=SIZE[1],
            tokens_per_image=TOKENS, features_per_image=left, sequence=text_tokens + sum(i.tokens for i in items),
            frames=frames if video else 0, fps=2.0 if video else 0.0, audio_seconds=seconds if sound else 0,
            audio_tokens=25 * seconds if sound else 0,
        ),
        media=Media(
            items=items, around=AROUND, sound_before=[SOUND] if interleaved else [],
            sound_behind=[SOUND_END] if interleaved else [],
        ),
    )  # fmt: skip


def open_processor(directory: Path, kinds: list[str], **options: Any) -> Processor:
    return Processor(directory, make_manifest(kinds, **options))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("files"))


def picture(height: int = SIZE[0], width: int = SIZE[1]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def film(frames: int = 4, size: tuple[int, int] = SIZE) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).integers(0, 256, (frames, *size, 3), dtype=np.uint8)


def noise(seconds: float = 2) -> np.ndarray[Any, Any]:
    return np.random.default_rng(2).uniform(-0.5, 0.5, round(16000 * seconds)).astype(np.float32)


def show(ids: list[int]) -> str:
    """Special tokens by a letter each, runs of placeholders by their length."""
    letters = {VISION: "<", VISION_END: ">", SOUND: "(", SOUND_END: ")"}
    shown, run = "", 0
    for token in [*ids, None]:
        if token == IMAGE:
            run += 1
            continue
        shown += str(run) if run else ""
        run = 0
        if token is not None:
            shown += letters.get(token) or ALPHABET[token - len(NAMES)].replace("Ġ", " ")
    return shown


@pytest.mark.parametrize(
    ("kinds", "prompt", "text"),
    [
        (["image"], "hi", "user: <6>hi/a:"),
        (["image", "image"], "hi", "user: <6><6>hi/a:"),
        (["image"] * 2, "a<vision><image></vision>b<vision><image></vision>c", "a<6>b<6>c"),
        (["video"], "hi", "user: <12>hi/a:"),
        (["video"], "x<vision><video></vision>y", "x<12>y"),
        (["video with sound"], "hi", "user: <(62)>hi/a:"),
        (["video with sound"], "<vision><video></vision>y", "<(62)>y"),
        (["image", "audio"], "hi", "user: <6>(50)hi/a:"),
        (
            ["video", "audio"],
            [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "x"}, {"type": "audio"}]}],
            "user: <12>x(50)/a:",
        ),
        (
            ["video with sound"],
            [{"role": "user", "content": [{"type": "audio"}, {"type": "video"}, {"type": "text", "text": "x"}]}],
            "user: <(62)>x/a:",
        ),
        (["video with sound"], [{"role": "user", "content": [{"type": "audio"}]}], "user: <(62)>/a:"),
    ],
)
def test_placeholders_become_the_tokens_of_their_items(files: Path, kinds: list[str], prompt: Any, text: str) -> None:
    assert show(open_processor(files, kinds).encode(prompt)) == text


def test_grids_behind_their_times(files: Path) -> None:
    processor = open_processor(files, ["video"], frames=4)
    manifest = processor._manifest
    assert manifest.media is not None
    grids = [MediaItem(kind="video", tokens=TOKENS, span=3, reach=3)] * 2
    timed = manifest.media.model_copy(update={"items": grids, "timestamp": "{:.1f}s"})
    manifest = manifest.model_copy(update={"media": timed})
    processor = processor.at(manifest)
    assert manifest.items == ["video"]
    assert show(processor.encode("hi")) == "user: <0.2s<6>1.2s<6>>hi/a:"
    assert show(processor.encode("hi", times=[3, 10.25])) == "user: <3.0s<6>10.2s<6>>hi/a:"
    assert show(processor(["hi"], videos=[[film(40)]], video_fps=10).prompt_ids(0)) == "user: <0.5s<6>2.5s<6>>hi/a:"
    words = len("user: <0.2s<>1.2s<>>hi/a:")
    short = manifest.model_copy(update={"geometry": manifest.geometry.model_copy(update={"text_tokens": words - 1})})
    with pytest.raises(UserError, match=f"has {words} text tokens, the bundle was compiled for at most {words - 1};"):
        processor.at(short).encode("hi")


def test_each_image_has_its_own_size(files: Path) -> None:
    processor = open_processor(files, ["image", "image"])
    manifest = processor._manifest
    sizes = [ImageSize(height=56, width=84, tokens=6, features=6), ImageSize(height=28, width=28, tokens=1, features=1)]
    assert manifest.media is not None
    items = [MediaItem(kind="image", tokens=size.tokens, span=3, reach=3) for size in sizes]
    changes = {
        "geometry": manifest.geometry.model_copy(update={"sizes": sizes}),
        "media": manifest.media.model_copy(update={"items": items}),
    }
    manifest = manifest.model_copy(update=changes)
    processor = processor.at(manifest)
    assert manifest.shown == "2 image(s) of 56x84, 28x28"
    assert manifest.geometry.features == manifest.geometry.places == 7
    inputs = processor(["hi"], [[picture(56, 84), picture(28, 28)]])
    assert inputs.pixel_values.shape == (4 * 7, 3 * 2 * 14 * 14)
    assert show(inputs.prompt_ids(0)) == "user: <6><1>hi/a:"
    alone = open_processor(files, ["image"])(["hi"], [[picture(56, 84)]])
    np.testing.assert_array_equal(inputs.pixel_values[:24], alone.pixel_values)
    assert "compiled for 2 per row (56x84, 28x28)" in refusal(processor, images=[picture()])
    wrong = manifest.geometry.model_copy(update={"sizes": [sizes[0], sizes[0].model_copy(update={"width": 56})]})
    with pytest.raises(BundleError, match="compiled for 6 tokens"):
        processor.at(manifest.model_copy(update={"geometry": wrong}))


def test_pruned_items_have_fewer(files: Path) -> None:
    assert show(open_processor(files, ["video with sound"], left=2).encode("hi")) == "user: <(54)>hi/a:"


def test_marks_count_as_text(files: Path) -> None:
    words = len("user: <()>hi/a:")
    open_processor(files, ["video with sound"], text_tokens=words).encode("hi")
    with pytest.raises(UserError, match=f"has {words} text tokens, the bundle was compiled for at most {words - 1};"):
        open_processor(files, ["video with sound"], text_tokens=words - 1).encode("hi")


def test_arrays_are_those_of_the_programs(files: Path, tmp_path: Path) -> None:
    images = open_processor(files, ["image"] * 2)(["hi"], [[picture(), picture()]])
    assert images.pixel_values.shape == (2 * 24, 3 * 2 * 14 * 14)
    assert images.input_features is None
    both = open_processor(files, ["video with sound"])(["hi"], videos=[[film()]], audio=[[noise()]])
    assert both.pixel_values.shape == (2 * 24, 3 * 2 * 14 * 14)
    assert both.input_features is not None
    assert both.input_features.shape == (1, 4, 200)
    np.save(tmp_path / "film.npy", film())
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((noise() * 32768).round().astype("<i2").tobytes())
    parts = [{"type": "video", "path": str(tmp_path / "film.npy")}, {"type": "audio", "audio": tmp_path / "sound.wav"}]
    carried = open_processor(files, ["video with sound"])([[{"role": "user", "content": parts}]])
    np.testing.assert_array_equal(carried.pixel_values, both.pixel_values)
    assert carried.input_features is not None
    np.testing.assert_allclose(carried.input_features, both.input_features, atol=1e-2)


def test_another_native_size_is_told_once(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    processor = open_processor(files, ["image"])
    with caplog.at_level(logging.WARNING):
        processor(["hi"], [[picture()]])
        processor(["hi"], [[picture(SIZE[0] + 5, SIZE[1] - 5)]])
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert processor(["hi"], [[picture(170, 200)]]).pixel_values.shape[0] == 24
    assert caplog.messages == [
        "transformers would show the model this image as 168x196; it is resized to the 56x84 that the bundle was "
        "compiled for"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        open_processor(files, ["video"])(["hi"], videos=[[film(size=(112, 112))]])
    assert "show the model this video as" in caplog.text


def refusal(processor: Processor, prompt: Any = "hi", **given: Any) -> str:
    with pytest.raises(UserError) as caught:
        processor([prompt], *([given.get(kind, [])] for kind in ("images", "videos", "audio")))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_media_that_do_not_fit(files: Path) -> None:
    image, video, both = (open_processor(files, [kind]) for kind in ("image", "video", "video with sound"))
    beside = open_processor(files, ["image", "audio"])
    assert refusal(image, images=[picture()] * 2) == (
        "row 0: 2 image(s), the bundle was compiled for 1 per row (56x84); give 1, or compile with --images 2"
    )
    assert refusal(image, videos=[film()]) == (
        "row 0: 1 video(s), the bundle was compiled for 1 image(s) of 56x84 per row; give 1 image(s), or compile with "
        "--frames N"
    )
    told = "a video of 4 frames, 2 a second, of 56x84"
    assert refusal(video, images=[picture()]) == (
        f"row 0: 1 image(s), the bundle was compiled for {told} per row; give 1 video(s), or compile with --images 1"
    )
    assert f"row 0: 2 video(s), the bundle was compiled for {told} per row" in refusal(video, videos=[film()] * 2)
    assert refusal(video, videos=[film()], audio=[noise()]) == (
        f"row 0: audio is given, the bundle was compiled for {told}; leave it out, or compile with --audio-seconds "
        "SECONDS"
    )
    deaf = open_processor(files, ["image"], audio_token_id=None)
    assert refusal(deaf, images=[picture()], audio=[noise()]) == (
        "row 0: a qwen model does not hear; leave the audio out"
    )
    assert refusal(both, videos=[film()]) == (
        f"row 0: the sound of the video is missing, the bundle was compiled for {told} with 2 s of sound; give audio, "
        "or compile without --audio-seconds"
    )
    assert "row 0: sound is missing, the bundle" in refusal(beside, images=[picture()])
    assert "row 0: 2 audio clips, the bundle" in refusal(beside, images=[picture()], audio=[noise()] * 2)
    assert "the video has 3 frame(s), the bundle was compiled for 4 at 2 a second (2 s); give a longer video" in (
        refusal(video, videos=[film(3)])
    )
    assert "3 s of audio, the bundle was compiled for 2" in refusal(both, videos=[film()], audio=[noise(3)])
    assert "an image of 9000x20 pixels is too narrow" in refusal(image, images=[picture(20, 9000)])


def test_placeholders_that_do_not_fit(files: Path) -> None:
    image, both = open_processor(files, ["image"]), open_processor(files, ["video with sound"])
    beside = open_processor(files, ["image", "audio"])
    where = "prompt, placeholders in the prompt"
    for processor, prompt, says in (
        (image, "<vision><image></vision><vision><image></vision>x", f"{where}: 2 image(s), the bundle was compiled"),
        (image, "<vision><video></vision>x", f"{where}: 1 video(s), the bundle was compiled for 1 image(s) of 56x84;"),
        (beside, "<sound><audio></sound><vision><image></vision>x",
         f"{where}: 1 audio clip(s) and 1 image(s), the bundle was compiled for 1 image(s) of 56x84 and 2 s of sound; "
         "name 1 image(s) and 1 audio clip(s), in this order"),
        (both, "<vision><video></vision><sound><audio></sound>x",
         "name 1 video(s); the sound lies between the frames of the video, not beside it"),
        (image, "x<image>y", "prompt: the marks around its image are missing; write <vision><image></vision>, or"),
        (image, "x<image>", "prompt: the prompt ends with its image; put text (a question) behind the image"),
        (image, [{"role": "user", "content": [{"type": "video"}]}],
         "messages: a message holds video (available: image, text)"),
        (image, [{"role": "system", "content": "x"}], "no message of role 'user' to put the image in"),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            processor.encode(prompt)
        assert says in str(caught.value)


def test_positions_are_those_of_the_docs() -> None:
    """docs/ports.md: an image of 4x6 tokens behind three words and a mark."""
    item = MediaItem(kind="image", tokens=24, span=6, reach=6)
    manifest = make_manifest(["image"], left=24)
    media = Media(items=[item], around=AROUND)
    ids = np.array([[50, 51, 52, VISION, *[IMAGE] * 24, VISION_END, 53, PAD]])
    positions, behind = media_positions(manifest, media, ids, np.array([30]))
    assert positions[0].tolist() == [0, 1, 2, 3, *[4] * 24, 10, 11, 0]
    assert behind.tolist() == [12]


def test_another_rate_of_sound_is_told(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    processor = open_processor(files, ["image", "audio"])
    with caplog.at_level(logging.WARNING):
        processor(["hi"], [[picture()]], audio=[[noise()[::2]]], audio_rate=8000)
    assert caplog.messages == ["audio is resampled from 8000 to 16000 Hz"]


def test_files_that_are_not_the_compiled_ones(tmp_path: Path) -> None:
    write_files(tmp_path, patch_size=7)
    with pytest.raises(BundleError, match="patches of 7 pixels and merges 2x2 of them, the bundle was compiled for 6"):
        open_processor(tmp_path, ["image"])
    write_files(tmp_path, chunk_length=1)
    with pytest.raises(UserError, match="2 s of audio, the model's feature extractor takes 1"):
        open_processor(tmp_path, ["image", "audio"])


def test_files_of_their_own_for_each_kind(tmp_path: Path) -> None:
    """What newer versions of transformers write: one file with a part for each processor, or one for videos."""
    write_files(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    images = {"image_processor_type": "Qwen2VLImageProcessor", "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    videos = images | {"video_processor_type": "Qwen2VLVideoProcessor", "image_std": [0.5] * 3}
    sound = {key: CONFIG[key] for key in ("feature_extractor_type", "feature_size", "chunk_length")}
    whole = {"image_processor": images, "video_processor": videos, "feature_extractor": sound}
    (tmp_path / "processor_config.json").write_text(json.dumps(whole))
    white = np.full((4, *SIZE, 3), 255, np.uint8)
    seen = open_processor(tmp_path, ["image", "audio"])(["hi"], [[white[0]]], audio=[[noise()]])
    assert seen.pixel_values.max() == 1
    assert seen.input_features is not None
    assert open_processor(tmp_path, ["video"])(["hi"], videos=[[white]]).pixel_values.max() == 2
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(videos | {"image_std": [0.25] * 3}))
    assert open_processor(tmp_path, ["video"])(["hi"], videos=[[white]]).pixel_values.max() == 2  # as transformers 5
    (tmp_path / "processor_config.json").write_text(json.dumps({**whole, "video_processor": None}))
    assert open_processor(tmp_path, ["video"])(["hi"], videos=[[white]]).pixel_values.max() == 4
