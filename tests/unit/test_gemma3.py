"""Gemma 3: tokens of an image that attend to each other, averaged squares of patches, two kinds of layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from secateur.compiler import ops, pipeline
from secateur.compiler.oracle import Oracle
from secateur.compiler.pipeline import Geometry, plan_job, read_source
from secateur.compiler.recording import load_recording_model
from secateur.passes.join_phases import number_blocks
from secateur.runtime.errors import UserError
from secateur.runtime.images import ImagePipeline
from secateur.runtime.manifest import read_manifest
from secateur.runtime.session import Session

from . import tiny_model
from .layout_checks import NEW, bundle_maker, check_answers, check_parity, load_model, pictures
from .tiny_gemma3 import END, SOFT, START, UNITS, load_processor, make_config, write_model

PROMPTS = {1: "what is <start_of_image>?", 2: "<start_of_image>a<start_of_image>what?"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model directory; do not change it."""
    return write_model(tmp_path_factory.mktemp("gemma3") / "model")


@pytest.fixture(scope="module")
def model(source: Path) -> Any:
    return load_model(source)


@pytest.fixture(scope="module")
def compile_for(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return bundle_maker(source, tmp_path_factory, text_tokens=40)


# -- the processor ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"size": {"height": 20, "width": 20}, "resample": 3}, {"do_rescale": False}])
def test_images_are_processed_as_transformers_does(options: dict[str, Any]) -> None:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    theirs = Gemma3ImageProcessorPil(**options)
    ours = ImagePipeline.from_config(theirs.to_dict())
    for image in pictures(0, 4):
        want = theirs([image], return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(ours(image), want[0], rtol=0, atol=1e-6)


def test_crops_are_refused() -> None:
    config = {"image_processor_type": "Gemma3ImageProcessorFast", "do_pan_and_scan": True}
    with pytest.raises(UserError, match="do_pan_and_scan is on, and the crops it cuts are not supported"):
        ImagePipeline.from_config(config)


@pytest.mark.parametrize(
    "prompt",
    [
        "<start_of_image>a<start_of_image>what?",
        "tell\n<start_of_image><start_of_image> more",
        "behind <start_of_image>, <start_of_image>",
    ],
)
def test_prompts_are_processed_as_transformers_does(
    source: Path, compile_for: Callable[..., Path], prompt: str
) -> None:
    images = pictures(1, 2)
    with Session(compile_for(), threads=1) as session:
        ours = session.processor([prompt], [images])
    want = load_processor(source)(text=prompt, images=images, return_tensors="np")
    ids = ours.prompt_ids(0)
    assert ids == want["input_ids"][0].tolist()
    assert (ids.count(SOFT), ids.count(START), ids.count(END), ids.count(tiny_model.IMAGE)) == (2 * UNITS, 2, 2, 0)
    np.testing.assert_allclose(ours.pixel_values, want["pixel_values"], rtol=0, atol=1e-6)


def test_messages_name_images_by_the_templates_token(source: Path, compile_for: Callable[..., Path]) -> None:
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    with Session(compile_for("none", 1), threads=1) as session:
        ours = session.processor.encode([message])
    text = "user: <start_of_image>what?assistant:"
    want = load_processor(source)(text=text, images=pictures(0, 1), return_tensors="np")["input_ids"][0]
    assert ours == want.tolist()


# -- the model, unpruned and pruned -----------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["none", "fastv", "divprune"])
@pytest.mark.parametrize("images", [1, 2])
def test_an_unpruned_bundle_answers_as_transformers_does(
    source: Path, model: Any, compile_for: Callable[..., Path], images: int, recipe: str
) -> None:
    given = pictures(3, images)
    feed = load_processor(source)(text=PROMPTS[images], images=given, return_tensors="pt")
    assert int(feed["token_type_ids"].sum()) == images * UNITS
    path = compile_for(recipe, images, None if recipe == "none" else 1.0)
    check_answers(path, model, [PROMPTS[images]], [given], lambda row, inputs: feed)


@pytest.mark.parametrize("behind", [0, 3])
def test_an_image_token_behind_the_vocabulary(tmp_path: Path, behind: int) -> None:
    """At its end, or some ids further: transformers embeds another token in its place and replaces the row."""
    path = write_model(tmp_path / "model", layers=3, text={"vocab_size": SOFT}, image_token_index=SOFT + behind)
    for name in ("tokenizer.json", "tokenizer_config.json") if behind else ():
        text = (path / name).read_text().replace("<image_soft_token>", "<seen>")
        (path / name).write_text(text)
    if behind:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        tokenizer.add_special_tokens(["<one>", "<two>", "<image_soft_token>"])
        assert tokenizer.token_to_id("<image_soft_token>") == SOFT + behind
        tokenizer.save(str(path / "tokenizer.json"))
        words = (path / "tokenizer_config.json").read_text().replace("<seen>", "<image_soft_token>")
        (path / "tokenizer_config.json").write_text(words)
    out, given = tmp_path / "out", pictures(0, 1)
    pipeline.compile(path, out, geometry=Geometry(text_tokens=40, new_tokens=NEW))
    feed = load_processor(path)(text=PROMPTS[1], images=given, return_tensors="pt")
    assert int(feed["input_ids"].max()) == SOFT + behind
    check_answers(out, load_model(path), [PROMPTS[1]], [given], lambda row, inputs: feed)
    pipeline.compile(path, tmp_path / "pruned", recipe="fastv", keep=0.5, geometry=Geometry(text_tokens=40))
    check_parity(tmp_path / "pruned", path)
    with Session(out, threads=1) as session:
        inputs = session.processor([PROMPTS[1]], [given])
        request = session.request()
        session.prefill(request, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)
        with pytest.raises(UserError, match=f"decode: token ids go from {SOFT} to {SOFT}; the vocabulary's are 0 to"):
            session.decode(request, np.array([SOFT]))


def test_marks_behind_the_vocabulary_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", layers=3, text={"vocab_size": END})
    with pytest.raises(UserError) as error:
        pipeline.compile(path, tmp_path / "out")
    assert str(error.value) == (
        f"{path / 'config.json'}: text_config.vocab_size: token {END}, which stands beside media in every prompt, has "
        f"no row among the {END} of the embedding; use the tokenizer and the config.json of these weights; "
        "transformers cannot run them either"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "target"),
    [
        ("none", "onnxruntime"), ("fastv", "plain"), ("vispruner_siglip", "onnxruntime"), ("divprune", "plain"),
        ("pyramiddrop", "onnxruntime"), ("zoo_prune", "onnxruntime"), ("transprune", "plain"),
        ("todre", "onnxruntime"),
    ],
)  # fmt: skip
def test_bundles_compute_what_the_oracle_does(
    source: Path, compile_for: Callable[..., Path], recipe: str, target: str
) -> None:
    check_parity(compile_for(recipe, keep=None if recipe == "none" else 0.5, target=target), source)


@pytest.mark.parametrize("recipe", ["seats", "sparsevlm"])
def test_caches_that_shrink_and_signals_of_visual_queries(
    source: Path, compile_for: Callable[..., Path], recipe: str
) -> None:
    """Evicted rows leave attention without a cache; visual rows are scored as they attend, in both directions."""
    check_parity(compile_for(recipe, 1, 0.5), source)


def test_the_decoders_signals_are_its_own_attention(source: Path, tmp_path: Path) -> None:
    """Against attention maps as transformers gives them: visual rows see those behind them in their image."""
    recipe = tmp_path / "mine.yaml"
    stage = "{site: 'decoder.layer[2]', score: {name: received_attention_mean}, select: top_k, share: 0.5}"
    recipe.write_text(f"name: mine\nstages:\n  - {stage}")
    job = plan_job(read_source(source), Geometry(), pipeline.load_recipe(str(recipe)), None)
    model = load_recording_model(job.source)
    pixels = torch.randn(1, 3, 36, 36, generator=torch.Generator().manual_seed(1))
    ids = [5, START, *[SOFT] * UNITS, END, 6, 7]
    row = Oracle(job, model).run(ids, pixels, keep_signals=True)
    model.set_attn_implementation("eager")
    given = torch.tensor([ids])
    with torch.no_grad():
        maps = model(
            input_ids=given, pixel_values=pixels, token_type_ids=(given == SOFT).long(), output_attentions=True
        ).attentions[1]  # fmt: skip
    assert float(maps[0, :, 2, 3 : 2 + UNITS].min()) > 0, "the first visual row sees the others"
    want = maps.mean(2)[:, :, 2 : 2 + UNITS]
    torch.testing.assert_close(row.signals["stage0"]["received_attention"], want)


def test_an_image_is_one_block_and_text_is_in_none() -> None:
    image = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0, 1]]).bool()
    want = [[-1, 0, 0, -1, 1, 1, 1, -1], [0, 0, -1, -1, -1, -1, -1, 1]]
    assert number_blocks(image).tolist() == want
    blocks = torch.tensor(want)
    visible = ops.causal_mask(torch.zeros(2, dtype=torch.int64), 8, 8, 3, blocks)[:, 0]
    for row in range(2):
        for i in range(8):
            for j in range(8):
                together = blocks[row, i] == blocks[row, j] and blocks[row, i] >= 0
                assert bool(visible[row, i, j]) == ((j <= i or bool(together)) and j > i - 3)


# -- what is said, and refused ----------------------------------------------------------------------------


def test_the_manifest_names_the_prompts_token_and_the_placeholders(compile_for: Callable[..., Path]) -> None:
    manifest = read_manifest(compile_for("fastv", keep=0.5))
    sizes, told = manifest.geometry, manifest.model
    assert (sizes.tokens_per_image, sizes.features_per_image, sizes.sequence) == (9, 9, 58)
    assert (told.image_token, told.prompt_token_id, told.image_token_id) == ("<start_of_image>", START, SOFT)
    assert (told.image_before, told.image_behind, told.image_space) == ([START], [END], ["\n\n", "\n\n"])
    assert "block_ids" not in [port.name for program in manifest.programs.values() for port in program.inputs]


def test_the_same_bytes_whatever_order_sets_have(source: Path) -> None:
    """transformers makes the tables of its kinds of layers in the order of a set."""
    script = (
        "import sys; from pathlib import Path; from secateur.compiler import pipeline;"
        "from secateur.compiler.trace import read_source;"
        "traced = pipeline.trace_model(read_source(Path(sys.argv[1])), pipeline.Geometry());"
        "print(traced.programs['decoder'])"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", script, str(source)], env=os.environ | {"PYTHONHASHSEED": seed},
            check=True, capture_output=True, text=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(said) == 1
    assert "sliding_attention_inv_freq" in said.pop()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_tokens_per_image": 8}, "6x6 patches cannot be averaged into 8 tokens"),
        ({"mm_tokens_per_image": 16}, "6x6 patches cannot be averaged into 16 tokens"),
        ({"text": {"final_logit_softcapping": 30.0}}, "text_config.final_logit_softcapping is 30.0"),
        ({"text": {"use_bidirectional_attention": True}}, "text_config.use_bidirectional_attention is True"),
        ({"vision": {"patch_size": 40}}, "cannot be cut into patches"),
        ({"text_config": tiny_model.make_config()["text_config"]}, "'llama' is unknown"),
    ],
)
def test_layouts_that_are_not_supported_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(make_config(**changes)))
    with pytest.raises(UserError, match=message):
        read_source(tmp_path)
