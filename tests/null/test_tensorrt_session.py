"""Sessions over engines of the null library: the same tokens as ONNX Runtime, and every rule of CUDA kept.

Nothing here runs TensorRT or a GPU.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from secateur.runtime import Session
from secateur.runtime.errors import SecateurError, UserError

from . import null_bundle
from .null_tensorrt import Library


@pytest.fixture(params=["tensorrt-rtx", "tensorrt"])
def flavour(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "secateur" / "tensorrt-rtx"


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    library = null_bundle.install(monkeypatch)
    with null_bundle.nothing_left(library):
        yield library


def draw(rows: int) -> list[list[Image.Image]]:
    random = np.random.default_rng(1)
    return [[Image.fromarray(random.integers(0, 256, (9, 11, 3), dtype=np.uint8))] for _ in range(rows)]


@pytest.mark.parametrize("weights", ["plan", "stripped", "inputs"])
def test_tokens_are_those_of_onnx_runtime(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: str, weights: str
) -> None:
    """Plain, captured and replayed runs, in two requests one after the other; rows of different length."""
    t, pictures, prompts = tiny.Tiny(batch=2), draw(2), ["<image>abcdefghijk", "<image>xy"]
    with Session(tiny.build(tmp_path / "plain", t), threads=1) as plain:
        want = plain.generate(prompts, pictures, ignore_eos=True)
        inputs = plain.processor(prompts, pictures)
        logits = plain.prefill(plain.request(), inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)
    library = null_bundle.install(monkeypatch, flavour)
    directory = null_bundle.build(tiny, tmp_path / "b", t, flavour=flavour, weights=weights)
    with null_bundle.nothing_left(library), Session(directory) as session:
        for _ in range(3):
            got = session.generate(prompts, pictures, ignore_eos=True)
            assert [one.tokens for one in got] == [one.tokens for one in want]
            for stage, kept in want[0].metrics.kept.items():
                assert got[0].metrics.kept[stage].tolist() == kept.tolist()
            assert got[0].metrics.cache_bytes == want[0].metrics.cache_bytes
            assert len(got[0].metrics.step_s) == t.new_tokens - 1
        again = session.request()
        made = session.prefill(again, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)
        assert (made.dtype, np.array_equal(made, logits)) == (np.float32, True)
        assert library.calls.count("decode enqueued") == library.calls.count("decode captured") == 1
        assert library.calls.count("prefill enqueued") == 2
        del again


@pytest.mark.parametrize(("dtype", "bits"), [("fp16", 10), ("bf16", 7)])
def test_half_precision_is_converted_on_the_way(
    tiny: ModuleType, tmp_path: Path, library: Library, image: Image.Image, dtype: str, bits: int
) -> None:
    """Features, caches and logits pass through the type: logits differ by its rounding and no more."""
    with Session(tiny.build(tmp_path / "plain"), threads=1) as plain:
        inputs = plain.processor(["<image>what"], [[image]])
        one = plain.request()
        want = [plain.prefill(one, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)]
        want += [plain.decode(one, np.array([token])) for token in (7, 9, 11)]
    with Session(null_bundle.build(tiny, tmp_path / "b", dtype=dtype)) as session:
        two = session.request()
        got = [session.prefill(two, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)]
        got += [session.decode(two, np.array([token])) for token in (7, 9, 11)]
        for mine, theirs in zip(got, want, strict=True):
            assert mine.dtype == np.float32
            # Features, a key or value and the logit itself are rounded, each by half a unit of the last place.
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=8 * 2.0 ** -(bits + 1) * np.abs(theirs).max())
            assert not np.array_equal(mine, theirs)
        cache = two.cache["past_key.0"]
        assert cache.dtype == (np.float16 if dtype == "fp16" else np.float32)
        assert np.isfinite(cache).all()
        del two


def test_memory_is_one_of_each(tiny: ModuleType, tmp_path: Path, library: Library) -> None:
    """Caches have one address in both programs, a request one scratch memory, a bundle one copy of the weights."""
    directory = null_bundle.build(tiny, tmp_path / "b", weights="inputs")
    with Session(directory) as session:
        weights = library.cuda.used()
        assert weights == sum(-(-one.nbytes // 256) * 256 for one in tiny.weights(tiny.Tiny()).values())
        request = session.request()
        ports = request._ports
        for name in ("key.0", "value.0", "key.1", "value.1"):
            places = {ports[p][f"{w}_{name}"].address for p in ("prefill", "decode") for w in ("past", "present")}
            assert len(places) == 1
        buffers = {id(buffer): buffer for each in ports.values() for buffer in each.values()}.values()
        scratch = {buffer.scratch.address for buffer in buffers}
        assert len(scratch) == 1
        held = sum(buffer.bytes for buffer in buffers) + max(null_bundle.SCRATCH.values())
        assert library.cuda.used() - weights == held
        assert not np.any(request.cache["past_key.0"])  # zeroed, whatever the memory held
        del request, ports, buffers
        gc.collect()
        assert library.cuda.used() == weights


def test_weights_are_read_in_pieces(
    tiny: ModuleType, tmp_path: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.runtime.backends.engine_weights import SharedWeights
    from secateur.runtime.backends.preflight import bindings
    from secateur.runtime.manifest import read_manifest

    directory = null_bundle.build(tiny, tmp_path / "b", weights="inputs")
    pinned: list[int] = []
    allocate = library.cuda.cudaHostAlloc
    monkeypatch.setattr(
        bindings(), "cudaHostAlloc", lambda size, flags: (pinned.append(size), allocate(size, flags))[1]
    )
    shared = SharedWeights(directory, read_manifest(directory), piece=1000)
    assert pinned == [1000, 1000]
    for name, tensor in tiny.weights(tiny.Tiny()).items():
        place = shared.address[name] - shared.memory.address
        block = library.cuda.block(shared.memory.address, shared.memory.size, "device", "weights")
        start = block.address - block.memory.ctypes.data + place
        assert block.memory[start : start + tensor.nbytes].tobytes() == tensor.tobytes()
    del block, shared


def test_graphs_can_be_turned_off_or_refused(
    tiny: ModuleType, tmp_path: Path, library: Library, image: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    directory = null_bundle.build(tiny, tmp_path / "b")
    with Session(directory) as session:
        want = session.generate("what", image, ignore_eos=True).tokens
        assert "decode captured" in library.calls
    library.calls.clear()
    with Session(directory, cuda_graphs=False) as session:
        assert session.generate("what", image, ignore_eos=True).tokens == want
        assert library.calls.count("decode enqueued") == 7
        assert "decode captured" not in library.calls
    library.cuda.refuse_capture = True
    caplog.set_level(logging.WARNING)
    with Session(directory) as session:
        for _ in range(2):
            assert session.generate("what", image, ignore_eos=True).tokens == want
            session._idle.clear()
    said = [record.getMessage() for record in caplog.records if "decode" in record.getMessage()]
    assert said == [
        "decode runs without a CUDA graph: CUDA: cudaStreamEndCapture failed with "
        "cudaErrorStreamCaptureInvalidated: as the test asked"
    ]


def test_kernels_are_kept_outside_the_bundle(
    tiny: ModuleType, tmp_path: Path, library: Library, cache_home: Path, image: Image.Image
) -> None:
    directory = null_bundle.build(tiny, tmp_path / "b")
    before = sorted(path.name for path in directory.iterdir())
    compiled = ["decode compiled", "prefill compiled", "vision compiled"]
    with Session(directory) as session:
        session.generate("what", image)
        assert [call for call in library.calls if "compiled" in call] == compiled
    kept = sorted(cache_home.iterdir())
    assert len(kept) == 3
    assert sorted(path.name for path in directory.iterdir()) == before
    library.calls.clear()
    with Session(directory) as session:
        session.request()
        assert not [call for call in library.calls if "compiled" in call]
    for path in kept:
        path.write_bytes(path.read_bytes()[:-1])
    library.calls.clear()
    with Session(directory) as session:
        session.generate("what", image)
        assert [call for call in library.calls if "compiled" in call] == compiled
    library.cuda.driver = 13010
    with Session(directory) as session:
        session.request()
    assert len(list(cache_home.iterdir())) == 6


def test_a_cache_directory_that_cannot_be_written(
    tiny: ModuleType, tmp_path: Path, library: Library, cache_home: Path, image: Image.Image
) -> None:
    cache_home.parent.mkdir(parents=True)
    cache_home.write_text("a file where the directory should be")
    with Session(null_bundle.build(tiny, tmp_path / "b")) as session:
        assert len(session.generate("what", image, ignore_eos=True).tokens) == 8


def test_nothing_writes_behind_a_cache(tiny: ModuleType, tmp_path: Path, library: Library, image: Image.Image) -> None:
    """Neither through the session nor through the buffers themselves."""
    with Session(null_bundle.build(tiny, tmp_path / "b")) as session:
        inputs = session.processor(["<image>" + "x" * 23], [[image]])
        request = session.request()
        session.prefill(request, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)
        for _ in range(8):
            session.decode(request, np.array([7]))
        with pytest.raises(SecateurError, match="would write cache row 35, the capacity is 35"):
            session.decode(request, np.array([7]))
        ports: Any = request._ports
        for slot, says in ((35, "slot.s0 goes from 35 to 35, the program takes 0 to 34"), (-1, "goes from -1 to -1")):
            with pytest.raises(SecateurError, match=says):
                ports["decode"]["slot.s0"].write(np.array([slot]))
        with pytest.raises(SecateurError, match="lengths goes from 28 to 28, the program takes 1 to 27"):
            ports["prefill"]["lengths"].write(np.array([28]))
        elsewhere = session._backend.buffer((1,), "int64")  # type: ignore[union-attr]
        elsewhere.write(np.array([35]))
        with pytest.raises(SecateurError, match=r"slot\.s0 goes from 35 to 35"):
            ports["decode"]["slot.s0"].write(elsewhere)
        with pytest.raises(BufferError, match=r"slot\.s0 is checked when it is written"):
            ports["decode"]["slot.s0"].__dlpack__()
        del request, ports, elsewhere


def test_device_memory_is_taken_and_given(
    tiny: ModuleType, tmp_path: Path, library: Library, image: Image.Image
) -> None:
    """Features made on the GPU go to prefill through DLPack, and no copy of them through the host is made."""
    with Session(null_bundle.build(tiny, tmp_path / "b", dtype="fp16")) as session:
        inputs = session.processor(["<image>what"], [[image]])
        first, second = session.request(), session.request()
        want = session.prefill(first, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)
        given = first.share("prefill", "features")
        kept = first.kept["stage0"]
        got = session.prefill(second, inputs.input_ids, inputs.lengths, features=given, kept=kept)
        assert np.array_equal(got, want)
        buffer: Any = second._ports["prefill"]["features"]
        assert buffer._pinned is None
        assert not np.array_equal(first.read("prefill", "features"), np.zeros(buffer.shape))
        wrong = session._backend.buffer((1, 3, 16), "fp32")  # type: ignore[union-attr]
        with pytest.raises(UserError, match="DLPack: fp32 for an input of fp16; convert it first"):
            session.prefill(second, inputs.input_ids, inputs.lengths, features=wrong, kept=kept)
        small = session._backend.buffer((1, 2, 16), "fp16")  # type: ignore[union-attr]
        with pytest.raises(UserError, match=r"an array of shape \[1, 2, 16\] for an input of \[1, 3, 16\]"):
            session.prefill(second, inputs.input_ids, inputs.lengths, features=small, kept=kept)
        del first, second, given, buffer, wrong, small


def test_buffers_that_are_not_the_ports(tiny: ModuleType, tmp_path: Path, library: Library) -> None:
    with Session(null_bundle.build(tiny, tmp_path / "b")) as session:
        backend: Any = session._backend
        program = session.manifest.programs["decode"]
        inputs = {port.name: backend.buffer(port.shape, port.dtype) for port in program.inputs}
        outputs = {port.name: backend.buffer(port.shape, port.dtype) for port in program.outputs}
        with pytest.raises(SecateurError, match=r"output present_key\.0 is written in place of input past_key\.0, but"):
            backend.bind("decode", inputs, outputs)
        outputs |= {name: inputs[name.replace("present", "past")] for name in outputs if name.startswith("present")}
        outputs["present_key.0"] = inputs["past_value.0"]
        with pytest.raises(SecateurError, match=r"present_key\.0 is written in place of input past_key\.0"):
            backend.bind("decode", inputs, outputs)
        outputs["present_key.0"] = inputs["past_key.0"]
        with pytest.raises(UserError, match="input position is bound to nothing"):
            backend.bind("decode", {k: v for k, v in inputs.items() if k != "position"}, outputs)
        with pytest.raises(UserError, match=r"output logits is bound to fp32\[1, 5\], it is fp32\[1, 260\]"):
            backend.bind("decode", inputs, outputs | {"logits": backend.buffer((1, 5), "fp32")})
        with pytest.raises(UserError, match="no input mask"):
            backend.bind("decode", inputs | {"mask": outputs["logits"]}, outputs)
        del backend, inputs, outputs


def test_a_program_writes_over_what_the_host_left(
    tiny: ModuleType, tmp_path: Path, library: Library, image: Image.Image
) -> None:
    with Session(null_bundle.build(tiny, tmp_path / "b")) as session:
        inputs = session.processor(["<image>what"], [[image]])
        request = session.request()
        want = session.prefill(request, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)
        features: Any = request._ports["prefill"]["features"]
        features.write(np.ones(features.shape))
        assert np.array_equal(features.read(), np.ones(features.shape))
        again = session.prefill(request, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)
        assert np.array_equal(again, want)
        del request, features


def test_threads_share_a_session(tiny: ModuleType, tmp_path: Path, library: Library) -> None:
    with Session(null_bundle.build(tiny, tmp_path / "b", weights="inputs")) as session:
        pictures = [row[0] for row in draw(4)]
        alone = [session.generate("what", picture, ignore_eos=True).tokens for picture in pictures]
        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(lambda p: session.generate("what", p, ignore_eos=True).tokens, pictures * 2))
        assert together == alone * 2


def test_streams_outlive_their_session(tiny: ModuleType, tmp_path: Path, library: Library, image: Image.Image) -> None:
    session = Session(null_bundle.build(tiny, tmp_path / "b", weights="inputs"))
    want = session.generate("what", image, ignore_eos=True).tokens
    stream = session.stream("what", image, ignore_eos=True)
    next(stream)
    session.close()
    list(stream)
    assert stream.generations[0].tokens == want
    assert library.cuda.used() == 0
