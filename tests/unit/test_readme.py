"""What the README shows can be typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from secateur.passes.recipe_file import recipe_from_yaml
from secateur.tools import cli

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition(" #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
]


def test_the_recipe_is_valid() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert len(recipe_from_yaml(text).stages) == 2


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("secateur ")])
def test_a_command_has_an_existing_verb_and_options(command: str) -> None:
    _, verb, *arguments = shlex.split(command)
    group: Any = typer.main.get_command(cli.app)
    options = {option for parameter in group.get_command(None, verb).params for option in parameter.opts}
    assert {word for word in arguments if word.startswith("-")} <= options


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make ")])
def test_a_make_target_exists(command: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE)


def test_linked_files_exist() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / link).exists(), link
