"""The static shapes a bundle is compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.runtime.errors import UserError
from secateur.runtime.manifest import Manifest, describe_media


@dataclass(frozen=True)
class Geometry:
    """Sizes the user chooses. Everything else follows from the model's configuration.

    ``text_tokens`` is the bucket for every token that is no media's placeholder (template, BOS and separators
    included; rows a family appends to an image are the image's); ``new_tokens`` is how many tokens decode may add.
    A row has ``images``, or one video of ``frames`` sampled frames at ``fps`` a second; ``image_size`` is the height
    and width in pixels of either where the family leaves the choice. ``audio_seconds`` of sound follow, or with
    ``audio_in_video`` lie between the video's frames as they are heard.
    """

    batch: int = 1
    images: int = 1
    text_tokens: int = 64
    new_tokens: int = 64
    image_size: tuple[int, int] | None = None
    frames: int = 0
    fps: float = 2.0
    audio_seconds: int = 0
    audio_in_video: bool = True

    def __post_init__(self) -> None:
        for name in ("batch", "images", "text_tokens", "new_tokens"):
            _at_least(name, getattr(self, name), 1)
        for name in ("frames", "audio_seconds"):
            _at_least(name, getattr(self, name), 0)
        if not 0 < self.fps < float("inf"):
            raise UserError(f"fps is {self.fps:g}", where="geometry", fix="give --fps a number above 0")
        if self.image_size is not None and min(self.image_size) < 1:
            raise UserError(
                f"image_size is {self.image_size[0]}x{self.image_size[1]}", where="geometry",
                fix="give --image-size HEIGHTxWIDTH in pixels",
            )  # fmt: skip
        if self.frames and self.images > 1:
            raise UserError(
                f"{self.images} images beside a video of {self.frames} frames", where="geometry",
                fix="a row has images or one video: leave out --images or --frames",
            )  # fmt: skip

    @classmethod
    def of(cls, manifest: Manifest) -> Geometry:
        """What a bundle was compiled for."""
        sizes, media = manifest.geometry, manifest.media
        return cls(
            batch=sizes.batch,
            images=1 if sizes.frames else sizes.images,
            text_tokens=sizes.text_tokens,
            new_tokens=sizes.new_tokens,
            image_size=None if media is None and not sizes.tiles else (sizes.image_height, sizes.image_width),
            frames=sizes.frames,
            fps=sizes.fps or cls.fps,
            audio_seconds=sizes.audio_seconds,
            audio_in_video=media is None or all(item.kind != "audio" for item in media.items),
        )

    @property
    def interleaves(self) -> bool:
        """Whether sound lies between the frames of a video."""
        return bool(self.frames and self.audio_seconds and self.audio_in_video)

    @property
    def media(self) -> str:
        """What a row holds, in words."""
        return describe_media(self.images, self.image_size, self.frames, self.fps, self.audio_seconds, self.interleaves)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(
            f"{name} is {value}",
            where="geometry",
            fix=f"give --{name.replace('_', '-')} a number of at least {least}",
        )
