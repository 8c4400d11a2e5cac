"""Recipes from Python: out of a file of the user's, or of an installed package that offers them."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import sys
import traceback
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from secateur.compiler.recipe import Recipe
from secateur.runtime.errors import UserError

GROUP = "secateur.recipes"
"""Entry points of this group are recipes: the name is what ``--recipe`` takes, the value ``package.module:NAME``."""

_log = logging.getLogger(__name__)


def recipe_from_file(path: Path, name: str | None) -> Recipe:
    """The recipe called ``name`` in the Python file ``path``; without a name, the only one there.

    The file is run as it is on disk now; functions it decorates join the vocabulary. Every fault is a UserError with
    the file and line.
    """
    module = _run_file(path)
    found = {key: value for key, value in vars(module).items() if isinstance(value, Recipe)}
    if name is None and len(found) == 1:
        (recipe,) = found.values()
    elif name is None:
        raise UserError(
            f"{len(found)} recipes in it", where=str(path), available=found, fix=f"choose one with {path}:NAME"
        )
    elif name not in found:
        kind = f", {name} is a {type(getattr(module, name)).__name__}" if hasattr(module, name) else ""
        raise UserError(f"no recipe {name!r} in it{kind}", where=str(path), available=sorted(found))
    else:
        recipe = found[name]
    check_recipe(recipe, f"{path}:{name}" if name else str(path))
    return recipe


def check_recipe(recipe: Recipe, where: str) -> None:
    """Look up every function and signal of a recipe that was written in Python."""
    from secateur.passes.vocabulary import bind_stage  # imports torch

    for part in recipe.parts:
        check_recipe(part.recipe, where)
    for index, stage in enumerate(() if recipe.parts else recipe.stages):
        bind_stage(stage, where=f"{where}: stages[{index}]")


def installed_names() -> list[str]:
    """The names of recipes that installed packages offer; nothing of those packages is loaded."""
    return sorted(entry_points(group=GROUP).names)


def recipe_from_package(name: str) -> Recipe | None:
    """The recipe an installed package offers under ``name``; None if none does."""
    offered = list(entry_points(group=GROUP, name=name))
    if not offered:
        return None
    if len(offered) > 1:
        raise UserError(
            f"{len(offered)} installed packages offer a recipe {name!r}", where="--recipe",
            available=[_origin(point) for point in offered], fix="uninstall all but one",
        )  # fmt: skip
    return _load(offered[0])


def installed_recipes() -> dict[str, Recipe]:
    """All of them by name. One that cannot be loaded is left out with a warning."""
    found = {}
    for name in installed_names():
        try:
            recipe = recipe_from_package(name)
        except UserError as error:
            _log.warning("%s", error)
            continue
        if recipe is not None:
            found[name] = recipe
    return found


def _load(point: EntryPoint) -> Recipe:
    where = f"entry point {_origin(point)}"
    try:
        value = point.load()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot load it ({type(error).__name__}: {error})", where=where) from error
    if not isinstance(value, Recipe):
        raise UserError(f"a {type(value).__name__} is no recipe", where=where, fix="name a secateur.recipes.Recipe")
    check_recipe(value, where)
    return value


def _origin(point: EntryPoint) -> str:
    package = f" of {point.dist.name}" if point.dist else ""
    return f"{point.name} = {point.value}{package}"


def _run_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError("no such file", where=str(path))
    path = path.resolve()
    # A name of its own per path, so that two files called recipe.py do not meet.
    name = f"secateur_recipe_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # As with `python FILE`: what lies beside it can be imported.
    sys.path.insert(0, str(path.parent))
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"not Python: {error.msg}", where=f"{error.filename}:{error.lineno}") from None
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        at = f":{lines[-1]}" if lines else ""
        raise UserError(f"{type(error).__name__}: {error}", where=f"{path}{at}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module
