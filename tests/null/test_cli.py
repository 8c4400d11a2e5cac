"""The command line's shell: help, version, and one line for everything that can go wrong."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys
from types import ModuleType

import pytest

from secateur.runtime.errors import SecateurError, UserError
from secateur.tools import cli


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A verb `work` whose deed a test sets: the exception it raises, or None."""
    module = ModuleType("secateur.tools.work")

    def work(name: str = "nobody") -> str:
        """Do the work.

        \b
        Example:
          secateur work --name somebody
        """
        logging.getLogger("secateur.work").info("half done")
        if module.deed is not None:
            raise module.deed
        return name

    module.deed = None
    module.work = work
    monkeypatch.setitem(sys.modules, "secateur.tools.work", module)
    monkeypatch.setitem(cli.VERBS, "work", "work")
    return module


def secateur(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, out, err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert secateur(capsys, "--version") == (0, "secateur 0.1.0\n", "")


def test_module_and_command_are_the_same_program() -> None:
    done = subprocess.run([sys.executable, "-m", "secateur", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "secateur 0.1.0\n")


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help_lists_the_verbs_and_the_journey(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    code, out, err = secateur(capsys, *arguments)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.partition("Commands:\n")[2].splitlines()[: len(cli.VERBS)]] == [*cli.VERBS]
    assert "secateur compile MODEL_DIR -o BUNDLE --recipe fastv --keep 0.25\n" in out


@pytest.mark.parametrize("name", list(cli.VERBS))
def test_the_help_of_a_verb_has_an_example(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, _ = secateur(capsys, name, "--help")
    assert code == 0
    assert f"  secateur {name} " in out.partition("Usage:")[2].partition("\n")[2]


def test_an_unknown_verb_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = secateur(capsys, "prune")
    assert (code, out) == (2, "")
    assert err == f"error: there is no verb 'prune' (available: {', '.join(cli.VERBS)})\n"


@pytest.mark.parametrize(("arguments", "complaint"), [(("--nmae", "x"), "--nmae"), (("--name",), "--name")])
def test_a_mistyped_option_is_one_line(
    capsys: pytest.CaptureFixture[str], verb: ModuleType, arguments: tuple[str, ...], complaint: str
) -> None:
    code, out, err = secateur(capsys, "work", *arguments)
    assert (code, out) == (2, "")
    assert complaint in err
    assert err.startswith("error: ")
    assert err.endswith("; see secateur work --help\n")
    assert err.count("\n") == 1


def test_a_result_is_not_an_exit_code(capsys: pytest.CaptureFixture[str], verb: ModuleType) -> None:
    assert secateur(capsys, "work", "--name", "3") == (0, "", "half done\n")


FAILURES = {
    "user": (
        UserError("no recipe 'fastvv'", available=["fastv", "none"], fix="see secateur recipes"),
        2,
        "no recipe 'fastvv' (available: fastv, none); see secateur recipes",
    ),
    "own": (SecateurError("the engine\ndid not build", where="prefill"), 1, "prefill: the engine did not build"),
    "extra": (
        ModuleNotFoundError("No module named 'onnx'", name="onnx.helper"),
        2,
        "onnx is not installed; pip install 'secateur[compile]'",
    ),
    "interrupt": (KeyboardInterrupt(), 130, "interrupted"),
    "full": (
        OSError(errno.ENOSPC, "No space left on device", "bundle/weights.safetensors"),
        1,
        "disk full writing bundle/weights.safetensors; free some space or choose another directory",
    ),
    "file": (FileNotFoundError(errno.ENOENT, "No such file", "a.png"), 2, "a.png: No such file"),
    "bug": (ValueError("shapes\n  differ"), 1, "ValueError: shapes differ; run with --debug for the traceback"),
    "silent": (AssertionError(), 1, "AssertionError; run with --debug for the traceback"),
    "module": (
        ModuleNotFoundError("No module named 'secateur.x'", name="secateur.x"),
        1,
        "ModuleNotFoundError: No module named 'secateur.x'; run with --debug for the traceback",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_line(capsys: pytest.CaptureFixture[str], verb: ModuleType, case: str) -> None:
    verb.deed, code, line = FAILURES[case]
    assert secateur(capsys, "work", "--quiet") == (code, "", f"error: {line}\n")


def test_a_long_failure_is_cut(capsys: pytest.CaptureFixture[str], verb: ModuleType) -> None:
    verb.deed = RuntimeError("node " * 10_000)
    assert len(secateur(capsys, "-q", "work")[2]) < 600


@pytest.mark.parametrize("arguments", [("--debug", "work"), ("work", "--debug")])
def test_debug_shows_the_traceback(
    capsys: pytest.CaptureFixture[str], verb: ModuleType, arguments: tuple[str, ...]
) -> None:
    verb.deed = UserError("keep is 1.5")
    code, _, err = secateur(capsys, *arguments)
    assert code == 2
    assert "Traceback (most recent call last)" in err
    assert err.endswith("error: keep is 1.5\n")
