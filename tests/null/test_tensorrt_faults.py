"""What keeps a bundle's engines from running, one line each.

The libraries are the null ones; nothing here runs TensorRT or a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from secateur.runtime import Session
from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.kv import buffer_bytes, cache_bytes
from secateur.runtime.manifest import read_manifest
from secateur.runtime.schema import Forecast

from . import null_bundle, null_tensorrt
from .null_bundle import refusal
from .null_cuda_types import Error
from .null_tensorrt import Library

pytestmark = pytest.mark.usefixtures("cache_home")


def forecast_of(bundle: Path, activations: int = 1 << 30) -> dict[str, int]:
    """A little more than 7 GiB: weights are said to be large, caches and buffers are the ports'."""
    m = read_manifest(bundle)
    caches, buffers = cache_bytes(m), buffer_bytes(m.programs)
    return Forecast(
        engines=1, weights=7 << 30, caches=caches, activations=activations, buffers=buffers, host=1
    ).model_dump()


@pytest.fixture
def built(engines: Path) -> Path:
    """What ``bundle`` is a copy of."""
    return engines


def no_driver(library: Library) -> None:
    library.cuda.driver = 0


def no_gpu(library: Library) -> None:
    library.cuda.gpus = 0


def old_driver(library: Library) -> None:
    library.cuda.driver = 12080


def other_gpu(library: Library) -> None:
    library.cuda.sm = 120


def silent_gpu(library: Library) -> None:
    library.cuda.fail("cudaGetDeviceProperties", Error.cudaErrorIllegalAddress)


def little_memory(library: Library) -> None:
    library.cuda.total = 4 << 30


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            no_driver,
            "backend tensorrt-rtx: the tensorrt-rtx engines cannot run here: missing an NVIDIA GPU with its driver "
            "(libcuda.so.1); to run on this machine compile with --target onnxruntime",
        ),
        (
            no_gpu,
            "backend tensorrt-rtx: there is a driver, but it shows no GPU (cudaErrorNoDevice); look at nvidia-smi and "
            "CUDA_VISIBLE_DEVICES; to run on this machine compile with --target onnxruntime",
        ),
        (silent_gpu, "backend tensorrt-rtx: the GPU does not answer (cudaErrorIllegalAddress); look at nvidia-smi"),
        (
            old_driver,
            "backend tensorrt-rtx: the driver runs CUDA up to 12.8, tensorrt-rtx needs 13.0; update the NVIDIA driver",
        ),
        (
            other_gpu,
            "backend tensorrt-rtx: the engines are for architecture 89, Null GPU is 120; compile with --sm 120",
        ),
        (
            little_memory,
            "backend tensorrt-rtx: the bundle needs 7169 MiB of Null GPU, 4096 MiB of 4096 MiB are free; "
            "free memory of the GPU, or compile a smaller geometry",
        ),
    ],
)
def test_machines_that_cannot(
    tiny: ModuleType, bundle: Path, library: Library, spoil: Callable[[Library], None], says: str
) -> None:
    tiny.resign(bundle, forecast=forecast_of(bundle))
    spoil(library)
    assert refusal(bundle) == says
    assert library.calls == []
    assert not {"cudaMalloc", "cudaStreamCreateWithFlags"} & set(library.cuda.calls)


def test_engines_say_what_they_need(
    tiny: ModuleType, bundle: Path, library: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A forecast of activations refuses nothing; what an engine wants beside a request's caches and buffers does."""
    tiny.resign(bundle, forecast=forecast_of(bundle, 1 << 40))
    with Session(bundle) as session:
        ports = session.request()._ports
        buffers = {id(buffer): buffer for each in ports.values() for buffer in each.values()}.values()
        held = sum(buffer.bytes for buffer in buffers)  # type: ignore[attr-defined]
        del ports, buffers
    monkeypatch.setitem(null_bundle.SCRATCH, "prefill", 3 << 20)
    greedy = null_bundle.build(tiny, tmp_path / "greedy")
    library.cuda.total = held + (3 << 20)
    Session(greedy).close()
    library.cuda.total -= 1
    assert refusal(greedy, UserError) == (
        "backend tensorrt-rtx: a request of the bundle needs 4 MiB of Null GPU, 4 MiB of 4 MiB are free; "
        "free memory of the GPU, or compile a smaller geometry"
    )


def test_missing_libraries(bundle: Path, library: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    wants = "(pip install 'secateur[tensorrt-rtx]'); to run on this machine compile with --target onnxruntime"
    assert refusal(bundle).endswith(f"cannot run here: missing the library {wants}")
    library.cuda.driver = 0
    assert refusal(bundle).endswith(f"missing an NVIDIA GPU with its driver (libcuda.so.1) and the library {wants}")
    library.cuda.driver = 13000
    monkeypatch.setitem(sys.modules, "cuda", None)
    assert f"the library and cuda-python {wants}" in refusal(bundle)
    monkeypatch.undo()


def test_a_library_that_does_not_load(
    bundle: Path, library: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text("raise ImportError('libtensorrt_rtx.so.1: cannot open shared object')")
    monkeypatch.delitem(sys.modules, "tensorrt_rtx")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert refusal(bundle) == (
        "backend tensorrt-rtx: the library does not load: libtensorrt_rtx.so.1: cannot open shared object; "
        "pip install 'secateur[tensorrt-rtx]'"
    )


@pytest.mark.parametrize(
    ("built", "installed", "compatible", "opens"),
    [
        ("11.4.0.12", "11.4.0.12", False, True),
        ("11.3.0.1", "11.4.0.12", False, False),
        ("11.3.0.1", "11.4.0.12", True, True),
        ("11.5.0.1", "11.4.0.12", True, False),
        ("10.15.1.2", "11.4.0.12", True, False),
    ],
)
def test_versions(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: str, installed: str, compatible: bool,
    opens: bool,
) -> None:  # fmt: skip
    null_bundle.install(monkeypatch, "tensorrt")
    bundle = null_bundle.build(tiny, tmp_path / "b", flavour="tensorrt", version_compatible=compatible)
    tiny.resign(bundle, versions={"tensorrt": built})
    if opens:
        Session(bundle).close()
    else:
        said = refusal(bundle, BundleError)
        assert f"the engines were built by tensorrt {built}, {installed} is installed; " in said
        assert ("within its major" in said) == compatible


def test_versions_that_are_not_said(tiny: ModuleType, bundle: Path, library: Library) -> None:
    tiny.resign(bundle, versions={})
    assert "the manifest does not say which tensorrt-rtx built the engines" in refusal(bundle, BundleError)


def test_a_library_that_is_too_old(tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    null_bundle.install(monkeypatch, "tensorrt")
    bundle = null_bundle.build(tiny, tmp_path / "b", flavour="tensorrt")
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "10.14.1.48")
    assert refusal(bundle) == "backend tensorrt: tensorrt 10.14.1.48 is older than 10.15; install a newer one"


@pytest.mark.parametrize(("sm", "opens"), [(75, False), (80, True), (120, True)])
def test_hardware_compatible_engines(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sm: int, opens: bool
) -> None:
    library = null_bundle.install(monkeypatch, "tensorrt")
    bundle = null_bundle.build(tiny, tmp_path / "b", flavour="tensorrt", hardware_compatible=True)
    library.cuda.sm = sm
    if opens:
        Session(bundle).close()
        return
    assert "hardware compatible engines run from architecture 80 on, Null GPU is 75" in refusal(bundle, BundleError)


def test_engines_of_several_architectures(tiny: ModuleType, bundle: Path, library: Library) -> None:
    tiny.resign(bundle, sm=86, engines__architectures=[86, 89])
    library.cuda.sm = 89
    Session(bundle).close()
    library.cuda.sm = 120
    assert "the engines are for architecture 86, 89, Null GPU is 120; compile with --sm 120" in refusal(bundle)


def test_another_flavour(tiny: ModuleType, bundle: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(bundle, UserError, "tensorrt") == (
        "backend tensorrt: the bundle was compiled for tensorrt-rtx; compile it with --target tensorrt, or leave the "
        "backend to the bundle"
    )
    null_bundle.install(monkeypatch, "tensorrt")
    tiny.resign(bundle, target="tensorrt", versions={"tensorrt": null_tensorrt.VERSIONS["tensorrt"]})
    assert "decode.engine: an engine of tensorrt-rtx, not of tensorrt; compile" in refusal(bundle, BundleError)


def test_a_bundle_without_engines(tiny: ModuleType, bundle: Path, library: Library) -> None:
    tiny.resign(bundle, programs__decode__engine=None)
    assert "decode has no engine; compile the bundle with --target tensorrt-rtx" in refusal(bundle, BundleError)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: data[:-5], "decode.engine: {less} bytes, its header says {size}"),
        (lambda data: b"\0" + data[1:], "decode.engine: not an engine of tensorrt-rtx"),
        (lambda data: b"vt", "decode.engine: not an engine of tensorrt-rtx: 2 bytes"),
        (
            lambda data: data[:26] + b"\x09" + data[27:],
            "decode.engine: built by tensorrt-rtx 1.7.9.116, the manifest says 1.7.1.116",
        ),
        (
            lambda data: data[:32] + b"\x10" + data[33:],
            "decode.engine: the engine is for architecture 120, this GPU is 89; compile with --sm 89",
        ),
    ],
)
def test_engines_that_are_none(
    tiny: ModuleType, bundle: Path, library: Library, spoil: Callable[[bytes], bytes], says: str
) -> None:
    """Spoilt without the manifest's knowledge, the digest tells; with it, the header does."""
    path = bundle / "decode.engine"
    data = path.read_bytes()
    path.write_bytes(spoil(data))
    assert "decode.engine: " in refusal(bundle, BundleError)
    tiny.relist(bundle)
    assert says.format(size=len(data), less=len(data) - 5) in refusal(bundle, BundleError)
    assert library.calls == []


def test_engines_the_library_does_not_open(bundle: Path, library: Library) -> None:
    library.opens_nothing = True
    assert refusal(bundle, BundleError).endswith(
        "decode.engine: tensorrt-rtx 1.7.1.116 does not open the engine: Magic tag does not match; compile the bundle "
        "again with the version and for the GPU that will run it"
    )
    library.invalid = 1 | 32
    assert "cannot run the engine on Null GPU: version mismatch, malformed engine; compile" in refusal(bundle)


def test_engines_with_other_ports(tiny: ModuleType, bundle: Path, library: Library) -> None:
    (bundle / "decode.engine").write_bytes((bundle / "prefill.engine").read_bytes())
    tiny.relist(bundle)
    assert "decode.engine: input features is fp32[1, 3, 16] in the engine, missing in the manifest; the decode" in (
        refusal(bundle, BundleError)
    )


@pytest.mark.parametrize("weights", ["inputs", "stripped"])
def test_weights_that_do_not_fit(tiny: ModuleType, tmp_path: Path, library: Library, weights: str) -> None:
    bundle = null_bundle.build(tiny, tmp_path / "b", weights=weights)
    tiny.resign(bundle, tensors__head__bytes=4)
    assert "tensor head has 4 bytes, fp32[16, 260] has 16640" in refusal(bundle, BundleError)
    tiny.resign(bundle, tensors__head__bytes=16640, programs__decode__weights=["embed"])
    assert (
        "input head is fp32[16, 260] in the engine, missing" if weights == "inputs" else "the engine wants weights"
    ) in (refusal(bundle, BundleError))
