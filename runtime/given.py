"""Checks of arrays that a caller made by hand, before a program reads them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.errors import UserError
from secateur.runtime.schema import Manifest

Ints = NDArray[np.int64]


def check_placeholders(manifest: Manifest, ids: Ints, lengths: Ints) -> None:
    """Ids [B, N], lengths [B]: each row has one placeholder per feature, none last and none in its padding.

    The programs would gather features by the placeholders' rank without a word when there are too many.
    """
    want, token = manifest.geometry.features, manifest.model.image_token_id
    marks = ids == token
    for row, length in enumerate(lengths):
        count, padding = int(marks[row, :length].sum()), int(marks[row, length:].sum())
        if count != want or padding:
            raise UserError(
                f"row {row} has {count} placeholders (token {token}) and {padding} in its padding",
                where="prefill",
                fix=f"a row needs {want}, one for each visual token of its images, all before its end",
            )
        if marks[row, length - 1]:
            raise UserError(
                f"row {row} ends with its image", where="prefill", fix="put text (a question) behind the image"
            )


def check_kept(manifest: Manifest, kept: Ints) -> Ints:
    """A copy of ``kept`` as int64 [B, V], each an original patch of its row."""
    geometry, given = manifest.geometry, np.array(kept)
    shape, patches = (geometry.batch, geometry.patches), geometry.places
    if given.shape != shape or given.dtype.kind not in "iu":
        raise UserError(f"kept is {given.dtype}{list(given.shape)}", where="prefill", fix=f"give int64{list(shape)}")
    if given.min() < 0 or given.max() >= patches:
        raise UserError(
            f"kept goes from {given.min()} to {given.max()}",
            where="prefill",
            fix=f"a row's patches are 0 to {patches - 1}",
        )
    return given.astype(np.int64)
