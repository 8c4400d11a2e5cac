"""What a recipe costs and saves, from a configuration alone; FLOPs against a count by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur.compiler import pipeline
from secateur.compiler.explain import Explanation
from secateur.compiler.flops import count_flops
from secateur.compiler.function import trace_function
from secateur.compiler.pipeline import Geometry, count_unpruned, explain
from secateur.runtime.errors import UserError
from secateur.tools import cli

from .tiny_model import VOCABULARY, write_config

WIDTH, HEADS, HEAD, KV, HIDDEN = 64, 4, 16, 2, 96
TOWER = 32
TEXT, NEW, PATCHES = 24, 8, 16
GEOMETRY = Geometry(text_tokens=TEXT, new_tokens=NEW)
SIZES = ("--text-tokens", "24", "--new-tokens", "8")


def layer_flops(rows: int, keys: int | None = None) -> int:
    """A decoder layer on ``rows`` fresh rows, or on one row that attends to ``keys`` slots."""
    projections = WIDTH * WIDTH * 2 + 2 * WIDTH * KV * HEAD
    attention = 4 * HEADS * HEAD * rows * rows // 2 if keys is None else 4 * HEADS * HEAD * keys
    return 2 * rows * (projections + 3 * WIDTH * HIDDEN) + attention


HEAD_FLOPS = 2 * WIDTH * VOCABULARY
TOWER_LAYER = 2 * (PATCHES + 1) * (4 * TOWER * TOWER + 2 * TOWER * 48) + 4 * TOWER * (PATCHES + 1) ** 2


def projector_flops(rows: int) -> int:
    return 2 * rows * (TOWER * WIDTH + WIDTH * WIDTH)


VISION = 2 * PATCHES * TOWER * 3 * 64 + 2 * TOWER_LAYER  # patches, and the two layers the projector sees


def flops(pruned: Any) -> dict[str, int]:
    return {name: count_flops(program) for name, program in pruned.programs.programs.items()}


def test_flops_of_the_unpruned_model(pruned: Callable[..., Any]) -> None:
    length = TEXT + PATCHES
    assert flops(pruned("none")) == {
        "vision": VISION + projector_flops(PATCHES),
        "prefill": 4 * layer_flops(length) + HEAD_FLOPS,
        "decode": 4 * layer_flops(1, length + NEW) + HEAD_FLOPS,
    }


def test_flops_of_a_pruned_decoder(pruned: Callable[..., Any]) -> None:
    """Layer 0 sees all 40 rows, the others 32; the score is one query row against 40 keys."""
    assert flops(pruned("fastv")) == {
        "vision": VISION + projector_flops(PATCHES),
        "prefill": layer_flops(40) + 3 * layer_flops(32) + HEAD_FLOPS + 2 * HEADS * HEAD * 40,
        "decode": layer_flops(1, 48) + 3 * layer_flops(1, 40) + HEAD_FLOPS,
    }


def test_flops_of_a_pruned_encoder(pruned: Callable[..., Any]) -> None:
    """The projector and every decoder layer see 4 of 16 patches; the score is CLS against 17 keys."""
    assert flops(pruned("fastervlm")) == {
        "vision": VISION + projector_flops(4) + 2 * TOWER * (PATCHES + 1),
        "prefill": 4 * layer_flops(28) + HEAD_FLOPS,
        "decode": 4 * layer_flops(1, 36) + HEAD_FLOPS,
    }


def test_flops_of_a_loop_count_every_step() -> None:
    scan = torch._higher_order_ops.scan

    def walk(state: torch.Tensor, steps: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return scan(lambda s, x: (torch.matmul(s, weight) + x, s.sum(-1)), state, steps)[0]

    shapes = {"state": (2, 3), "steps": (5, 2, 3), "weight": (3, 3)}
    feed = {name: torch.rand(shape) for name, shape in shapes.items()}
    assert count_flops(trace_function("walk", walk, feed, ("state",))) == 5 * 2 * 2 * 3 * 3


def test_flops_follow_the_batch(pruned: Callable[..., Any]) -> None:
    one, two = flops(pruned("fastv")), flops(pruned("fastv", batch=2))
    assert {n: 2 * f for n, f in one.items()} == two
    images = flops(pruned("fastv", batch=2, images=2))
    assert images["vision"] == 2 * two["vision"]


@pytest.fixture(scope="module")
def explained(traced: Callable[..., Any]) -> Callable[..., Explanation]:
    """``explained(recipe, keep)``: the session's trace, so it takes no time; nothing else is replaced."""

    def make(recipe: str, keep: float | None = None) -> Explanation:
        trace = traced()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "trace_model", lambda *_: trace)
            return explain(recipe, trace.source.path, keep=keep, geometry=trace.geometry)

    return make


def test_numbers_of_a_decoder_recipe(explained: Callable[..., Explanation], pruned: Callable[..., Any]) -> None:
    found = explained("pyramiddrop", 0.25)
    assert (found.recipe, found.keep, found.positions, found.evidence) == (
        "pyramiddrop", 0.25, "compact", "authors' code",
    )  # fmt: skip
    assert found.visual_tokens == (16, 10, 6, 4)
    assert found.mean_keep == (16 + 10 + 6 + 4) / 64
    assert [(s.site, s.groups, s.length_in, s.length_out) for s in found.stages] == [
        ("decoder.layer[1]", 1, 16, 10), ("decoder.layer[2]", 1, 10, 6), ("decoder.layer[3]", 1, 6, 4),
    ]  # fmt: skip
    assert found.stages[0].signals == {"last_query_attention": {"projections": "next"}}
    row = 2 * KV * HEAD * 4  # keys and values of one layer and slot, in bytes
    assert (found.kv_bytes.before, found.kv_bytes.after) == (4 * 48 * row, (48 + 42 + 38 + 36) * row)
    assert {n: c.after for n, c in found.flops.items()} == flops(pruned("pyramiddrop", 0.25))
    assert {n: c.before for n, c in found.flops.items()} == count_unpruned(pruned("pyramiddrop", 0.25).traced)


def test_the_unpruned_model_saves_nothing(explained: Callable[..., Explanation]) -> None:
    found = explained("none")
    assert (found.stages, found.visual_tokens, found.mean_keep) == ((), (16,) * 4, 1.0)
    assert {c.ratio for c in (*found.flops.values(), found.kv_bytes)} == {1.0}


def test_it_prints_itself(explained: Callable[..., Explanation]) -> None:
    lines = str(explained("visionzip", 0.5)).splitlines()
    assert lines[0] == "recipe visionzip keep 0.5 mean keep 0.5 positions compact"
    assert lines[2] == "  link https://arxiv.org/abs/2412.04467"
    assert lines[5] == (
        "model llama (llava, llama decoder of 4 layers) fp32 batch 1 images 1 of 16 tokens text tokens 24 new tokens 8"
    )
    assert lines[6:12] == [
        "stage0 vision.out scope image tokens 1x16 -> 1x8",
        "  score cls_attention_mean(heads='sum')",
        "  select top_k_and_uniform(contextual=0.156)",
        "  merge nearest_target(average='assigned')",
        "  signal cls_attention heads=split layer=read",
        "  signal keys layer=read",
    ]
    assert lines[12] == "layers 0-3: 8 visual + 24 text"
    assert [line.split()[:2] for line in lines[13:16]] == [["flops", n] for n in ("vision", "prefill", "decode")]
    assert lines[16] == "kv bytes 49152 -> 40960 (83.3%)"
    assert len(lines) == 17


def test_its_json_says_the_same(explained: Callable[..., Explanation]) -> None:
    found = json.loads(json.dumps(explained("fastv").as_json()))
    assert found["layers"][1] == {"layer": 1, "visual": 8, "text": 24, "length": 32, "cached": 32}
    assert found["kv_bytes"] == {"before": 49152, "after": 43008, "ratio": 0.875}
    assert found["flops"]["vision"]["ratio"] == 1.0
    assert found["stages"][0]["signals"] == {"last_query_attention": {"projections": "previous"}}
    sizes = {"batch": 1, "images": 1, "text_tokens": 24, "new_tokens": 8, "image_size": None}
    media = {"frames": 0, "fps": 2.0, "audio_seconds": 0, "audio_in_video": True}
    assert found["geometry"] == sizes | media


def secateur_verb(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, out, err


def test_the_verb_needs_the_configuration_only(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, traced: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Really traced, from a directory without weights or tokenizer; nothing is written there."""
    source = write_config(tmp_path / "model", layers=2)
    code, out, err = secateur_verb(capsys, "explain", "fastv", source, "--keep", "0.25", *SIZES)
    assert code == 0
    assert [line.split()[0] for line in err.splitlines()] == ["trace", "prune"]
    lines = [line.split() for line in out.splitlines()]
    assert ["stage0", "decoder.layer[1]", "score", "last_query_attention_mean(heads='mean')"] in lines
    assert ["signal", "last_query_attention,", "projections", "previous"] in lines
    assert [w for w in lines if w and "-" in w[0][1:2]] == [
        ["0-0", "16", "24", "40", "40"],
        ["1-1", "4", "24", "28", "28"],
    ]
    assert [w[:2] for w in lines if w[1:2] == ["FLOPs"]] == [[n, "FLOPs"] for n in ("vision", "prefill", "decode")]
    assert [w[-1] for w in lines if w[:2] == ["KV", "caches"]] == ["87.5%"]
    assert [p.name for p in source.iterdir()] == ["config.json"]


def test_the_verb_prints_json(
    capsys: pytest.CaptureFixture[str], traced: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = traced()
    monkeypatch.setattr(pipeline, "trace_model", lambda *_: trace)
    code, out, err = secateur_verb(capsys, "-q", "explain", "random", trace.source.path, "--json", *SIZES)
    assert (code, err) == (0, "")
    assert json.loads(out)["visual_tokens"] == [8] * 4


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("fastvv",), "--recipe: no recipe 'fastvv' (available: adaptinfer, "),
        (("fastv", "--keep", "2"), "--keep: keep ratio 2 is out of (0, 1]; 1 keeps every visual token, "),
        (("fastv", "--dtype", "fp8"), "--dtype: no dtype 'fp8' (available: fp32, fp16, bf16)"),
        (
            ("pyramiddrop",),
            "recipe pyramiddrop: 2 layers are too few for the stages at decoder.layer; use a deeper model",
        ),
        (("fastv", "--images", "0"), "geometry: images is 0; give --images a number of at least 1"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, text: str
) -> None:
    monkeypatch.setattr(pipeline, "trace_model", lambda *_: pytest.fail("the model was traced"))
    recipe, *options = arguments
    code, out, err = secateur_verb(capsys, "explain", recipe, write_config(tmp_path, layers=2), *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {text}")


def test_the_public_name_is_the_pipelines() -> None:
    assert secateur.explain is explain
    with pytest.raises(UserError, match="no such directory"):
        secateur.explain("none", "/nowhere")
