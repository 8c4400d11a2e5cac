"""Sessions over the null CUDA provider: the same tokens as on the CPU, and every rule of CUDA kept.

Nothing here runs on a GPU.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from secateur.runtime import Session
from secateur.runtime.errors import SecateurError, UserError

from . import null_bundle
from .null_bundle import draw
from .null_cuda_types import Error
from .null_onnxruntime import Library

PROMPTS = ["<image>abcdefghijk", "<image>xy"]


@pytest.fixture
def plain(tiny: ModuleType, tmp_path: Path) -> Any:
    return tiny.build(tmp_path / "plain", tiny.Tiny(batch=2))


@pytest.fixture
def library(tiny: ModuleType, plain: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    """The fake in place of ``onnxruntime``, for the bundle that :func:`bundle` makes."""
    cuda = null_bundle.install_cuda(monkeypatch)
    library = Library(cuda, json.loads((plain / "manifest.json").read_text())["programs"])
    monkeypatch.setitem(sys.modules, "onnxruntime", library.module())
    yield library
    gc.collect()
    assert cuda.violations == []
    assert {kind: count for kind, count in cuda.live().items() if count} == {}
    assert list(library.sessions) == []


def make(tiny: ModuleType, directory: Path, library: Library, dtype: str = "fp32") -> Path:
    """The tiny bundle as a compilation for the CUDA provider would leave it; its graphs compute in fp32 throughout."""
    return null_bundle.build_for_cuda(tiny, directory, library.ports, tiny.Tiny(batch=2), dtype)


def test_tokens_are_those_of_the_cpu(
    tiny: ModuleType, tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    with Session(plain, threads=1) as session:
        want = session.generate(PROMPTS, draw(2), ignore_eos=True)
    library = request.getfixturevalue("library")
    with Session(make(tiny, tmp_path / "b", library)) as session:
        for _ in range(2):
            got = session.generate(PROMPTS, draw(2), ignore_eos=True)
            assert [one.tokens for one in got] == [one.tokens for one in want]
    assert {"vision run", "prefill run", "decode run"} <= set(library.calls)


def test_all_sessions_share_one_copy_of_the_weights(tiny: ModuleType, tmp_path: Path, library: Library) -> None:
    directory = make(tiny, tmp_path / "b", library)
    tensors = json.loads((directory / "manifest.json").read_text())["tensors"]
    with Session(directory):
        given = {one.name: one.given() for one in library.sessions}
        assert given["prefill"].keys() & given["decode"].keys(), "the decoder is in both"
        for name in given["prefill"].keys() & given["decode"].keys():
            assert given["prefill"][name].address == given["decode"][name].address
        assert set(tensors) == {name for names in given.values() for name in names}
        # One allocation, rounded up to its alignment.
        assert library.cuda.used() <= sum(256 * -(-one["bytes"] // 256) for one in tensors.values())


@pytest.mark.parametrize(("dtype", "share"), [("fp16", 0.01), ("bf16", 0.08)])
def test_half_precision_at_the_ports(
    tiny: ModuleType, tmp_path: Path, library: Library, dtype: str, share: float
) -> None:
    """``share`` of the largest logit: what is rounded is caches, features and logits."""
    logits = []
    for kind in ("fp32", dtype):
        with Session(make(tiny, tmp_path / kind, library, kind)) as session:
            inputs, request = session.processor(PROMPTS, draw(2)), session.request()
            logits.append(session.prefill(request, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values))
            del request
    assert logits[1].dtype == np.float32
    assert not np.array_equal(*logits)
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=share * np.abs(logits[0]).max())


def test_a_request_outlives_its_closed_session(tiny: ModuleType, tmp_path: Path, library: Library) -> None:
    session = Session(make(tiny, tmp_path / "b", library))
    inputs, request = session.processor(PROMPTS, draw(2)), session.request()
    session.close()
    session.prefill(request, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)
    with pytest.raises(UserError, match="closed"):
        session.request()


def test_failures_are_one_line(tiny: ModuleType, tmp_path: Path, library: Library) -> None:
    directory = make(tiny, tmp_path / "b", library)
    with Session(directory) as session:
        library.fails = True
        with pytest.raises(SecateurError, match=r"^program vision: CUDA failure 2: out of memory$"):
            session.generate(PROMPTS, draw(2))
        library.fails = False
        session.generate(PROMPTS, draw(2))
    library.loads = ["CPUExecutionProvider"]
    with pytest.raises(UserError, match=r"has the CUDA provider but cannot load it: cuBLAS, .* is missing, or"):
        Session(directory)
    library.loads, library.place = library.providers, "Cpu"
    with pytest.raises(SecateurError, match=r"^backend onnxruntime-cuda: [a-z]+ reads [a-z_]+ on the CPU; compile"):
        Session(directory)
    library.place = "Cuda"
    library.cuda.fail("cudaMalloc", Error.cudaErrorMemoryAllocation)
    with pytest.raises(SecateurError, match=r"cudaMalloc failed with cudaErrorMemoryAllocation"):
        Session(directory)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (
            lambda library: library.providers.remove("CUDAExecutionProvider"),
            r"here has no CUDA provider; pip uninstall",
        ),
        (lambda library: setattr(library.cuda, "gpus", 0), r"there is a driver, but it shows no GPU"),
        (
            lambda library: setattr(library.cuda, "driver", 0),
            r"the onnxruntime-cuda graphs cannot run here: missing an",
        ),
        (lambda library: setattr(library.cuda, "sm", 75), r"of architecture 75 computes no bf16; compile with"),
        (
            lambda library: setattr(library.cuda, "total", 60_000),
            r"a request of the bundle needs 1 MiB of .*; free memory",
        ),
    ],
)
def test_what_the_machine_lacks(tiny: ModuleType, tmp_path: Path, library: Library, spoil: Any, text: str) -> None:
    directory = make(tiny, tmp_path / "b", library, "bf16")
    spoil(library)
    with pytest.raises(UserError, match=rf"^backend onnxruntime-cuda: .*{text}"):
        Session(directory)
    assert not [call for call in library.calls if call.endswith("run")]


def test_other_bundles_are_refused(plain: Path, library: Library) -> None:
    text = r"the bundle was compiled for onnxruntime; compile it with --target onnxruntime-cuda, or leave"
    with pytest.raises(UserError, match=text):
        Session(plain, backend="onnxruntime-cuda")


def test_the_real_library_computes_with_the_weights_it_is_given() -> None:
    """On its CPU provider, and not with the file's: neither directly nor folded into something else."""
    import onnx
    import onnxruntime as ort

    from secateur.runtime.backends.onnxruntime_cuda import make_options

    stored = {name: np.full((4, 4), place, np.float32) for place, name in enumerate("abc")}
    given = {name: ort.OrtValue.from_dlpack(values + 10) for name, values in stored.items()}
    text = """<ir_version: 10, opset_import: ["" : 23]> g (float[1,4] x) => (float[1,4] y) {
        u = MatMul (x, a) t = Transpose <perm = [1, 0]> (b) v = MatMul (u, t) y = Gemm <transB = 1> (v, c) }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(values, name) for name, values in stored.items())
    session = ort.InferenceSession(
        model.SerializeToString(), make_options(ort, 1, given), providers=["CPUExecutionProvider"],
        disabled_optimizers=["ConstantFolding"],
    )  # fmt: skip
    x = np.ones((1, 4), np.float32)
    (found,) = session.run(None, {"x": x})
    assert found.tolist() == (x @ (stored["a"] + 10) @ (stored["b"] + 10).T @ (stored["c"] + 10).T).tolist()
