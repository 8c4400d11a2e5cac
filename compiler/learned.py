"""Files of learned weights, and how a recipe refers to one as an option of a function.

    options: {weights: "file:sieve.safetensors@3f9a0c1d7b20"}

Behind ``file:`` stands a path that ends in .safetensors, counted from the recipe file's own directory. What follows
``@``, at least eight digits of the file's SHA-256, may be left out; where it is given, another file is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from secateur.runtime.errors import UserError
from secateur.runtime.manifest import hash_file, read_header
from secateur.runtime.sizes import size_text

_REFERENCE = re.compile(r"file:([^#@]+)(?:@([0-9a-f]{8,64}))?")
_DIGITS = 12
MOST_BYTES = 256 << 20
"""A file's weights become constants of the graphs that use them, and these are read whole."""


@dataclass(frozen=True)
class WeightsFile:
    """A safetensors file as an option's value: its path as it was written, its digest, and where it lies. It prints as
    the reference to it, without the folder: manifests hold no paths of the machine they were made on."""

    path: str
    sha256: str
    location: Path = field(compare=False)

    @property
    def reference(self) -> str:
        """As a recipe file says it."""
        return f"file:{self.path}@{self.sha256[:_DIGITS]}"

    @property
    def name(self) -> str:
        return Path(self.path).name

    def __repr__(self) -> str:
        return f"file:{self.name}@{self.sha256[:_DIGITS]}"


def read_weights(text: str, folder: Path = Path(), where: str = "weights") -> WeightsFile:
    """The file that ``file:PATH`` or ``file:PATH@DIGEST`` names; ``folder`` is where the path counts from.

    Raises UserError where it cannot be read, is no safetensors file, is too large or has another digest.
    """
    parts = _REFERENCE.fullmatch(text)
    if parts is None:
        raise UserError(
            f"{text!r} names no weights file", where=where, fix="write file:PATH, or file:PATH@ and at least 8 digits"
        )
    path, digest = parts.groups()
    location = folder / path
    try:
        size = location.stat().st_size
        read_header(location)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", where=where) from None
    except ValueError:
        raise UserError(
            f"{path} is no safetensors file", where=where, fix="save the weights with safetensors.torch.save_file"
        ) from None
    if size > MOST_BYTES:
        raise UserError(
            f"{path} has {size_text(size)}, weights of a score {size_text(MOST_BYTES)} at most", where=where,
            fix="save only the tensors that the function reads",
        )  # fmt: skip
    sha256 = hash_file(location)
    if digest and not sha256.startswith(digest):
        raise UserError(
            f"{path} has another digest", where=where,
            fix=f"end the reference with @{sha256[:_DIGITS]} if this is the file you mean",
        )  # fmt: skip
    return WeightsFile(path, sha256, location.absolute())
