"""Checks of arrays that a caller made by hand, before a program reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.backends import Shared, Writable
from secateur.runtime.errors import UserError
from secateur.runtime.schema import Manifest

Ints = NDArray[np.int64]

_CPU = 1
"""As DLPack numbers devices."""


def check_array(name: str, values: Any, shape: Sequence[int], where: str) -> Writable:
    """``values`` as an array of numbers; raises UserError for another shape than the program's input has.

    Memory of another device (DLPack) comes back as it is: the buffer that takes it checks it.
    """
    if isinstance(values, Shared) and not isinstance(values, np.ndarray):
        if values.__dlpack_device__()[0] != _CPU:
            return values
        try:
            values = np.from_dlpack(values)
        except (BufferError, RuntimeError) as error:
            raise UserError(f"{name} cannot be read: {error}", where=where, fix="give an array of NumPy") from None
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise UserError(f"{name} is {array.dtype}, not numbers", where=where, fix=f"give an array {list(shape)}")
    if array.shape != tuple(shape):
        raise UserError(f"{name} has shape {list(array.shape)}", where=where, fix=f"give {list(shape)}")
    return array


def check_ids(manifest: Manifest, ids: Ints, where: str) -> None:
    """Raise UserError for token ids without a row in the embedding table: on a GPU any memory would be read.

    In prefill placeholders need none: another token is embedded in their place, and features replace its row.
    """
    last = manifest.model.vocab_size - 1
    known = (ids >= 0) & (ids <= last)  # so that NaN is refused too
    if not (known | (ids == manifest.model.image_token_id) if where == "prefill" else known).all():
        raise UserError(
            f"token ids go from {ids.min()} to {ids.max()}", where=where, fix=f"the vocabulary's are 0 to {last}"
        )


def check_placeholders(manifest: Manifest, ids: Ints, lengths: Ints) -> None:
    """Ids [B, N], lengths [B]: each row has one placeholder per feature, none last and none in its padding.

    The programs would gather features by the placeholders' rank without a word when there are too many.
    """
    want, token = manifest.geometry.features, manifest.model.image_token_id
    media = None if manifest.media is None else manifest.media.items
    marks = ids == token
    for row, length in enumerate(lengths):
        count, padding = int(marks[row, :length].sum()), int(marks[row, length:].sum())
        if count != want or padding:
            raise UserError(
                f"row {row} has {count} placeholders (token {token}) and {padding} in its padding",
                where="prefill",
                fix=f"a row needs {want}, one for each token of {manifest.shown} that is left, all before its end",
            )
        if media is not None and not _are_whole([item.tokens for item in media], runs := _runs(marks[row])):
            needs = ", ".join(f"{item.tokens} ({item.kind})" for item in media)
            raise UserError(
                f"row {row} has runs of {', '.join(map(str, runs))} placeholders", where="prefill",
                fix=f"give runs of {needs}: what one item becomes stays together",
            )  # fmt: skip
        if marks[row, length - 1]:
            raise UserError(f"row {row} ends with its media", where="prefill", fix="put text (a question) behind them")


def _runs(marks: NDArray[np.bool_]) -> list[int]:
    """Lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marks, [False]]).astype(np.int8)))
    return [int(end - start) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def _are_whole(items: Sequence[int], runs: Sequence[int]) -> bool:
    """Whether each run ends where an item does; ``items`` are as many tokens as ``runs``."""
    ends = set(np.cumsum(items).tolist())
    return ends.issuperset(np.cumsum(runs).tolist())


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
