"""The errors a user may meet: one line each, with what, where, what there was, and what to do."""

from __future__ import annotations

from collections.abc import Iterable


class SecateurError(Exception):
    """An error whose text is one line a user can act on.

    ``what`` went wrong; ``where`` (file, pass, program, node, field); ``available`` lists the valid
    choices; ``fix`` says what to do. The command line prints ``str(error)`` and exits with
    ``exit_code``.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        available: Iterable[object] | None = None,
        fix: str | None = None,
    ) -> None:
        text = f"{where}: {what}" if where else what
        if available is not None:
            text += f" (available: {', '.join(str(a) for a in available) or 'none'})"
        if fix:
            text += f"; {fix}"
        super().__init__(text)


class UserError(SecateurError):
    """The input is at fault: a name, an option, a file or a shape the user chose."""

    exit_code = 2


class MisfitError(UserError):
    """The input is not of the geometry a program was compiled for; it may be of another."""


class BundleError(UserError):
    """A bundle is missing, incomplete, altered, too new, or not for this machine."""


def refuse_idle(why: str, fix: str = "leave it out", **given: object) -> None:
    """Raise UserError for the first option of ``given`` that was given (is not None) though it says nothing here."""
    for name, value in given.items():
        if value is not None:
            raise UserError(f"says nothing: {why}", where=f"--{name.replace('_', '-')}", fix=fix)
