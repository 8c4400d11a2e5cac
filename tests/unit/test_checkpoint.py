"""What a checkpoint's tensors are called, how they are put together, which dtype they have, and which are too many."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping, core_model_loading

from secateur.compiler import pipeline
from secateur.compiler.pipeline import check_weights, export
from secateur.exporters.checkpoint import Checkpoint
from secateur.exporters.shards import refer_weights
from secateur.exporters.weights import WEIGHTS_FILE, plan_weights, write_weights
from secateur.runtime.errors import UserError

SINGLE = "model.safetensors"
HALVES = "multi_modal_projector.linear_1.weight"
NAME = f"model.{HALVES}"
Change = Callable[[dict[str, torch.Tensor]], object]
Copy = Callable[..., Checkpoint]


@pytest.fixture
def copy(model_dir: Callable[..., Path], traced: Callable[..., Any], tmp_path: Path) -> Copy:
    """``copy(change)`` -> a checkpoint whose tensors ``change`` has edited in their dictionary."""

    def make(change: Change = lambda tensors: None, dtype: torch.dtype = torch.float32) -> Checkpoint:
        path = tmp_path / "model"
        shutil.copytree(model_dir(), path, dirs_exist_ok=True)
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(path / SINGLE).items()}
        change(tensors)
        save_file(tensors, path / SINGLE)
        return Checkpoint(path, traced().model)

    return make


def used(traced: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for program in traced.programs.programs.values():
        found |= program.weights()
    return found


def complaint(run: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        run()
    return str(caught.value)


# -- tensors that must be put together -----------------------------------------------------------------------


def operations(monkeypatch: pytest.MonkeyPatch, *made: tuple[Any, str, list[Any]]) -> None:
    """Add conversions to transformers' table of the model."""
    real = conversion_mapping.get_model_conversion_mapping

    def table(model: Any) -> list[Any]:
        return [*real(model), *(core_model_loading.WeightConverter(*row) for row in made)]

    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", table)


def split(tensors: dict[str, torch.Tensor]) -> None:
    whole = tensors.pop(HALVES)
    for index, part in enumerate(whole.chunk(4)):
        tensors[f"multi_modal_projector.parts.{index}.weight"] = part.contiguous()


def stack(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = "multi_modal_projector.parts.*.weight"
    operations(monkeypatch, (parts, HALVES, [core_model_loading.Concatenate(dim=0)]))


def test_parts_are_put_together_tensor_by_tensor(
    copy: Copy, model_dir: Any, traced: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_file(model_dir() / SINGLE)[HALVES]
    stack(monkeypatch)
    layout = plan_weights(used(traced()), traced().model, torch.float32)
    write_weights(layout, copy(split), tmp_path / "w")
    assert torch.equal(load_file(tmp_path / "w")[NAME], whole)


def test_only_what_is_put_together_is_written_beside_the_files(
    copy: Copy, model_dir: Any, traced: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack(monkeypatch)
    checkpoint = copy(split)
    layout = refer_weights(used(traced()), checkpoint, torch.float32)
    assert list(layout.written) == [NAME]
    assert {place.file for place in layout.tensors.values()} == {WEIGHTS_FILE, f"weights/{SINGLE}"}
    write_weights(layout, checkpoint, tmp_path / "w")
    made = load_file(tmp_path / "w")
    assert list(made) == [NAME]
    assert torch.equal(made[NAME], load_file(model_dir() / SINGLE)[HALVES])


def test_a_part_too_few(copy: Copy, traced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(tensors: dict[str, torch.Tensor]) -> None:
        split(tensors)
        del tensors["multi_modal_projector.parts.1.weight"]

    stack(monkeypatch)
    checkpoint = copy(lose)
    assert complaint(lambda: checkpoint.require({NAME: (64, 32)})) == (
        f"{checkpoint.directory / SINGLE}: 1 tensor of another shape than the configuration says: "
        "multi_modal_projector.parts.0.weight [48,32] instead of [64,32]; "
        "check that config.json belongs to this checkpoint"
    )


def test_operations_that_leave_the_bytes_alone(copy: Copy, traced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix stored with more dimensions is one, and so is one that is turned only if it needs to be."""
    bias = "multi_modal_projector.linear_1.bias"

    def lift(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HALVES] = tensors[HALVES].reshape(64, 2, 2, 2, 4)

    flatten = core_model_loading.Conv3dToLinear(in_channels=2, kernel_size=(2, 2, 4))
    turn = core_model_loading.Transpose(0, 0, check_dims=True)
    operations(monkeypatch, (HALVES, HALVES, [flatten]), (bias, bias, [turn]))
    layout = refer_weights(used(traced()), copy(lift), torch.float32)
    assert layout.tensors[NAME].shape == (64, 32)


def test_a_matrix_stored_turned(copy: Copy, model_dir: Any, traced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def turn(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HALVES] = tensors[HALVES].T.contiguous()

    operations(monkeypatch, (HALVES, HALVES, [core_model_loading.Transpose(0, 1, check_dims=True)]))
    whole, checkpoint = load_file(model_dir() / SINGLE)[HALVES], copy(turn)
    assert torch.equal(checkpoint.read(NAME, (64, 32)), whole)
    assert list(refer_weights(used(traced()), checkpoint, torch.float32).written) == [NAME]


def test_a_tensor_that_is_several(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    both = ["multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_2.weight"]
    operations(monkeypatch, ("multi_modal_projector.both", both, [core_model_loading.Chunk(dim=0)]))  # type: ignore[arg-type]
    checkpoint = copy(lambda tensors: tensors.update({"multi_modal_projector.both": tensors.pop(HALVES)}))
    assert "tensor multi_modal_projector.both must be split into several" in complaint(lambda: checkpoint.names)


# -- dtypes -------------------------------------------------------------------------------------------------


def test_a_cast_cannot_be_referred_to(copy: Copy, traced: Any) -> None:
    checkpoint, wanted = copy(dtype=torch.bfloat16), used(traced())
    text = complaint(lambda: refer_weights(wanted, checkpoint, torch.float32, "copy"))
    first = f"--weights copy: {checkpoint.directory}: the checkpoint's files cannot be used as they are: "
    assert text.startswith(f"{first}{len(wanted)} tensors would have to be cast, such as ")
    assert text.endswith(" from bf16 to fp32; take --weights stream, or --dtype auto")
    assert len(refer_weights(wanted, checkpoint, torch.bfloat16).tensors) == len(wanted)


def test_a_tensor_at_an_odd_byte_cannot_be_referred_to(copy: Copy, traced: Any) -> None:
    checkpoint = copy(dtype=torch.bfloat16)
    path = checkpoint.directory / SINGLE
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :])
    text = complaint(lambda: refer_weights(used(traced()), checkpoint, torch.bfloat16))
    assert "would have to be moved, such as " in text
    assert text.endswith("; take --weights stream")


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")]
)
def test_the_checkpoints_own_dtype(copy: Copy, dtype: torch.dtype, name: str) -> None:
    # What is no part of the model has no say.
    assert copy(lambda tensors: tensors.update(inv_freq=torch.ones(4)), dtype).dtype() == name


def test_mixed_dtypes_are_counted(copy: Copy) -> None:
    norm = "language_model.model.norm.weight"

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[norm] = tensors[norm].float()

    checkpoint = copy(widen, torch.bfloat16)
    count = len(load_file(checkpoint.directory / SINGLE))
    assert complaint(checkpoint.dtype) == (
        f"--dtype auto: {checkpoint.directory}: the checkpoint has tensors of several dtypes: "
        f"{count - 1} in bf16 (such as language_model.lm_head.weight), 1 in fp32 (such as {norm}); "
        "choose one with --dtype; tensors of another are cast"
    )


def test_a_dtype_no_bundle_has(copy: Copy) -> None:
    checkpoint = copy(dtype=torch.float64)
    assert complaint(checkpoint.dtype).startswith(
        f"--dtype auto: {checkpoint.directory}: the checkpoint's dtype is none a bundle may have: "
    )
    quantised = copy(dtype=torch.float8_e4m3fn)
    text = complaint(lambda: quantised.read(NAME, (64, 32)))
    assert text.startswith(f"{quantised.directory / SINGLE}: tensor {HALVES} is in F8_E4M3 (available: ")


def test_auto_is_resolved_before_tracing(
    copy: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found: list[str] = []

    def stop(source: Any, geometry: Any, dtype: str) -> None:
        found.append(dtype)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "trace_model", stop)
    model = copy(dtype=torch.bfloat16).directory
    assert complaint(lambda: pipeline.compile(model, tmp_path / "out", dtype="auto")) == (
        "--dtype auto, the checkpoint is bf16: ONNX Runtime on the CPU is fp32; "
        "half precision is for --target onnxruntime-cuda and TensorRT; compile with --dtype fp32"
    )
    with pytest.raises(KeyboardInterrupt):
        pipeline.compile(model, tmp_path / "out", target="plain", dtype="auto")
    assert found == ["bf16"]


# -- too many, too few --------------------------------------------------------------------------------------


def test_tensors_the_model_does_not_have(copy: Copy, traced: Any, caplog: pytest.LogCaptureFixture) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(5):
            tensors[f"language_model.model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    directory = copy(add).directory
    here = replace(traced(), source=replace(traced().source, path=directory))
    with caplog.at_level(logging.WARNING, "secateur"):
        check_weights(here)
    names = [f"language_model.model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(3)]
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        f"{directory}: 5 tensors are no part of the model and are left out, such as {', '.join(names)}"
    ]


def test_tensors_of_a_larger_model_are_expected(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = copy(lambda tensors: tensors.update({"talker.a": torch.ones(1), "other": torch.ones(1)}))
    assert checkpoint.unexpected() == ["other", "talker.a"]
    monkeypatch.setattr(checkpoint.model, "_keys_to_ignore_on_load_unexpected", ["^talker"])
    assert checkpoint.unexpected() == ["other"]


def test_every_tensor_of_another_shape_is_counted(copy: Copy, traced: Any) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(4):
            name = f"language_model.model.layers.{layer}.mlp.down_proj.weight"
            tensors[name] = tensors[name][:, :-1].contiguous()

    checkpoint = copy(cut)
    text = complaint(lambda: checkpoint.require({n: tuple(t.shape) for n, t in used(traced()).items()}))
    first = "language_model.model.layers.0.mlp.down_proj.weight [64,95] instead of [64,96], "
    assert text.startswith(
        f"{checkpoint.directory / SINGLE}: 4 tensors of another shape than the configuration says: {first}"
    )
    assert text.endswith(" and 1 more; check that config.json belongs to this checkpoint")


def test_a_shard_with_a_name_no_bundle_holds(copy: Copy, traced: Any) -> None:
    directory = copy().directory
    keys = list(load_file(directory / SINGLE))
    (directory / SINGLE).rename(directory / "a:b.safetensors")
    (directory / f"{SINGLE}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(keys, "a:b.safetensors")}))
    checkpoint = Checkpoint(directory, traced().model)
    text = complaint(lambda: refer_weights(used(traced()), checkpoint, torch.float32))
    assert text == (
        f"{directory}: shard 'a:b.safetensors' has a name that no bundle may hold; rename it, or take --weights stream"
    )


def test_a_mode_that_is_none(pruned: Any, tmp_path: Path) -> None:
    text = "--weights: no way 'link' of placing weights (available: stream, reference, copy)"
    assert complaint(lambda: export(pruned("none"), "plain", "link")) == text
    assert complaint(lambda: pipeline.compile(tmp_path, tmp_path / "out", weights="link")) == text
