"""Bundles whose manifest lies and is signed anew: refused with one line, or they answer as before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from secateur.runtime import kv
from secateur.runtime import manifest as m
from secateur.runtime.errors import BundleError
from secateur.runtime.session import Session

from .manifest_walk import change, list_places

PARTS = 4


def run_walk(bundle: Path, *options: str) -> str:
    command = [sys.executable, str(Path(__file__).with_name("manifest_walk.py")), str(bundle), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_field_changed_in_every_way(built: Path, part: int) -> None:
    assert run_walk(built, "--part", str(part), "--parts", str(PARTS)) == ""


@pytest.mark.slow
def test_two_fields_changed_at_a_time(built: Path) -> None:
    assert run_walk(built, "--seed", "0", "--count", "400") == ""


def test_the_walk_reaches_every_field(built: Path) -> None:
    manifest = json.loads((built / m.MANIFEST).read_text())
    places = list(list_places(manifest))
    assert {at[0] for at in places if at} == set(manifest)
    assert min(sum(1 for _ in change(manifest, at)) for at in places) > 5


def sign(tiny: ModuleType, bundle: Path, **fields: object) -> str:
    tiny.resign(bundle, **fields)
    with pytest.raises(BundleError) as caught, Session(bundle) as session:
        session.request()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_capacity_is_the_rows_and_the_new_tokens(tiny: ModuleType, bundle: Path) -> None:
    first, *others = json.loads((bundle / m.MANIFEST).read_bytes())["segments"]
    said = sign(tiny, bundle, segments=[{**first, "capacity": 10**9}, *others])
    assert "segment s0: a capacity of 1000000000 is not its 27 rows and 8 new" in said


def lie_about_new_tokens(bundle: Path, new: int) -> dict[str, object]:
    """Consistent in sizes, segments and cache ports."""
    raw = json.loads((bundle / m.MANIFEST).read_bytes())
    grown = new - raw["geometry"]["new_tokens"]
    raw["geometry"]["new_tokens"] = new
    for segment in raw["segments"]:
        segment["capacity"] += grown
    for program in raw["programs"].values():
        for port in (*program["inputs"], *program["outputs"]):
            if port["name"].startswith(("past_", "present_")):
                port["shape"][2] += grown
    return {key: raw[key] for key in ("geometry", "segments", "programs")}


def test_a_lie_that_is_consistent_is_held_against_the_graph(tiny: ModuleType, bundle: Path) -> None:
    said = sign(tiny, bundle, **lie_about_new_tokens(bundle, 10**9))
    assert "is fp32[1, 1, 35, 8] in the graph, fp32[1, 1, 1000000027, 8] in the manifest" in said


def test_caches_are_held_against_the_machines_memory(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "available_memory", lambda: 4096)
    with Session(built) as session, pytest.raises(BundleError, match=r"a request takes .* this machine has 4\.0 KiB"):
        session.request()


def test_a_further_geometry_that_lies_is_refused_before_its_caches_are_made(tiny: ModuleType, bundle: Path) -> None:
    raw = json.loads((bundle / m.MANIFEST).read_bytes())
    own = {k: raw[k] for k in ("recipe", "geometry", "programs", "segments", "position_offset")}
    tiny.resign(bundle, variants=[own | lie_about_new_tokens(bundle, 10**12)])
    with Session(bundle) as session, pytest.raises(BundleError, match=r"geometry 1: a request takes .* GiB of memory"):
        session.request(1)


FORECAST = {"engines": 0, "weights": 0, "caches": 2176, "activations": 0, "buffers": 1, "host": 0}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model__layers": 10**9}, "segments do not cover every layer"),
        ({"model__kv_heads": 10**9}, r"past_key.0 is fp32[1, 1, 35, 8], its segment and the model say fp32[1, 10000"),
        ({"model__head_dim": 9}, "its segment and the model say fp32[1, 1, 35, 9]"),
        ({"geometry__tokens_per_image": 10**9}, "geometry: 1000000000 tokens of media in each of 1 rows"),
        ({"geometry__features_per_image": 2}, "a sequence of 27 is not 24 of text and 2 of media"),
        ({"geometry__batch": 2}, "has shape [1, 3, 16], the sizes say [2, 3]"),
        ({"forecast": FORECAST | {"caches": 10**9}}, "forecast: 1000000000 bytes of caches, the ports say"),
        ({"position_offset": 10**30}, "position_offset"),
        ({"model__image_token": "\ud800"}, "text that is not Unicode"),
        ({"model__image_token": "x" * 100_000}, "model.image_token: String should have at most"),
    ],
)
def test_what_does_not_fit_together(tiny: ModuleType, bundle: Path, change: dict[str, object], says: str) -> None:
    said = sign(tiny, bundle, **change)
    assert says in said
    assert len(said) < 1000


def test_ports_of_one_name_and_caches_that_lack(tiny: ModuleType, bundle: Path) -> None:
    raw = json.loads((bundle / m.MANIFEST).read_bytes())
    inputs = raw["programs"]["decode"]["inputs"]
    assert "program decode has two inputs of one name" in sign(
        tiny, bundle, programs__decode__inputs=inputs + inputs[:1]
    )
    fewer = [port for port in inputs if port["name"] != "past_key.1"]
    assert "program decode has 3 past caches, 2 layers have two each" in sign(
        tiny, bundle, programs__decode__inputs=fewer
    )
    without = [port for port in inputs if port["name"] != "slot.s1"]
    assert "there is no input of decode slot.s1" in sign(tiny, bundle, programs__decode__inputs=without)
