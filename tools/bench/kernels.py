"""What the score kernels cost on a GPU: `python -m secateur.tools.bench kernels [--out FILE] [--small]`.

A row per kernel: how far it is from float64 (of selections: how many picks differ from the plain form in float64), its
median time, the time the bytes it must move and the products it must make take at rates measured on the same GPU, and
the time of the plain form in torch. Selections are chains of dependent steps, so their floor is far below any time.
Needs a GPU and triton.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from secateur.compiler import score_ops
from secateur.tools.console import results

DEVICE = "cuda"


@dataclass(frozen=True)
class Case:
    """``kernel()`` and ``plain()`` return the same tensor; ``exact()`` in float64. ``bytes``, ``flops``: what any
    program has to move and multiply; ``error`` compares (kernel's, exact)."""

    name: str
    shape: str
    kernel: Callable[[], Tensor]
    plain: Callable[[], Tensor]
    exact: Callable[[], Tensor]
    bytes: int
    flops: int
    error: Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Row:
    """Milliseconds, medians. ``error``: largest relative difference, or the share of picks that differ."""

    name: str
    shape: str
    error: float
    kernel_ms: float
    floor_ms: float
    plain_ms: float


def list_cases(small: bool) -> list[Case]:
    """A 7B decoder's attention and what is chosen of 576, 2880 and 20,000 tokens; ``small`` for a quick check."""
    length, tokens = (300, (100,)) if small else (2944, (576, 2880))
    cases = [_received(length, True), _received(length, False), _last_rows(length)]
    for count in tokens:
        cases += [_fold(rule, count) for rule in ("farthest", "relevance")]
        cases += [_determinant(count), _coverage(count), _rank(count, 4096)]
    if not small:
        cases += [_fold("farthest", 20000), _rank(20000, 4096)]
    return cases


def _normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    source = torch.Generator(DEVICE).manual_seed(0)
    return torch.randn(*shape, generator=source, device=DEVICE).to(dtype)


def _run(name: str, inputs: list[Tensor], settings: dict[str, Any]) -> list[Tensor]:
    from secateur.exporters.plugins.run import run_plugin

    return run_plugin(name, inputs, settings)


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


def _picks(found: Tensor, exact: Tensor) -> float:
    return float((found.long() != exact).double().mean())


def _received(length: int, causal: bool) -> Case:
    heads, key_heads, width = (28, 4, 128) if causal else (16, 16, 64)
    query = _normal(1, heads, length, width, dtype=torch.bfloat16)
    key = _normal(1, key_heads, length, width, dtype=torch.bfloat16)
    last = torch.tensor([length - 1], device=DEVICE)
    settings = {"scale": width**-0.5, "causal": causal}

    def kernel() -> Tensor:
        (sums,) = _run("RowLogSumExp", [query, key], settings)
        return _run("ColumnSums", [query, key, sums, last.int()], settings)[0]

    def plain() -> Tensor:
        return score_ops.receive_plainly(query, key, settings["scale"], causal, last)

    def exact() -> Tensor:
        one = [_exact_received(query[:, [h]], key[:, [h * key_heads // heads]], settings["scale"], causal)
               for h in range(heads)]  # fmt: skip
        return torch.cat(one, 1)

    moved = 2 * (query.numel() + key.numel()) + 4 * heads * length
    flops = 2 * 2 * heads * length * length * width // (2 if causal else 1)
    title = "received attention, causal" if causal else "received attention, tower"
    return Case(title, f"H{heads}/{key_heads} L{length} d{width}", kernel, plain, exact, moved, flops, _relative)


def _exact_received(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    logits = query.double() @ key.double().transpose(-1, -2) * scale
    if causal:
        length = logits.shape[-1]
        future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        logits = logits.masked_fill(future, float("-inf"))
    return torch.softmax(logits, -1).mean(2)


def _last_rows(length: int) -> Case:
    query, key = _normal(1, 28, 1, 128, dtype=torch.bfloat16), _normal(1, 4, length, 128, dtype=torch.bfloat16)
    slots, scale = torch.tensor([[length - 1]], device=DEVICE), 128**-0.5

    def exact() -> Tensor:
        wide = key.double().repeat_interleave(7, 1)
        return torch.softmax(query.double() @ wide.transpose(-1, -2) * scale, -1)

    return Case(
        "last row's attention", f"H28/4 L{length} d128",
        lambda: _run("LastRows", [query, key, slots.int()], {"scale": scale})[0],
        lambda: torch.softmax(score_ops.score_rows(query, key, scale, slots), -1),
        exact, 2 * key.numel() + 4 * 28 * length, 2 * 28 * length * 128, _relative,
    )  # fmt: skip


def _table(count: int) -> tuple[Tensor, Tensor, Tensor]:
    units = torch.nn.functional.normalize(_normal(1, count, 256), dim=-1)
    start = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    return units @ units.transpose(1, 2), start, torch.rand(1, count, device=DEVICE)


def _fold(rule: str, count: int) -> Case:
    alike, start, weight = _table(count)
    table, k = alike if rule == "relevance" else 1.0 - alike, max(count // 10, 2)
    plain = score_ops.PLAIN[score_ops.pick_by_fold]
    return Case(
        f"greedy, {rule}", f"N{count} K{k}",
        lambda: _run("PickByFold", [table, start.int(), weight], {"k": k, "rule": rule, "trade": 0.5})[0],
        lambda: plain(table, start, weight, k, rule, 0.5),
        lambda: plain(table.double(), start, weight.double(), k, rule, 0.5),
        4 * k * count, 0, _picks,
    )  # fmt: skip


def _determinant(count: int) -> Case:
    alike, _, weight = _table(count)
    plain, k = score_ops.PLAIN[score_ops.pick_by_determinant], max(count // 10, 2)
    return Case(
        "greedy, determinant", f"N{count} K{k}",
        lambda: _run("PickByDeterminant", [alike, weight], {"k": k})[0],
        lambda: plain(alike, weight, k), lambda: plain(alike.double(), weight.double(), k),
        4 * k * count * (k // 2 + 1), k * k * count, _picks,
    )  # fmt: skip


def _coverage(count: int) -> Case:
    alike, start, weight = _table(count)
    table, k = torch.relu(alike), max(count // 10, 2)
    plain = score_ops.PLAIN[score_ops.pick_by_coverage]
    return Case(
        "greedy, coverage", f"N{count} K{k}",
        lambda: _run("PickByCoverage", [table, start.int(), weight], {"k": k, "product": True})[0],
        lambda: plain(table, start, weight, k, True), lambda: plain(table.double(), start, weight.double(), k, True),
        4 * k * count * count, 0, _picks,
    )  # fmt: skip


def _rank(count: int, width: int) -> Case:
    score, rows, k = _normal(1, count), _normal(1, count, width, dtype=torch.bfloat16), max(count // 10, 1)

    def plain() -> Tensor:
        keep = score_ops.take_highest(score, k)
        rows.gather(1, keep[..., None].expand(-1, -1, width))
        return keep

    return Case(
        "rank and gather", f"N{count} K{k} D{width}", lambda: _run("RankTake", [score, rows], {"k": k})[0], plain,
        lambda: score_ops.take_highest(score.double(), k), 4 * count + 4 * k * width, 0, _picks,
    )  # fmt: skip


def measure_rates() -> tuple[float, float]:
    """Bytes a second of a copy (read and written both counted), and bf16 FLOPs a second of a product."""
    from triton.testing import do_bench

    source = torch.empty(1 << 28, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    side = 8192
    a, b = _normal(side, side, dtype=torch.bfloat16), _normal(side, side, dtype=torch.bfloat16)
    copied = do_bench(lambda: target.copy_(source), return_mode="median")
    multiplied = do_bench(lambda: a @ b, return_mode="median")
    return 2e3 * source.numel() / copied, 2e3 * side**3 / multiplied


def measure(case: Case, rates: tuple[float, float]) -> Row:
    from triton.testing import do_bench

    error = case.error(case.kernel(), case.exact())
    kernel, plain = (float(do_bench(run, return_mode="median")) for run in (case.kernel, case.plain))
    floor = 1e3 * max(case.bytes / rates[0], case.flops / rates[1])
    return Row(case.name, case.shape, error, kernel, floor, plain)


def make_table(rows: list[Row]) -> Table:
    table = Table("kernel", "shape", "error", "kernel ms", "floor ms", "plain ms", "plain / kernel")
    for row in rows:
        times = [f"{ms:.3f}" for ms in (row.kernel_ms, row.floor_ms, row.plain_ms)]
        table.add_row(row.name, row.shape, f"{row.error:.1e}", *times, f"{row.plain_ms / row.kernel_ms:.1f}")
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m secateur.tools.bench kernels", description=__doc__)
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    parser.add_argument("--small", action="store_true", help="small shapes: a check, not a measurement")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("kernels: this table needs an NVIDIA GPU and a torch that sees it; there is none\n")
        sys.exit(2)
    rates = measure_rates()
    rows = [measure(case, rates) for case in list_cases(chosen.small)]
    results.print(
        f"{torch.cuda.get_device_name()}: copies {rates[0] / 1e9:.0f} GB/s, bf16 {rates[1] / 1e12:.0f} TFLOP/s"
    )
    results.print(make_table(rows))
    if chosen.out is not None:
        told = {
            "device": torch.cuda.get_device_name(), "bytes_per_second": rates[0], "flops_per_second": rates[1],
            "rows": [asdict(row) for row in rows],
        }  # fmt: skip
        chosen.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
