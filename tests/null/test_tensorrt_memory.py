"""What buffers of the GPU hold, share and refuse, and how often weights are there, over engines of the null library.

Nothing here runs TensorRT or a GPU.
"""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from secateur.runtime import Session
from secateur.runtime.backends.engine_ports import check_aliases
from secateur.runtime.errors import SecateurError, UserError
from secateur.runtime.schema import Variant

from . import null_bundle
from .null_bundle import draw
from .null_tensorrt import Library

pytestmark = pytest.mark.usefixtures("cache_home")


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


def test_geometries_share_the_weights(tiny: ModuleType, tmp_path: Path, library: Library) -> None:
    """The second one's engines are opened when a prompt first needs them, and its caches are its own."""
    bundle = null_bundle.build(tiny, tmp_path / "b", weights="inputs")
    large = tiny.Tiny(images=2, text_tokens=48, new_tokens=12)
    second = null_bundle.build(tiny, tmp_path / "second", large, weights="inputs")
    said = json.loads((second / "manifest.json").read_text())
    own = {name: said[name] for name in Variant.model_fields}
    for name, program in own["programs"].items():
        for kind, end in (("graph", "onnx"), ("engine", "engine")):
            shutil.copyfile(second / f"{name}.{end}", bundle / f"{name}.1.{end}")
            program[kind] = f"{name}.1.{end}"
        program["flops"] = 5000
    tiny.relist(bundle)
    tiny.resign(bundle, variants=[own])
    pictures = [row[0] for row in draw(2)]
    with Session(tiny.build(tmp_path / "plain", large), threads=1) as plain:
        want = plain.generate("what", pictures, ignore_eos=True).tokens
    with Session(bundle) as session:
        weights = library.cuda.used()
        assert len(library.engines) == 3
        first = session.generate("what", pictures[0], ignore_eos=True)
        assert (first.metrics.variant, len(library.engines)) == (0, 3)
        answer = session.generate("what", pictures, ignore_eos=True)
        assert (answer.metrics.variant, answer.tokens, len(library.engines)) == (1, want, 6)
        assert session.generate("what", pictures[0], ignore_eos=True).tokens == first.tokens
        session._idle.clear()
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
        decode = backend._open("decode", 0).engine
        del decode.what["aliases"]["present_key.0"]
        with pytest.raises(SecateurError, match=r"output present_key\.0 would overwrite input past_key\.0 while it is"):
            backend.bind("decode", inputs, outputs)
        decode.what["aliases"]["present_key.0"] = "past_key.0"
        with pytest.raises(UserError, match="input position is bound to nothing"):
            backend.bind("decode", {k: v for k, v in inputs.items() if k != "position"}, outputs)
        with pytest.raises(UserError, match=r"output logits is bound to fp32\[1, 5\], it is fp32\[1, 260\]"):
            backend.bind("decode", inputs, outputs | {"logits": backend.buffer((1, 5), "fp32")})
        with pytest.raises(UserError, match="no input mask"):
            backend.bind("decode", inputs | {"mask": outputs["logits"]}, outputs)
        old = SimpleNamespace()  # libraries before the method: caches are in place, nothing else is
        check_aliases(old, "decode", inputs, outputs)
        with pytest.raises(SecateurError, match=r"output logits would overwrite input past_key\.0 while it is read"):
            check_aliases(old, "decode", inputs, outputs | {"logits": inputs["past_key.0"]})
        del backend, inputs, outputs, decode


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
