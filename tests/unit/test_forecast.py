"""Forecasts against bundles as they came out, and what is refused because of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from secateur.compiler import capacity, pipeline
from secateur.compiler.build_bundle import lay_out
from secateur.compiler.bundle import Target
from secateur.compiler.capacity import Expected, Room, check_room
from secateur.compiler.forecast import Needs, engine_bytes, forecast
from secateur.exporters.liveness import peak_bytes
from secateur.exporters.onnx import export_programs
from secateur.runtime.errors import UserError
from secateur.runtime.host_memory import available_memory
from secateur.runtime.kv import buffer_bytes, cache_bytes
from secateur.runtime.manifest import Forecast, Manifest, read_manifest
from secateur.runtime.request import Request
from secateur.tools import cli
from secateur.tools.forecast import read_bytes

GIB = 1 << 30
MIB = 1 << 20


def foresee(pruned: Any, target: str, engine_weights: str | None = None) -> Needs:
    geometries = pruned if isinstance(pruned, list) else [pruned]
    dialect, layout = "tensorrt" if target.startswith("tensorrt") else target, lay_out(geometries, "stream")
    exported = [export_programs(one.programs.programs, dialect, layout) for one in geometries]
    return forecast(geometries, exported, target, engine_weights)


@pytest.fixture(scope="module")
def bundle(pruned: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = pruned("fastv", 0.5)
    out = tmp_path_factory.mktemp("bundles") / "bundle"
    return pipeline.build(made, pipeline.export(made, "onnxruntime"), Target("onnxruntime", "fp32", None), out)


class CountingBackend:
    """Adds up what a request allocates."""

    name = "counting"
    taken = 0

    def buffer(self, shape: Sequence[int], dtype: str) -> Any:
        kinds = {"fp32": np.float32, "fp16": np.float16, "int64": np.int64, "int32": np.int32, "bool": np.bool_}
        self.taken += np.zeros(shape, kinds[dtype]).nbytes
        return SimpleNamespace(shape=tuple(shape))

    def bind(self, program: str, inputs: Any, outputs: Any, *, variant: int = 0) -> None: ...

    def close(self) -> None: ...


def test_a_bundle_is_what_was_foretold(bundle: Path, pruned: Callable[..., Any]) -> None:
    """Graphs and caches, weights and buffers to the byte."""
    manifest = read_manifest(bundle)
    told = manifest.forecast
    assert told is not None
    assert foresee(pruned("fastv", 0.5), "onnxruntime").geometries == (told,)
    assert told.engines == sum((bundle / program.graph).stat().st_size for program in manifest.programs.values())
    header = (bundle / "weights.safetensors").read_bytes()[:8]
    data = (bundle / "weights.safetensors").stat().st_size - 8 - int.from_bytes(header, "little")
    assert told.weights == data
    assert told.caches == cache_bytes(manifest)
    backend = CountingBackend()
    Request(backend, manifest)
    assert told.caches + told.buffers == backend.taken
    assert told.buffers == buffer_bytes(manifest.programs)
    assert told.device == told.weights + told.caches + told.buffers + told.activations
    assert 0 < told.activations < MIB


def test_the_manifest_keeps_it(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert Manifest.model_validate(manifest.model_dump(mode="json")).forecast == manifest.forecast
    assert manifest.variant(0).forecast == manifest.forecast


def test_where_weights_are_is_what_engines_hold(pruned: Callable[..., Any]) -> None:
    """Prefill and decode share the decoder; each plan has it, an allocation holds it once."""
    made = pruned("fastv", 0.5, dtype="fp16")
    held = {kind: foresee(made, "tensorrt-rtx", kind).geometries[0] for kind in ("plan", "stripped", "inputs")}
    sizes = {
        name: {key: 2 * tensor.numel() for key, tensor in program.weights().items()}
        for name, program in made.programs.programs.items()
    }
    every = sum(sum(each.values()) for each in sizes.values())
    once = sum({key: size for each in sizes.values() for key, size in each.items()}.values())
    assert held["plan"].weights == held["stripped"].weights == every > once
    # All of these tensors are too small to be inputs: every engine keeps its own.
    assert held["inputs"].weights == every
    assert held["plan"].engines == held["inputs"].engines > every
    assert foresee(made, "plain").geometries[0].weights == once


def test_large_weights_are_inputs_but_for_convolutions(pruned: Callable[..., Any], monkeypatch: Any) -> None:
    monkeypatch.setattr("secateur.exporters.engine_weights.SMALL", 1)
    made = pruned("fastv", 0.5, dtype="fp16")
    plan, inputs = (foresee(made, "tensorrt-rtx", kind).geometries[0] for kind in ("plan", "inputs"))
    assert inputs.weights == foresee(made, "plain").geometries[0].weights
    assert inputs.host < plan.host
    models = pipeline.export(made, "tensorrt").models
    for name in ("vision", "prefill"):
        held = made.programs[name].weights()
        outside = sum(2 * tensor.numel() for key, tensor in held.items() if "patch_embedding" not in key)
        own = [engine_bytes(name, models[name].graph, kind) for kind in ("plan", "inputs")]
        assert own[0] - own[1] == outside
    # Besides, layers of decoding share kernels then.
    assert plan.engines - inputs.engines > plan.weights - inputs.weights


def test_tied_weights_count_once(pruned: Callable[..., Any]) -> None:
    """Qwen2's head is its embedding, under two names."""
    made = pruned("none", decoder="qwen2")
    told = foresee(made, "onnxruntime").geometries[0]
    assert told.weights == sum(place.length for place in lay_out([made], "stream").tensors.values())


def test_an_engine_comes_near_what_was_foretold(pruned: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    made = pruned("fastv", 0.5, dtype="fp16")
    exported = pipeline.export(made, "tensorrt")
    out = pipeline.build(made, exported, Target("tensorrt-rtx", "fp16", 89), tmp_path / "engines")
    manifest = read_manifest(out)
    told = manifest.forecast
    assert told is not None
    size = sum((out / str(program.engine)).stat().st_size for program in manifest.programs.values())
    # Of so small a model engines are kernels, of which only the number is known.
    assert 0.4 < told.engines / size < 2.5
    needed = sum(path.stat().st_size for path in out.iterdir() if path.suffix in (".onnx", ".safetensors")) + size
    assert 0.4 < pipeline.foresee([made], [exported], Target("tensorrt-rtx", "fp16", 89)).disk / needed < 2.5


def test_what_engines_hold_is_there_for_every_geometry(pruned: Callable[..., Any], monkeypatch: Any) -> None:
    """What lies outside of them is there once."""
    monkeypatch.setattr("secateur.exporters.engine_weights.SMALL", 1 << 13)
    made = [pruned("fastv", 0.5, dtype="fp16", images=images) for images in (1, 2)]
    sizes = [
        {key: 2 * tensor.numel() for key, tensor in program.weights().items()}
        for one in made
        for program in one.programs.programs.values()
    ]
    outside = {key: size for each in sizes for key, size in each.items() if size >= 1 << 13 and "patch" not in key}
    inside = [size for each in sizes for key, size in each.items() if key not in outside]
    told = foresee(made, "tensorrt-rtx", "inputs")
    assert 0 < sum(inside) == told.weights - sum(outside.values())
    assert max(one.weights for one in told.geometries) < told.weights < sum(one.weights for one in told.geometries)
    assert foresee(made, "tensorrt-rtx", "plan").weights == sum(sum(each.values()) for each in sizes)
    graphs = foresee(made, "plain")
    assert graphs.weights == sum({key: size for each in sizes for key, size in each.items()}.values())
    assert (graphs.engines, graphs.disk) == (0, graphs.written + graphs.graphs)


def test_equal_graphs_have_one_engine(pruned: Callable[..., Any]) -> None:
    made = pruned("fastv", 0.5, dtype="fp16")
    for kind in ("plan", "inputs"):
        (one, other), told = (needs := foresee([made, made], "tensorrt-rtx", kind)).geometries, needs
        assert (one.engines, one.weights, one.device) == (other.engines, told.weights, told.device)
        assert told.engines == one.engines
        assert told.disk == foresee(made, "tensorrt-rtx", kind).disk


def test_steps_of_selectors_are_kernels(pruned: Callable[..., Any]) -> None:
    """Eight steps of DivPrune instead of four, two kernels each; what else differs is a few nodes."""
    few, many = (foresee(pruned("divprune", keep, dtype="fp16"), "tensorrt-rtx", "inputs") for keep in (0.25, 0.5))
    assert many.engines - few.engines == pytest.approx(4 * 2 * 70_000, rel=0.1)


NEEDS = Needs(
    target="tensorrt-rtx", engine_weights="plan", weights_mode="stream", batches=(4,), weights=26 * GIB,
    written=13 * GIB, graphs=MIB, engines=27 * GIB, host=50 * GIB,
    geometries=(
        Forecast(engines=27 * GIB, weights=26 * GIB, caches=2 * GIB, activations=GIB, buffers=GIB, host=50 * GIB),
    ),
)  # fmt: skip
PLENTY = Room(memory=1000 * GIB, device=None, disk=1000 * GIB)


def refusal(needs: Needs, room: Room, device_memory: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        check_room(needs, room, Path("/data/bundle"), device_memory)
    return str(caught.value)


def test_sessions_on_a_gpu_keep_what_their_largest_run_took(pruned: Callable[..., Any]) -> None:
    half = pruned("fastv", 0.5, dtype="fp16")
    models = pipeline.export(half, "onnxruntime-cuda").models.values()
    peaks = [peak_bytes(model.graph, True) for model in models]
    (one,) = foresee(half, "onnxruntime-cuda").geometries
    assert one.activations == sum(peaks) > max(peaks)
    (engines,) = foresee(half, "tensorrt-rtx", "inputs").geometries
    assert engines.activations < one.activations


def test_too_little_memory_to_compile() -> None:
    assert refusal(NEEDS, replace(PLENTY, memory=32 * GIB)) == (
        "forecast: compiling takes 50.00 GiB of memory, this machine has 32.00 GiB for it; take --engine-weights "
        "inputs, so that builders hold no weights, or compile on a machine with more memory and copy the bundle; "
        "--ignore-forecast goes on anyway"
    )
    graphs = replace(NEEDS, target="onnxruntime", engine_weights=None)
    assert "take --weights reference, so that no tensor is read, or" in refusal(graphs, replace(PLENTY, memory=GIB))
    check_room(NEEDS, replace(PLENTY, memory=None), Path("bundle"))
    check_room(NEEDS, replace(PLENTY, memory=50 * GIB), Path("bundle"))


def test_too_little_disk() -> None:
    assert refusal(NEEDS, replace(PLENTY, disk=GIB)) == (
        "/data: disk full: the bundle takes 40.00 GiB, 1.00 GiB are free; take --engine-weights inputs, so that "
        "engines are small, or take --weights reference, which links the checkpoint's files, or free some space or "
        "choose another directory; --ignore-forecast goes on anyway"
    )


def test_too_little_device_memory() -> None:
    assert refusal(NEEDS, PLENTY, 28 * GIB) == (
        "--device-memory: running takes 30.00 GiB of the device's memory, 28.00 GiB are there: 2147483648 bytes too "
        "much; the largest part is 26.00 GiB of weights; take --engine-weights inputs, so that weights are there once, "
        "or take --batch 2, which fits; --ignore-forecast goes on anyway"
    )
    said = refusal(replace(NEEDS, engine_weights="inputs"), replace(PLENTY, device=20 * GIB))
    assert said.startswith(
        "forecast: running takes 30.00 GiB of the device's memory, 20.00 GiB are free on this machine"
    )
    assert said.endswith("weights; choose a smaller model; --ignore-forecast goes on anyway")
    single = replace(NEEDS, batches=(1,))
    assert "a lower --keep, fewer --images and smaller --text-tokens: 50% of what one row" in refusal(
        single, PLENTY, 28 * GIB
    )
    check_room(NEEDS, PLENTY, Path("bundle"), 30 * GIB)
    # What the user says of another GPU counts, not this machine's.
    check_room(NEEDS, replace(PLENTY, device=GIB), Path("bundle"), 30 * GIB)


def write_machine(root: Path, groups: dict[str, dict[str, str]], listed: str = "0::/job/step\n") -> tuple[Path, Path]:
    """A ``/proc`` with 8 GiB available of which this process holds one more, and a tree of control groups."""
    proc, cgroup = root / "proc", root / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {8 << 20} kB\n")
    (proc / "self" / "status").write_text(f"Name:\tx\nVmRSS:\t {1 << 20} kB\n")
    (proc / "self" / "cgroup").write_text(listed)
    for path, files in groups.items():
        (cgroup / path).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (cgroup / path / name).write_text(text)
    return proc, cgroup


def test_memory_is_what_the_kernel_and_every_control_group_leave(tmp_path: Path) -> None:
    assert available_memory(*write_machine(tmp_path / "free", {})) == 9 * GIB
    limits = {
        "job": {"memory.max": f"{4 * GIB}\n", "memory.current": f"{3 * GIB}",
                "memory.stat": f"anon 1\ninactive_file {GIB}\n"},
        "job/step": {"memory.max": "max\n", "memory.current": "5", "memory.stat": "inactive_file 0\n"},
    }  # fmt: skip
    assert available_memory(*write_machine(tmp_path / "grouped", limits)) == (2 + 1) * GIB
    old = {"memory": {"memory.limit_in_bytes": str(2 * GIB), "memory.usage_in_bytes": str(GIB),
                      "memory.stat": "total_inactive_file 0\n"}}  # fmt: skip
    made = write_machine(tmp_path / "old", old, "5:cpu:/x\n4:memory:/docker/abc\n")
    assert available_memory(*made) == (1 + 1) * GIB
    assert available_memory(tmp_path / "nowhere", tmp_path) is None


def test_free_memory_of_a_gpu_is_asked_of_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runtime:
        answer: Any = (0, 7 * GIB, 8 * GIB)

        def cudaMemGetInfo(self) -> Any:  # noqa: N802  the library's name
            return self.answer

    library = Runtime()
    monkeypatch.setattr(capacity.importlib, "import_module", lambda name: library)
    assert capacity.free_device_memory() == 7 * GIB
    library.answer = (35, None, None)
    assert capacity.free_device_memory() is None


def compile_small(pruned: Any, traced: Any, monkeypatch: Any, model: Path, out: Path, *options: str) -> int:
    monkeypatch.setattr(pipeline, "trace_model", lambda *_: traced())
    monkeypatch.setattr(pipeline, "prune", lambda *_, **__: pruned("fastv", 0.5))
    sizes = ("--text-tokens", "24", "--new-tokens", "8", "--recipe", "fastv", "--keep", "0.5")
    with pytest.raises(SystemExit) as stop:
        cli.main(["compile", str(model), "-o", str(out), *sizes, *options])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_the_command_shows_refuses_and_goes_on(
    pruned: Any, traced: Any, model_dir: Any, monkeypatch: Any, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(capacity, "available_memory", lambda *_: 100 * MIB)
    run = lambda *options: compile_small(pruned, traced, monkeypatch, model_dir(), tmp_path / "out", *options)  # noqa: E731
    assert run() == 2
    said = capsys.readouterr().err
    assert "Forecast for onnxruntime" in said
    assert "memory to compile" in said
    assert "error: forecast: compiling takes " in said
    assert " this machine has 100.0 MiB for it; take --weights reference" in said
    assert list(tmp_path.iterdir()) == []
    assert run("--ignore-forecast", "--json") == 0
    said = capsys.readouterr()
    assert "Forecast for" not in said.err
    assert '"forecast": {' in said.out
    monkeypatch.undo()
    assert run("--force", "--device-memory", "100kB") == 2
    said = capsys.readouterr().err
    assert "error: --device-memory: running takes " in said
    assert " of the device's memory, 97.7 KiB are there: " in said
    assert read_manifest(tmp_path / "out").forecast is not None


def test_expected_tells_before_it_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[Needs] = []
    monkeypatch.setattr(capacity, "find_room", lambda *_: replace(PLENTY, disk=0))
    with pytest.raises(UserError, match="disk full"):
        Expected(tell=told.append).consider(NEEDS, tmp_path / "new")
    assert told == [NEEDS]
    assert Expected(ignore=True).consider(NEEDS, tmp_path / "new") is NEEDS


@pytest.mark.parametrize(
    ("text", "count"), [("24GiB", 24 * GIB), ("80 GB", 80 * 10**9), ("1.5mib", 3 * MIB // 2), ("77", 77)]
)
def test_sizes(text: str, count: int) -> None:
    assert read_bytes(text, "--device-memory") == count


@pytest.mark.parametrize("text", ["", "big", "0", "24 gallons", "-3GiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match=r"--device-memory: .* is no size; give 24GiB, 80GB or a number of bytes"):
        read_bytes(text, "--device-memory")
