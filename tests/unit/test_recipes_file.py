"""Recipe files: what is written reads back equal, and what is wrong is named with its place and the choices."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.compiler.recipe import Recipe, Site, Stage, Term
from secateur.passes.methods import registry
from secateur.passes.recipe_file import load_recipe, recipe_from_yaml, recipe_to_yaml
from secateur.passes.recipes import RECIPES
from secateur.runtime.errors import UserError

from .rows import LEARNED, ready, weights_file

GOOD = """\
name: mine
stages:
  - site: vision.out
    score: cls_attention_mean
    select: top_k
    share: 0.5
"""
SCORES = f"(available: {', '.join(sorted(registry.SCORES))})"
SELECTORS = f"(available: {', '.join(sorted(registry.SELECTORS))})"
MERGES = f"(available: {', '.join(sorted(registry.MERGES))})"
SITES = "(available: vision.layer[i], vision.out, projector.out, audio.out, decoder.layer[k])"
STAGE_FIELDS = "site, select, score, merge, share, count, scope, window, signals, rounds"
RECIPE_FIELDS = (
    "name, title, link, positions, cache, evidence, notes, identity_at_one, collapses, settings, schedule, stages"
)


def test_a_short_file_reads() -> None:
    stage = Stage(Site("vision.out"), Term("top_k"), score=Term("cls_attention_mean"), share=0.5)
    assert recipe_from_yaml(GOOD) == Recipe("mine", "", "", (stage,), evidence="reconstructed")


@pytest.mark.parametrize("name", RECIPES)
def test_rows_survive_the_round_trip(name: str) -> None:
    text = recipe_to_yaml(ready(name))
    folder = weights_file(name, 12).parent if name in LEARNED else Path()
    assert recipe_to_yaml(recipe_from_yaml(text, folder=folder)) == text


@given(
    name=st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "Zs"]), min_size=1),
    notes=st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "Zs"])),
    share=st.floats(1e-6, 1.0),
    layer=st.integers(1, 99),
)
def test_any_text_and_number_survives_the_round_trip(name: str, notes: str, share: float, layer: int) -> None:
    stage = Stage(
        Site("decoder.layer", layer),
        Term("top_k_and_uniform", {"contextual": 0.2}),
        score=Term("last_query_attention_mean"),
        share=share,
        signals={"last_query_attention": {"projections": "own"}},
    )
    recipe = Recipe(name, "", "", (stage,), notes=notes)
    assert recipe_from_yaml(recipe_to_yaml(recipe)) == recipe


def test_loading_by_name_and_by_path(tmp_path: Path) -> None:
    assert load_recipe("fastv") is RECIPES["fastv"]
    for name in ("r.yaml", "r.yml"):
        (tmp_path / name).write_text(GOOD, encoding="utf-8")
        assert load_recipe(str(tmp_path / name)).name == "mine"


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    missing, directory, binary = tmp_path / "no.yaml", tmp_path / "d.yaml", tmp_path / "b.yaml"
    directory.mkdir()
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in (
        (missing, "cannot read it: No such file or directory"),
        (directory, "cannot read it: Is a directory"),
        (binary, "not a text file in UTF-8"),
    ):
        with pytest.raises(UserError) as caught:
            load_recipe(str(path))
        assert str(caught.value) == f"{path}: {message}"


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "colour: red\n", f"colour: no such field (available: {RECIPE_FIELDS})"),
        (GOOD + "    nose: 1\n", f"stages[0].nose: no such field (available: {STAGE_FIELDS})"),
        (
            changed("select: top_k", "select: {name: top_k, option: {}}"),
            "stages[0].select.option: no such field (available: name, options, of)",
        ),
        (GOOD + "    share: 0.2\n", "key 'share' is given twice in the mapping at line 3"),
        (changed("name: mine\n", ""), "name: this field is missing"),
        (changed("    share: 0.5\n", ""), "stages[0]: give either a share or a count"),
        (changed("mine", "3"), "name: must be a valid string, not 3"),
        (changed("0.5", "half"), "stages[0].share: must be a valid number, not 'half'"),
        (changed("0.5", "true"), "stages[0].share: must be a valid number, not True"),
        (changed("0.5", "1.5"), "stages[0].share: must be less than or equal to 1, not 1.5"),
        (changed("0.5", "-1"), "stages[0].share: must be greater than or equal to 0, not -1"),
        (GOOD + "    count: 0\n", "stages[0].count: must be greater than or equal to 1, not 0"),
        (GOOD + "    count: 9\n", "stages[0]: give either a share or a count"),
        (GOOD + "schedule: {name: linear}\n", "schedule.name: no choice 'linear' (available: exponential)"),
        (
            GOOD + "schedule: {name: exponential, entri: 1}\n",
            "schedule.entri: no such field (available: name, entry, drop)",
        ),
        (changed("vision.out", "vision.end"), f"stages[0].site: no site 'vision.end' {SITES}"),
        (changed("vision.out", "decoder.layer"), f"stages[0].site: site 'decoder.layer' is malformed {SITES}"),
        (changed("cls_attention_mean", "cls"), f"stages[0].score: no score 'cls' {SCORES}"),
        (
            changed("top_k", "topk"),
            f"stages[0].select: no selector 'topk' {SELECTORS}",
        ),
        (GOOD + "    merge: mean\n", f"stages[0].merge: no merge 'mean' {MERGES}"),
        (
            changed("score: cls_attention_mean", "score: {name: cls_attention_mean, options: {head: max}}"),
            "stages[0].score.options: cls_attention_mean has no option 'head' (available: heads)",
        ),
        (
            changed("score: cls_attention_mean", "score: {name: cls_attention_mean, options: {heads: all}}"),
            "stages[0].score.options.heads: no choice 'all' (available: mean, sum, max)",
        ),
        (
            changed("score: cls_attention_mean", "score: {name: cls_attention_mean, options: [max]}"),
            "stages[0].score.options: must be a valid mapping, not a list",
        ),
        (
            changed("vision.out", "decoder.layer[2]"),
            "stages[0].signals.cls_attention: signal 'cls_attention' does not exist at decoder.layer[2] "
            "(available: vision.layer, vision.out, projector.out)",
        ),
        (
            GOOD + "    signals: {keys: {}}\n",
            "stages[0].signals: signal 'keys' is not used by this stage (available: cls_attention)",
        ),
        (GOOD + "    scope: row\n", "stages[0].scope: no choice 'row' (available: image, window, whole)"),
        (GOOD + "positions: new\n", "positions: no choice 'new' (available: original, compact)"),
        (
            GOOD + "evidence: rumour\n",
            "evidence: no choice 'rumour' (available: authors' code, paper, reconstructed)",
        ),
        ("name: x\nstages: 3\n", "stages: must be a valid list, not 3"),
        ("name: x\nstages: [3]\n", f"stages[0]: must be a mapping with the fields {STAGE_FIELDS}, not 3"),
        ("- a\n", f"must be a mapping with the fields {RECIPE_FIELDS}, not a list"),
        ("", f"must be a mapping with the fields {RECIPE_FIELDS}, not empty"),
        ("name: [a\n", "not YAML: expected ',' or ']', but got '<stream end>' at line 2, column 1"),
        (
            "!!python/object:os.system x",
            "not YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object:os.system' "
            "at line 1, column 1",
        ),
    ],
)
def test_misfits_are_named(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe_from_yaml(text, where="mine.yaml")
    assert str(caught.value) == f"mine.yaml: {message}"


def test_shares_that_grow_are_named() -> None:
    with pytest.raises(UserError, match=r"recipe mine: stages\[1\].share: share 0.7 is more than the 0.5"):
        recipe_from_yaml(GOOD + "  - {site: projector.out, select: max_min, share: 0.7}\n")
