"""Prompts and images of a batch to the arrays that the programs take."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.chat import Message
from secateur.runtime.errors import BundleError, MisfitError, UserError
from secateur.runtime.images import ImageLike, ImagePipeline
from secateur.runtime.prompts import Prompts, read_json
from secateur.runtime.schema import Manifest

Prompt: TypeAlias = "str | Sequence[Message]"
"""A plain prompt, or a conversation."""


@dataclass(frozen=True)
class Inputs:
    """A processed batch. ``input_ids`` int64 [B, N], right padded; ``lengths`` int64 [B];
    ``pixel_values`` float32 [B*n, 3, H, W], row by row."""

    input_ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    pixel_values: NDArray[np.float32]

    def prompt_ids(self, row: int) -> list[int]:
        return [int(token) for token in self.input_ids[row, : self.lengths[row]]]


class Processor:
    """Tokenizer, chat template and image processor of a bundle, held to its geometry."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._manifest, self._directory = manifest, directory
        self.prompts = Prompts(directory, manifest.model.image_token, manifest.model.image_token_id)
        config = read_json(directory / "preprocessor_config.json") or read_json(directory / "processor_config.json")
        self.images = ImagePipeline.from_config(config)
        self._check_size()

    def at(self, manifest: Manifest) -> Processor:
        """The same for another geometry of the bundle; the tokenizer and all else is shared."""
        other = copy.copy(self)
        other._manifest = manifest
        other._check_size()
        return other

    def _check_size(self) -> None:
        geometry = self._manifest.geometry
        compiled_for = (geometry.image_height, geometry.image_width)
        if self.images.output_size not in (None, compiled_for):
            raise BundleError(
                f"the image processor makes {self.images.output_size}, the bundle was compiled for {compiled_for}",
                where=f"{self._directory}: preprocessor_config.json",
                fix="compile the bundle again",
            )

    def __call__(self, prompts: Sequence[Prompt], images: Sequence[Sequence[ImageLike]] | None = None) -> Inputs:
        """One entry of ``prompts`` per row; ``images`` holds each row's, or None if the messages carry them."""
        geometry = self._manifest.geometry
        if len(prompts) != geometry.batch:
            raise MisfitError(
                f"{len(prompts)} prompt(s) for a bundle of batch {geometry.batch}",
                fix=f"give exactly {geometry.batch}" + (f", or compile with --batch {len(prompts)}" if prompts else ""),
            )
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, (str, list, tuple)):
                raise UserError(
                    f"a {type(prompt).__name__} is not a prompt",
                    where=f"row {row}",
                    fix="give text, or a list of messages",
                )
        per_row = [images_in_messages(prompt) for prompt in prompts] if images is None else [list(i) for i in images]
        if len(per_row) != geometry.batch:
            raise UserError(f"images for {len(per_row)} row(s), prompts for {geometry.batch}", fix="give both per row")
        for row, given in enumerate(per_row):
            self._expect_images(len(given), f"row {row}")
        ids = [self.encode(prompt, f"row {row}") for row, prompt in enumerate(prompts)]
        input_ids = np.full((geometry.batch, geometry.sequence), self._manifest.model.pad_token_id, dtype=np.int64)
        for row, tokens in enumerate(ids):
            input_ids[row, : len(tokens)] = tokens
        pixels = np.stack([self.pixel_values(image) for given in per_row for image in given])
        return Inputs(input_ids, np.array([len(tokens) for tokens in ids], dtype=np.int64), pixels)

    def encode(self, prompt: Prompt, where: str = "prompt") -> list[int]:
        """Token ids with each image's placeholder repeated for every token the image has in the decoder, between the
        tokens the model wants around it."""
        geometry, model = self._manifest.geometry, self._manifest.model
        text, add_special_tokens = self.prompts.render(prompt, geometry.images)
        ids = self.prompts.encode(text, add_special_tokens)
        if model.video_token_id in ids:
            raise UserError(
                "the prompt holds a video", where=where, fix="this version takes images; give frames as such"
            )
        self._expect_images(ids.count(self.prompts.placeholder_id), f"{where}, placeholders in the prompt")
        words = len(ids) + geometry.images * (len(model.image_before) + len(model.image_behind) - 1)
        if words > geometry.text_tokens:
            raise MisfitError(
                f"the prompt has {words} text tokens, the bundle was compiled for at most {geometry.text_tokens}",
                where=where,
                fix=f"shorten it, or compile with --text-tokens {words}",
            )
        if ids[-1] == self.prompts.placeholder_id and not model.image_behind:
            # Its token would be a patch: a stage may drop it, and its logits would be another token's.
            raise UserError("the prompt ends with its image", where=where, fix="put text (a question) behind the image")
        placeholders = [self.prompts.placeholder_id] * geometry.features_per_image
        image = [*model.image_before, *placeholders, *model.image_behind]
        return [token for given in ids for token in (image if given == self.prompts.placeholder_id else [given])]

    def pixel_values(self, image: ImageLike) -> NDArray[np.float32]:
        """float32 [3, H, W]."""
        geometry, pixels = self._manifest.geometry, self.images(image)
        if pixels.shape != (3, geometry.image_height, geometry.image_width):
            raise UserError(
                f"the image is {pixels.shape[1]}x{pixels.shape[2]} after processing, "
                f"the bundle was compiled for {geometry.image_height}x{geometry.image_width}",
                fix="check size and crop_size in preprocessor_config.json",
            )
        return pixels

    def _expect_images(self, count: int, where: str) -> None:
        geometry = self._manifest.geometry
        if count != geometry.images:
            raise MisfitError(
                f"{count} image(s), the bundle was compiled for {geometry.images} per row "
                f"({geometry.image_height}x{geometry.image_width})",
                where=where,
                fix=f"give {geometry.images}" + (f", or compile with --images {count}" if count else ""),
            )


def images_in_messages(prompt: Prompt) -> list[ImageLike]:
    """The images a conversation carries in its parts, under ``image``, ``path`` or ``url`` (a local file)."""
    found: list[ImageLike] = []
    for message in [] if isinstance(prompt, str) else prompt:
        content: Any = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, (list, tuple)) else []:
            if not isinstance(part, dict) or part.get("type") != "image":
                continue
            image = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
            if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
                raise UserError(f"{image[:40]} is not a local file", fix="download the image and give its path")
            if image is not None:
                found.append(image)
    return found
