"""The command `secateur`: finds the verb, sets up logging, turns every exception into one line.

A verb is a function in a module of its own; its module is imported when the verb is asked for, so that
`secateur run` needs none of what `secateur compile` needs. To add one: a line in `VERBS`.
"""

from __future__ import annotations

import copy
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

import secateur
from secateur.runtime.errors import UserError
from secateur.tools.console import say_error, set_up_logging
from secateur.tools.failures import USER_ERROR, Terminated, describe_failure

# Verb -> its function in the module secateur.tools.<verb>, in the order `secateur --help` lists them.
VERBS = {
    "compile": "compile_model",
    "run": "run",
    "profile": "profile",
    "explain": "explain",
    "inspect": "inspect",
    "verify": "verify",
    "lint": "lint",
    "sweep": "sweep",
    "compare": "compare",
    "calibrate": "calibrate",
    "recipes": "recipes",
}

EPILOG = """From a checkpoint to an answer:

\b
  secateur compile MODEL_DIR -o BUNDLE --recipe fastv --keep 0.25
  secateur run BUNDLE --image photo.png --prompt "What is in the picture?"
  secateur profile BUNDLE --against UNPRUNED_BUNDLE
"""

# Options of the program that are also accepted after the verb, where people type them.
SHARED_OPTIONS = ("debug", "quiet", "verbose")

# The class every "you typed it wrong" exception derives from; typer does not export it by name.
_UsageError: Any = typer.BadParameter.__mro__[1]

logger = logging.getLogger("secateur")


class VerbGroup(TyperGroup):
    """Loads verbs when they are named, and reports what goes wrong in them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in VERBS:
            raise UserError(f"there is no verb '{args[0]}'", available=VERBS)
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        function = getattr(import_module(f"secateur.tools.{cmd_name}"), VERBS[cmd_name])
        verb = typer.Typer(add_completion=False, rich_markup_mode=None)
        verb.command(cmd_name)(function)
        command = typer.main.get_command(verb)
        known = {parameter.name for parameter in command.params}
        for parameter in self.params:
            if parameter.name in SHARED_OPTIONS and parameter.name not in known:
                shared = copy.copy(parameter)
                shared.expose_value = False
                command.params.append(shared)
        return command

    def invoke(self, ctx: Any) -> None:
        # What a verb returns is for callers in Python; returned from here it would become the exit code.
        try:
            super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise typer.Exit(fail(error)) from error

    def main(self, args: Sequence[str] | None = None, **extra: Any) -> Any:  # type: ignore[override]  # fewer options
        arguments = sys.argv[1:] if args is None else list(args)
        set_up_logging()
        extra["standalone_mode"] = False
        try:
            with _signals_raise():
                code = super().main(arguments, **extra)
        except Terminated as error:
            code = fail(error)
        except _UsageError as error:
            complaint = " ".join(error.format_message().split()).rstrip(".")
            verb = next((f"{word} " for word in arguments if word in VERBS), "")
            say_error(f"{complaint}; see secateur {verb}--help")
            code = USER_ERROR
        except Exception as error:
            if "--debug" in arguments:
                traceback.print_exception(error)
            code = fail(error)
        sys.exit(code or 0)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP end a verb as an interrupt does, so that half-written files are removed.

    Only the first one counts: a second must not break into that removal. What the caller ignores
    (`nohup`) or handles itself stays so.
    """
    signals = [signal.SIGTERM, signal.SIGHUP]
    taken = [s for s in signals if signal.getsignal(s) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        taken = []

    def end(number: int, frame: object) -> None:
        for one in taken:
            signal.signal(one, signal.SIG_IGN)
        raise Terminated(number)

    try:
        for one in taken:
            signal.signal(one, end)
        yield
    finally:
        for one in taken:
            signal.signal(one, signal.SIG_DFL)


def fail(error: BaseException) -> int:
    """Say what went wrong and return the exit code for it."""
    line, code = describe_failure(error)
    say_error(line)
    return code


def run_script(run: Callable[[Any], object], options: Any) -> None:
    """``run(options)`` for a script beside the verbs: its log is shown, and what goes wrong is one line and the exit
    code that the command would give. With ``options.debug`` the traceback is shown instead."""
    set_up_logging()
    try:
        run(options)
    except (Exception, KeyboardInterrupt) as error:
        if getattr(options, "debug", False):
            raise
        sys.exit(fail(error))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"secateur {secateur.__version__}")
        raise typer.Exit


def _be_quiet(wanted: bool) -> None:
    if wanted:
        _refuse_level(logging.DEBUG)
        logger.setLevel(logging.WARNING)


def _be_verbose(wanted: bool) -> None:
    if wanted:
        _refuse_level(logging.WARNING)
        logger.setLevel(logging.DEBUG)


def _refuse_level(level: int) -> None:
    if logger.level == level:
        raise UserError("--quiet and --verbose say opposite things", fix="give one of them")


app = typer.Typer(name="secateur", cls=VerbGroup, epilog=EPILOG, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def secateur_command(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback when something fails.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", callback=_be_quiet, help="Print only results, warnings and errors.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", callback=_be_verbose, help="Also say what each step decides.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Compile a multimodal LLM together with a published token-pruning recipe, and run it.

    A checkpoint directory goes in; out comes a bundle: static-shape graphs or engines in which the
    tokens the recipe finds redundant are removed on the way. Bundles run without torch.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line on ``arguments`` (the process's own if none are given) and exit."""
    command = cast(VerbGroup, typer.main.get_command(app))
    command.main(arguments, prog_name="secateur")
