"""What --target tensorrt and tensorrt-rtx refuse, by text, with and without the libraries installed."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest

from secateur.exporters import gpu, tensorrt
from secateur.exporters.tensorrt_library import Speech, load_library
from secateur.exporters.tensorrt_progress import Watch
from secateur.runtime.errors import SecateurError, UserError


@pytest.mark.parametrize(
    ("flavour", "options", "text"),
    [
        (
            "tensorrt-rtx",
            {"dtype": "fp32"},
            "--dtype fp32: tensorrt-rtx has no fused attention in fp32 (available: fp16, bf16); "
            "compile with --dtype fp16; norms and scores stay in fp32 inside the graph",
        ),
        (
            "tensorrt-rtx",
            {"sm": 90},
            "--sm: tensorrt-rtx does not compile for SM90 (available: 75, 80, 86, 89, 120, 121)",
        ),
        (
            "tensorrt-rtx",
            {"sm": (89, 100)},
            "--sm: tensorrt-rtx does not compile for SM100 (available: 75, 80, 86, 89, 120, 121)",
        ),
        (
            "tensorrt-rtx",
            {"sm": 75, "dtype": "bf16"},
            "--dtype bf16: GPUs of architecture 75 have no bf16; compile with --dtype fp16",
        ),
        (
            "tensorrt",
            {"sm": 89},
            "--sm 89: tensorrt builds for the GPU of this machine and takes no architecture; "
            "leave --sm out, or use --target tensorrt-rtx",
        ),
        ("trt", {}, "--target: no TensorRT flavour 'trt' (available: tensorrt, tensorrt-rtx)"),
    ],
)
def test_impossible_targets_are_refused_without_the_library(flavour: str, options: dict, text: str) -> None:
    with pytest.raises(UserError) as caught:
        tensorrt.check_target(flavour, **options)
    assert str(caught.value) == text


def test_possible_targets() -> None:
    assert tensorrt.check_target("tensorrt-rtx") == (89,)
    assert tensorrt.check_target("tensorrt-rtx", dtype="bf16", sm=120) == (120,)
    assert tensorrt.check_target("tensorrt-rtx", sm=(120, 86, 120)) == (86, 120)


@pytest.mark.parametrize(("found", "sms"), [(None, ()), (90, (90,))])
def test_the_datacentre_library_builds_for_the_gpu_that_is_here(
    monkeypatch: pytest.MonkeyPatch, found: int | None, sms: tuple[int, ...]
) -> None:
    monkeypatch.setattr(tensorrt, "find_architecture", lambda: found)
    assert tensorrt.check_target("tensorrt", dtype="bf16") == sms


def test_bf16_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "find_architecture", lambda: 75)
    with pytest.raises(UserError, match="--dtype bf16: GPUs of architecture 75 have no bf16; compile with --dtype"):
        tensorrt.check_target("tensorrt", dtype="bf16")


def test_the_datacentre_library_needs_a_gpu_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "has_driver", lambda: False)
    tensorrt.check_machine("tensorrt-rtx")
    with pytest.raises(UserError) as caught:
        tensorrt.check_machine("tensorrt")
    assert str(caught.value) == (
        "--target tensorrt: it builds on the GPU it builds for, and no GPU driver is here (libcuda.so.1); "
        "compile on that machine, or use --target tensorrt-rtx"
    )


class FakeDriver:
    """Answers as ``cuda.bindings.driver`` does: a status, and a value where there is one."""

    class CUdevice_attribute:  # noqa: N801  # the library's name
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 75, 76

    def __init__(self, status: int) -> None:
        self.status = status

    def cuInit(self, _flags: int) -> tuple[int]:  # noqa: N802
        return (self.status,)

    def cuDeviceGet(self, _ordinal: int) -> tuple[int, str]:  # noqa: N802
        return 0, "device"

    def cuDeviceGetAttribute(self, attribute: int, device: str) -> tuple[int, int]:  # noqa: N802
        assert device == "device"
        return 0, {75: 12, 76: 1}[attribute]


@pytest.mark.parametrize(("driver", "sm"), [(FakeDriver(0), 121), (FakeDriver(100), None), (None, None)])
def test_the_driver_is_asked_for_the_architecture(
    monkeypatch: pytest.MonkeyPatch, driver: FakeDriver | None, sm: int | None
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    assert gpu.find_architecture() == sm


@pytest.mark.parametrize(
    ("flavour", "module", "text"),
    [
        (
            "tensorrt-rtx",
            "tensorrt_rtx",
            "--target tensorrt-rtx: the library is not installed; "
            "install it with: pip install 'secateur[tensorrt-rtx]'",
        ),
        (
            "tensorrt",
            "tensorrt",
            "--target tensorrt: the library is not installed; install it with: pip install 'secateur[tensorrt]' "
            "--extra-index-url https://pypi.nvidia.com (the builder comes from NVIDIA's index; PyPI has the Python "
            "bindings only)",
        ),
    ],
)
def test_missing_library_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, flavour: str, module: str, text: str, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as caught:
        tensorrt.build_engine(tmp_path / "vision.onnx", tmp_path / "vision.engine", flavour=flavour)
    assert str(caught.value) == text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("version", "fits"), [("10.14.1.48", False), ("10.15.0", True), ("11.4.0", True)])
def test_versions_of_the_datacentre_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, fits: bool
) -> None:
    for name in ("tensorrt", "polygraphy.config", "polygraphy.backend.trt"):
        made = types.ModuleType(name)
        made.__dict__.update(__version__=version, USE_TENSORRT_RTX=False)
        monkeypatch.setitem(sys.modules, name, made)
    if fits:
        assert load_library("tensorrt").version == version
        return
    with pytest.raises(UserError, match=r"tensorrt 10\.14\.1\.48 is too old: rotary .* need 10\.15; install it with"):
        load_library("tensorrt")


def test_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(UserError, match=r"--target tensorrt: the library does not load: libnvinfer\.so\.11: cannot"):
        load_library("tensorrt")


def test_missing_polygraphy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text("__version__ = '1.7'")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "polygraphy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    with pytest.raises(UserError, match=r"Polygraphy, which drives it, is not installed; install it with: pip"):
        load_library("tensorrt-rtx")


def test_importing_the_exporter_loads_no_backend() -> None:
    code = (
        "import sys, secateur.exporters.tensorrt\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & "
        "{'tensorrt', 'tensorrt_rtx', 'polygraphy', 'onnx', 'onnx_ir', 'torch'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("errors", "node", "reason"),
    [
        (
            [
                'ModelImporter.cpp:140: While parsing node number 0 [Attention -> "y"]:',
                "In node 0 with name: layer.3/attention and operator: Attention (checkAttention): UNSUPPORTED_NODE: "
                'softcap == 0.0 && "Setting softcap is not supported in TensorRT Attention."',
            ],
            "layer.3/attention (Attention)",
            "Setting softcap is not supported in TensorRT Attention.",
        ),
        (
            [
                "In node 4 with name:  and operator: TensorScatter (importTensorScatter): INVALID_NODE: Assertion "
                'failed: mode == "linear": Only linear mode is supported for now, got circular'
            ],
            "unnamed node (TensorScatter)",
            "Only linear mode is supported for now, got circular",
        ),
        (
            ["WeightsContext.cpp:203: Failed to open file: weights.safetensors", "In node -1 with name: and more"],
            None,
            "Failed to open file: weights.safetensors",
        ),
        ([], None, "no reason given"),
    ],
)
def test_parser_errors_become_one_line(errors: list[str], node: str | None, reason: str) -> None:
    assert Speech(errors).parser_error() == (node, reason)


def test_builder_errors_lose_their_source_positions() -> None:
    speech = Speech(
        ["IBuilder: Error Code 4: API Usage Error (rank: K exceeds 3840. In check at /_src/opt/shape.cpp:1066)"]
    )
    assert speech.last_error() == "IBuilder: Error Code 4: API Usage Error (rank: K exceeds 3840.)"
    assert Speech().last_error() == "no reason given"


def test_watch_keeps_what_the_callback_raises() -> None:
    told: list[tuple[str, int, int]] = []

    def progress(phase: str, step: int, steps: int) -> None:
        told.append((phase, step, steps))
        if step == 1:
            raise SecateurError("enough")

    watch = Watch(progress)
    watch.open_phase("Optimizing", 3)
    for step in (1, 2):
        watch.tell("Optimizing", step)
    watch.close_phase("Optimizing")
    assert told == [("Optimizing", 0, 3), ("Optimizing", 1, 3)]
    assert str(watch.stopped_by) == "enough"


def test_failed_write_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = tmp_path / "prefill.engine"
    target.write_bytes(b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"prefill\.engine: cannot write: No space left on device; make room"):
        tensorrt._write_atomically(target, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["prefill.engine"]
    assert target.read_bytes() == b"old"
