"""Videos: how frames are chosen, from what they are read, what is refused."""

from __future__ import annotations

import logging
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from secateur.runtime.errors import UserError
from secateur.runtime.video import FrameSampler


def level(number: int) -> Image.Image:
    """A frame that says which it is."""
    return Image.new("RGB", (16, 12), (number * 10, number * 10, 0))


def levels(frames: list[Image.Image]) -> list[int]:
    assert all(frame.mode == "RGB" for frame in frames)
    return [round(float(np.asarray(frame)[:, :, 0].mean()) / 10) for frame in frames]


def test_choices_by_hand() -> None:
    assert FrameSampler(4, 2.0).choose(10, None) == [0, 2, 5, 7]
    assert FrameSampler(4, 2.0, ends=True).choose(10, None) == [0, 3, 6, 9]
    assert FrameSampler(4, 2.0).choose(4, 2.0) == [0, 1, 2, 3]
    assert FrameSampler(1, 2.0, ends=True).choose(7, None) == [0]
    # 2 s at 25 a second, a frame every half second.
    assert FrameSampler(4, 2.0).choose(50, 25.0) == [0, 12, 25, 37]


def test_the_type_of_processor_says_how_frames_are_chosen() -> None:
    qwen3 = {"video_processor_type": "Qwen3VLVideoProcessor"}
    assert FrameSampler.from_config(qwen3, 8, 2.0) == FrameSampler(8, 2.0, ends=True)
    assert FrameSampler.from_config({"video_processor": qwen3}, 8, 2.0).ends
    assert not FrameSampler.from_config({"video_processor_type": "Qwen2VLVideoProcessor"}, 8, 2.0).ends
    assert not FrameSampler.from_config({"image_processor_type": "Qwen2VLImageProcessor"}, 8, 2.0).ends


def test_lists_and_arrays() -> None:
    frames = [level(number) for number in range(9)]
    for video in (frames, tuple(frames), np.stack([np.asarray(frame) for frame in frames])):
        assert levels(FrameSampler(3, 1.0)(video)) == [0, 3, 6]


def test_only_the_chosen_frames_of_a_list_are_read(tmp_path: Path) -> None:
    level(1).save(tmp_path / "there.png")
    video = [tmp_path / "there.png", tmp_path / "missing.png", level(2), tmp_path / "missing.png"]
    assert levels(FrameSampler(2, 1.0)(video)) == [1, 2]


def test_a_directory_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    for number in (0, 1, 2, 9, 10, 11):
        level(number).save(tmp_path / f"frame_{number}.png")
    level(20).save(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    assert levels(FrameSampler(6, 1.0)(tmp_path)) == [0, 1, 2, 9, 10, 11]


@pytest.mark.parametrize("suffix", ["png", "webp", "gif"])
def test_animated_images_say_their_rate(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / f"clip.{suffix}"
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    level(0).save(path, save_all=True, append_images=[level(n) for n in range(1, 8)], duration=250, **options)
    with caplog.at_level(logging.WARNING):
        assert levels(FrameSampler(4, 2.0)(path)) == [0, 2, 4, 6]
        assert not caplog.records
        # The file's 2 s at 2 a second are 4 frames; at 8 frames a second it has 1 s.
        with pytest.raises(UserError, match=r"8 frame\(s\) at 4 a second \(2 s\).*compiled for 5 at 2 a second"):
            FrameSampler(5, 2.0)(path)
        with pytest.raises(UserError, match=r"8 frame\(s\) at 8 a second \(1 s\).*compile with --frames 2"):
            FrameSampler(4, 2.0)(path, fps=8)


def test_a_longer_video_is_sampled_less_often_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    sampler = FrameSampler(2, 1.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert levels(sampler([level(number) for number in range(20)], fps=2)) == [0, 10]
    assert [record.message for record in caplog.records] == [
        "a video of 10 s is sampled at 0.2 frames a second, the bundle was compiled for 1"
    ]


def test_a_shorter_video_is_refused_with_what_would_fit() -> None:
    with pytest.raises(UserError) as caught:
        FrameSampler(16, 2.0)([level(0)] * 90, fps=30)
    assert str(caught.value) == (
        "the video has 90 frame(s) at 30 a second (3 s), the bundle was compiled for 16 at 2 a second (8 s); "
        "give a longer video, or compile with --frames 6"
    )
    assert len(FrameSampler(6, 2.0)([level(0)] * 90, fps=30)) == 6
    with pytest.raises(UserError, match=r"the video has 5 frame\(s\), the bundle was compiled for 8"):
        FrameSampler(8, 2.0)([level(0)] * 5)
    # Long enough, but its frames are fewer than are wanted.
    with pytest.raises(UserError, match=r"5 frame\(s\) at 1 a second \(5 s\).*compile with --frames 5"):
        FrameSampler(8, 2.0)([level(0)] * 5, fps=1)
    # Two frames become one grid: what fits is a multiple of two.
    with pytest.raises(UserError, match=r"compile with --frames 4$"):
        FrameSampler(8, 2.0, step=2)([level(0)] * 5, fps=1)
    with pytest.raises(UserError, match=r"give a longer video$"):
        FrameSampler(8, 2.0, step=2)([level(0)], fps=1)


def test_when_frames_are_seen() -> None:
    film = [level(0)] * 40
    assert FrameSampler(4, 2.0).read(film, fps=10).seconds == [0, 1, 2, 3]
    assert FrameSampler(4, 2.0, ends=True).read(film, fps=10).seconds == [0, 1.3, 2.6, 3.9]
    # A video whose rate nobody says lasts as long as was compiled: 2 seconds.
    assert FrameSampler(4, 2.0).read(film).seconds == [0, 0.5, 1, 1.5]


def test_a_video_that_just_holds_the_last_frame() -> None:
    # The 4th frame lies at 1.5 s, which is frame 45 of 30 a second.
    assert len(FrameSampler(4, 2.0).choose(46, 30.0)) == 4
    with pytest.raises(UserError, match="compile with --frames 3"):
        FrameSampler(4, 2.0).choose(45, 30.0)
    for fps in (0.1, 0.3, 2.0, 23.976):
        assert FrameSampler(100, fps).choose(100, fps) == list(range(100))


def refusal(video: object, fps: float | None = None) -> str:
    with pytest.raises(UserError) as caught:
        FrameSampler(2, 1.0)(video, fps)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_video(tmp_path: Path) -> None:
    assert refusal(5).startswith("a int is not a video; give a list of images, a uint8 array")
    assert "an array of shape [4, 4, 3] and type uint8 is not a video" in refusal(np.zeros((4, 4, 3), np.uint8))
    assert "no such video file or directory" in refusal(tmp_path / "none.npy")
    (tmp_path / "text.npy").write_text("text")
    assert "text.npy: not an array that NumPy saved" in refusal(tmp_path / "text.npy")
    np.save(tmp_path / "flat.npy", np.zeros((4, 4, 3), np.uint8))
    assert "an array of shape [4, 4, 3] and type uint8 is not a video" in refusal(tmp_path / "flat.npy")
    assert "type float32 is not a video" in refusal(np.zeros((4, 4, 4, 3), np.float32))
    assert "frame 1 of the video: a NoneType is not a frame" in refusal([level(0), None])
    assert "the video has 0 frame(s), the bundle was compiled for 2" in refusal([])
    assert refusal([]).endswith("give a longer video")
    assert "no such video file or directory" in refusal(tmp_path / "nothing.mp4")
    assert "a directory without frames (available: .bmp" in refusal(tmp_path)
    for fps in (0, -1, float("nan"), float("inf")):
        assert "give the rate at which it was taken" in refusal([level(0)] * 2, fps)


def test_files_that_are_no_video(tmp_path: Path) -> None:
    level(0).save(tmp_path / "still.png")
    assert "still.png: the video has 1 frame(s), the bundle was compiled for 2" in refusal(tmp_path / "still.png")
    noise = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (40, 40, 3), dtype=np.uint8)) for n in range(4)]
    noise[0].save(tmp_path / "whole.png", save_all=True, append_images=noise[1:], duration=1000)
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-6000])
    assert "cut.png: the video is corrupt" in refusal(tmp_path / "cut.png")


def test_other_files_ask_for_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"\x00\x00\x00\x18ftypmp42")
    said = refusal(tmp_path / "clip.mp4")
    assert "clip.mp4: not a GIF, WebP or PNG; other video files are read by PyAV" in said
    assert said.endswith("pip install av")


def write_movie(path: Path, frames: int, **options: str) -> Path:
    """Levels at 10 a second, in MPEG-4."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_image(level(number).resize((64, 48)))))
        container.mux(stream.encode())
    return path


def test_a_movie_through_pyav(tmp_path: Path) -> None:
    movie = write_movie(tmp_path / "clip.mp4", 20)
    assert levels(FrameSampler(4, 2.0)(movie)) == [0, 5, 10, 15]
    assert levels(FrameSampler(4, 2.0, ends=True)(movie)) == [0, 6, 13, 19]
    assert [frame.size for frame in FrameSampler(1, 1.0)(movie)] == [(64, 48)]
    with pytest.raises(UserError, match=r"clip\.mp4: the video has 20 frame\(s\) at 10 a second \(2 s\)"):
        FrameSampler(5, 2.0)(movie)


def test_a_movie_that_does_not_say_how_many_frames_it_has(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    movie = write_movie(tmp_path / "clip.mkv", 12)
    with av.open(str(movie)) as container:
        assert container.streams.video[0].frames == 0
    assert levels(FrameSampler(3, 3.0)(movie)) == [0, 4, 8]


def test_movies_that_are_no_movies(tmp_path: Path) -> None:
    whole = write_movie(tmp_path / "whole.mp4", 20, movflags="faststart").read_bytes()
    for name, data in {"text.mp4": b"not a movie", "empty.mp4": b""}.items():
        (tmp_path / name).write_bytes(data)
        assert f"{name}: not a video that Pillow or PyAV can read" in refusal(tmp_path / name)
    (tmp_path / "cut.mp4").write_bytes(whole[:-1200])
    assert "cut.mp4: the file ends before frame 10 of the 20 it announces" in refusal(tmp_path / "cut.mp4")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16000)
        sound.writeframes(bytes(3200))
    (tmp_path / "head.mp4").write_bytes(whole[:100])
    for name in ("sound.wav", "head.mp4"):
        assert f"{name}: the file holds no video" in refusal(tmp_path / name)
