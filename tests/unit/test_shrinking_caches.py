"""Recipes whose stages take rows out of earlier layers' caches too: decode, memory and answers against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.compiler import pipeline
from secateur.compiler.compose import compose
from secateur.compiler.inputs import random_rows
from secateur.compiler.oracle import Oracle, RowRun
from secateur.compiler.parity import TOLERANCE, likeliest
from secateur.compiler.pipeline import Geometry, plan_job, read_source, verify
from secateur.compiler.recipe import Part, Recipe, Site, Stage, Term
from secateur.compiler.runs import CompiledRun
from secateur.passes.recipe_file import digest_recipe, load_recipe, recipe_from_yaml, recipe_to_yaml
from secateur.runtime.errors import UserError
from secateur.runtime.manifest import read_manifest
from secateur.runtime.session import Session
from secateur.tools import cli

from . import tiny_onevision

LAYERS, TEXT, NEW = 4, 24, 8
GEOMETRY = Geometry(batch=3, images=2, text_tokens=TEXT, new_tokens=NEW)


def write_recipe(
    path: Path, *, cache: str = "shrink", positions: str = "original", exits: bool = False, vision: bool = False
) -> str:
    """Two stages inside the decoder that choose by attention, one more in front or one that leaves none behind."""
    choose = "score: {name: last_query_attention_mean, options: {heads: max}}, select: top_k, scope: whole"
    stages = [
        f"{{site: 'decoder.layer[{layer}]', {choose}, share: {share}, "
        f"signals: {{last_query_attention: {{projections: {projections}}}}}}}"
        for layer, share, projections in ((1, 0.5, "own"), (2, 0.25, "next"))
    ]
    if vision:
        stages.insert(
            0, "{site: vision.out, score: {name: seeded_random, options: {seed: 3}}, select: top_k, share: 0.8}"
        )
    if exits:
        stages.append("{site: 'decoder.layer[3]', select: nothing, share: 0.0, scope: whole}")
    lines = ["name: shrinks", f"positions: {positions}", f"cache: {cache}", "identity_at_one: false", "stages:"]
    path.write_text("\n".join([*lines, *(f"  - {stage}" for stage in stages)]) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def models(model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model directory by the name of its decoder, or of LLaVA-OneVision."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name != "onevision":
            return model_dir(name)
        if name not in made:
            made[name] = tiny_onevision.write_model(tmp_path_factory.mktemp(name) / "model")
        return made[name]

    return make


@pytest.fixture(scope="module")
def trace_for(models: Callable[[str], Path]) -> Callable[[str], Any]:
    """A model's trace for three rows of two images."""
    made: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in made:
            made[name] = pipeline.trace_model(read_source(models(name)), GEOMETRY)
        return made[name]

    return make


@pytest.fixture(scope="module")
def compile_for(
    trace_for: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, str]]:
    """``compile_for(model, target, **recipe)`` -> a bundle and its recipe."""
    made: dict[tuple[Any, ...], tuple[Path, str]] = {}

    def make(model: str, target: str = "onnxruntime", **recipe: Any) -> tuple[Path, str]:
        key = (model, target, *sorted(recipe.items()))
        if key not in made:
            trace, folder = trace_for(model), tmp_path_factory.mktemp("shrinks")
            file = write_recipe(folder / "recipe.yaml", **recipe)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pipeline, "trace_model", lambda *_: trace)
                pipeline.compile(trace.source.path, folder / "bundle", recipe=file, geometry=GEOMETRY, target=target)
            made[key] = folder / "bundle", file
        return made[key]

    return make


# -- against the oracle -----------------------------------------------------------------------------------

CASES = [
    ("llama", "onnxruntime", {}),
    ("llama", "onnxruntime", {"exits": True}),
    ("llama", "plain", {"exits": True, "positions": "compact"}),
    ("onevision", "onnxruntime", {"exits": True, "vision": True}),
    ("onevision", "onnxruntime", {"positions": "compact"}),
]


@pytest.mark.parametrize(("model", "target", "recipe"), CASES)
def test_compiled_programs_hold_and_answer_what_the_oracle_does(
    model: str, target: str, recipe: dict[str, Any], models: Callable[[str], Path], compile_for: Callable[..., Any]
) -> None:
    """Three rows of different length in one batch: choices, every layer's cache, logits and greedy tokens."""
    bundle, file = compile_for(model, target, **recipe)
    manifest = read_manifest(bundle)
    oracle = Oracle(plan_job(read_source(models(model)), GEOMETRY, load_recipe(file), None))
    items = [replace(item, forced_tokens=()) for item in random_rows(manifest, 3, NEW, seed=5)]
    assert len({len(item.input_ids) for item in items}) == 3
    with Session(bundle, threads=1) as session:
        found = CompiledRun(manifest, session.request()).run(items, greedy=NEW)
    for item, ours in zip(items, found, strict=True):
        theirs = oracle.run(item.input_ids, torch.from_numpy(item.pixel_values), greedy=NEW - 1)
        assert likeliest(ours) == likeliest(theirs)
        assert all(torch.equal(ours.kept[name], kept) for name, kept in theirs.kept.items() if name in ours.kept)
        assert len({rows.shape for rows in theirs.keys}) == 1  # all layers hold equally many
        pairs = [*zip(ours.keys, theirs.keys, strict=True), *zip(ours.values, theirs.values, strict=True)]
        for one, other in [*pairs, *zip(ours.logits, theirs.logits, strict=True)]:
            assert one.shape == other.shape
            scale = max(1.0, float(other.abs().max()))  # as parity has it
            torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE * scale)


def test_verify_compares_every_layer(models: Callable[[str], Path], compile_for: Callable[..., Any]) -> None:
    bundle, file = compile_for("llama")
    found = verify(bundle, models("llama"), recipe=file, rows=3, threads=1)
    assert found.parity is not None
    assert found.passed, found.parity
    compared = set(found.parity.differences)
    assert {f"{kind}.{layer}" for kind in ("key", "value") for layer in range(LAYERS)} <= compared


@pytest.mark.parametrize("exits", [False, True])
def test_the_oracle_holds_the_survivors_rows_of_what_ragged_caches_hold(
    exits: bool, models: Callable[[str], Path], tmp_path: Path
) -> None:
    """Counted token by token, with nothing of the oracle's but what its stages kept."""
    source, geometry = read_source(models("llama")), Geometry(1, 2, TEXT, NEW)
    ids = [1, 50, *[3] * 16, 60, *[3] * 16, 70, 71]
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    runs: dict[str, RowRun] = {}
    for cache in ("ragged", "shrink"):
        recipe = load_recipe(write_recipe(tmp_path / f"{cache}.yaml", cache=cache, exits=exits))
        runs[cache] = Oracle(plan_job(source, geometry, recipe, None)).run(ids, pixels, forced_tokens=[80])
    ragged, shrunk = runs["ragged"], runs["shrink"]
    assert torch.equal(ragged.kept["stage1"], shrunk.kept["stage1"])
    tokens = [slot for slot, token in enumerate(ids) if token == 3]
    after_first = [tokens[i] for i in ragged.kept["stage0"]]
    after_second = [] if exits else [after_first[i] for i in ragged.kept["stage1"]]
    held = [slot for slot, token in enumerate(ids) if token != 3 or slot in after_second]
    for layer in range(2):  # layer 1 stands behind the first stage
        seen = [slot for slot, token in enumerate(ids) if token != 3 or layer == 0 or slot in after_first]
        rows = [seen.index(slot) for slot in held]
        for one, other in ((shrunk.keys, ragged.keys), (shrunk.values, ragged.values)):
            assert torch.equal(one[layer][:, :-1], other[layer][:, rows])
    assert {len(rows[0]) for rows in shrunk.keys} == {len(held) + 1}
    assert torch.equal(shrunk.logits[0], ragged.logits[0])  # prefill is the same
    assert float((shrunk.logits[1] - ragged.logits[1]).abs().max()) > 100 * TOLERANCE  # decode is not


# -- what it saves, and what is said ----------------------------------------------------------------------


def test_explain_and_inspect_say_what_decode_saves(
    compile_for: Callable[..., Any], trace_for: Callable[[str], Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bundle, file = compile_for("llama", exits=True)
    trace = trace_for("llama")
    monkeypatch.setattr(pipeline, "trace_model", lambda *_: trace)
    shrunk, ragged = (
        pipeline.explain(recipe, trace.source.path, geometry=GEOMETRY)
        for recipe in (file, write_recipe(tmp_path / "r.yaml", cache="ragged", exits=True))
    )
    row = 3 * 2 * 2 * 16 * 4  # keys and values of one layer and slot: batch 3, two heads of 16, four bytes
    assert shrunk.visual_tokens == ragged.visual_tokens == (32, 16, 8, 0)
    assert (shrunk.cached_tokens, ragged.cached_tokens) == ((0,) * 4, (32, 16, 8, 0))
    assert shrunk.kv_bytes.after == 4 * (TEXT + NEW) * row
    assert ragged.kv_bytes.after == (4 * (TEXT + NEW) + 32 + 16 + 8) * row
    assert shrunk.flops["prefill"] == ragged.flops["prefill"]
    assert ragged.flops["decode"].after - shrunk.flops["decode"].after == 3 * 4 * 4 * 16 * (32 + 16 + 8)
    assert str(shrunk).splitlines()[0].endswith(" positions original cache shrink")
    assert f"layers 0-0: 32 visual + {TEXT} text; caches keep 0 visual" in str(shrunk)
    assert "cache" not in str(ragged).replace("caches", "")
    layer = shrunk.as_json()["layers"][0]
    assert (layer["length"], layer["cached"]) == (TEXT + 32, TEXT)
    manifest = read_manifest(bundle)
    assert manifest.recipe.cache == "shrink"
    assert [(s.length, s.removed, s.evicted, s.capacity) for s in manifest.segments] == [
        (56, 0, 32, 32), (40, 16, 16, 32), (32, 24, 8, 32), (24, 32, 0, 32),
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        cli.main(["inspect", str(bundle)])
    out = capsys.readouterr().out
    assert "positions original, cache shrink" in " ".join(out.split())
    assert [line.split()[:6] for line in out.splitlines() if line.startswith("s0 ")] == [
        ["s0", "0-0", "56", "32", "24", "32"]
    ]


def test_an_answer_fills_the_caches_to_the_last_slot(compile_for: Callable[..., Any]) -> None:
    bundle, _ = compile_for("llama", exits=True)
    manifest = read_manifest(bundle)
    rows = random_rows(manifest, 64, NEW, seed=0)
    longest = replace(max(rows, key=lambda row: len(row.input_ids)), forced_tokens=())
    assert len(longest.input_ids) == manifest.geometry.sequence
    with Session(bundle, threads=1) as session:
        (*_, row) = CompiledRun(manifest, session.request()).run([longest] * 3, greedy=NEW + 1)
    assert {keys.shape[1] for keys in row.keys} == {manifest.segments[0].capacity}


# -- the field --------------------------------------------------------------------------------------------


def test_a_file_names_the_policy_and_the_digest_covers_it(tmp_path: Path) -> None:
    shrinks = load_recipe(write_recipe(tmp_path / "recipe.yaml"))
    assert recipe_from_yaml(recipe_to_yaml(shrinks)) == shrinks
    ragged = replace(shrinks, cache="ragged")
    assert "cache" not in recipe_to_yaml(ragged)
    assert digest_recipe(ragged) != digest_recipe(shrinks)
    with pytest.raises(UserError, match=r"cache: no choice 'small' .*ragged, shrink"):
        recipe_from_yaml(recipe_to_yaml(shrinks).replace("cache: shrink", "cache: small"))


def test_merges_behind_a_layer_are_refused() -> None:
    merges = Stage(Site("decoder.layer", 2), Term("top_k"), Term("tokens_norm"), Term("nearest_target"), share=0.5)
    with pytest.raises(UserError, match=r"stages\[0\].merge: merge 'nearest_target' mixes hidden rows.*cache 'ragged'"):
        Recipe("mine", "", "", (merges,), cache="shrink")
    for site in (Site("decoder.layer", 0), Site("vision.out")):  # no layer before them holds a cache
        assert Recipe("mine", "", "", (replace(merges, site=site),), cache="shrink").cache == "shrink"


def test_stacked_parts_agree_inside_the_decoder() -> None:
    def row(name: str, cache: Any, kind: str, layer: int | None = None) -> Part:
        return Part(Recipe(name, "", "", (Stage(Site(kind, layer), Term("top_k"), Term("t")),), cache=cache), 0.5)

    shrinks, ragged = row("b", "shrink", "decoder.layer", 2), row("c", "ragged", "decoder.layer", 3)
    assert compose("a+b", [row("a", "ragged", "vision.out"), shrinks]).cache == "shrink"
    assert compose("a+c", [row("a", "shrink", "vision.out"), ragged]).cache == "ragged"
    with pytest.raises(UserError, match="b has cache 'shrink', c 'ragged', both inside the decoder"):
        compose("b+c", [shrinks, ragged])
