"""DLPack capsules against NumPy, which reads and makes them too; and buffers of the CPU."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secateur.runtime.backends import dlpack
from secateur.runtime.backends.dlpack import CPU, CUDA, export_capsule, read_capsule
from secateur.runtime.errors import UserError


class Owner:
    """Memory of the CPU that gives itself away as device memory does."""

    def __init__(self, array: np.ndarray, dtype: str) -> None:
        self.array, self.dtype = array, dtype

    def __dlpack_device__(self) -> tuple[int, int]:
        return (CPU, 0)

    def __dlpack__(self, **how: Any) -> Any:
        return export_capsule(self.array.ctypes.data, self.array.shape, self.dtype, (CPU, 0), self)


@pytest.mark.parametrize(
    ("dtype", "numpy"), [("fp32", "f4"), ("fp16", "f2"), ("int64", "i8"), ("int32", "i4"), ("bool", "?")]
)
def test_numpy_reads_what_is_exported(dtype: str, numpy: str) -> None:
    owner = Owner(np.arange(6).reshape(2, 3).astype(numpy), dtype)
    alive = weakref.ref(owner)
    view = np.from_dlpack(owner)  # type: ignore[arg-type]
    assert (view.dtype, view.shape) == (owner.array.dtype, (2, 3))
    assert np.shares_memory(view, owner.array)
    assert np.array_equal(view, owner.array)
    del owner
    gc.collect()
    assert alive() is not None
    assert len(dlpack._exported) == 1
    del view
    gc.collect()
    assert alive() is None
    assert dlpack._exported == {}


def test_a_capsule_nobody_took_lets_go() -> None:
    owner = Owner(np.zeros(3, np.float32), "fp32")
    capsule = owner.__dlpack__()
    assert len(dlpack._exported) == 1
    del capsule
    assert dlpack._exported == {}
    scalar = Owner(np.array(2.5, np.float32), "fp32")
    assert np.from_dlpack(scalar).tolist() == 2.5  # type: ignore[arg-type]


class Foreign:
    """NumPy's own capsule."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return self.array.__dlpack__()


def test_what_numpy_exports_is_read() -> None:
    array = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
    given = read_capsule(Foreign(array), 7, (CPU, 0))
    assert (given.address, given.shape, given.dtype) == (array.ctypes.data, (2, 3, 4), "fp16")
    offset = read_capsule(Foreign(array[1]), 7, (CPU, 0))
    assert (offset.address, offset.shape) == (array.ctypes.data + 24, (3, 4))
    one = read_capsule(Foreign(array[:, :1, :1][:1]), 7, (CPU, 0))
    assert one.shape == (1, 1, 1)  # strides of single rows mean nothing
    with pytest.raises(UserError, match="the memory is not row-major; make it contiguous first"):
        read_capsule(Foreign(array.T), 7, (CPU, 0))
    with pytest.raises(UserError, match="type code 2 of 64 bits"):
        read_capsule(Foreign(array.astype(np.float64)), 7, (CPU, 0))
    with pytest.raises(UserError, match="its memory is not where it says"):
        read_capsule(Foreign(array), 7, (CUDA, 0))


def test_sessions_on_the_cpu_take_and_give_memory(built: Path) -> None:
    pytest.importorskip("onnxruntime")
    from PIL import Image

    from secateur.runtime import Session

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8))
    with Session(built, threads=1) as session:
        inputs = session.processor(["<image>what"], [[picture]])
        first, second = session.request(), session.request()
        want = session.prefill(first, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)
        features = first.share("prefill", "features")
        seen = np.from_dlpack(features)  # type: ignore[arg-type]
        assert np.array_equal(seen, first.read("vision", "features"))
        kept = first.kept["stage0"]
        assert np.array_equal(
            session.prefill(second, inputs.input_ids, inputs.lengths, features=features, kept=kept), want
        )

        class OnTheGpu(Foreign):
            def __dlpack_device__(self) -> tuple[int, int]:
                return (CUDA, 0)

            def __dlpack__(self, **how: Any) -> Any:
                raise BufferError("it is on the GPU")

        with pytest.raises(UserError, match="DLPack: memory the CPU cannot read: it is on the GPU; copy it there"):
            session.prefill(second, inputs.input_ids, inputs.lengths, features=OnTheGpu(seen), kept=kept)
