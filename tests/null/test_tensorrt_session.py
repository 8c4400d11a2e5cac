"""Sessions over engines of the null library: the same tokens as ONNX Runtime, and every rule of CUDA kept.

Nothing here runs TensorRT or a GPU.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from secateur.runtime import Session

from . import null_bundle
from .null_bundle import draw
from .null_tensorrt import Library

pytestmark = pytest.mark.usefixtures("cache_home")


@pytest.fixture(params=["tensorrt-rtx", "tensorrt"])
def flavour(request: pytest.FixtureRequest) -> str:
    return str(request.param)


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
    library.cannot_be_captured = True
    library.calls.clear()
    with Session(directory) as session:
        assert session.generate("what", image, ignore_eos=True).tokens == want
    assert "decode captured" not in library.calls
    assert "decode runs without a CUDA graph: the library cannot capture it" in caplog.text


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


@pytest.mark.parametrize("keeps", ["to itself", "nowhere"])
def test_a_library_that_gives_no_kernels(
    tiny: ModuleType, tmp_path: Path, library: Library, cache_home: Path, image: Image.Image,
    caplog: pytest.LogCaptureFixture, keeps: str,
) -> None:  # fmt: skip
    library.keeps_kernels = keeps
    caplog.set_level(logging.INFO)
    with Session(null_bundle.build(tiny, tmp_path / "b")) as session:
        for _ in range(2):
            assert len(session.generate("what", image, ignore_eos=True).tokens) == 8
            session._idle.clear()
    assert not cache_home.exists()
    said = [one.getMessage() for one in caplog.records if "compiled kernels are not kept: the library" in one.message]
    assert len(said) == 3  # once for each engine


def test_a_thread_of_another_gpu(tiny: ModuleType, tmp_path: Path, library: Library, image: Image.Image) -> None:
    """Opened, run, read, shared and written there, with its own device current again behind every call."""
    cuda, directory = library.cuda, null_bundle.build(tiny, tmp_path / "b", weights="inputs")
    with Session(directory) as session:
        want = session.generate("what", image, ignore_eos=True).tokens

    def elsewhere() -> None:
        cuda.cudaSetDevice(1)
        with Session(directory) as session:
            assert cuda.cudaGetDevice()[1] == 1
            assert session.generate("what", image, ignore_eos=True).tokens == want
            request, buffer = session.request(), session._backend.buffer((2,), "fp32")  # type: ignore[union-attr]
            request.share("decode", "logits").__dlpack__()
            buffer.write(np.ones(2))
            assert buffer.read().tolist() == [1, 1]
            assert cuda.cudaGetDevice()[1] == 1

    with ThreadPoolExecutor(1) as pool:
        pool.submit(elsewhere).result()
    assert cuda.cudaGetDevice()[1] == 0


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
