"""The fakes themselves: what they are there to find they find, and they show nothing that the libraries lack."""

from __future__ import annotations

import mmap
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from secateur.runtime import Session
from secateur.runtime.backends.cuda import DeviceMemory, PinnedMemory, Stream, call
from secateur.runtime.backends.tensorrt import make_logger
from secateur.runtime.errors import SecateurError

from . import null_bundle, null_tensorrt
from .null_cuda import NullCuda
from .null_cuda_types import BrokenRuleError


def test_broken_rules_are_found(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: Image.Image
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library = null_bundle.install(monkeypatch)
    bundle = null_bundle.build(tiny, tmp_path / "bundle")
    stream, memory, pinned = Stream(), DeviceMemory(64), PinnedMemory(64)
    pageable = np.zeros(64, np.uint8)
    for function, arguments, says in (
        (stream.upload, (memory.address, pageable.ctypes.data, 64), "not in live pinned memory"),
        (stream.upload, (memory.address, pinned.address, 65), "not in live pinned memory"),
        (call, ("cudaFree", pinned.address), "is no device memory"),
        (stream.zero, (memory.address + 1, 64), "not in live device memory"),
    ):
        with pytest.raises(BrokenRuleError, match=says):
            function(*arguments)  # type: ignore[operator]
    stream.upload(memory.address, pinned.address, 64)
    assert library.cuda.block(memory.address, 64, "device", "test").memory.max() == 0xCD  # nothing has run yet
    pinned.bytes[:] = 7
    stream.synchronize()
    offset = memory.address - library.cuda.block(memory.address, 1, "device", "test").memory.ctypes.data
    assert (library.cuda.block(memory.address, 1, "device", "test").memory[offset : offset + 64] == 7).all()
    address = memory.address
    del memory
    with pytest.raises(BrokenRuleError, match="not in live device memory"):
        stream.zero(address, 1)
    with pytest.raises(BrokenRuleError, match="freed twice"):
        call("cudaFree", address)
    del stream, pinned, function, arguments
    with Session(bundle) as session:
        session.generate("what", image, ignore_eos=True)
        bound = session._idle[0]._bound["decode"]
        context = bound._context
        places = dict(context._addresses)
        for port, address, says in (
            ("present_key.0", places["past_value.0"], "present_key.0 .* two addresses"),
            ("logits", places["past_key.0"], "lies in"),
            ("logits", places["logits"] + 256, "not in live device memory"),
        ):
            context.set_tensor_address(port, address)
            with pytest.raises(BrokenRuleError, match=says):
                context.execute_async_v3(bound._stream.number)
            context.set_tensor_address(port, places[port])
        with pytest.raises(BrokenRuleError, match="not aligned"):
            context.set_tensor_address("logits", places["logits"] + 8)
        del context._addresses["logits"]
        with pytest.raises(BrokenRuleError, match="without an address for logits"):
            context.execute_async_v3(bound._stream.number)
        context._addresses["logits"] = places["logits"]
        other = Stream()
        assert context.execute_async_v3(other.number)
        with pytest.raises(BrokenRuleError, match="two streams use one scratch memory"):
            context.execute_async_v3(bound._stream.number)
        other.synchronize()
        del bound, context, other
    with pytest.raises(AssertionError), null_bundle.nothing_left(library):
        pass


@pytest.mark.parametrize("name", ["cuda", "tensorrt_rtx"])
def test_the_fakes_have_no_names_the_libraries_lack(name: str) -> None:
    real = pytest.importorskip("cuda.bindings.runtime" if name == "cuda" else name)
    if name == "cuda":
        fake = NullCuda()
        names = [one for one in dir(fake) if one.startswith("cuda")]
        assert [one for one in names if not hasattr(real, one)] == []
        for kind in ("cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode"):
            for member in getattr(fake, kind):
                assert int(getattr(getattr(real, kind), member.name)) == int(member)
        return
    for fake_class, real_class in (
        (null_tensorrt.Engine, real.ICudaEngine),
        (null_tensorrt.Context, real.IExecutionContext),
        (null_tensorrt.RtxContext, real.IExecutionContext),
        (null_tensorrt.RuntimeCache, real.IRuntimeCache),
        (null_tensorrt.RuntimeConfig, real.IRuntimeConfig),
    ):
        own = {"size", "compute"}  # what the fake does behind the library's names
        shown = [one for one in vars(fake_class) if not one.startswith("_") and one not in own]
        assert [one for one in shown if not hasattr(real_class, one)] == []
    for kind in ("DataType", "TensorIOMode", "TensorLocation", "ExecutionContextAllocationStrategy", "EngineValidity",
                 "EngineInvalidityDiagnostics"):  # fmt: skip
        for member in getattr(null_tensorrt, kind):
            assert int(getattr(getattr(real, kind), member.name)) >= 0
    for member in null_tensorrt.EngineInvalidityDiagnostics:
        assert int(getattr(real.EngineInvalidityDiagnostics, member.name)) == int(member)


def test_the_real_cuda_names_its_errors() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    if int(runtime.cudaDriverGetVersion()[1]) != 0:
        pytest.skip("there is a driver")
    with pytest.raises(SecateurError) as caught:
        Stream()
    assert str(caught.value) == (
        "CUDA: cudaStreamCreateWithFlags failed with cudaErrorInsufficientDriver: "
        "CUDA driver version is insufficient for CUDA runtime version; update the NVIDIA driver"
    )


def test_the_real_library_takes_mapped_files_and_its_words_are_kept(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = make_logger(trt)
    runtime = trt.Runtime(logger)
    (tmp_path / "engine").write_bytes(bytes(1000))
    with open(tmp_path / "engine", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        validity, bits = runtime.get_engine_validity(plan)
        assert validity == trt.EngineValidity.INVALID
        assert int(bits) in range(1 << 8)
        assert runtime.deserialize_cuda_engine(plan) is None
    assert "Error Code" in logger.last
    assert "\n" not in logger.last
