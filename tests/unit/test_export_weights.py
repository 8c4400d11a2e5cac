"""The weights file: streamed out of any safetensors checkpoint, and what a broken checkpoint says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.compiler.pipeline import export
from secateur.exporters import weights
from secateur.exporters.checkpoint import Checkpoint, list_tensors
from secateur.exporters.weights import WeightLayout, plan_weights, write_weights
from secateur.runtime.errors import UserError
from secateur.runtime.sizes import size_text

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def layout(pruned: Callable[..., Any]) -> WeightLayout:
    return export(pruned("none"), "plain").layout


@pytest.fixture
def copy(model_dir: Callable[..., Path], traced: Callable[..., Any], tmp_path: Path) -> Any:
    """``copy(change)`` -> a checkpoint whose tensors ``change`` has edited in their dictionary."""

    def make(change: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None) -> Checkpoint:
        tensors = load_file(model_dir() / SINGLE)
        change(tensors)
        save_file(tensors, tmp_path / SINGLE)
        return Checkpoint(tmp_path, traced().model)

    return make


def hugging_face(directory: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForImageTextToText

    return dict(AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).named_parameters())


def test_the_file_holds_what_hugging_face_loads(
    model_dir: Callable[..., Path], layout: WeightLayout, copy: Any, tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    digest = write_weights(layout, copy(), tmp_path / "w", lambda done, total: told.append((done, total)))
    written, wanted = load_file(tmp_path / "w"), hugging_face(model_dir())
    assert list(written) == list(layout.tensors)
    for name, tensor in written.items():
        assert torch.equal(tensor, wanted[name]), name
    raw = (tmp_path / "w").read_bytes()
    assert (digest, len(raw)) == (hashlib.sha256(raw).hexdigest(), layout.size)
    for name, place in layout.tensors.items():
        data = torch.frombuffer(bytearray(raw[place.offset : place.offset + place.length]), dtype=place.dtype)
        assert torch.equal(data.reshape(place.shape), wanted[name])
    assert told == [(p.offset + p.length, layout.size) for p in layout.tensors.values()]


@pytest.mark.parametrize("prefix", ["vision_tower.vision_model.", "model.vision_tower."])
def test_older_and_newer_names_are_known(copy: Any, layout: WeightLayout, prefix: str) -> None:
    """LLaVA-1.5's files on the hub name the tower ``vision_tower.vision_model``; the model in memory does not."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("vision_tower.")]:
            tensors[prefix + name.removeprefix("vision_tower.")] = tensors.pop(name)

    copy(rename).require({name: place.shape for name, place in layout.tensors.items()})


def test_shards_are_read(copy: Any, layout: WeightLayout, tmp_path: Path) -> None:
    whole = copy()
    first = write_weights(layout, whole, tmp_path / "w")
    tensors = load_file(tmp_path / SINGLE)
    (tmp_path / SINGLE).unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({n: tensors[n] for n in part}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {n: file for file, part in shards.items() for n in part}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    sharded = Checkpoint(tmp_path, whole.model)
    assert write_weights(layout, sharded, tmp_path / "w2") == first
    (tmp_path / "b.safetensors").unlink()
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(UserError) as caught:
        list_tensors(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: missing shards: a.safetensors, b.safetensors; download the whole checkpoint"
    )


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": [1]}'])
def test_a_broken_index_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(UserError) as caught:
        list_tensors(tmp_path)
    assert str(caught.value) == f"{tmp_path / INDEX}: not a valid index of shards; download it again"


def test_no_safetensors_at_all(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        list_tensors(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: no model.safetensors; save the model with save_pretrained; other weight formats are not read"
    )


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5])
def test_a_truncated_file_is_named(copy: Any, layout: WeightLayout, tmp_path: Path, share: float) -> None:
    copy()
    raw = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(UserError) as caught:
        list_tensors(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / SINGLE}: not a valid safetensors file (")
    assert str(caught.value).endswith("); download it again")


def test_an_index_that_names_absent_tensors(copy: Any, layout: WeightLayout, tmp_path: Path) -> None:
    checkpoint = copy()
    names = list(load_file(tmp_path / SINGLE))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE)}))
    tensors = load_file(tmp_path / SINGLE)
    del tensors["language_model.model.norm.weight"]
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(UserError) as caught:
        write_weights(layout, checkpoint, tmp_path / "w")
    assert str(caught.value) == (
        f"{tmp_path / INDEX}: {SINGLE} lacks 1 tensor that the index says it has: language_model.model.norm.weight; "
        "download the whole checkpoint"
    )
    assert not (tmp_path / "w").exists()


def test_missing_tensors_are_listed(copy: Any, layout: WeightLayout, tmp_path: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".layers.2.mlp." in n or ".layers.1.self_attn." in n]:
            del tensors[name]

    with pytest.raises(UserError) as caught:
        write_weights(layout, copy(drop), tmp_path / "w")
    shown = str(caught.value)
    assert shown.startswith(f"{tmp_path}: checkpoint lacks 15 tensors: model.vision_tower.encoder.layers.1.self_attn.")
    assert shown.endswith(" and 12 more; download the whole checkpoint, or check that config.json belongs to it")
    assert not (tmp_path / "w").exists()


def test_a_tensor_of_another_shape_is_named(copy: Any, layout: WeightLayout, tmp_path: Path) -> None:
    name = "language_model.model.layers.3.mlp.up_proj.weight"

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:, :-1].contiguous()

    with pytest.raises(UserError) as caught:
        write_weights(layout, copy(cut), tmp_path / "w")
    assert str(caught.value) == (
        f"{tmp_path / SINGLE}: 1 tensor of another shape than the configuration says: {name} [96,63] instead of "
        "[96,64]; check that config.json belongs to this checkpoint"
    )
    assert not (tmp_path / "w").exists()


def test_a_disk_too_small_is_noticed_before_writing(
    copy: Any, layout: WeightLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = weights.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    (tmp_path / "work").mkdir()
    with pytest.raises(UserError) as caught:
        write_weights(layout, copy(), tmp_path / "work" / "w")
    size = len(layout.header) + sum(place.length for place in layout.written.values())
    assert str(caught.value) == (
        f"{tmp_path}: disk full: the weights take {size_text(size)}, 1000 B are free; "
        "free some space or choose another directory"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_are_cast_one_by_one(
    traced: Callable[..., Any], copy: Any, layout: WeightLayout, tmp_path: Path, dtype: torch.dtype
) -> None:
    half = plan_weights(traced().programs["decoder"].weights(), traced().model, dtype)
    write_weights(half, copy(), tmp_path / "w")
    written, source = load_file(tmp_path / "w"), load_file(tmp_path / SINGLE)
    assert {t.dtype for t in written.values()} == {dtype}
    name = "layers.0.self_attn.q_proj.weight"
    assert torch.equal(written[f"model.language_model.{name}"], source[f"language_model.model.{name}"].to(dtype))
    assert half.size < layout.size
