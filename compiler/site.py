"""The places where tokens can be reduced."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from secateur.runtime.errors import UserError

SITE_KINDS = ("vision.layer", "vision.out", "projector.out", "audio.out", "decoder.layer")
"""Kinds of site of the present families; the two that end in ``layer`` take an index."""


@dataclass(frozen=True)
class Site:
    """A place where tokens can be reduced. ``layer`` counts from 0 and means *before* that layer.

    ``depth`` is the depth of the published model when ``layer`` is the published one, so that it scales
    to ``round(layer * L / depth)`` of a model with L layers; None means the layer is taken as it is.
    """

    kind: str
    layer: int | None = None
    depth: int | None = None

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}[{self.layer}]"

    @property
    def behind_a_layer(self) -> bool:
        """Whether a layer of the decoder has seen the tokens before they come here."""
        return self.kind == "decoder.layer" and bool(self.layer)

    @property
    def written(self) -> str:
        """As a recipe file has it, with the published depth; :meth:`parse` reads it back."""
        return f"{self.kind}[{self.layer}/{self.depth}]" if self.depth else str(self)

    @classmethod
    def parse(cls, text: str, where: str = "site") -> Site:
        """Read ``decoder.layer[2]``, ``decoder.layer[2/32]`` (published layer/depth) or ``vision.out``.

        ``where`` opens the message of the :class:`UserError` raised for anything else.
        """
        match = re.fullmatch(r"\s*([a-z.]+?)\s*(?:\[\s*(\d+)\s*(?:/\s*(\d+)\s*)?\])?\s*", text)
        kind = match[1] if match else text
        if not match or kind not in SITE_KINDS:
            raise UserError(f"no site {text!r}", where=where, available=_SITE_FORMS)
        if kind.endswith(".layer") != (match[2] is not None):
            raise UserError(f"site {text!r} is malformed", where=where, available=_SITE_FORMS)
        if match[3] and int(match[2]) >= int(match[3]):
            raise UserError(
                f"site {text!r} is beyond the last layer of its published depth",
                where=where,
                fix=f"the layer must be below {match[3]}" if int(match[3]) else "the depth must be at least 1",
            )
        return cls(kind, int(match[2]) if match[2] else None, int(match[3]) if match[3] else None)

    def at_depth(self, layers: int) -> Site:
        """The site in a model of ``layers`` layers. A published layer of 1 or more never becomes 0."""
        if self.layer is None:
            return self
        if self.depth is not None:
            scaled = math.floor(self.layer * layers / self.depth + 0.5)
            return Site(self.kind, min(max(scaled, min(self.layer, 1)), layers - 1))
        if self.layer >= layers:
            raise UserError(
                f"site {self} is beyond the last layer",
                where="recipe",
                available=[f"{self.kind}[0] to {self.kind}[{layers - 1}]"],
            )
        return self


_SITE_FORMS = ("vision.layer[i]", "vision.out", "projector.out", "audio.out", "decoder.layer[k]")
