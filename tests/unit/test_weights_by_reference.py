"""Bundles whose graphs point into the checkpoint's own shards: linked, copied, and changed afterwards."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.compiler.output import check_output
from secateur.compiler.pipeline import build, check_target, export
from secateur.exporters import digests
from secateur.runtime.backends.engine_ports import DTYPES
from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.manifest import check_files, read_manifest
from secateur.runtime.session import Session

from . import tiny_model

Make = Callable[..., Path]
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoint(decoder="llama", dtype=float32)`` -> a model directory in several shards; do not change it."""
    root = tmp_path_factory.mktemp("sharded")

    def make(decoder: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        path = root / f"{decoder}-{dtype}"
        if not path.is_dir():
            tiny_model.write_config(path, decoder=decoder, layers=4)
            tiny_model.write_processor(path)
            tiny_model.make_model(path, 0).to(dtype).save_pretrained(path, max_shard_size="150KB")
        return path

    return make


@pytest.fixture
def bundle(pruned: Callable[..., Any], checkpoint: Callable[..., Path], tmp_path: Path) -> Make:
    """``bundle(mode, source=None, name=None, target="onnxruntime", **model)`` -> a bundle of recipe none."""

    def make(
        mode: str, source: Path | None = None, name: str | None = None, target: str = "onnxruntime", **how: Any
    ) -> Path:
        progress, goal = how.pop("progress", None), check_target(target, how.get("dtype"), None)
        whole = pruned("none", **how)
        path = source or checkpoint(how.get("decoder", "llama"))
        here = replace(whole, job=replace(whole.job, source=replace(whole.job.source, path=path)))
        return build(here, export(here, goal.dialect, mode), goal, tmp_path / (name or mode), progress=progress)

    return make


def shards_of(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.glob("*.safetensors"))


def contents(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def logits(path: Path) -> np.ndarray[Any, Any]:
    """Of the prompt's last token, for a picture and text of one kind."""
    with Session(path, verify="full") as session:
        sizes = session.manifest.geometry
        ids = np.full((1, sizes.sequence), tiny_model.PAD, np.int64)
        ids[0, : sizes.features + 4] = [1, *[tiny_model.IMAGE] * sizes.features, 40, 50, 60]
        pixels = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
        return session.prefill(session.request(), ids, np.array([sizes.features + 4]), pixel_values=pixels)


# -- what lies in the bundle --------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["llama", "qwen2"])
def test_three_ways_to_one_answer(bundle: Make, checkpoint: Any, decoder: str) -> None:
    """qwen2's head is its embedding: stored once, and no file holds it under the other name."""
    source = checkpoint(decoder)
    made = {mode: bundle(mode, decoder=decoder) for mode in ("stream", "reference", "copy")}
    names = shards_of(source)
    assert len(names) > 3
    for mode in ("reference", "copy"):
        assert read_manifest(made[mode]).weights == [f"weights/{name}" for name in names]
        for name in names:
            assert os.path.samefile(made[mode] / "weights" / name, source / name) == (mode == "reference")
    assert contents(made["reference"]) == contents(made["copy"])
    expected = logits(made["stream"])
    assert np.array_equal(logits(made["reference"]), expected)
    assert np.array_equal(logits(made["copy"]), expected)
    heads = [key for name in names for key in load_file(source / name) if key.endswith("lm_head.weight")]
    assert len(heads) == (0 if decoder == "qwen2" else 1)


def test_entries_point_at_the_tensors_bytes(bundle: Make, checkpoint: Any) -> None:
    path, stored = bundle("reference"), {}
    for name in shards_of(checkpoint()):
        stored |= load_file(checkpoint() / name)
    for program in ("vision", "prefill", "decode"):
        found = [v.const_value for v in ir.load(path / f"{program}.onnx").graph.initializers.values()]
        external = [tensor for tensor in found if isinstance(tensor, ir.ExternalTensor)]
        assert external
        for tensor in external:
            raw = (path / tensor.location).read_bytes()[tensor.offset : tensor.offset + tensor.length]
            data = torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(tuple(tensor.shape))
            assert any(torch.equal(data, other) for other in stored.values() if other.shape == data.shape)


def test_shards_no_graph_needs_stay_outside(bundle: Make, checkpoint: Any, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint(), tmp_path / "model")
    save_file({"talker.weight": torch.zeros(4)}, source / "other.safetensors")
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["talker.weight"] = "other.safetensors"
    (source / INDEX).write_text(json.dumps(index))
    assert "weights/other.safetensors" not in contents(bundle("reference", source))


def test_the_same_inputs_give_the_same_bytes(bundle: Make) -> None:
    assert contents(bundle("reference", name="a")) == contents(bundle("reference", name="b"))


def test_one_file_of_a_checkpoint_without_shards(bundle: Make, model_dir: Any) -> None:
    path = bundle("reference", model_dir())
    manifest = read_manifest(path)
    assert manifest.weights == ["weights/model.safetensors"]
    digest = hashlib.sha256((model_dir() / "model.safetensors").read_bytes()).hexdigest()
    assert manifest.model.weights_sha256 == manifest.files["weights/model.safetensors"].sha256 == digest


def test_engines_read_several_files(bundle: Make, checkpoint: Any) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    pytest.importorskip("polygraphy", reason="needs the extra tensorrt-rtx")
    source = checkpoint(dtype=torch.float16)
    path = bundle("reference", source, target="tensorrt-rtx", dtype="fp16")
    assert len(read_manifest(path).weights) == len(shards_of(source)) > 1
    assert all((path / f"{name}.engine").stat().st_size > 0 for name in ("vision", "prefill", "decode"))
    for program in read_manifest(path).programs.values():
        declared = {port.name: (port.dtype, port.shape) for port in (*program.inputs, *program.outputs)}
        assert parsed_ports(path / program.graph) == declared
    if find_driver() == 0:
        with pytest.raises(UserError, match="engines cannot run here: missing an NVIDIA GPU with its driver"):
            Session(path)


def parsed_ports(graph: Path) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of every input and output of the network that the library makes of a graph."""
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(graph))
    ports = [network.get_input(i) for i in range(network.num_inputs)]
    ports += [network.get_output(i) for i in range(network.num_outputs)]
    return {port.name: (DTYPES[port.dtype.name], list(port.shape)) for port in ports}


def find_driver() -> int:
    """The newest CUDA that this machine's driver runs; 0 without one."""
    return int(pytest.importorskip("cuda.bindings.runtime").cudaDriverGetVersion()[1])


# -- where the shards come from -----------------------------------------------------------------------------


@pytest.fixture
def cached(checkpoint: Any, tmp_path: Path) -> Path:
    """The snapshot of a download cache: links to blobs, large files named by their SHA-256."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "rev"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in checkpoint().iterdir():
        large = path.suffix == ".safetensors"
        digest = (hashlib.sha256 if large else hashlib.sha1)(path.read_bytes()).hexdigest()
        shutil.copy(path, blobs / digest)
        (snapshot / path.name).symlink_to(f"../../blobs/{digest}")
    return snapshot


def test_links_of_a_cache_are_followed(bundle: Make, cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = contents(bundle("reference", name="plain"))
    monkeypatch.setattr(digests, "hash_file", lambda *_: pytest.fail("a blob was read, its name is its digest"))
    path = bundle("reference", cached, name="cached")
    check_files(path, read_manifest(path), "full")
    for name in shards_of(cached):
        assert not (path / "weights" / name).is_symlink()
        assert os.path.samefile(path / "weights" / name, (cached / name).resolve())
    different = {name for name, data in contents(path).items() if plain[name] != data}
    assert different == {"manifest.json"}  # the name of the model's directory
    assert read_manifest(path).files == read_manifest(path.parent / "plain").files


def test_a_damaged_blob(bundle: Make, cached: Path) -> None:
    shard = (cached / shards_of(cached)[1]).resolve()
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    path = bundle("reference", cached)
    with pytest.raises(BundleError, match="altered: its SHA-256 is not the manifest's"):
        check_files(path, read_manifest(path), "full")
    with pytest.raises(UserError) as caught:
        bundle("copy", cached)
    assert str(caught.value) == (
        f"{cached / shards_of(cached)[1]}: damaged: the cache says it has another SHA-256; "
        "delete it and download it again"
    )
    assert not (path.parent / "copy").exists()


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM])
def test_what_cannot_be_linked_is_copied(
    bundle: Make, checkpoint: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    linked = contents(bundle("reference", name="linked"))

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    with caplog.at_level(logging.WARNING, "secateur"):
        path = bundle("reference", name="copied")
    first = shards_of(checkpoint())[0]
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        f"weights are copied: {checkpoint() / first} cannot be linked into the bundle ({os.strerror(code)})"
    ]
    assert contents(path) == linked
    assert not os.path.samefile(path / "weights" / first, checkpoint() / first)


def test_a_checkpoint_that_may_only_be_read(bundle: Make, checkpoint: Any, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint(), tmp_path / "model")
    before = contents(source)
    for path in (*source.iterdir(), source):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        made = bundle("reference", source)
        assert stat.S_IMODE((source / shards_of(source)[0]).stat().st_mode) == 0o444
        shutil.rmtree(made)
        assert contents(source) == before
    finally:
        source.chmod(0o755)


# -- in the middle ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["reference", "copy"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_build_leaves_nothing(
    bundle: Make, checkpoint: Any, tmp_path: Path, mode: str, error: BaseException
) -> None:
    before = contents(checkpoint())

    def stop(what: str, done: int, total: int) -> None:
        if what == "weights" and done > total / 2:
            raise error

    with pytest.raises(type(error)):
        bundle(mode, progress=stop)
    assert list(tmp_path.iterdir()) == []
    assert contents(checkpoint()) == before


def test_progress_counts_every_byte(bundle: Make, checkpoint: Any) -> None:
    size = sum((checkpoint() / name).stat().st_size for name in shards_of(checkpoint()))
    for mode in ("reference", "copy"):
        told: list[tuple[int, int]] = []
        bundle(mode, progress=lambda what, done, total, told=told: what == "weights" and told.append((done, total)))
        assert told[-1] == (size, size)
        assert told == sorted(told)


def test_a_disk_too_small_for_copies(bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.exporters import weights

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="disk full: the weights take"):
        bundle("copy")
    assert list(tmp_path.iterdir()) == []
    bundle("reference")


# -- bundles that were changed ------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(BundleError) as caught:
        check_files(path, read_manifest(path))
    return str(caught.value)


def test_changed_shards_are_refused_at_load(bundle: Make, checkpoint: Any) -> None:
    path, name = bundle("copy"), shards_of(checkpoint())[0]
    shard = path / "weights" / name
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4])
    assert f"weights/{name}: truncated" in refusal(path)
    shard.unlink()
    assert f"weights/{name}: missing" in refusal(path)
    shard.symlink_to(checkpoint() / name)
    assert f"weights/{name}: links to a file outside the bundle" in refusal(path)
    shard.unlink()
    shard.write_bytes(whole)
    check_files(path, read_manifest(path))


def test_another_header_of_the_same_size_is_refused_at_load(bundle: Make, checkpoint: Any) -> None:
    """The checkpoint was saved anew: whole, and as long as before, but two tensors lie in each other's place."""
    path, name = bundle("copy"), shards_of(checkpoint())[0]
    whole = (path / "weights" / name).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    shapes = {key: entry["shape"] for key, entry in header.items() if key != "__metadata__"}
    a, b = next((a, b) for a in shapes for b in shapes if a < b and shapes[a] == shapes[b])
    header[a], header[b] = header[b], header[a]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    (path / "weights" / name).write_bytes(whole[:8] + text + whole[8 + length :])
    assert f"weights/{name}: altered: its header's SHA-256 is not the manifest's" in refusal(path)


def test_only_a_bundles_own_files_are_replaced(bundle: Make) -> None:
    path = bundle("reference")
    check_output(path, force=True)
    (path / "weights" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds what is no part of the bundle: weights/mine\.txt"):
        check_output(path, force=True)
