"""Prompts and media of a batch to the arrays that the programs take."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.errors import MisfitError, UserError
from secateur.runtime.pictures import MAX_PIXELS, ImageLike
from secateur.runtime.prompts import Prompts
from secateur.runtime.row_media import PARTS, Prompt, RowMedia, count_kinds, gather
from secateur.runtime.schema import Manifest
from secateur.runtime.tower_inputs import TowerInput, open_tower_inputs
from secateur.runtime.video import VideoLike
from secateur.runtime.waveform import AudioLike

__all__ = ["Inputs", "Processor", "Prompt", "RowMedia"]


@dataclass(frozen=True)
class Inputs:
    """A processed batch. ``input_ids`` int64 [B, N], right padded; ``lengths`` int64 [B]; ``pixel_values`` float32
    [B*n, 3, H, W], or [B*patches, values] where the tower takes patches, row by row; ``input_features`` float32
    [B, mel bins, frames] where it hears."""

    input_ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    pixel_values: NDArray[np.float32]
    input_features: NDArray[np.float32] | None = None

    def prompt_ids(self, row: int) -> list[int]:
        return [int(token) for token in self.input_ids[row, : self.lengths[row]]]


class Processor:
    """Tokenizer, chat template and processors of images, videos and sound of a bundle, held to its geometry."""

    def __init__(self, directory: Path, manifest: Manifest, max_pixels: int = MAX_PIXELS) -> None:
        self._manifest, self._directory, self._max_pixels, model = manifest, directory, max_pixels, manifest.model
        others = {"video": model.video_token_id, "audio": model.audio_token_id}
        stands_for = model.image_token_id if model.prompt_token_id is None else model.prompt_token_id
        inner = {model.image_token_id} - {stands_for}
        self.prompts = Prompts(directory, model.image_token, stands_for, others, inner)
        self.tower_inputs = open_tower_inputs(directory, manifest, max_pixels)

    def at(self, manifest: Manifest) -> Processor:
        """The same for another geometry of the bundle; the tokenizer is shared."""
        other = copy.copy(self)
        other._manifest = manifest
        other.tower_inputs = open_tower_inputs(self._directory, manifest, self._max_pixels)
        return other

    def __call__(
        self,
        prompts: Sequence[Prompt],
        images: Sequence[Sequence[ImageLike]] | None = None,
        videos: Sequence[Sequence[VideoLike]] | None = None,
        audio: Sequence[Sequence[AudioLike]] | None = None,
        *,
        video_fps: float | None = None,
        audio_rate: int | None = None,
    ) -> Inputs:
        """One entry of ``prompts`` per row; ``images``, ``videos`` and ``audio`` hold each row's, or are None if the
        messages carry them. ``video_fps`` and ``audio_rate`` as in :class:`RowMedia`."""
        geometry = self._manifest.geometry
        if len(prompts) != geometry.batch:
            raise MisfitError(
                f"{len(prompts)} prompt(s) for a bundle of batch {geometry.batch}",
                fix=f"give exactly {geometry.batch}" + (f", or compile with --batch {len(prompts)}" if prompts else ""),
            )
        read_prompts, given = gather(prompts, (images, videos, audio))
        media = [RowMedia(list(i), list(v), list(a), video_fps, audio_rate) for i, v, a in zip(*given, strict=True)]
        for row, each in enumerate(media):
            self.expect(each.kinds, f"row {row}")
        # Where the prompt says when frames are seen, the video has to be looked at first.
        timed = self._manifest.media is not None and bool(self._manifest.media.timestamp)
        read = [self.tower_inputs(each) for each in media] if timed else []
        times = [one.times for one in read] or [()] * len(prompts)
        ids = [self.encode(prompt, f"row {row}", times[row]) for row, prompt in enumerate(read_prompts)]
        input_ids = np.full((geometry.batch, geometry.sequence), self._manifest.model.pad_token_id, dtype=np.int64)
        for row, tokens in enumerate(ids):
            input_ids[row, : len(tokens)] = tokens
        read = read or [self.tower_inputs(each) for each in media]
        heard = [one.input_features for one in read if one.input_features is not None]
        return Inputs(
            input_ids,
            np.array([len(tokens) for tokens in ids], dtype=np.int64),
            np.concatenate([one.pixel_values for one in read]),
            np.concatenate(heard) if heard else None,
        )

    def encode(self, prompt: Prompt, where: str = "prompt", times: Sequence[float] = ()) -> list[int]:
        """Token ids with each placeholder repeated for every token that its image, video or sound has in the decoder,
        all of them the image's, between the tokens the model wants around it.

        ``times`` are the seconds of a video's grids, for models whose prompts say them; those of a video as long as the
        bundle was compiled for are taken where there are none.
        """
        manifest, items = self._manifest, self._manifest.items
        text, add_special_tokens = self.prompts.render(prompt, items, where)
        space = manifest.model.image_space
        if any(space):
            text = text.replace(self.prompts.placeholder, self.prompts.placeholder.join(space))
        ids = self.prompts.encode(text, add_special_tokens)
        kinds = self.prompts.kinds
        self._expect_placeholders([kinds[token] for token in ids if token in kinds], where)
        expanded = self._expand(times)
        own = manifest.model.image_token_id
        words = len(ids) - len(items) + _count_words(expanded, own)
        if words > manifest.geometry.text_tokens:
            raise MisfitError(
                f"the prompt has {words} text tokens, the bundle was compiled for at most "
                f"{manifest.geometry.text_tokens}",
                where=where,
                fix=f"shorten it, or compile with --text-tokens {words}",
            )
        if ids[-1] in kinds and expanded[-1][-1] == own:
            # Its token would be a patch: a stage may drop it, and its logits would be another token's.
            kind = kinds[ids[-1]]
            raise UserError(
                f"the prompt ends with its {kind}", where=where, fix=f"put text (a question) behind the {kind}"
            )
        self._expect_marks(ids, where)
        rest, found = iter(expanded), []
        for token in ids:
            found += next(rest) if token in kinds else [token]
        return found

    @property
    def items(self) -> list[str]:
        """Kinds of a row's media in the order of its prompt."""
        return self._manifest.items

    @property
    def media_words(self) -> int:
        """Text tokens that placeholders become beside media: marks put around them, and the times of a video as long
        as the bundle was compiled for."""
        return _count_words(self._expand(()), self._manifest.model.image_token_id)

    def tower_input(self, media: RowMedia, where: str = "row") -> TowerInput:
        """What the tower reads of one row. Raises UserError for media the bundle does not take."""
        self.expect(media.kinds, where)
        return self.tower_inputs(media)

    def expect(self, given: Sequence[str], where: str) -> None:
        """Raises UserError unless a row's media, ``given`` by kind, are those that the bundle was compiled for."""
        manifest = self._manifest
        wanted = [part for item in manifest.items for part in PARTS[item]]
        if sorted(given) == sorted(wanted):
            return
        if {*given, *wanted} <= {"image"}:
            sizes = manifest.geometry
            shown = ", ".join(f"{height}x{width}" for height, width in sizes.sizes_seen)
            raise MisfitError(
                f"{len(given)} image(s), the bundle was compiled for {sizes.images} per row ({shown})",
                where=where,
                fix=f"give {sizes.images}" + (f", or compile with --images {len(given)}" if given else ""),
            )
        seen = [[kind for kind in kinds if kind != "audio"] for kinds in (given, wanted)]
        if sorted(seen[0]) == sorted(seen[1]):
            raise self._blame_sound(given.count("audio"), wanted.count("audio"), where)
        flags = [f"--images {given.count('image')}"] if "image" in given else ["--frames N"]
        if {"image", "video"} <= {*given} or given.count("video") > 1:
            flags = []  # no bundle takes these
        raise MisfitError(
            f"{count_kinds(given)}, the bundle was compiled for {manifest.shown} per row",
            where=where,
            fix=f"give {count_kinds(wanted)}" + (f", or compile with {flags[0]}" if flags else ""),
        )

    def _blame_sound(self, given: int, wanted: int, where: str) -> MisfitError:
        manifest = self._manifest
        told = f"the bundle was compiled for {manifest.shown}"
        if given < wanted:
            lacks = "the sound of the video is missing" if "video with sound" in manifest.items else "sound is missing"
            return MisfitError(f"{lacks}, {told}", where=where, fix="give audio, or compile without --audio-seconds")
        if wanted:
            return MisfitError(f"{given} audio clips, {told}", where=where, fix="give one clip a row")
        if manifest.model.audio_token_id is None:
            what = f"a {manifest.model.model_type} model does not hear"
            return MisfitError(what, where=where, fix="leave the audio out")
        return MisfitError(
            f"audio is given, {told}", where=where, fix="leave it out, or compile with --audio-seconds SECONDS"
        )

    def _expect_placeholders(self, found: list[str], where: str) -> None:
        """Those in the prompt, one for each item in the order of the media."""
        items = self._manifest.items
        wanted = [PARTS[item][0] for item in items]
        if found == wanted:
            return
        where = f"{where}, placeholders in the prompt"
        fix = f"name {count_kinds(wanted)}" + (", in this order" if len({*wanted}) > 1 else "")
        if "video with sound" in items and "audio" in found:
            fix += "; the sound lies between the frames of the video, not beside it"
        else:
            fix += ", or leave placeholders out of the words"
        raise MisfitError(
            f"{count_kinds(found)}, the bundle was compiled for {self._manifest.shown}", where=where, fix=fix
        )

    def _expect_marks(self, ids: Sequence[int], where: str) -> None:
        """Each placeholder stands between the tokens that the model numbers positions by."""
        media = self._manifest.media
        if media is None:
            return
        at = [slot for slot, token in enumerate(ids) if token in self.prompts.kinds]
        for slot, kind in zip(at, self._manifest.items, strict=True):
            before, behind = media.around.get(kind, ([], []))
            start = slot - len(before)
            if start < 0 or [*ids[start:slot]] != before or [*ids[slot + 1 : slot + 1 + len(behind)]] != behind:
                written = [self.prompts.spell(tokens) for tokens in (before, [ids[slot]], behind)]
                raise UserError(
                    f"the marks around its {PARTS[kind][0]} are missing", where=where,
                    fix=f"write {''.join(written)}, or leave the placeholder to the chat template",
                )  # fmt: skip

    def _expand(self, times: Sequence[float]) -> list[list[int]]:
        """What every placeholder becomes: its own number of the image's, and the tokens put around them."""
        media, sizes = self._manifest.media, self._manifest.geometry
        texts: Iterator[list[int]] = iter(())
        if media is not None and media.timestamp:
            length = sizes.frames / sizes.fps / len(media.items)
            nominal = [length * grid + (length - 1 / sizes.fps) / 2 for grid in range(len(media.items))]
            said = (media.timestamp.format(seconds) for seconds in times or nominal)
            texts = (self.prompts.encode(text, add_special_tokens=False) for text in said)
        return [
            [token for part in parts for token in (next(texts) if part is None else part)] for parts in self.expansion()
        ]

    def expansion(self) -> list[list[list[int] | None]]:
        """What every placeholder becomes, in parts. None stands for the text of the time of a video's next grid."""
        media, model, sizes = self._manifest.media, self._manifest.model, self._manifest.geometry
        own = model.image_token_id
        if media is None:
            return [[sizes.place(own, model.image_before, model.image_behind)]] * sizes.images
        found: list[list[int]] = []
        for item in media.items:
            brings = item.kind == "video with sound"
            before, behind = (media.sound_before, media.sound_behind) if brings else ([], [])
            found.append([*before, *[own] * item.tokens, *behind])
        if not media.timestamp:
            return [[tokens] for tokens in found]
        before, behind = media.around.get("video", ([], []))
        return [[part for tokens in found for part in (None, [*before, *tokens, *behind])]]


def _count_words(expanded: Sequence[Sequence[int]], placeholder: int) -> int:
    return sum(token != placeholder for tokens in expanded for token in tokens)
