"""Recipes from outside the package: a file, an installed package, and functions of one's own that are tried first."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from secateur.compiler.plan_recipe import plan_recipe
from secateur.passes import recipe_module
from secateur.passes.methods.own import digest_own
from secateur.passes.methods.registry import SCORES
from secateur.passes.recipe_file import load_recipe
from secateur.passes.recipe_module import installed_recipes
from secateur.passes.recipes import get_recipe
from secateur.passes.stage import StageFunction, stage_function
from secateur.runtime.errors import UserError

from .own_words import forget_own

HEAD = """\
import random
import torch
from torch import Tensor
from secateur.recipes import Recipe, Scored, Selection, Site, Stage, Term, merge, score, selector

def row(name, select="top_k", **terms):
    return Recipe(name, "", "", (Stage(Site("decoder.layer", 2, 32), Term(select), scope="whole", **terms),))
"""
GOOD = """
@score
def loud_values(values: Tensor, power: float = 1.0) -> Tensor:
    return values.norm(dim=-1).mean(dim=1) ** power

LOUD = row("loud", score=Term("loud_values", {"power": 2.0}), share=0.25)
"""


@pytest.fixture(autouse=True)
def forget_functions() -> Iterator[None]:
    yield
    forget_own()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(body: str) -> Path:
        path = tmp_path / "mine.py"
        path.write_text(HEAD + textwrap.dedent(body))
        return path

    return write


def line_of(path: Path, text: str) -> int:
    return next(i for i, line in enumerate(path.read_text().splitlines(), 1) if text in line)


def bind(text: str, tokens: int = 16) -> StageFunction:
    model: dict[str, Any] = {"keep": None, "images": 1, "vision_layers": 24, "decoder_layers": 4}
    (stage,) = plan_recipe(load_recipe(text), tokens_per_image=tokens, **model).stages
    return stage_function(stage)


def test_a_function_of_ones_own_is_chosen_by_name(write: Callable[[str], Path]) -> None:
    path = write(GOOD)
    for text in (f"{path}:LOUD", str(path)):
        stage = bind(text)
        assert stage.signals == ("values",)
        assert stage.planned.length_out == 4
        assert stage.bound.score is not None
        assert stage.bound.score.options == {"power": 2.0}


def test_a_file_can_be_changed_and_read_again(write: Callable[[str], Path]) -> None:
    before = digest_own([load_recipe_score(f"{write(GOOD)}:LOUD")])
    after = digest_own([load_recipe_score(f"{write(GOOD.replace('mean', 'amax'))}:LOUD")])
    assert before != after, "what a recipe does is more than its name"
    assert digest_own([SCORES["cls_attention_mean"]]) == ""


def load_recipe_score(text: str) -> Callable[..., Any]:
    score = bind(text).bound.score
    assert score is not None
    return score.function


def test_selector_and_merge_of_ones_own(write: Callable[[str], Path]) -> None:
    path = write(
        """
        @selector
        def first_ones(tokens: Tensor, k: int) -> Selection:
            return Selection(torch.arange(k).expand(tokens.shape[0], k))

        @merge
        def plain(tokens: Tensor, selection: Selection) -> Tensor:
            return torch.nn.functional.one_hot(selection.keep, tokens.shape[1]).float()

        MINE = row("mine", "first_ones", merge=Term("plain"), share=0.5)
        """
    )
    assert bind(f"{path}:MINE").planned.length_out == 8


@pytest.mark.parametrize(
    ("body", "line", "message"),
    [
        (
            "@score\ndef bad(tokens: Tensor) -> Tensor:\n    return torch.rand(tokens.shape[:2])\n",
            "def bad", "bad returned another choice for the same input the second time",
        ),
        (
            "@score\ndef bad(tokens: Tensor) -> Tensor:\n    return tokens.sum(-1) * random.random()\n",
            "def bad", "bad returned another score for the same input the second time",
        ),
        (
            "@score\ndef bad(tokens: Tensor) -> Tensor:\n    total = tokens.sum(-1)\n    if total.sum() > 0:\n"
            "        return total\n    return -total\n",
            "if total", "cannot trace bad: a branch or a size depends on data (",
        ),
        (
            "def inner(x):\n    return x[x > -9]\n@score\ndef bad(tokens: Tensor) -> Tensor:\n"
            "    return inner(tokens.sum(-1)).reshape(tokens.shape[:2])\n",
            "x > -9", "cannot trace bad: ",
        ),
        (
            "@score\ndef bad(tokens: Tensor) -> Tensor:\n    return tokens @ tokens\n",
            "tokens @", "RuntimeError: ",
        ),
        (
            "@score\ndef bad(tokens: Tensor) -> Tensor:\n    return tokens\n",
            "def bad", "score is (2, 16, 8), of 16 tokens per group, 8 to keep",
        ),
        (
            "@score\ndef bad(tokens: Tensor) -> Tensor:\n    return tokens.sum(-1).half()\n",
            "def bad", "score is float16, not float32; return it with .float()",
        ),
        (
            "@score\ndef bad(tokens: Tensor) -> Tensor:\n    return tokens.sum(-1) / 0\n",
            "def bad", "score is not finite",
        ),
    ],
)  # fmt: skip
def test_a_score_that_will_not_do_is_named_by_line(
    write: Callable[[str], Path], body: str, line: str, message: str
) -> None:
    path = write(f"{body}\nBAD = row('bad', score=Term('bad'), share=0.5)\n")
    with pytest.raises(UserError) as caught:
        bind(f"{path}:BAD")
    said = str(caught.value)
    assert said.startswith("stage0: ")
    assert message in said
    number = line_of(path, line)
    assert {f"{path}:{number}", f"{path}:{number - 1}"} & {
        said[i:].partition(" ")[0].rstrip(":") for i in starts(said, path)
    }
    assert "\n" not in said


def starts(text: str, path: Path) -> list[int]:
    return [i for i in range(len(text)) if text.startswith(f"{path}:", i)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "return Selection(score.topk(k).indices)",
            "keep is not int64 and strictly increasing; sort the chosen indices",
        ),
        ("return Selection(torch.arange(k) + 16 + 0 * score.long()[:, :k])", "keep names a token outside 0 to 15"),
        ("return Selection(torch.arange(k - 1).expand(score.shape[0], k - 1))", "keep has shape (2, 7)"),
    ],
)
def test_a_selector_that_will_not_do(write: Callable[[str], Path], body: str, message: str) -> None:
    path = write(
        f"@selector\ndef bad(score: Tensor, k: int) -> Selection:\n    {body}\n"
        "BAD = row('bad', 'bad', score=Term('last_query_attention_mean'), share=0.5)\n"
    )
    with pytest.raises(UserError) as caught:
        bind(f"{path}:BAD")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("body", "name", "message"),
    [
        (GOOD, "LAUD", "{path}: no recipe 'LAUD' in it (available: LOUD)"),
        (GOOD, "row", "{path}: no recipe 'row' in it, row is a function (available: LOUD)"),
        (GOOD + "\nSOFT = row('soft', score=Term('loud_values'))\n", None,
         "{path}: 2 recipes in it (available: LOUD, SOFT); choose one with {path}:NAME"),
        ("x = (\n", None, "{path}:8: not Python: '(' was never closed"),
        ("x = 1\nx.y\n", None, "{path}:9: AttributeError: 'int' object has no attribute 'y'"),
        ("@score\ndef seeded_random(tokens: Tensor) -> Tensor: ...\n", None,
         "{path}:8: there is a score 'seeded_random' already, part of the vocabulary; choose another name"),
        ("X = row('x', score=Term('nope'))\n", None, "{path}: stages[0].score: no score 'nope' (available: "),
        ("@score\ndef odd(tokns: Tensor) -> Tensor: ...\nX = row('x', score=Term('odd'))\n", None,
         "{path}: stages[0].score: odd takes 'tokns', which is no signal (available: "),
        ("@score\ndef odd(tokens: Tensor, power=1.0) -> Tensor: ...\nX = row('x', score=Term('odd'))\n", None,
         "{path}: stages[0].score: odd takes 'power', which is no signal and has no type (available: "),
    ],
)  # fmt: skip
def test_a_file_that_will_not_do(write: Callable[[str], Path], body: str, name: str | None, message: str) -> None:
    path = tmp = write(body)
    with pytest.raises(UserError) as caught:
        load_recipe(f"{path}:{name}" if name else str(path))
    assert str(caught.value).startswith(message.format(path=tmp))


def test_two_files_may_not_define_the_same_word(write: Callable[[str], Path], tmp_path: Path) -> None:
    first = write(GOOD)
    load_recipe(str(first))
    second = tmp_path / "other.py"
    second.write_text(first.read_text())
    with pytest.raises(UserError) as caught:
        load_recipe(str(second))
    assert str(caught.value) == (
        f"{second}:9: there is a score 'loud_values' already, defined at {first}:9; choose another name"
    )


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"^nowhere/x\.py: no such file$"):
        load_recipe("nowhere/x.py:X")


class Point:
    """As much of an entry point as is read."""

    dist = None

    def __init__(self, name: str, value: object) -> None:
        self.name, self.value, self._loaded = name, f"package:{name}", value

    def load(self) -> object:
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded


class Points(list[Point]):
    @property
    def names(self) -> set[str]:
        return {point.name for point in self}


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def offer(**values: object) -> None:
        points = Points(Point(name, value) for name, value in values.items())
        monkeypatch.setattr(
            recipe_module, "entry_points",
            lambda group, name=None: Points(p for p in points if name in (None, p.name)),
        )  # fmt: skip

    return offer


def test_installed_packages_offer_recipes(
    write: Callable[[str], Path], offer: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    loud = load_recipe(f"{write(GOOD)}:LOUD")
    offer(loud=loud, number=3, broken=ImportError("no module"))
    assert get_recipe("loud") is loud
    assert load_recipe("divprune:keep=0.5+loud").stages[1] == loud.stages[0]
    with pytest.raises(UserError, match="entry point number = package:number: a int is no recipe; name a secateur"):
        get_recipe("number")
    with pytest.raises(UserError, match=r"broken: cannot load it \(ImportError: no module\)"):
        get_recipe("broken")
    with pytest.raises(UserError, match=r"no recipe 'lout' \(available: .*broken.*loud"):
        get_recipe("lout")
    assert list(installed_recipes()) == ["loud"]
    assert len(caplog.records) == 2


def test_the_guide_works_as_it_is_written(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "writing-a-recipe.md").read_text(encoding="utf-8")
    code = guide.partition("```python\n")[2].partition("```")[0]
    path = tmp_path / "loud.py"
    path.write_text(code)
    stage = bind(f"{path}:LOUD")
    assert stage.signals == ("last_query_attention", "values")
    assert stage.planned.length_out == 4
    assert len([line for line in code.splitlines() if line.strip()]) <= 20


@pytest.mark.slow
def test_a_recipe_of_ones_own_becomes_a_bundle(
    model_dir: Callable[..., Path], tmp_path: Path, write: Callable[[str], Path]
) -> None:
    import numpy as np

    import secateur
    from secateur.runtime.manifest import read_manifest

    pytest.importorskip("onnxruntime")
    geometry = secateur.Geometry(text_tokens=24, new_tokens=4)
    digests = []
    for body in (GOOD, GOOD.replace("mean", "amax")):
        path = write(body)
        secateur.compile(
            model_dir(), tmp_path / "bundle", recipe=f"{path}:LOUD", geometry=geometry, force=True
        )  # fmt: skip
        manifest = read_manifest(tmp_path / "bundle")
        digests.append(manifest.recipe.sha256)
        assert manifest.recipe.name == "loud"
        assert manifest.recipe.stages[0].length_out == 4
    assert digests[0] != digests[1], "the function's text is part of the recipe's digest"
    picture = np.zeros((32, 32, 3), np.uint8)
    assert secateur.verify(tmp_path / "bundle", model_dir(), recipe=f"{path}:LOUD", rows=2).passed
    with secateur.Session(tmp_path / "bundle", threads=1) as session:
        assert session.generate("hello", picture, max_new_tokens=2).metrics.kept["stage0"].shape == (1, 4)
