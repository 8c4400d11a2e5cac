"""The omni demo: clips are as their labels say, inputs are what the family's processor makes, files are laid out as
the family's checkpoints are."""

from pathlib import Path

import numpy as np
import pytest
import torch

from secateur.runtime.errors import UserError
from secateur.tools.demo.omni import architecture, inputs, language
from secateur.tools.demo.omni.answers import build_prompt, draw_shown, mask_blocks
from secateur.tools.demo.omni.clips import (
    COLUMN_TONES,
    DIGITS,
    FRAMES_PER_SECOND,
    ROW_TONES,
    SAMPLING_RATE,
    SECONDS,
    dial_tones,
    make_audio,
    make_clip,
    make_video,
)
from secateur.tools.demo.omni.evaluate import choose_tokens
from secateur.tools.demo.omni.files import read_frames, read_questions, read_sound, write_clip
from secateur.tools.demo.omni.language import KINDS, SPECIAL_TOKENS, build_tokenizer, list_answers
from secateur.tools.demo.omni.questions import held_out
from secateur.tools.demo.omni.towers import encode_mels, encode_patches, use_equal_parts

SHIPPED = Path(__file__).parents[2] / "demo" / "omni"


def test_the_same_seed_gives_the_same_clip():
    first, second, other = make_clip(5), make_clip(5), make_clip(5, "held_out")
    assert np.array_equal(first.video.frames, second.video.frames)
    assert np.array_equal(first.audio.wave, second.audio.wave)
    assert not np.array_equal(first.video.frames, other.video.frames)
    assert not np.array_equal(first.audio.wave, other.audio.wave)


def test_digits_seen_and_heard_are_the_same_in_half_of_the_clips():
    same = [clip.video.digit == clip.audio.digit for clip in (make_clip(seed) for seed in range(80))]
    assert 30 <= sum(same) <= 58  # a half, and a tenth of the other half


@pytest.mark.parametrize("seed", range(12))
def test_ink_is_where_and_when_the_label_says(seed):
    video = make_video(seed, "held_out")
    shown = video.ink.max((1, 2)) > 0.5
    assert shown.reshape(SECONDS, FRAMES_PER_SECOND).all(1).tolist() == [s == video.second for s in range(SECONDS)]
    assert shown.sum() == FRAMES_PER_SECOND
    # Without the digit a clip differs at inked pixels only.
    other = make_video(seed, "held_out", digit=(video.digit + 1) % 10)
    differs = (video.frames != other.frames).any(-1)
    assert not differs[(video.ink == 0) & (other.ink == 0)].any()
    assert differs[shown].any((1, 2)).all()
    labels = inputs.label_video(video)
    assert (labels[video.second] == video.digit).any()
    assert (np.delete(labels, video.second, 0) == 10).all()


@pytest.mark.parametrize("seed", range(12))
def test_the_tones_heard_are_the_digits(seed):
    audio = make_audio(seed, "held_out")
    assert audio.second * SAMPLING_RATE <= audio.start < audio.stop <= (audio.second + 1) * SAMPLING_RATE
    heard = audio.wave[audio.start : audio.stop]
    power = abs(np.fft.rfft(heard))
    hertz = np.fft.rfftfreq(len(heard), 1 / SAMPLING_RATE)
    strongest = [
        max(tones, key=lambda tone: power[abs(hertz - tone) <= 0.015 * tone].max())
        for tones in (ROW_TONES, COLUMN_TONES)
    ]
    assert tuple(strongest) == dial_tones(audio.digit)
    labels = inputs.label_audio(audio)
    assert set(labels) <= {audio.digit, 10, -1}
    assert (labels == audio.digit).sum() >= 8
    assert len({dial_tones(digit) for digit in DIGITS}) == 10


def test_patches_are_those_of_the_familys_processor():
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    names = ("image_mean", "image_std", "merge_size", "patch_size", "temporal_patch_size", "min_pixels", "max_pixels")
    processor = Qwen2VLImageProcessorPil(**{name: architecture.PREPROCESSOR[name] for name in names})
    frames = make_video(3).frames
    for frame in frames[::3]:  # the processor repeats a picture to make a pair of frames
        theirs = processor([Image.fromarray(frame)], return_tensors="np")
        assert theirs["image_grid_thw"].tolist() == [[1, *architecture.GRID_THW[1:]]]
        np.testing.assert_allclose(inputs.cut_patches(np.stack([frame, frame])), theirs["pixel_values"], atol=1e-6)
    pair = inputs.cut_patches(frames[4:6]).reshape(64, 3, 2, 14, 14)
    for number, frame in enumerate(frames[4:6]):
        alone = inputs.cut_patches(np.stack([frame, frame])).reshape(64, 3, 2, 14, 14)
        assert np.array_equal(pair[:, :, number], alone[:, :, 0])


def test_mels_are_those_of_five_minutes_of_padding():
    wave = make_audio(4).wave
    padded = np.pad(wave, (0, 20 * SAMPLING_RATE))
    theirs = inputs._build_extractor()(padded, sampling_rate=SAMPLING_RATE, padding=False, return_tensors="np")
    mels = inputs.hear_mels(wave)
    assert mels.shape == (architecture.MEL_BINS, architecture.MEL_FRAMES)
    np.testing.assert_allclose(mels, theirs["input_features"][0][:, : architecture.MEL_FRAMES], atol=1e-6)


def test_special_tokens_stand_in_the_familys_order_behind_the_words():
    tokenizer = build_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(tokenizer) - len(SPECIAL_TOKENS), len(tokenizer)))
    # The checkpoints have them at 151643 and on: the same steps between them.
    assert [ids[i] - ids[0] for i in (3, 4, 5, 9, 10, 12, 13)] == [3, 4, 5, 9, 10, 12, 13]
    assert len(tokenizer) <= architecture.VOCABULARY_SIZE
    for answer in list_answers():
        assert len(tokenizer.encode(answer, add_special_tokens=False)) == 1
    for kind in KINDS:
        for wording, text in enumerate(language.TEMPLATES[kind]):
            assert language.phrase_question(kind, wording + len(language.TEMPLATES[kind])) == text
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chunks_of_two_seconds_and_positions_of_the_model():
    prompt = build_prompt(architecture.build_model())
    tokenizer = build_tokenizer()
    media = prompt.ids[int(prompt.video[0]) : int(prompt.audio[-1]) + 1]
    is_video = media == tokenizer.convert_tokens_to_ids("<|VIDEO|>")
    runs = torch.unique_consecutive(is_video, return_counts=True)
    assert runs[0].tolist() == [True, False, True, False]
    assert runs[1].tolist() == [32, 50, 32, 50]
    assert tokenizer.convert_ids_to_tokens(prompt.ids[-2:].tolist()) == ["<|audio_eos|>", "<|vision_eos|>"]
    start = int(prompt.positions[0, prompt.video[0]])
    time, row, column = (prompt.positions[:, prompt.video] - start).reshape(3, SECONDS, 4, 4)
    assert time[:, 0, 0].tolist() == [0, 25, 50, 75]
    assert row[2, :, 1].tolist() == column[2, 1].tolist() == [0, 1, 2, 3]
    assert (prompt.positions[:, prompt.audio] - start).tolist() == [list(range(100))] * 3
    assert prompt.after == int(prompt.positions.max()) + 1 == start + 101


def test_attending_in_equal_parts_changes_nothing():
    plain, fast = architecture.build_model(), architecture.build_model()
    use_equal_parts(fast)
    assert "flash" in fast.model.visual.config._attn_implementation
    clip = make_clip(1)
    patches = torch.from_numpy(inputs.cut_patches(clip.video.frames))
    mels = torch.from_numpy(np.stack([inputs.hear_mels(clip.audio.wave), inputs.hear_mels(make_clip(2).audio.wave)]))
    with torch.no_grad():
        for encode, given in ((encode_patches, patches), (encode_mels, mels)):
            torch.testing.assert_close(encode(fast, given), encode(plain, given), atol=1e-5, rtol=1e-5)


def test_tokens_shown_in_training_hold_the_digit():
    labels = np.full((2, 20), 10)
    labels[0, 5:9], labels[1, 2] = 3, 7
    shown = draw_shown(np.random.default_rng(0), labels, 8)
    assert shown.shape == (2, 8)
    assert (np.diff(shown) > 0).all()
    assert {5, 6, 7, 8} <= set(shown[0])
    assert 2 in shown[1]


def test_blocks_see_the_clip_and_themselves_only():
    mask = mask_blocks(3, 2, 2)[0, 0]
    assert mask[:3, :3].equal(torch.ones(3, 3).tril().bool())
    assert mask[5].tolist() == [True, True, True, False, False, True, False]
    assert mask[6].tolist() == [True, True, True, False, False, True, True]


def test_kept_tokens_of_the_oracle_hold_the_digit():
    clip = make_clip(0, "held_out")
    video, audio = choose_tokens("oracle:0.25", clip, 0)
    assert (len(video), len(audio)) == (16, 25)
    assert set(np.flatnonzero(inputs.label_video(clip.video).ravel() == clip.video.digit)) <= set(video)
    assert set(np.flatnonzero(inputs.label_audio(clip.audio) == clip.audio.digit)) <= set(audio)
    with pytest.raises(UserError, match="no such rule"):
        choose_tokens("best:0.5", clip, 0)


def test_held_out_questions_ask_every_kind_of_every_clip():
    asked = held_out(3)
    assert [question.kind for question in asked] == list(KINDS) * 3
    assert {question.answer for question in asked} <= set(list_answers())
    assert asked[0].clip is asked[4].clip
    assert asked[0].frames is asked[0].clip.video.frames


def test_clip_files_hold_what_was_written(tmp_path):
    clip = make_clip(7, "held_out")
    picture, sound = write_clip(clip, tmp_path / "clip")
    assert np.array_equal(read_frames(picture), clip.video.frames)
    np.testing.assert_allclose(read_sound(sound), clip.audio.wave, atol=1 / 32767)
    sound.write_bytes(sound.read_bytes()[:2000])
    with pytest.raises(UserError, match="1956 bytes of samples"):
        read_sound(sound)


@pytest.mark.parametrize("content", ["{", '[{"frames": "a.png", "question": "?"}]'])
def test_malformed_questions_are_refused_in_one_line(content, tmp_path):
    path = tmp_path / "questions.json"
    with pytest.raises(UserError, match="no such file"):
        read_questions(path)
    path.write_text(content)
    with pytest.raises(UserError, match="not a list of questions"):
        read_questions(path)
