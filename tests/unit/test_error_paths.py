"""Bad input ends in one line that names the file, early, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secateur.compiler import output, pipeline
from secateur.compiler.pipeline import check_target, check_weights, read_source
from secateur.exporters.checkpoint import INDEX, Checkpoint, list_tensors
from secateur.runtime.errors import UserError

from .tiny_model import make_config, write_config, write_processor

SINGLE = "model.safetensors"


@pytest.fixture
def model(model_dir: Callable[..., Path], tmp_path: Path) -> Path:
    """A model directory that may be changed."""
    return Path(shutil.copytree(model_dir(), tmp_path / "model"))


@pytest.fixture
def no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("traced before the input was checked")

    monkeypatch.setattr(pipeline, "trace_model", refuse)


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def complaint(run: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        run()
    text = str(caught.value)
    assert "\n" not in text
    return text


# Signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_cleans_up(tmp_path: Path, number: signal.Signals, code: int) -> None:
    program = f"""
        import time
        from pathlib import Path
        from secateur.compiler import output
        from secateur.tools import cli, recipes

        def recipes_that_take_long() -> None:
            with output.whole_directory(Path({str(tmp_path / "out")!r}), False):
                print("working", flush=True)
                time.sleep(60)

        recipes.recipes = recipes_that_take_long
        cli.main(["recipes"])
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "working\n"
    assert [p.suffix for p in tmp_path.iterdir()] == [".partial"]
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (code, f"error: ended by {number.name}\n")
    assert not list(tmp_path.iterdir())


# The output directory


def test_a_link_is_not_replaced(tmp_path: Path) -> None:
    (bundle := tmp_path / "bundle").mkdir()
    (bundle / output.MANIFEST).touch()
    for name, target in (("link", bundle), ("dangling", tmp_path / "absent")):
        (link := tmp_path / name).symlink_to(target)
        for force in (False, True):
            assert complaint(lambda link=link, force=force: output.check_output(link, force)) == (  # type: ignore[misc]
                f"{link}: is a link; name the directory it points to, or a new one"
            )


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_replacement_leaves_the_old_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    (out := tmp_path / "bundle").mkdir()
    (out / output.MANIFEST).write_text(old := '{"secateur": "0", "files": {}}')
    replace, calls = os.replace, []

    def replace_or_fail(old: Path, new: Path) -> None:
        calls.append(old)
        if len(calls) == failing:
            raise OSError("no")
        replace(old, new)

    monkeypatch.setattr(os, "replace", replace_or_fail)
    with pytest.raises(OSError, match="no"), output.whole_directory(out, True) as work:
        (work / output.MANIFEST).write_text("new")
    assert list(tmp_path.iterdir()) == [out]
    assert (out / output.MANIFEST).read_text() == old


# Processor files: told before tracing


def set_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")


def drop_image_token(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    change(model / "config.json", image_token_index=len(tokenizer["model"]["vocab"]) + 7)


def square(edge: int) -> dict[str, Any]:
    return {"size": {"height": edge, "width": edge}, "crop_size": {"height": edge, "width": edge}}


def move_image_processor(model: Path) -> None:
    found = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").unlink()
    change(model / "processor_config.json", image_processor={**found, **square(40)})


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "{m}: no tokenizer.json; "),
    "broken tokenizer": (set_tokenizer, "{m}/tokenizer.json: not a tokenizer ("),
    "no image token": (drop_image_token, "{m}/tokenizer.json: image token 267 is not in the tokenizer"),
    "broken generation config": (
        lambda m: (m / "generation_config.json").write_text("{"), "{m}/generation_config.json: not a JSON object"
    ),
    "list as generation config": (
        lambda m: (m / "generation_config.json").write_text("[]"), "{m}/generation_config.json: not a JSON object"
    ),
    "no such eos": (
        lambda m: change(m / "generation_config.json", eos_token_id=[2, 9999]),
        "{m}/generation_config.json: eos_token_id [2, 9999] is none of the 260 tokens",
    ),
    "empty eos": (lambda m: change(m / "generation_config.json", eos_token_id=[]), "{m}: no eos_token_id"),
    "broken image processor": (
        lambda m: (m / "preprocessor_config.json").write_text("{"), "{m}/preprocessor_config.json: not JSON ("
    ),
    "other image size": (
        lambda m: change(m / "preprocessor_config.json", **square(40)),
        "{m}/preprocessor_config.json: the image processor makes (40, 40), the bundle was compiled for (32, 32); "
        "take the processor files that belong to this checkpoint",
    ),
    "other image size elsewhere": (
        move_image_processor, "{m}/processor_config.json, image_processor: the image processor makes (40,"
    ),
    "unknown image processor": (
        lambda m: change(m / "preprocessor_config.json", image_processor_type="ViTImageProcessor"),
        "{m}/preprocessor_config.json: no image processor 'ViTImageProcessor'",
    ),
    "no weights": (lambda m: (m / SINGLE).unlink(), "{m}: no model.safetensors; "),
}  # fmt: skip


@pytest.mark.usefixtures("no_trace")
@pytest.mark.parametrize("case", BROKEN)
def test_a_directory_no_bundle_can_be_made_of(model: Path, tmp_path: Path, case: str) -> None:
    damage, text = BROKEN[case]
    damage(model)
    assert complaint(lambda: pipeline.compile(model, tmp_path / "out")).startswith(text.format(m=model))
    assert list(tmp_path.iterdir()) == [model]


def test_a_whole_directory_is_traced(model: Path, tmp_path: Path, no_trace: None) -> None:
    with pytest.raises(AssertionError, match="traced before"):
        pipeline.compile(model, tmp_path / "out")


def test_the_bundle_s_copies_are_opened_too(model: Path, tmp_path: Path) -> None:
    from secateur.compiler.bundle import copy_processor_files

    job = pipeline.plan_job(read_source(model), pipeline.Geometry(), pipeline.RECIPES["none"], None)
    (work := tmp_path / "work").mkdir()
    copy_processor_files(job, work)
    change(model / "preprocessor_config.json", **square(40))
    assert complaint(lambda: copy_processor_files(job, work)).startswith(f"{model}/preprocessor_config.json: ")


# The checkpoint


def shard(model: Path, weight_map: object, name: str = "weight_map") -> Path:
    (path := model / INDEX).write_text(json.dumps({name: weight_map}))
    return path


def test_tensors_are_missed_right_after_tracing(
    model: Path, tmp_path: Path, traced: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_weights(traced())
    keys = list_tensors(model)[SINGLE]
    shard(model, {key: SINGLE for key in keys if "up_proj" not in key})
    trace = traced()
    monkeypatch.setattr(pipeline, "trace_model", lambda source, geometry, dtype: vars_with(trace, source))
    text = complaint(lambda: pipeline.compile(model, tmp_path / "out"))
    assert text.startswith(f"{model}: checkpoint lacks 4 tensors: ")
    assert "up_proj" in text


def vars_with(trace: Any, source: Any) -> Any:
    from dataclasses import replace

    return replace(trace, source=source)


def test_an_index_that_cannot_be_used(model: Path) -> None:
    keys = list_tensors(model)[SINGLE]
    index = shard(model, {}, "other")
    assert complaint(lambda: list_tensors(model)) == f"{index}: not a valid index of shards; download it again"
    for outside in ("../other.safetensors", str(model.parent / "other.safetensors")):
        shard(model, dict.fromkeys(keys, outside))
        assert complaint(lambda: list_tensors(model)) == (
            f"{index}: names shards outside its directory: {outside}; download it again"
        )


def test_a_truncated_shard(model: Path, traced: Callable[..., Any]) -> None:
    keys = list_tensors(model)[SINGLE]
    shard(model, dict.fromkeys(keys, SINGLE))
    os.truncate(model / SINGLE, (model / SINGLE).stat().st_size // 2)
    text = complaint(lambda: Checkpoint(model, traced().model).require({"lm_head.weight": (1,)}))
    assert text.startswith(f"{model / SINGLE}: not a valid safetensors file (")


# The configuration


def test_what_transformers_refuses_is_one_line(tmp_path: Path) -> None:
    write_config(tmp_path, text={"hidden_size": 66})
    text = complaint(lambda: read_source(tmp_path))
    assert text.startswith(f"{tmp_path / 'config.json'}: transformers cannot read it (The hidden size (66)")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"quantization_config": "awq"}, "checkpoint is quantised (awq); use the unquantised checkpoint"),
        (
            {"vision_config": {**make_config()["vision_config"], "patch_size": 0}},
            "an image of image_size 32 cannot be cut into patches of patch_size 0; "
            "check vision_config; both are numbers of pixels",
        ),
        (
            {"vision_config": {**make_config()["vision_config"], "patch_size": 64}},
            "an image of image_size 32 cannot be cut into patches of patch_size 64; "
            "check vision_config; both are numbers of pixels",
        ),
    ],
)
def test_configurations_that_cannot_be(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    write_config(tmp_path, **changes)
    assert complaint(lambda: read_source(tmp_path)) == f"{tmp_path / 'config.json'}: {text}"


def test_the_configuration_alone_is_enough_to_plan(tmp_path: Path) -> None:
    """`explain` reads nothing else."""
    write_config(tmp_path)
    source = read_source(tmp_path)
    pipeline.plan_job(source, pipeline.Geometry(), pipeline.RECIPES["fastv"], 0.5)
    write_processor(tmp_path)
    assert complaint(lambda: pipeline.compile(tmp_path, tmp_path / "out")).startswith(f"{tmp_path}: no {SINGLE}")


# The target


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_needs_another_toolchain(dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    assert complaint(lambda: check_target("onnxruntime", dtype, None)) == (
        f"--dtype {dtype}: ONNX Runtime on the CPU is fp32; half precision is for --target onnxruntime-cuda and "
        "TensorRT; compile with --dtype fp32"
    )
    assert not caplog.records
    assert check_target("plain", dtype, None).provider is None
    assert [r.getMessage() for r in caplog.records] == [
        f"this bundle is for other toolchains: Session runs fp32 only, not {dtype}"
    ]
    for target in ("onnxruntime", "plain"):
        assert check_target(target, None, None).provider == "CPUExecutionProvider"
    found = check_target("onnxruntime-cuda", None, None)
    assert (found.dtype, found.provider) == ("fp16", "CUDAExecutionProvider")
    assert complaint(lambda: check_target("onnxruntime-cuda", "fp32", None)) == (
        "--dtype fp32: GroupQueryAttention computes in half precision on ONNX Runtime's CUDA provider "
        "(available: fp16, bf16); compile with --dtype fp16; norms and scores stay in fp32 inside the graph"
    )
    assert len(caplog.records) == 1
