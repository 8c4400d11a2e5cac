"""The static shapes a bundle is compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.runtime.errors import UserError


@dataclass(frozen=True)
class Geometry:
    """Sizes the user chooses. Everything else follows from the model's configuration.

    ``text_tokens`` is the bucket for every token that is no image's placeholder (template, BOS and separators
    included; rows a family appends to an image are the image's); ``new_tokens`` is how many tokens decode may add;
    ``images`` is per row.
    """

    batch: int = 1
    images: int = 1
    text_tokens: int = 64
    new_tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("batch", "images", "text_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"{name} is {getattr(self, name)}",
                    where="geometry",
                    fix=f"give --{name.replace('_', '-')} a number of at least 1",
                )
