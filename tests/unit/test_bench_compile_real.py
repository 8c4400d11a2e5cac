"""Checkpoints made of holes: named and shaped as real ones are, and compiled by the benchmark as real ones would be."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from secateur.exporters.checkpoint import list_tensors
from secateur.tools.bench.compile_real import Layout, clip_pixels, draw, main, measure
from secateur.tools.bench.sparse_checkpoint import INDEX, write_sparse

from . import tiny_model, tiny_onevision


def tensors(directory: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {k: (e.dtype, e.shape) for keys in list_tensors(directory).values() for k, e in keys.items()}


@pytest.mark.parametrize(
    ("tiny", "options"),
    [(tiny_model, {}), (tiny_model, {"decoder": "qwen2"}), (tiny_onevision, {})],
    ids=["llava", "llava-tied", "onevision"],
)
def test_names_and_shapes_are_those_of_save_pretrained(
    tmp_path: Path, tiny: ModuleType, options: dict[str, Any]
) -> None:
    real = tiny.write_model(tmp_path / "real", **options)
    sparse = tmp_path / "sparse"
    sparse.mkdir()
    (sparse / "config.json").write_text((real / "config.json").read_text())
    size = write_sparse(sparse, "fp32", shard_bytes=60_000)
    assert tensors(sparse) == tensors(real)
    shards = sorted(sparse.glob("*.safetensors"))
    assert len(shards) > 3
    assert sum(path.stat().st_size for path in shards) == size
    index = json.loads((sparse / INDEX).read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}


def test_names_of_the_model_in_memory(tmp_path: Path) -> None:
    tiny_model.write_config(tmp_path, layers=2)
    write_sparse(tmp_path, original=False)
    names = tensors(tmp_path)
    assert "lm_head.weight" in names
    assert names["model.language_model.norm.weight"] == ("F16", (64,))


def test_the_data_are_holes(tmp_path: Path) -> None:
    text = {"hidden_size": 512, "intermediate_size": 4096}
    tiny_model.write_config(tmp_path, layers=2, text=text)
    size = write_sparse(tmp_path, "fp16")
    (shard,) = tmp_path.glob("*.safetensors")
    assert shard.stat().st_size == size > 20_000_000
    assert shard.stat().st_blocks * 512 < 200_000


@pytest.mark.slow
def test_a_layout_is_measured(tmp_path: Path) -> None:
    layout = Layout(tiny_model.make_config(layers=4, image_token_index=300), clip_pixels(32), gib=1.5)
    layout.config["text_config"] |= {"vocab_size": 301}
    held = bytearray(b"x") * (2 << 30)  # what this process holds is not the child's
    report = measure("tiny", layout)
    del held
    assert report["linked"]
    assert report["shards"] == 1
    assert 0 < report["peak_gib"] < layout.gib
    assert report["phases"].keys() >= {"trace", "prune", "export", "weights"}
    assert report["cpu_seconds"] > 0
    assert draw([report]).row_count == 1


def test_a_layout_that_is_not_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["llava-9000"])
    assert "no layout 'llava-9000' (available: llava-1.5-7b" in capsys.readouterr().err
