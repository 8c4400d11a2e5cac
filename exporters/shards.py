"""A checkpoint's own files as a bundle's weights: graphs point into them, they are linked or copied into the bundle.

Backends take weights from inside the bundle only, and none by a symbolic link that leaves it; a hard link is a file
like any other. Links of download caches are followed to the file itself first.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from secateur.exporters.checkpoint import FLOATS, Checkpoint, Stored
from secateur.exporters.digests import Digests
from secateur.exporters.tensor_names import tied_names
from secateur.exporters.weights import MODES, Placed, WeightLayout, plan_weights, require_space
from secateur.runtime.errors import UserError

FOLDER = "weights"
_PIECE = 1 << 22
_LEAST_USED = 0.5
_UNLINKABLE = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

_log = logging.getLogger(__name__)


def refer_weights(
    used: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    mode: str = "reference",
    turnable: Collection[str] = (),
) -> WeightLayout:
    """Find the parameters the programs use in the checkpoint's files; nothing is read but headers.

    Tensors that must be put together from parts, such as experts that the files keep apart, are laid out in a file of
    their own, and with them what else a shard holds that has little but such parts. ``turnable`` names those the
    graphs may also read with their last two dimensions exchanged.
    Raises UserError that lists why when tensors would have to be cast to ``dtype`` or do not start at a multiple of
    their element's size.
    """
    aliases = tied_names(checkpoint.model)
    wanted = {aliases.get(name, name): tensor for name, tensor in used.items()}
    checkpoint.require({name: tuple(tensor.shape) for name, tensor in wanted.items()})
    tensors: dict[str, Placed] = {}
    shards: dict[str, Path] = {}
    cast: list[str] = []
    uneven: list[str] = []
    parts: dict[str, Tensor] = {}
    for name, tensor in wanted.items():
        stored = checkpoint.stored(name)
        turned = stored is None and name in turnable
        if turned:
            stored = checkpoint.turned(name)
        if stored is None:
            parts[name] = tensor
            continue
        kind, entry = dtype if tensor.is_floating_point() else tensor.dtype, stored.entry
        if checkpoint.kind(stored) != kind:
            cast.append(f"{stored.key} from {_spell(entry.dtype)} to {_spell(_NAMES.get(kind, str(kind)))}")
        elif entry.offset % kind.itemsize:
            uneven.append(stored.key)
        path = _bundle_path(checkpoint, stored)
        shards[path] = checkpoint.directory / stored.file
        shape = entry.shape if turned else tuple(tensor.shape)
        tensors[name] = Placed(shape, kind, entry.offset, entry.length, path, turned)
    _refuse(mode, checkpoint, cast, uneven)
    if parts:
        for path in _list_left(tensors, shards):
            parts |= {name: wanted[name] for name, place in tensors.items() if place.file == path}
            del shards[path]
        tensors = {name: place for name, place in tensors.items() if name not in parts}
    own = plan_weights(parts, checkpoint.model, dtype) if parts else None
    tensors |= own.tensors if own else {}
    return WeightLayout(tensors, own.header if own else b"", aliases, mode, dict(sorted(shards.items())))


def _list_left(tensors: Mapping[str, Placed], shards: Mapping[str, Path]) -> list[str]:
    """Shards of which the graphs would point at the lesser part, because they hold experts apart: to link such a file
    is to read it for its digest and to carry its bytes about, beside the stacks that were made of them."""
    held = dict.fromkeys(shards, 0)
    fixed = {place.file for place in tensors.values() if place.turned}
    for place in tensors.values():
        held[place.file] += place.length
    return [path for path in shards if path not in fixed and held[path] < _LEAST_USED * shards[path].stat().st_size]


def list_unread(files: Iterable[Path]) -> list[Path]:
    """Of a checkpoint's files those whose digest has to be computed, as they are behind links."""
    return [file for file in dict.fromkeys(one.resolve() for one in files) if _digest_of_blob(file) is None]


def place_shards(
    layout: WeightLayout,
    directory: Path,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
    digests: Digests | None = None,
) -> dict[str, str]:
    """Put the checkpoint's files into a bundle in the making; returns the SHA-256 of each by its path there.

    Mode ``reference`` links them and copies, with one warning, what cannot be linked: to another file system, say.
    A file of a download cache whose name is its digest is not read; any other is, and ``on_bytes`` is told how many
    bytes of how many; ``digests`` may have begun on them. Raises UserError for a disk that is too full, and for a
    copied file of a cache that is damaged.
    """
    sources = {path: source.resolve() for path, source in layout.shards.items()}
    sizes = {path: source.stat().st_size for path, source in sources.items()}
    linking = layout.mode == "reference"
    if not linking:
        require_space(directory, sum(sizes.values()))
    total, placed = sum(sizes.values()), 0

    def told(before: int) -> Callable[[int], None]:
        return lambda done: on_bytes(before + done, total)

    known: dict[str, str] = {}
    unread: dict[str, Path] = {}
    for path, source in sources.items():
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if linking and (reason := _link(source, target)) is not None:
            _log.warning("weights are copied: %s cannot be linked into the bundle (%s)", layout.shards[path], reason)
            linking = False
        if not linking:
            known[path] = _copy(source, target, layout.shards[path], told(placed))
            placed += sizes[path]
        elif (named := _digest_of_blob(source)) is not None:
            known[path] = named
            placed += sizes[path]
            on_bytes(placed, total)
        else:
            unread[path] = source
    with ExitStack() as stack:
        digests = digests or stack.enter_context(Digests())
        found = digests.get(unread.values(), told(placed))
    known |= {path: found[source] for path, source in unread.items()}
    return dict(sorted(known.items()))


def _link(source: Path, target: Path) -> str | None:
    """Make a hard link; returns why it cannot be made here."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in _UNLINKABLE:
            return os.strerror(error.errno)
        raise
    return None


def _copy(source: Path, target: Path, shown: Path, on_bytes: Callable[[int], None]) -> str:
    require_space(target.parent, source.stat().st_size)
    digest, done = hashlib.sha256(), 0
    with source.open("rb") as read, target.open("wb") as write:
        while piece := read.read(_PIECE):
            write.write(piece)
            digest.update(piece)
            done += len(piece)
            on_bytes(done)
    if _digest_of_blob(source) not in (None, digest.hexdigest()):
        raise UserError(
            "damaged: the cache says it has another SHA-256", where=str(shown), fix="delete it and download it again"
        )
    return digest.hexdigest()


def _digest_of_blob(path: Path) -> str | None:
    """The SHA-256 that the Hugging Face cache names a large file by: ``blobs/<64 hexadecimal digits>``."""
    return path.name if path.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", path.name) else None


def _bundle_path(checkpoint: Checkpoint, stored: Stored) -> str:
    path = str(PurePosixPath(FOLDER, stored.file))
    if re.search(r"[\\:\x00]", path):
        raise UserError(
            f"shard {stored.file!r} has a name that no bundle may hold", where=str(checkpoint.directory),
            fix="rename it, or take --weights stream",
        )  # fmt: skip
    return path


def _refuse(mode: str, checkpoint: Checkpoint, cast: list[str], uneven: list[str]) -> None:
    reasons = [
        f"{len(found)} {'tensor' if len(found) == 1 else 'tensors'} would have to be {what}, such as {found[0]}"
        for what, found in (("cast", cast), ("moved", uneven))
        if found
    ]
    if reasons:
        fix = f"take --weights {MODES[0]}"
        raise UserError(
            f"the checkpoint's files cannot be used as they are: {'; '.join(reasons)}",
            where=f"--weights {mode}: {checkpoint.directory}",
            fix=f"{fix}, or --dtype auto" if cast and not uneven else fix,
        )


def _spell(kind: str) -> str:
    return FLOATS.get(kind, kind)
