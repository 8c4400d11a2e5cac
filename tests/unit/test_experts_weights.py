"""Stacked experts out of checkpoints that keep them apart, that stack them, and that stack them turned."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.exporters.checkpoint import Checkpoint, open_checkpoint
from secateur.exporters.shards import refer_weights
from secateur.exporters.weights import WEIGHTS_FILE, plan_weights, write_weights
from secateur.runtime.errors import UserError

from .tiny_experts import HIDDEN, TEXT, WIDTH, make_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EXPERTS = int(TEXT["num_experts"])


def parameters(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def stacked(model: Any) -> list[str]:
    return [name for name in parameters(model) if ".experts." in name]


@pytest.fixture
def apart(tmp_path: Path) -> tuple[Path, Any]:
    """A language model in several shards, as ``save_pretrained`` writes it: each expert's matrices by themselves."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    model = make_model(Qwen3MoeForCausalLM, Qwen3MoeConfig(**TEXT, tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    return tmp_path / "model", model


@pytest.fixture
def turned(tmp_path: Path) -> tuple[Path, Any]:
    """A vision-language model whose file stacks experts as the hub's do, with the last two dimensions exchanged."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    tower = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": WIDTH,
             "deepstack_visual_indexes": [0]}  # fmt: skip
    config = Qwen3VLMoeConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=tower)
    model = make_model(Qwen3VLMoeForConditionalGeneration, config)
    model.save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / SINGLE)
    save_file(
        {k: t.mT.contiguous() if ".experts." in k else t for k, t in tensors.items()}, tmp_path / "model" / SINGLE
    )
    return tmp_path / "model", model


def test_files_keep_experts_apart(apart: Any) -> None:
    """What the other tests stand on: matrices of one expert each, spread over shards."""
    directory, model = apart
    checkpoint = Checkpoint(directory, model)
    assert "model.layers.0.mlp.experts.7.gate_proj.weight" in checkpoint.files
    assert len(list(directory.glob("*.safetensors"))) > 3
    assert not any(name in checkpoint.files for name in stacked(model))
    assert checkpoint.unexpected() == []
    assert all(checkpoint.stored(name) is None for name in stacked(model))


def test_experts_come_one_by_one(apart: Any) -> None:
    directory, model = apart
    checkpoint = Checkpoint(directory, model)
    for name, tensor in parameters(model).items():
        pieces = list(checkpoint.read_pieces(name, tuple(tensor.shape)))
        assert len(pieces) == (EXPERTS if name in stacked(model) else 1)
        assert torch.equal(torch.cat(pieces), tensor)
        assert torch.equal(checkpoint.read(name, tuple(tensor.shape)), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streaming_stacks_and_casts(apart: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    directory, model = apart
    told: list[tuple[int, int]] = []
    layout = plan_weights(parameters(model), model, dtype)
    write_weights(layout, Checkpoint(directory, model), tmp_path / "w", lambda *step: told.append(step))
    made = load_file(tmp_path / "w")
    assert made.keys() == parameters(model).keys()
    for name, tensor in parameters(model).items():
        assert torch.equal(made[name], tensor.to(dtype)), name
    assert told[-1] == (layout.size, layout.size)


@pytest.mark.parametrize("mode", ["reference", "copy"])
def test_stacks_are_written_and_with_them_what_their_shards_hold_beside(apart: Any, mode: str, tmp_path: Path) -> None:
    directory, model = apart
    checkpoint = Checkpoint(directory, model)
    layout = refer_weights(parameters(model), checkpoint, torch.float32, mode)
    used: dict[str, int] = {}
    for name in parameters(model).keys() - set(stacked(model)):
        stored = checkpoint.stored(name)
        assert stored is not None
        used[stored.file] = used.get(stored.file, 0) + stored.entry.length
    most = {file for file, length in used.items() if length >= (directory / file).stat().st_size / 2}
    assert 0 < len(most) < len(used), "the files show neither or both"
    assert {path.name for path in layout.shards.values()} == most
    for name in parameters(model):
        stored = checkpoint.stored(name)
        assert (name in layout.written) == (stored is None or stored.file not in most), name
    write_weights(layout, checkpoint, tmp_path / WEIGHTS_FILE)
    made = load_file(tmp_path / WEIGHTS_FILE)
    assert sorted(made) == sorted(layout.written)
    for name, tensor in parameters(model).items():
        place = layout.tensors[name]
        source = layout.shards.get(place.file, tmp_path / WEIGHTS_FILE)
        raw = source.read_bytes()[place.offset : place.offset + place.length]
        assert torch.equal(torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(place.shape), tensor), name


def test_stacks_that_lie_turned_are_referred_to(turned: Any) -> None:
    directory, model = turned
    checkpoint = Checkpoint(directory, model)
    layout = refer_weights(parameters(model), checkpoint, torch.float32, turnable=stacked(model))
    assert layout.header == b""
    assert layout.written == {}
    stored = load_file(directory / SINGLE)
    for name in stacked(model):
        place, tensor = layout.tensors[name], parameters(model)[name]
        assert place.turned
        assert place.shape == tuple(stored[name].shape) == (EXPERTS, *reversed(tensor.shape[1:]))
    assert not any(place.turned for name, place in layout.tensors.items() if name not in stacked(model))


def test_stacks_nobody_may_read_turned_are_written(turned: Any, tmp_path: Path) -> None:
    directory, model = turned
    checkpoint = Checkpoint(directory, model)
    layout = refer_weights(parameters(model), checkpoint, torch.float32)
    assert list(layout.written) == stacked(model)
    write_weights(layout, checkpoint, tmp_path / "w")
    for name, tensor in load_file(tmp_path / "w").items():
        assert torch.equal(tensor, parameters(model)[name])


def test_a_lost_expert_is_named(apart: Any) -> None:
    directory, model = apart
    lost = "model.layers.1.mlp.experts.3.up_proj.weight"
    index = json.loads((directory / INDEX).read_text())
    del index["weight_map"][lost]
    (directory / INDEX).write_text(json.dumps(index))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    with pytest.raises(UserError) as caught:
        Checkpoint(directory, model).require({name: (EXPERTS, 2 * HIDDEN, WIDTH)})
    assert str(caught.value).startswith("tensor model.layers.1.mlp.experts.0.gate_proj.weight and its like do not make")
    assert name in str(caught.value)


def test_a_layer_of_fewer_experts_is_of_another_shape(apart: Any) -> None:
    directory, model = apart
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] = {k: f for k, f in index["weight_map"].items() if ".0.mlp.experts.7." not in k}
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError) as caught:
        Checkpoint(directory, model).require({name: tuple(t.shape) for name, t in parameters(model).items()})
    assert "2 tensors of another shape than the configuration says" in str(caught.value)
    assert f"[7,{2 * HIDDEN},{WIDTH}] instead of [8,{2 * HIDDEN},{WIDTH}]" in str(caught.value)


def test_a_checkpoint_is_read_once_until_it_changes(apart: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.exporters import checkpoint as module

    directory, model = apart
    read: list[Any] = []
    mapped: Callable[..., Any] = module.map_names

    def count(*given: Any) -> Any:
        read.append(given)
        return mapped(*given)

    monkeypatch.setattr(module, "map_names", count)
    for _ in range(3):
        assert open_checkpoint(directory, model).names
    assert len(read) == 1
    os.utime(directory / INDEX, ns=(0, 0))
    assert open_checkpoint(directory, model).names
    assert len(read) == 2
