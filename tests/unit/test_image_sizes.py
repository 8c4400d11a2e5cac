"""Images of several sizes in one row: programs, a bundle's answers, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from secateur.compiler import pipeline
from secateur.compiler.bundle import outline
from secateur.compiler.calibrate import calibrate_model
from secateur.compiler.geometry_text import read_geometries
from secateur.compiler.image_sizes import join_kept, split_kept
from secateur.compiler.inputs import random_rows
from secateur.compiler.oracle import Oracle, load_recording_model
from secateur.compiler.parity import Parity, compare_runs
from secateur.compiler.pipeline import RECIPES, Geometry, plan_job, prune, read_source, trace_model
from secateur.compiler.questions import Question
from secateur.compiler.recipe import Recipe, Stage, Term
from secateur.compiler.runs import CompiledRun, EagerBackend, OracleRun, Weights
from secateur.compiler.site import Site
from secateur.runtime.errors import UserError
from secateur.runtime.request import Request
from secateur.runtime.session import Session

from . import tiny_model, tiny_qwen, tiny_qwen_more

SIZES = {"qwen2_5_vl": ((112, 168), (56, 84), (112, 168)), "qwen3_vl": ((64, 96), (128, 64))}


def geometry_of(kind: str) -> Geometry:
    return Geometry(image_size=SIZES[kind], text_tokens=60, new_tokens=4)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any]]:
    """``traced(kind)`` -> the trace of a small model for images of several sizes, and the recording model."""
    root, made = tmp_path_factory.mktemp("sizes"), dict[str, Any]()

    def make(kind: str) -> tuple[Any, Any]:
        if kind not in made:
            few: dict[str, Any] = {"layers": 4}
            if kind == "qwen2_5_vl":
                path = tiny_qwen.write_model(root / kind, vision={"depth": 2, "fullatt_block_indexes": [1]}, **few)
            else:
                path = tiny_qwen_more.write_model(
                    root / kind, kind, vision={"depth": 2, "deepstack_visual_indexes": [0]}, **few
                )
            source = read_source(path)
            made[kind] = trace_model(source, geometry_of(kind)), load_recording_model(source)
        return made[kind]  # type: ignore[no-any-return]

    return make


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [("qwen2_5_vl", "seats"), ("qwen3_vl", "divprune")],
)
def test_programs_equal_the_oracle(traced: Callable[[str], tuple[Any, Any]], kind: str, recipe: str) -> None:
    trace, model = traced(kind)
    pruned = prune(trace, RECIPES[recipe], 0.5, expose=True)
    told = outline(pruned.job, pruned.programs)
    weights = Weights(trace.source, trace.model)
    ours = CompiledRun(told, Request(EagerBackend(pruned.programs.programs, weights), told))
    oracle, found = Oracle(pruned.job, model), Parity()
    compare_runs(ours, OracleRun(oracle), random_rows(told, 2, 2, seed=1), 1, found, referee=oracle)
    assert found.passed
    assert found.chose_equally == 2
    assert found.kind("features").scale > 0


def test_features_are_those_of_all_images_at_once(traced: Callable[[str], tuple[Any, Any]]) -> None:
    trace, model = traced("qwen3_vl")
    pruned, facts = prune(trace, RECIPES["none"]), trace.source.vision
    programs = pruned.programs.programs
    request = Request(
        EagerBackend(programs, Weights(trace.source, trace.model)), told := outline(pruned.job, pruned.programs)
    )
    pixels = random_rows(told, 1, 1, seed=2)[0].pixel_values
    merge = trace.source.config.vision_config.spatial_merge_size
    grids = torch.tensor([[1, image.grid[0] * merge, image.grid[1] * merge] for image in facts.images])
    with torch.no_grad():
        want = model.get_image_features(torch.from_numpy(pixels), image_grid_thw=grids, return_dict=True).pooler_output
    np.testing.assert_allclose(request.encode(pixels)[0], torch.cat(list(want)).numpy(), atol=1e-4)
    assert [len(each) for each in want] == [size.tokens for size in told.geometry.sizes]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    random = np.random.default_rng(5)
    return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES["qwen2_5_vl"]]


def test_a_bundle_answers_as_transformers(
    traced: Callable[[str], tuple[Any, Any]], pictures: list[Image.Image], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    trace, model = traced("qwen2_5_vl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "trace_model", lambda source, geometry, dtype: trace)
        pipeline.compile(trace.source.path, tmp_path / "bundle", geometry=geometry_of("qwen2_5_vl"))
    with Session(tmp_path / "bundle", threads=1) as session:
        told = session.manifest
        answer = session.generate("what?", images=pictures, ignore_eos=True)
        ids = session.processor.encode("what?")
        with pytest.raises(UserError, match="compiled for 3 per row"):
            session.generate("what?", images=pictures[:2])
    assert Geometry.of(told) == geometry_of("qwen2_5_vl")
    assert "3 image(s) of 112x168, 56x84, 112x168" in told.words
    made = Qwen2VLImageProcessorPil(**json.loads((trace.source.path / "preprocessor_config.json").read_text()))
    seen = made(pictures, return_tensors="pt")
    whole = torch.tensor([ids])
    with torch.no_grad():
        want = model.generate(
            input_ids=whole, attention_mask=torch.ones_like(whole), pixel_values=seen["pixel_values"],
            image_grid_thw=seen["image_grid_thw"], mm_token_type_ids=(whole == tiny_qwen.IMAGE).int(),
            do_sample=False, min_new_tokens=4, max_new_tokens=4,
        )  # fmt: skip
    assert answer.tokens == want[0, len(ids) :].tolist()


def test_what_each_size_keeps_is_told_apart(traced: Callable[[str], tuple[Any, Any]]) -> None:
    trace, _ = traced("qwen2_5_vl")
    job = plan_job(trace.source, trace.geometry, RECIPES["divprune"], 0.25)
    assert [size.tokens for size in outline(job).geometry.sizes] == [24, 6, 24]
    assert [size.features for size in outline(job).geometry.sizes] == job.items_left == [6, 2, 6]
    kept = torch.tensor([0, 1, 2, 3, 22, 23, 25, 29, 30, 31, 40, 41, 50, 53])
    parts = split_kept(job, 0, kept)
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3, 22, 23, 24, 25, 34, 35, 44, 47], [1, 5]]
    assert torch.equal(join_kept(job, 0, parts), kept)


def test_how_sizes_are_written(tmp_path: Path) -> None:
    pair = Geometry(image_size=((448, 448), (224, 336)))
    assert pair.images == 2
    file = tmp_path / "sizes.yaml"
    file.write_text("- {image_size: [448x448, 224x336]}\n- {images: 2, image_size: [448, 224]}\n")
    assert read_geometries([str(file)], {}) == (pair, Geometry(images=2, image_size=(448, 224)))
    assert read_geometries(["image_size=448x448,224x336,new_tokens=9"], {}) == (
        Geometry(image_size=((448, 448), (224, 336)), new_tokens=9),
    )
    assert Geometry(image_size=((56, 56), (56, 56))) == Geometry(images=2, image_size=(56, 56))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": ((56, 56), (28, 28)), "images": 3}, "2 sizes for 3 images"),
        ({"image_size": ((56, 56), (28, 28)), "frames": 4}, "2 sizes for a video"),
        ({"image_size": ((56, 56), (28, 0))}, "image_size is 28x0"),
        ({"image_size": (56,)}, "image_size is 56"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Geometry(**options)


def test_what_presumes_equal_images_is_refused(traced: Callable[[str], tuple[Any, Any]], tmp_path: Path) -> None:
    trace, _ = traced("qwen2_5_vl")
    for site, scope, wanted in (
        (Site("projector.out"), "whole", "image"),
        (Site("decoder.layer", 1), "image", "whole"),
    ):
        stage = Stage(site, Term("max_min"), scope=scope)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=f"different numbers of tokens; use scope '{wanted}' there"):
            plan_job(trace.source, trace.geometry, Recipe("own", "", "", (stage,)), 0.5)
    with pytest.raises(UserError, match="whole grid of patches, and images of several sizes have several; compile for"):
        plan_job(trace.source, trace.geometry, RECIPES["evs"], 0.5)
    with pytest.raises(UserError, match="give multiples of 28"):
        read_source(trace.source.path, Geometry(image_size=((56, 56), (56, 60))))
    asked = [Question((tmp_path, tmp_path, tmp_path), "what?", None, "here")]
    with pytest.raises(UserError, match="scores before the decoder, where images of several sizes are apart"):
        calibrate_model(
            trace.source.path, asked, recipe="vispruner_siglip", plan=plan_job, image_size=SIZES["qwen2_5_vl"]
        )
    fixed = tiny_model.write_config(tmp_path / "llava")
    with pytest.raises(UserError, match="have the size its configuration says; leave --image-size out"):
        read_source(fixed, Geometry(image_size=((56, 56), (28, 28))))
