"""LLaVA-OneVision: a video, whose frames are resized behind the projector and share one row behind all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from secateur.compiler import pipeline
from secateur.compiler.bundle import outline
from secateur.compiler.inputs import random_rows
from secateur.compiler.oracle import Oracle
from secateur.compiler.parity import Parity, compare_runs
from secateur.compiler.pipeline import Geometry, read_source
from secateur.compiler.pooled import Pooled, bilinear_weights
from secateur.compiler.recording import load_recording_model
from secateur.compiler.runs import CompiledRun, EagerBackend, OracleRun, Weights
from secateur.compiler.trace import Traced, trace_model
from secateur.passes.recipes import RECIPES
from secateur.passes.units import mean_units, sum_units
from secateur.runtime.errors import UserError
from secateur.runtime.manifest import read_manifest
from secateur.runtime.request import Request
from secateur.runtime.session import Session

from .layout_checks import check_found
from .tiny_model import IMAGE
from .tiny_onevision import SIDE, VIDEO, write_model

NEW, TEXT, FRAMES = 6, 16, 4
SEEN = FRAMES * 4
"""Tokens of a video: frames of three by three patches become two by two tokens each."""
PROMPTS = ([70, 71], [80, 81, 82, 83]), ([90], [91, 92])
"""Words before and behind the video."""
GEOMETRY = Geometry(batch=2, frames=FRAMES, text_tokens=TEXT, new_tokens=NEW)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("video") / "model")


@pytest.fixture(scope="module")
def traced(source: Path) -> Traced:
    return trace_model(read_source(source), GEOMETRY)


@pytest.fixture(scope="module")
def model(traced: Traced) -> Any:
    return load_recording_model(traced.source)


@pytest.fixture(scope="module")
def bundle(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "bundle"
    pipeline.compile(source, out, geometry=GEOMETRY)
    return out


# -- the unpruned model -----------------------------------------------------------------------------------


def test_an_unpruned_bundle_answers_as_transformers_does(source: Path, bundle: Path) -> None:
    from transformers import AutoModelForImageTextToText

    theirs = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    pixels = np.random.default_rng(0).standard_normal((2, FRAMES, 3, SIDE, SIDE)).astype(np.float32)
    wanted = []
    for row, (before, behind) in enumerate(PROMPTS):
        ids = torch.tensor([[*before, *[VIDEO] * (SEEN + 1), *behind]])
        with torch.no_grad():
            wanted.append(
                theirs.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids),
                    pixel_values_videos=torch.from_numpy(pixels[row : row + 1]), do_sample=False, min_new_tokens=NEW,
                    max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True,
                )
            )  # fmt: skip
    with Session(bundle, threads=1) as session:
        sizes = session.manifest.geometry
        ids, lengths = np.zeros((2, sizes.sequence), np.int64), np.zeros(2, np.int64)
        for row, (before, behind) in enumerate(PROMPTS):
            tokens = [*before, *[IMAGE] * (SEEN + 1), *behind]
            ids[row, : len(tokens)], lengths[row] = tokens, len(tokens)
        request = session.request()
        flat = pixels.reshape(2 * FRAMES, 3, SIDE, SIDE)
        seen = [session.prefill(request, ids, lengths, pixel_values=flat)]
        for _ in range(NEW - 1):
            seen.append(session.decode(request, seen[-1].argmax(-1)))
    for row, want in enumerate(wanted):
        assert [int(logits[row].argmax()) for logits in seen] == want.sequences[0, -NEW:].tolist()
        for step, logits in enumerate(want.logits):
            np.testing.assert_allclose(seen[step][row], logits[0].numpy(), rtol=0, atol=1e-4)
        assert len(set(want.sequences[0, -NEW:].tolist())) > 2


def test_a_session_reads_frames_of_the_towers_size(bundle: Path) -> None:
    """Resized without padding, each as an image of its own would be."""
    frames = np.random.default_rng(1).integers(0, 256, (FRAMES, 20, 45, 3), dtype=np.uint8)
    with Session(bundle, threads=1) as session:
        inputs = session.processor(["<video>what?", "tell <video> more"], videos=[[frames], [frames]])
        assert inputs.prompt_ids(0).count(IMAGE) == SEEN + 1
        assert inputs.pixel_values.shape == (2 * FRAMES, 3, SIDE, SIDE)
        resized = Image.fromarray(frames[2]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        mean, std = np.array([[[0.5]], [[0.4]], [[0.3]]]), 0.25
        want = (np.asarray(resized).transpose(2, 0, 1) / 255 - mean) / std
        np.testing.assert_allclose(inputs.pixel_values[2], want, rtol=0, atol=1e-5)
        answers = session.generate(["<video>what?", "tell <video> more"], videos=[[frames], [frames]], max_new_tokens=2)
        assert [len(answer.tokens) for answer in answers] == [2, 2]
        with pytest.raises(UserError, match=r"1 image\(s\), the bundle was compiled for a video"):
            session.processor(["<video>a", "<video>b"], [[Image.new("RGB", (9, 9))]] * 2)


def test_the_manifest_counts_a_video_as_one_item(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    sizes = manifest.geometry
    assert (sizes.images, sizes.frames, sizes.tokens_per_image, sizes.features_per_image) == (1, FRAMES, SEEN, SEEN + 1)
    assert (sizes.extra_rows, sizes.features, sizes.patches, sizes.fixed_tokens) == (1, SEEN + 1, SEEN, TEXT + 1)
    assert sizes.sequence == TEXT + SEEN + 1
    assert manifest.notes == []
    assert Geometry.of(manifest) == GEOMETRY


# -- pruned -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "left"),
    [("none", SEEN), ("divprune", SEEN // 2), ("vispruner_siglip", SEEN // 2), ("fastv", SEEN), ("pyramiddrop", SEEN)],
)
def test_pruned_programs_are_the_oracles(traced: Traced, model: Any, name: str, left: int) -> None:
    recipe = RECIPES[name]
    pruned = pipeline.prune(traced, recipe, 0.5 if recipe.stages else None, expose=True)
    assert pruned.job.features_per_row == left + 1
    told = outline(pruned.job, pruned.programs)
    weights = Weights(traced.source, traced.model)
    ours = CompiledRun(told, Request(EagerBackend(pruned.programs.programs, weights), told))
    found = Parity()
    compare_runs(ours, OracleRun(Oracle(pruned.job, model)), random_rows(told, 2, 2, seed=1), 2, found)
    check_found(found, 2)


def test_fresh_numbering_counts_the_row_behind_the_video(traced: Traced, model: Any, write_recipe: Any) -> None:
    recipe = pipeline.load_recipe(write_recipe("projector.out", "compact"))
    pruned = pipeline.prune(traced, recipe)
    told = outline(pruned.job, pruned.programs)
    weights = Weights(traced.source, traced.model)
    ours = CompiledRun(told, Request(EagerBackend(pruned.programs.programs, weights), told))
    found = Parity()
    compare_runs(ours, OracleRun(Oracle(pruned.job, model)), random_rows(told, 2, 2, seed=2), 2, found)
    check_found(found, 2)


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[[str, str], str]:
    def write(site: str, positions: str = "original") -> str:
        stage = f"{{site: '{site}', score: {{name: seeded_random, options: {{seed: 3}}}}, select: top_k, share: 0.5}}"
        path = tmp_path / "mine.yaml"
        path.write_text(f"name: mine\npositions: {positions}\nstages:\n  - {stage}\n")
        return str(path)

    return write


# -- stages count tokens, not patches ---------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(27, 14), (3, 2), (4, 2), (5, 3), (9, 5), (1, 1), (2, 5)])
def test_weights_are_those_of_bilinear_interpolation(before: int, after: int) -> None:
    values = torch.randn(1, 1, before, before, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = torch.nn.functional.interpolate(values, size=(after, after), mode="bilinear")[0, 0]
    weights = torch.tensor(bilinear_weights(before, after), dtype=torch.float64)
    torch.testing.assert_close(weights @ values[0, 0] @ weights.t(), want, rtol=0, atol=1e-12)


def test_numbers_of_patches_become_those_of_tokens() -> None:
    """What is paid to patches is shared out and none of it lost; means stay between their parts."""
    paid = torch.rand(2, 27 * 27, 3, generator=torch.Generator().manual_seed(0))
    summed = sum_units(paid, (14, 14), Pooled((27, 27)), 1)
    assert summed.shape == (2, 14 * 14, 3)
    torch.testing.assert_close(summed.sum(1), paid.sum(1))
    image = paid.transpose(1, 2).reshape(2, 3, 27, 27)
    want = torch.nn.functional.interpolate(image, size=(14, 14), mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(mean_units(paid, (14, 14), Pooled((27, 27)), 1), want, rtol=0, atol=1e-5)


def test_what_is_paid_to_patches_that_count_in_no_token_is_lost() -> None:
    # Of seven in a line two are left, each made of the two around its centre.
    paid = torch.rand(7, generator=torch.Generator().manual_seed(0))
    summed = sum_units(paid.expand(7, 7).reshape(1, 49), (2, 2), Pooled((7, 7)))
    torch.testing.assert_close(summed[0, :2], 2 * torch.stack([paid[1:3].sum(), paid[4:6].sum()]))


def test_a_stage_before_the_projector_stands_behind_the_frames_tokens(source: Path, write_recipe: Any) -> None:
    recipe = pipeline.load_recipe(write_recipe("vision.out"))
    job = pipeline.plan_job(read_source(source), GEOMETRY, recipe, None)
    (stage,) = job.plan.stages
    assert (str(stage.site), stage.groups, stage.length_in, stage.length_out) == ("projector.out", FRAMES, 4, 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tome", r"vision.layer\[1\]: behind the projector the 3x3 patches of a frame become 2x2 visual tokens"),
        ("zoo_prune", "'probe_slopes' needs one row before the projector for every visual token"),
    ],
)
def test_what_needs_a_token_before_the_projector_is_refused(source: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipeline.plan_job(read_source(source), GEOMETRY, RECIPES[name], 0.5)


def test_images_beside_a_video_and_sound_are_refused(source: Path) -> None:
    with pytest.raises(UserError, match="2 images beside a video of 4 frames"):
        Geometry(images=2, frames=FRAMES)
    with pytest.raises(UserError, match="takes images and videos only; leave --audio-seconds out"):
        read_source(source, Geometry(frames=FRAMES, audio_seconds=2))
