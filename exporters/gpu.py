"""What is known of this machine's GPU before anything is built for it."""

from __future__ import annotations

import importlib
from ctypes import CDLL
from typing import Any


def has_driver() -> bool:
    """Whether a GPU driver is installed: without one no library of TensorRT can open an engine."""
    try:
        CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def find_architecture() -> int | None:
    """The architecture of the first GPU, such as 89; None without a GPU, its driver or cuda-python."""
    try:
        driver: Any = importlib.import_module("cuda.bindings.driver")
        part = driver.CUdevice_attribute
        wanted = (
            part.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, part.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
        )  # fmt: skip
        _ask(driver.cuInit(0))
        device = _ask(driver.cuDeviceGet(0))
        major, minor = (_ask(driver.cuDeviceGetAttribute(each, device)) for each in wanted)
    except (ImportError, RuntimeError):
        return None
    return 10 * int(major) + int(minor)


def _ask(answer: tuple[Any, ...]) -> Any:
    """The value of a call. Raises RuntimeError where its first part says that it failed."""
    status, *values = answer
    if int(status):
        raise RuntimeError(str(status))
    return values[0] if values else None
