"""docs/manifest.md, its JSON Schema and docs/ports.md say every field, every port, and when ports are there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.matrix.applies import lacks
from tests.matrix.layouts import LAYOUTS

from secateur.compiler.bundle import outline
from secateur.compiler.pipeline import prune, read_source, trace_model
from secateur.compiler.recipe import Recipe
from secateur.passes.recipes import RECIPES
from secateur.runtime.schema import Manifest
from secateur.tools import manifest_page

from .rows import ready

DOCS = Path(__file__).parents[2] / "docs"
AXES = ("qwen2_5_omni", "gemma3", "qwen3_vl")
"""Layouts whose programs have what LLaVA's have not: sound, windows, features of inner layers."""


def test_a_reader_made_of_the_schema_takes_fields_of_later_versions() -> None:
    assert '"additionalProperties": false' not in manifest_page.write_schema()


def test_the_page_and_the_schema_are_what_the_code_says() -> None:
    assert (DOCS / "manifest.md").read_text(encoding="utf-8") == manifest_page.write()
    assert (DOCS / "manifest.schema.json").read_text(encoding="utf-8") == manifest_page.write_schema()


def test_every_field_of_every_part_is_described() -> None:
    parts = manifest_page.list_parts()
    assert len(parts) > 30
    lacking = [
        f"{part.__name__}.{name}"
        for part in parts
        for name, text in manifest_page.describe_fields(part).items()
        if not text
    ]
    assert lacking == []


def list_documented() -> dict[tuple[str, str], set[str]]:
    """(program, in or out) -> ports as docs/ports.md writes them, from its two tables."""
    found: dict[tuple[str, str], set[str]] = {}
    text = (DOCS / "ports.md").read_text(encoding="utf-8")
    programs: list[str] = []
    kind = ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[:2] in (["program", "input"], ["program", "output"]):
            kind = cells[1]
        elif not line.startswith("|"):
            kind = ""
        elif kind and not cells[0].startswith("---"):
            named = re.findall(r"`(\w+)`", cells[0])
            programs = ["prefill", "decode"] if cells[0] == "both" else named or programs
            for program in programs:
                found.setdefault((program, kind), set()).update(re.findall(r"`([^`]+)`", cells[1]))
    return found


def spell(port: str) -> str:
    """``slot.s1`` -> ``slot.<segment>``."""
    stem, dot, _ = port.partition(".")
    what = {"slot": "segment", "positions": "segment", "kept": "stage", "deepstack": "i"}.get(stem, "layer")
    return f"{stem}.<{what}>" if dot else port


def check(manifest: Manifest) -> set[str]:
    """Every port is on the page, and the conditions there hold; returns the ports as the page writes them."""
    documented, seen = list_documented(), set()
    for name, program in manifest.programs.items():
        for kind, ports in (("input", program.inputs), ("output", program.outputs)):
            spelled = {spell(port.name) for port in ports}
            assert spelled <= documented[name, kind], (name, kind, spelled - documented[name, kind])
            seen |= {f"{name} {kind} {port}" for port in spelled}
    vision, prefill, decode = (manifest.programs[name] for name in ("vision", "prefill", "decode"))
    written = {port.name for port in vision.outputs} | {port.name for port in prefill.outputs}
    numbered = manifest.recipe.positions == "compact" and manifest.segments[0].removed > 0
    assert decode.has_input("position") == (not numbered), manifest.recipe.name
    assert {p.name for p in decode.inputs if p.name.startswith("slot.")} == {
        f"slot.{s.name}" for s in manifest.segments
    }
    removes = any(stage.length_out < stage.length_in and not stage.in_decoder for stage in manifest.recipe.stages)
    slots = manifest.recipe.positions == "compact" and removes
    assert prefill.has_input("positions") == (manifest.media is not None and not slots)
    assert vision.has_input("input_features") == bool(manifest.geometry.audio_seconds)
    for port in (*prefill.inputs, *decode.inputs):
        if port.name == "carried" or port.name.startswith(("deepstack.", "positions.")):
            assert port.name in written, "bound to what was written"
    for segment in manifest.segments:
        layers = range(segment.first_layer, segment.last_layer)
        caches = {port.name: port.shape[2] for port in decode.inputs if port.name.startswith("past_key.")}
        assert {caches[f"past_key.{layer}"] for layer in layers} == {segment.capacity}
    return seen


def test_every_port_of_every_recipe_is_on_the_page(pruned: Callable[..., Any]) -> None:
    seen: set[str] = set()
    for name, recipe in RECIPES.items():
        if not lacks(recipe, LAYOUTS["llava"].tower):
            made = pruned(name)
            seen |= check(outline(made.job, made.programs))
    assert {"prefill input kept", "vision output carried", "decode input position"} <= seen


@pytest.mark.slow
@pytest.mark.parametrize("layout", AXES)
def test_every_port_of_other_layouts_is_on_the_page(layout: str, tmp_path: Path) -> None:
    one = LAYOUTS[layout]
    source = read_source(one.write(tmp_path / "model"))
    traced = trace_model(source, one.geometry(), "fp32")
    row: Recipe = ready(one.rows[-1 if layout == "gemma3" else 0], width=64)
    made = prune(traced, row, 0.5)
    seen = check(outline(made.job, made.programs))
    wanted = {
        "qwen2_5_omni": {"vision input input_features", "prefill input positions"},
        "gemma3": {"decode input slot.<segment>"},
        "qwen3_vl": {"prefill input deepstack.<i>", "vision output deepstack.<i>"},
    }[layout]
    assert wanted <= seen


def test_every_step_and_rule_is_on_the_page() -> None:
    """Steps by the table, rules and filters by their names, requirements and text fields by theirs."""
    text = (DOCS / "ports.md").read_text(encoding="utf-8")
    schema = json.loads((DOCS / "manifest.schema.json").read_text(encoding="utf-8"))["$defs"]
    names = [d["properties"][k]["const"] for d in schema.values() for k in ("op", "rule") if k in d["properties"]]
    filters = schema["Resize"]["properties"]["filter"]["enum"]
    assert len(names) > 14
    assert [name for name in [*names, *filters] if f"`{name}`" not in text] == []
