"""An output directory that appears whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from secateur.runtime.errors import UserError
from secateur.runtime.leftovers import (
    clear_leftovers,
    held_directory,
    hold,
    list_leftovers,
    lock_leftover,
    make_directory,
)
from secateur.runtime.manifest import MANIFEST

WORK, ASIDE = ".partial", ".old"
"""Ends of the names that a directory has while it is written, and an old one while it is replaced."""

_log = logging.getLogger(__name__)


def check_output(out: Path, force: bool) -> None:
    """Refuse an output that is there already; ``force`` allows a bundle or an empty directory to be replaced.

    A link is always refused: replacing it would leave the bundle it points to where it is.
    """
    if out.is_symlink():
        raise UserError("is a link", where=str(out), fix="name the directory it points to, or a new one")
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError("is a file", where=str(out), fix="name a directory for the bundle")
    if Path.cwd().is_relative_to(out.resolve()):
        raise UserError("is the directory you are in", where=str(out), fix="name a new one, such as ./bundle")
    if not any(out.iterdir()):
        return
    if not force:
        raise UserError("exists already", where=str(out), fix="choose another directory, or replace it with --force")
    fix = "--force replaces bundles only; choose another directory"
    listed = _listed_files(out / MANIFEST)
    if listed is None:
        raise UserError("exists and is not a bundle", where=str(out), fix=fix)
    others = sorted(_paths(out) - listed)
    if others:
        raise UserError(f"holds what is no part of the bundle: {', '.join(others[:5])}", where=str(out), fix=fix)


def _paths(directory: Path) -> set[str]:
    """What lies in a directory, deep down: files, links, and folders that hold nothing."""
    found = set()
    for path in directory.rglob("*"):
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir()):
            found.add(path.relative_to(directory).as_posix())
    return found


def _listed_files(manifest: Path) -> set[str] | None:
    """What a bundle of any version consists of; None for another program's manifest or none at all."""
    try:
        content = json.loads(manifest.read_text())
        return {MANIFEST, *content["files"]} if "secateur" in content else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def whole_directory(out: Path, force: bool) -> Iterator[Path]:
    """Yield a temporary directory beside ``out`` that becomes ``out`` when the block ends well.

    On any failure, an interrupt included, the temporary directory is removed and ``out`` stays as it was.
    """
    recover_output(out)
    check_output(out, force)
    out = out.absolute()
    with ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            work = stack.enter_context(held_directory(out.parent, f".{out.name}.", WORK))
        except OSError as error:
            if isinstance(error, (PermissionError, NotADirectoryError, FileExistsError)):
                raise UserError(
                    f"cannot be written ({error.strerror})", where=str(out), fix="choose another place"
                ) from None
            raise
        yield work
        os.chmod(work, 0o755)
        with hold(out):
            _put_in_place(work, out)


def recover_output(out: Path) -> None:
    """Clear what processes that were killed left beside ``out``: half-written directories, and an old one that was
    being replaced. Where the new one had not come into its place yet, the old one is put back there."""
    out = out.absolute()
    for aside in list_leftovers(out.parent, f".{out.name}.", ASIDE):
        with lock_leftover(aside, f".{out.name}.", ASIDE) as left:
            if left and not os.path.lexists(out) and (aside / MANIFEST).is_file():
                os.replace(aside, out)
                _log.warning("%s was being replaced when the process was killed: it is put back as it was", out)
    for suffix in (WORK, ASIDE):
        clear_leftovers(out.parent, f".{out.name}.", suffix)


def _put_in_place(work: Path, out: Path) -> None:
    if not out.exists():
        os.replace(work, out)
        return
    aside = make_directory(out.parent, f".{out.name}.", ASIDE)
    try:
        os.replace(out, aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    try:
        os.replace(work, out)
    except BaseException:
        os.replace(aside, out)
        raise
    # The manifest first: what is left without one is not put back.
    (aside / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
