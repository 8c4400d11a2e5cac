"""The demo model on this machine's GPU, as engines and on ONNX Runtime's CUDA provider, against its CPU.

Not part of `make test`: run it where there is a GPU with `pytest -m device tests/device`.
"""

from __future__ import annotations

import gc
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from secateur.compiler.pipeline import EngineOptions, Geometry, compile
from secateur.exporters.tensorrt import SMS
from secateur.runtime import Session
from secateur.runtime.backends.preflight import MODULES
from secateur.tools.demo.ask import read_questions

pytestmark = pytest.mark.device

DEMO = Path(__file__).resolve().parents[2] / "demo"
GEOMETRY = Geometry(batch=1, images=1, text_tokens=64, new_tokens=16)
TOLERANCE = {"fp16": 0.03, "bf16": 0.2}
"""Of the largest logit. Eight layers, each rounding its results to half a unit of the last place some ten times."""


def gpu() -> int:
    """Architecture of the first GPU; skips where there is none."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs the extra tensorrt or tensorrt-rtx")
    code, count = runtime.cudaGetDeviceCount()
    if int(code) != 0 or not count:
        pytest.skip("there is no GPU")
    properties = runtime.cudaGetDeviceProperties(0)[1]
    return int(properties.major) * 10 + int(properties.minor)


@pytest.fixture(scope="module", params=["tensorrt-rtx", "tensorrt", "onnxruntime-cuda"])
def flavour(request: pytest.FixtureRequest) -> str:
    name, sm = str(request.param), gpu()
    if importlib.util.find_spec(MODULES[name]) is None:
        pytest.skip(f"{name} is not installed")
    if name == "tensorrt-rtx" and sm not in SMS:
        pytest.skip(f"tensorrt-rtx does not compile for architecture {sm}")
    if name == "onnxruntime-cuda":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("this onnxruntime has no CUDA provider")
    return name


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``bundles(recipe, target, dtype, weights="inputs")`` -> a bundle of the demo model, compiled once."""
    root, made = tmp_path_factory.mktemp("bundles"), dict[tuple[str, str, str, str], Path]()

    def make(recipe: str, target: str, dtype: str, weights: str = "inputs") -> Path:
        key = (recipe, target, dtype, weights)
        if key not in made:
            made[key] = root / "-".join(key)
            keep = None if recipe == "none" else 0.3
            sm = gpu() if target == "tensorrt-rtx" else None
            engines = EngineOptions(weights=weights) if target.startswith("tensorrt") else None
            compile(DEMO / "model", made[key], recipe=recipe, keep=keep, geometry=GEOMETRY, target=target, dtype=dtype,
                    sm=sm, engines=engines)  # fmt: skip
        return made[key]

    return make


@pytest.fixture(autouse=True)
def cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "secateur" / "tensorrt-rtx"


def question(place: int = 0) -> tuple[str, Image.Image]:
    one = read_questions(DEMO / "questions.json")[place]
    return one.text, Image.open(one.image)


@pytest.mark.parametrize(
    ("dtype", "weights"), [("fp16", "inputs"), ("bf16", "inputs"), ("fp16", "plan"), ("fp16", "stripped")]
)
def test_logits_are_those_of_onnx_runtime(bundles: Any, flavour: str, dtype: str, weights: str) -> None:
    """Prefill and eight forced decode steps, so that the plain, the captured and the replayed run are all compared."""
    if flavour == "onnxruntime-cuda" and weights != "inputs":
        pytest.skip("its sessions share one copy of the weights, always")
    text, picture = question()
    built = bundles("none", flavour, dtype, weights)
    with Session(bundles("none", "onnxruntime", "fp32")) as plain, Session(built) as engine:
        inputs = plain.processor([text], [[picture]])
        one, two = plain.request(), engine.request()
        want = [plain.prefill(one, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)]
        got = [engine.prefill(two, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)]
        for _ in range(8):
            token = want[-1].argmax(-1)
            want.append(plain.decode(one, token))
            got.append(engine.decode(two, token))
        for step, (mine, theirs) in enumerate(zip(got, want, strict=True)):
            assert mine.dtype == np.float32
            worst = np.abs(mine - theirs).max() / np.abs(theirs).max()
            assert worst <= TOLERANCE[dtype], f"step {step}: {worst:.4f} of the largest logit"


def test_a_pruned_model_answers_as_on_the_cpu(bundles: Any, flavour: str) -> None:
    with (
        Session(bundles("fastv", "onnxruntime", "fp32")) as plain,
        Session(bundles("fastv", flavour, "fp16")) as engine,
    ):
        places = range(8)
        want = [plain.generate(*question(place)).text for place in places]
        got = [engine.generate(*question(place)).text for place in places]
    # Near ties may fall the other way in fp16, and one token more or less is seldom an answer more or less.
    assert sum(a == b for a, b in zip(want, got, strict=True)) >= 7, list(zip(want, got, strict=True))


def test_graphs_change_nothing(bundles: Any, flavour: str, caplog: pytest.LogCaptureFixture) -> None:
    if flavour == "onnxruntime-cuda":
        pytest.skip("it uses no CUDA graphs")
    directory = bundles("fastv", flavour, "fp16")
    with Session(directory) as graphs, Session(directory, cuda_graphs=False) as plain:
        for place in range(3):
            assert graphs.generate(*question(place)).tokens == plain.generate(*question(place)).tokens
    refused = [record.getMessage() for record in caplog.records if "without a CUDA graph" in record.getMessage()]
    assert refused == []


def test_threads_share_the_weights(bundles: Any, flavour: str) -> None:
    with Session(bundles("fastv", flavour, "fp16")) as session:
        want = [session.generate(*question(place)).tokens for place in range(4)]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda place: session.generate(*question(place)).tokens, range(4))) == want


def test_memory_comes_back(bundles: Any, flavour: str) -> None:
    from cuda.bindings import runtime

    directory = bundles("fastv", flavour, "fp16")
    for round_ in range(4):
        with Session(directory) as session:
            session.generate(*question())
        gc.collect()
        free = int(runtime.cudaMemGetInfo()[1])
        if round_ == 0:  # what the driver and the library keep for good is taken by now
            first = free
    assert free >= first - (8 << 20)


def test_weights_are_on_the_device_once(bundles: Any, flavour: str) -> None:
    """Prefill and decode both read the whole decoder."""
    from cuda.bindings import runtime

    directory = bundles("none", flavour, "fp16")
    with Session(directory) as session:  # what the driver and the library keep for good
        session.generate(*question())
        told = session.manifest.forecast
    gc.collect()
    before = int(runtime.cudaMemGetInfo()[1])
    with Session(directory) as session:
        session.generate(*question())
        taken = before - int(runtime.cudaMemGetInfo()[1])
    assert told is not None
    assert taken < 1.5 * told.weights + told.caches + told.buffers + (512 << 20)


def test_compiled_kernels_are_kept(bundles: Any, flavour: str, cache_home: Path) -> None:
    if flavour != "tensorrt-rtx":
        pytest.skip("only tensorrt-rtx compiles kernels when it runs")
    directory = bundles("fastv", flavour, "fp16")
    with Session(directory) as session:
        want = session.generate(*question()).tokens
    kept = sorted(cache_home.iterdir())
    assert len(kept) == 3
    before = [path.stat().st_mtime_ns for path in kept]
    with Session(directory) as session:
        assert session.generate(*question()).tokens == want
    assert [path.stat().st_mtime_ns for path in sorted(cache_home.iterdir())] == before


def test_memory_of_torch_is_read_and_given(bundles: Any, flavour: str) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    text, picture = question()
    with Session(bundles("none", flavour, "fp16")) as session:
        inputs = session.processor([text], [[picture]])
        first, second = session.request(), session.request()
        want = session.prefill(first, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)
        features = torch.from_dlpack(first.share("prefill", "features"))
        assert features.is_cuda
        assert np.array_equal(features.cpu().numpy(), first.read("vision", "features"))
        got = session.prefill(second, inputs.input_ids, inputs.lengths, features=features.clone())
        np.testing.assert_array_equal(got, want)
