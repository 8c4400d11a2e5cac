"""What a mixture-of-experts layer costs beside its FLOPs: `python -m secateur.tools.bench.experts [SHAPE ...]`.

A shape is `T,D,F,E,k`: tokens, width, an expert's hidden width, experts, experts per token. The layer's graph for ONNX
Runtime takes turns with a dense one of as many FLOPs, whose `T*k` rows all go through a single expert, and with
transformers' own loop over experts. `even` is what a router of random scores chooses, `uneven` one with favourites.
With one thread the processor's time is told, which other work on the machine changes little, else the clock's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import onnx_ir as ir
import torch
from rich.table import Table
from torch import Tensor

from secateur.compiler import ops
from secateur.compiler.flops import count_flops
from secateur.compiler.function import trace_function
from secateur.exporters.dialects import DIALECTS
from secateur.exporters.onnx import export_program
from secateur.exporters.weights import WeightLayout
from secateur.runtime.backends.cores import available_cores
from secateur.tools.console import results
from secateur.tools.threads import read_threads

SHAPES = ("1024,1024,384,64,8", "128,1024,384,64,8", "1,1024,384,64,8")
"""A layer of Qwen3-30B-A3B with half of its width and of its experts: prefill, a short prompt, a step of decoding."""
LOADS = ("even", "uneven")
_FAVOUR = 2.0
_NAMES = ("x", "indices", "weights", "gate_up", "down")


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer and of what it is given."""

    tokens: int
    width: int
    hidden: int
    experts: int
    chosen: int

    def __str__(self) -> str:
        return f"{self.tokens},{self.width},{self.hidden},{self.experts},{self.chosen}"


@dataclass(frozen=True)
class Row:
    """Median seconds of one run each: the layer's graph, the dense graph, transformers; ``flops`` of a run."""

    shape: Shape
    load: str
    flops: int
    layer: float
    dense: float
    eager: float


def measure(shape: Shape, load: str, turns: int, threads: int) -> Row:
    """Time the three in turns."""
    clock = time.process_time if threads == 1 else time.perf_counter
    x, indices, weights, gate_up, down = draw(shape, load)
    feed = dict(zip(_NAMES, (x, indices, weights, gate_up, down), strict=True))
    program = trace_function("experts", lambda *given: ops.experts(*given), feed, ("out",))
    rows = {"x": x[:1].expand(shape.tokens * shape.chosen, -1).contiguous(), "gate_up": gate_up[0], "down": down[0]}
    dense = trace_function("dense", _dense, rows, ("out",))
    module = _transformers_layer(shape, gate_up, down)

    def run_eager() -> None:
        with torch.no_grad():
            module(x, indices, weights)

    torch.set_num_threads(threads)
    runs = (_session(program, feed, threads), _session(dense, rows, threads), run_eager)
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(turns + 1):
        for run, taken in zip(runs, times, strict=True):
            begin = clock()
            run()
            if turn:  # the first one warms up
                taken.append(clock() - begin)
    return Row(shape, load, count_flops(program), *map(median, times))


def draw(shape: Shape, load: str) -> tuple[Tensor, ...]:
    """``x``, ``indices``, ``weights``, ``gate_up``, ``down`` as ``secateur::experts`` takes them, seeded."""
    source = torch.Generator().manual_seed(0)
    scores = torch.randn(shape.tokens, shape.experts, generator=source)
    if load == "uneven":
        scores = scores + _FAVOUR * torch.randn(shape.experts, generator=source)
    weights, indices = torch.softmax(scores, -1).topk(shape.chosen)
    x = torch.randn(shape.tokens, shape.width, generator=source)
    gate_up = torch.randn(shape.experts, 2 * shape.hidden, shape.width, generator=source) * shape.width**-0.5
    down = torch.randn(shape.experts, shape.width, shape.hidden, generator=source) * shape.hidden**-0.5
    return x, indices, weights, gate_up, down


def _dense(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    both, hidden = torch.nn.functional.linear(x, gate_up), down.shape[1]
    return torch.nn.functional.linear(torch.nn.functional.silu(both[:, :hidden]) * both[:, hidden:], down)


def _transformers_layer(shape: Shape, gate_up: Tensor, down: Tensor) -> Any:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=shape.width, moe_intermediate_size=shape.hidden, num_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
    )  # fmt: skip
    config._experts_implementation = "eager"
    module = Qwen3MoeExperts(config)
    module.gate_up_proj, module.down_proj = torch.nn.Parameter(gate_up), torch.nn.Parameter(down)
    return module


def _session(program: Any, feed: dict[str, Tensor], threads: int) -> Callable[[], object]:
    """A run of a program by ONNX Runtime as bundles are run: weights as they lie, no copy of them."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "1")
    model = ir.to_proto(export_program(program, DIALECTS["onnxruntime"], WeightLayout({}, b"", {})))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = {name: tensor.numpy() for name, tensor in feed.items()}
    return lambda: session.run(None, given)


def make_table(rows: list[Row]) -> Table:
    table = Table("T,D,F,E,k", "load", "GFLOP", "layer ms", "dense ms", "layer / dense", "transformers ms")
    for row in rows:
        cells = [f"{1e3 * seconds:.1f}" for seconds in (row.layer, row.dense, row.eager)]
        ratio = f"{row.layer / row.dense:.2f}"
        table.add_row(str(row.shape), row.load, f"{row.flops / 1e9:.2f}", *cells[:2], ratio, cells[2])
    return table


def read_shape(text: str) -> Shape:
    sizes = [int(size) for size in text.split(",")]
    if len(sizes) != 5 or min(sizes) < 1 or sizes[4] > sizes[3]:
        raise argparse.ArgumentTypeError(f"{text}: a shape is T,D,F,E,k, all at least 1 and k at most E")
    return Shape(*sizes)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m secateur.tools.bench.experts", description=__doc__)
    parser.add_argument("shapes", nargs="*", type=read_shape, default=[read_shape(text) for text in SHAPES])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=read_threads, default=available_cores())
    chosen = parser.parse_args(arguments)
    rows = [measure(shape, load, chosen.turns, chosen.threads) for shape in chosen.shapes for load in LOADS]
    results.print(make_table(rows))


if __name__ == "__main__":
    main()
