"""How large pictures and frames may be, and that frames go the road of pictures."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from secateur.runtime import Session, UserError
from secateur.runtime.pictures import PictureReader, open_picture
from secateur.runtime.video import FrameSampler
from secateur.tools import cli

NARROW = PictureReader(max_pixels=100)


def says_the_bound(error: UserError) -> bool:
    return "pixels, the bound is 0.0001 million; make it smaller, or raise max_image_pixels" in str(error)


def test_a_session_has_a_bound(bundle: Path) -> None:
    picture = Image.new("RGB", (20, 10))
    with Session(bundle, threads=1, max_image_pixels=100) as session, pytest.raises(UserError) as caught:
        session.generate("what", picture)
    assert says_the_bound(caught.value)
    with Session(bundle, threads=1, max_image_pixels=200) as session:
        session.generate("what", picture)
    for wrong in (0, -1, 1.5, "many", True):
        with pytest.raises(UserError, match="give a number of pixels, 1 or more"):
            Session(bundle, threads=1, max_image_pixels=wrong)  # type: ignore[arg-type]


def test_the_command_line_has_a_bound(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that Pillow's own bound is put back.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    Image.new("RGB", (20, 10)).save(tmp_path / "large.png")
    ask = ["run", str(bundle), "--image", str(tmp_path / "large.png"), "--prompt", "x", "--threads", "1"]
    with pytest.raises(SystemExit) as caught:
        cli.main([*ask, "--max-image-pixels", "100"])
    assert caught.value.code == 2
    assert "(--max-image-pixels)" in capsys.readouterr().err
    Image.MAX_IMAGE_PIXELS = 90
    with pytest.raises(SystemExit) as caught:
        cli.main([*ask, "--max-image-pixels", "200"])
    assert caught.value.code == 0


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "directory", "array", ".npy", "bytes", "data URL", "pictures"])
def test_frames_over_the_bound(kind: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 10), (60 * number, 0, 0)) for number in range(4)]
    video: Any = frames
    if kind == "directory":
        for number, frame in enumerate(frames):
            frame.save(tmp_path / f"{number}.png")
        video = tmp_path
    elif kind in ("array", ".npy"):
        video = np.stack([np.asarray(frame) for frame in frames])
        if kind == ".npy":
            np.save(tmp_path / "video.npy", video)
            video = tmp_path / "video.npy"
    elif kind != "pictures":
        file = BytesIO()
        frames[0].save(file, kind if kind.isupper() else "GIF", save_all=True, append_images=frames[1:], duration=100)
        video = file.getvalue()
        if kind == "data URL":
            video = "data:image/gif;base64," + base64.b64encode(video).decode()
        elif kind != "bytes":
            (tmp_path / "video").write_bytes(video)
            video = tmp_path / "video"
    assert len(FrameSampler(2, 10.0, reader=PictureReader(max_pixels=200))(video)) == 2
    with pytest.raises(UserError) as caught:
        FrameSampler(2, 10.0, reader=NARROW)(video)
    assert says_the_bound(caught.value)


def test_a_movie_over_the_bound(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "movie.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 48)))))
        container.mux(stream.encode())
    for video in (tmp_path / "movie.mp4", (tmp_path / "movie.mp4").read_bytes()):
        assert len(FrameSampler(2, 10.0)(video)) == 2
        with pytest.raises(UserError, match="a frame of the video has 64x48"):
            FrameSampler(2, 10.0, reader=NARROW)(video)


def test_one_frame_at_a_time_is_as_large_as_it_is(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 10), (60 * number, 0, 0)) for number in range(4)]
    seen: list[tuple[int, int]] = []

    def shrink(frame: Image.Image) -> Image.Image:
        seen.append(frame.size)
        return frame.resize((2, 1))

    clip = FrameSampler(2, 10.0).read(frames, prepare=shrink)
    assert seen == [(20, 10)] * 2
    assert clip.size == (10, 20)
    assert [frame.size for frame in clip.frames] == [(2, 1)] * 2


def test_frames_of_files_are_read_as_files(tmp_path: Path) -> None:
    """A transparent colour is white and a turned frame upright, as in a picture of its own."""
    still = Image.new("P", (6, 4))
    still.putpalette([0, 0, 0, 200, 10, 10])
    still.putpixel((1, 1), 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(2):
        still.save(tmp_path / f"{number}.png", transparency=0, exif=exif)
    for frame in FrameSampler(2, 10.0)(tmp_path):
        assert np.array_equal(np.asarray(frame), np.asarray(open_picture(tmp_path / "0.png")))
        assert frame.size == (4, 6)
        assert frame.getpixel((0, 0)) == (255, 255, 255)
    other = still.copy()
    other.putpixel((2, 2), 1)
    other.putpixel((1, 1), 0)
    still.save(
        tmp_path / "moving.gif", save_all=True, append_images=[other], transparency=0, disposal=2, duration=100, loop=0
    )
    first, second = FrameSampler(2, 10.0)(tmp_path / "moving.gif")
    assert np.array_equal(np.asarray(first), np.asarray(open_picture(tmp_path / "moving.gif")))
    assert first.getpixel((0, 0)) == (255, 255, 255)
    assert second.getpixel((2, 2)) == (200, 10, 10)


def test_arrays_of_frames_with_channels_first() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 7), dtype=np.uint8)
    shown = FrameSampler(4, 10.0)(frames)
    assert all(
        np.array_equal(np.asarray(frame), array.transpose(1, 2, 0)) for frame, array in zip(shown, frames, strict=True)
    )
    # Four rows are not four channels: transformers takes 1 or 3 in a video.
    last = np.random.default_rng(0).integers(0, 256, (2, 4, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(FrameSampler(2, 10.0)(last)[0]), last[0])
