"""What is left when something breaks on the way, is interrupted, or is closed meanwhile: nothing, and nothing runs.

The libraries are the null ones; nothing here runs TensorRT or a GPU.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from secateur.runtime import Session
from secateur.runtime.backends import tensorrt
from secateur.runtime.backends.cuda import DeviceMemory, Graph, Stream
from secateur.runtime.backends.engine_ports import check_buffers
from secateur.runtime.errors import SecateurError, UserError

from .null_bundle import refusal
from .null_cuda_types import Error
from .null_tensorrt import Library


def test_opening_that_fails_leaves_nothing(engines: Path, library: Library) -> None:
    library.cuda.fail("cudaMalloc", Error.cudaErrorMemoryAllocation)
    assert refusal(engines) == (
        "CUDA: cudaMalloc failed with cudaErrorMemoryAllocation: as the test asked; free memory of the GPU, run "
        "fewer requests at once, or compile a smaller geometry"
    )
    for name in ("cudaHostAlloc", "cudaMemcpyAsync", "cudaEventRecord", "cudaStreamSynchronize"):
        library.cuda.fail(name, Error.cudaErrorIllegalAddress)
        assert f"{name} failed with cudaErrorIllegalAddress" in refusal(engines)
    library.opens_nothing = True
    refusal(engines)


def test_ctrl_c_leaves_nothing_running(engines: Path, library: Library) -> None:
    with Session(engines) as session:
        bound = session.request()._bound["vision"]
        library.interrupts = True
        with pytest.raises(KeyboardInterrupt):
            bound.run()
        assert library.calls[-1] == "vision enqueued"
        assert library.cuda.stream(bound._stream.number).pending == []
        del bound


def test_a_capture_that_fails_leaves_no_graph(library: Library) -> None:
    stream, memory = Stream(), DeviceMemory(64)

    def enqueue() -> None:
        stream.zero(memory.address, 64)
        raise SecateurError("the library does not run the engine")

    with pytest.raises(SecateurError, match="does not run"):
        Graph(stream, enqueue)
    assert library.cuda.live()["graphs"] == 0


def test_closing_meanwhile(engines: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is being bound keeps its engine and weights; behind that nothing is bound or opened."""
    says = "backend tensorrt-rtx: the session is closed; open the bundle again"
    with Session(engines) as session:
        backend: Any = session._backend
        request = session.request()
        ports, program = request._ports["vision"], session.manifest.programs["vision"]
        assert program.weights
        inputs = {port.name: ports[port.name] for port in program.inputs}
        outputs = {port.name: ports[port.name] for port in program.outputs}

        def close_first(*arguments: Any) -> Any:
            session.close()
            return check_buffers(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(tensorrt, "check_buffers", close_first)
            backend.bind("vision", inputs, outputs).run()
        with pytest.raises(UserError, match=says):
            backend.bind("vision", inputs, outputs)
        with pytest.raises(UserError, match=says):
            backend._open("vision", 0)
        assert backend._opened == {}
        del backend, request, ports, inputs, outputs


def test_errors_on_the_way_leave_nothing(engines: Path, library: Library, image: Image.Image) -> None:
    """The request that failed is let go with all its memory; the session can be used on."""
    with Session(engines) as session:
        want = session.generate("what", image, ignore_eos=True).tokens
        session._idle.clear()
        gc.collect()
        idle = library.cuda.live()
        assert idle == {"device": 1, "pinned": 0, "streams": 1, "events": 0, "graphs": 0}
        for name, after, says in (
            ("cudaMalloc", 5, "cudaMalloc failed with cudaErrorIllegalAddress"),
            ("cudaMemcpyAsync", 0, "program vision: CUDA: cudaMemcpyAsync failed with cudaErrorIllegalAddress"),
            ("cudaStreamSynchronize", 31, "program decode: CUDA: cudaStreamSynchronize failed with"),
            ("cudaGraphLaunch", 2, "program decode: CUDA: cudaGraphLaunch failed with cudaErrorIllegalAddress"),
        ):
            library.cuda.fail(name, Error.cudaErrorIllegalAddress, after)
            with pytest.raises(SecateurError, match=says) as caught:
                session.generate("what", image, ignore_eos=True)
            del caught
            gc.collect()
            assert library.cuda.live() == idle
        library.refuses_to_run = True
        with pytest.raises(SecateurError, match="program vision: the library does not run the engine") as caught:
            session.generate("what", image)
        library.refuses_to_run = False
        del caught
        assert session.generate("what", image, ignore_eos=True).tokens == want
