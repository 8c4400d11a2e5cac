"""Kernels compiled ahead of time, without a GPU, and handed to a fake TensorRT."""

from __future__ import annotations

import re
from typing import Any

import pytest

from secateur.exporters.plugins import register
from secateur.exporters.plugins.table import PLUGINS, read_settings, write_settings
from secateur.runtime.errors import SecateurError, UserError

from . import fake_tensorrt_plugin

pytest.importorskip("triton")
aot = pytest.importorskip("secateur.exporters.plugins.aot")

QUERY, KEY = (1, 4, 40, 32), (1, 2, 40, 32)
CASES: dict[str, tuple[list[tuple[int, ...]], list[str], dict[str, Any]]] = {
    "RowLogSumExp": ([QUERY, KEY], ["bf16", "bf16"], {"scale": 0.1, "causal": True}),
    "ColumnSums": ([QUERY, KEY, QUERY[:3], (1,)], ["fp16", "fp16", "fp32", "i32"], {"scale": 0.1, "causal": False}),
    "LastRows": ([QUERY, KEY, (1, 40)], ["fp16", "fp16", "i32"], {"scale": 0.1}),
    "PickByFold": ([(2, 90, 90), (2,), (2, 90)], ["fp32", "i32", "fp32"], {"k": 9, "rule": "relevance", "trade": 0.4}),
    "PickByDeterminant": ([(2, 90, 90), (2, 90)], ["fp32", "fp32"], {"k": 9}),
    "PickByCoverage": ([(2, 90, 90), (2,), (2, 90)], ["fp32", "i32", "fp32"], {"k": 9, "product": True}),
    "RankTake": ([(2, 90)], ["fp32"], {"k": 9}),
}


def compiled(name: str, sm: int, **sizes: int) -> Any:
    return aot.compile_launch(PLUGINS[name].launch(*CASES[name], **sizes), sm)


def test_every_kernel_has_a_case() -> None:
    assert set(CASES) == set(PLUGINS)


@pytest.mark.parametrize("sm", aot.ARCHITECTURES)
@pytest.mark.parametrize("name", CASES)
def test_ptx_has_one_entry_with_what_is_passed_and_the_target(name: str, sm: int) -> None:
    made = compiled(name, sm)
    assert re.findall(r"^\.target sm_(\d+)a?$", made.ptx, re.MULTILINE) == [str(sm)]
    (head,) = re.findall(r"\.visible \.entry (\w+)\(\n(.*?)\n\)", made.ptx, re.DOTALL)
    launch = PLUGINS[name].launch(*CASES[name])
    assert head[0] == made.name
    assert len(head[1].split(",\n")) == sum(kind is not None for kind in launch.pointers.values())
    assert f".reqntid {made.threads}" in made.ptx
    assert made.shared <= aot.SHARED_LIMIT
    assert not re.search(r"\.(loc|file)\s", made.ptx), "paths of the machine"


@pytest.mark.parametrize("sm", [80, 120])
def test_the_assembler_takes_the_text(sm: int) -> None:
    assert aot.assemble(compiled("PickByFold", sm))[:4] == b"\x7fELF"


def test_the_same_kernel_gives_the_same_text() -> None:
    assert compiled("RankTake", 90) == compiled("RankTake", 90)


@pytest.mark.parametrize("width", [64, 128, 256])
def test_wide_heads_fit_the_shared_memory_every_gpu_has(width: int) -> None:
    shapes = [(1, 4, 300, width), (1, 2, 300, width), (1, 4, 300), (1,)]
    launch = PLUGINS["ColumnSums"].launch(shapes, ["bf16", "bf16", "fp32", "i32"], {"scale": 0.1, "causal": True})
    assert aot.compile_launch(launch, 90).shared <= aot.SHARED_LIMIT


def test_tokens_beyond_a_block_are_walked_over_in_tiles() -> None:
    settings = {"k": 9, "rule": "farthest", "trade": 0.0}
    for count, in_registers in ((4096, True), (4097, False)):
        launch = PLUGINS["PickByFold"].launch([(1, count, count), (1,), (1, 1)], ["fp32", "i32", "fp32"], settings)
        assert (launch.constants["IN_REGISTERS"], launch.constants["TILE"]) == (in_registers, 4096)
    assert aot.compile_launch(launch, 90).name == "pick_by_fold"


def test_parameters_a_kernel_reads_are_not_taken_off() -> None:
    ptx = compiled("RankTake", 80).ptx
    with pytest.raises(SecateurError, match="2 parameters where 1 were written"):
        aot.take_off_hidden(ptx, "rank_take", 1)


def test_an_architecture_without_kernels_is_refused() -> None:
    with pytest.raises(UserError, match="no kernels for GPU architecture 75"):
        compiled("RankTake", 75)


def test_settings_come_back_as_they_were() -> None:
    settings = {"scale": 0.08838834764831845, "causal": True}
    assert read_settings(write_settings(settings) + "\0") == settings


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> fake_tensorrt_plugin.Fake:
    monkeypatch.setitem(register._building, "sm", 0)
    return fake_tensorrt_plugin.install(monkeypatch)


def test_tensorrt_gets_outputs_kernel_and_launch(fake: fake_tensorrt_plugin.Fake) -> None:
    register.register_plugins(90)
    assert set(fake.implement) == {f"secateur::{p.name}" for p in PLUGINS.values() if p.inserted}
    kinds = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "i32": "INT32"}
    for name in ("ColumnSums", "PickByDeterminant"):
        shapes, dtypes, settings = CASES[name]
        inputs = [(kinds[d], s) for d, s in zip(dtypes, shapes, strict=True)]
        outputs, (entry, ptx, launch, extra) = fake.build(
            f"secateur::{name}", inputs, {"settings": write_settings(settings)}
        )
        made = compiled(name, 90)
        assert (entry, ptx) == (made.name, made.ptx)
        grid = PLUGINS[name].launch(*CASES[name]).grid
        assert launch.sizes == {
            "grid_x": grid[0], "grid_y": grid[1], "grid_z": grid[2], "block_x": made.threads, "block_y": 1,
            "block_z": 1, "shared_mem": made.shared,
        }  # fmt: skip
        assert extra == []
        wanted = [(kinds[kind], shape) for kind, shape in PLUGINS[name].outputs(shapes, settings)]
        assert [(o.dtype, o.shape) for o in outputs] == wanted


def test_registering_again_compiles_for_the_latest_architecture(fake: fake_tensorrt_plugin.Fake) -> None:
    for sm in (80, 120):
        register.register_plugins(sm)
    inputs = [("FLOAT", (2, 90))]
    _, (_, ptx, _, _) = fake.build("secateur::RankTake", inputs, {"settings": write_settings({"k": 9})})
    assert ".target sm_120" in ptx


def test_without_the_library_one_line_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(UserError, match=r"score plugins need .*not installed; pip install 'secateur\[tensorrt\]'"):
        register.register_plugins(90)
