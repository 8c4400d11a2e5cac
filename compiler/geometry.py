"""The static shapes a bundle is compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from secateur.runtime.errors import UserError
from secateur.runtime.manifest import Manifest, describe_media

Size = tuple[int, int]
"""Height and width in pixels."""
Sizes = Size | tuple[Size, ...]
"""One for all images, or one for each."""
MOST = {
    "batch": 4096, "images": 4096, "text_tokens": 1 << 20, "new_tokens": 1 << 20, "frames": 1 << 14,
    "audio_seconds": 24 * 3600,
}  # fmt: skip
"""More of anything than a model of today takes; beyond it, working out the shapes alone fills a machine's memory."""


@dataclass(frozen=True)
class Geometry:
    """Sizes the user chooses. Everything else follows from the model's configuration.

    ``text_tokens`` is the bucket for every token that is no media's placeholder (template, BOS and separators
    included; rows a family appends to an image are the image's); ``new_tokens`` is how many tokens decode may add.
    A row has ``images`` (1 if not said, or as many as sizes), or no image and one video of ``frames`` sampled frames at
    ``fps`` a second; ``image_size`` is the height
    and width in pixels of either where the family leaves the choice, or one such pair for every image, in the order of
    the prompt. ``audio_seconds`` of sound follow, or with ``audio_in_video`` lie between the video's frames as they are
    heard.
    """

    batch: int = 1
    images: int = None  # type: ignore[assignment]  # not said: settled below
    text_tokens: int = 64
    new_tokens: int = 64
    image_size: Sizes | None = None
    frames: int = 0
    fps: float = 2.0
    audio_seconds: int = 0
    audio_in_video: bool = True

    def __post_init__(self) -> None:
        for name in ("batch", "text_tokens", "new_tokens"):
            _check_count(name, getattr(self, name), 1)
        for name in ("frames", "audio_seconds"):
            _check_count(name, getattr(self, name), 0)
        if self.images is not None:
            _check_count("images", self.images, 0 if self.frames else 1)
        if not 0 < self.fps < float("inf"):
            raise UserError(f"fps is {self.fps:g}", where="geometry", fix="give --fps a number above 0")
        if self.image_size is not None:
            self._settle_sizes(_list_sizes(self.image_size))
        if self.images is None:
            object.__setattr__(self, "images", 0 if self.frames else 1)
        if self.frames and self.images:
            raise UserError(
                f"{self.images} images beside a video of {self.frames} frames", where="geometry",
                fix="a row has images or one video: leave out --images or --frames",
            )  # fmt: skip
        for name in ("fps", "audio_in_video"):
            if getattr(self, name) != getattr(type(self), name) and (lack := self.lack(name)):
                raise UserError(f"{name} is {getattr(self, name)}, but {lack[0]}", where="geometry", fix=lack[1])

    def _settle_sizes(self, sizes: tuple[Size, ...]) -> None:
        """One size for all images is one pair; of several there are as many as images, which need not be counted."""
        if len(sizes) > 1:
            if self.frames:
                raise UserError(
                    f"{len(sizes)} sizes for a video", where="geometry", fix="all frames have one: give one size"
                )
            if self.images is None:
                object.__setattr__(self, "images", len(sizes))
            if self.images != len(sizes):
                raise UserError(
                    f"{len(sizes)} sizes for {self.images} images", where="geometry",
                    fix="give one size for all of them, or one for each",
                )  # fmt: skip
        object.__setattr__(self, "image_size", sizes if len(set(sizes)) > 1 else sizes[0])

    def lack(self, name: str) -> tuple[str, str] | None:
        """Why a field says nothing here, and what to do; None where it does."""
        if name == "fps" and not self.frames:
            return "there is no video", "give --frames as well, or leave --fps out"
        if name == "audio_in_video" and not (self.frames and self.audio_seconds):
            return "there is no video with sound", "give --frames and --audio-seconds as well, or leave it out"
        return None

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Of every image its size, where they are of several; empty where all have one."""
        size = self.image_size
        return size if size is not None and isinstance(size[0], tuple) else ()

    @property
    def one_size(self) -> Size | None:
        """The size of all images or frames; None where nobody chose one, or they are of several."""
        return None if self.sizes else cast("Size | None", self.image_size)

    @classmethod
    def of(cls, manifest: Manifest) -> Geometry:
        """What a bundle was compiled for."""
        sizes, media = manifest.geometry, manifest.media
        return cls(
            batch=sizes.batch,
            images=0 if sizes.frames else sizes.images,
            text_tokens=sizes.text_tokens,
            new_tokens=sizes.new_tokens,
            image_size=None if media is None and not sizes.tiles else tuple(sizes.sizes_seen),
            frames=sizes.frames,
            fps=sizes.fps or cls.fps,
            audio_seconds=sizes.audio_seconds,
            audio_in_video=not sizes.frames or media is None or all(item.kind != "audio" for item in media.items),
        )

    @property
    def interleaves(self) -> bool:
        """Whether sound lies between the frames of a video."""
        return bool(self.frames and self.audio_seconds and self.audio_in_video)

    @property
    def media(self) -> str:
        """What a row holds, in words."""
        sizes = self.sizes or (() if self.one_size is None else (self.one_size,))
        return describe_media(self.images, sizes, self.frames, self.fps, self.audio_seconds, self.interleaves)


def _list_sizes(given: object) -> tuple[Size, ...]:
    """A pair as the only entry, or pairs as they are."""
    each = tuple(given) if isinstance(given, (tuple, list)) else ()
    pairs = each if each and all(isinstance(one, (tuple, list)) for one in each) else (each,)
    for pair in pairs:
        if len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
            shown = "x".join(map(str, pair)) or repr(given)
            raise UserError(f"image_size is {shown}", where="geometry", fix="give --image-size HEIGHTxWIDTH in pixels")
    return tuple((pair[0], pair[1]) for pair in pairs)


def _check_count(name: str, value: int, least: int) -> None:
    if not hasattr(value, "__index__"):
        raise UserError(f"{name} is {value!r}", where="geometry", fix="give a whole number")
    if not least <= value <= MOST[name]:
        bound = f"at least {least}" if value < least else f"at most {MOST[name]}"
        raise UserError(
            f"{name} is {value}", where="geometry", fix=f"give --{name.replace('_', '-')} a number of {bound}"
        )
