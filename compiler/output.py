"""An output directory that appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.runtime.errors import UserError
from secateur.runtime.manifest import MANIFEST


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
    check_output(out, force)
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        if isinstance(error, (PermissionError, NotADirectoryError, FileExistsError)):
            raise UserError(
                f"cannot be written ({error.strerror})", where=str(out), fix="choose another place"
            ) from None
        raise
    try:
        yield work
        os.chmod(work, 0o755)
        _put_in_place(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _put_in_place(work: Path, out: Path) -> None:
    if not out.exists():
        os.replace(work, out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
    try:
        os.replace(out, aside)
    except BaseException:
        aside.rmdir()
        raise
    try:
        os.replace(work, out)
    except BaseException:
        os.replace(aside, out)
        raise
    shutil.rmtree(aside, ignore_errors=True)
