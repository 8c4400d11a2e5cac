"""One program that encodes images of several sizes: each size's images go through the tower by themselves.

A row's patches lie image by image, in the order of the prompt, and so do the tokens that come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.compiler.families.family import VisionFacts
from secateur.compiler.function import trace_function
from secateur.compiler.program import Module, Program, splice
from secateur.passes.edit import Node, shape_of
from secateur.passes.refresh_shapes import refresh_shapes


def join_sizes(programs: Sequence[Program], stages: Sequence[Sequence[Any]], facts: VisionFacts, batch: int) -> Program:
    """``pixel_values [B*S,...]`` -> what every program of a size returns, its images in their places: ``features
    [B,F,D]``, ``carried [B,F]``, ``deepstack.<i> [B,F,D]``, ``kept.<stage> [B,K]``.

    ``stages`` are the stage functions in each program. ``kept`` counts the tokens of all images that entered a stage.
    """
    module = Module(nn.Module(), fx.Graph())
    graph = module.graph
    pixels = graph.placeholder("pixel_values")
    entering = [next(n for n in program.graph.nodes if n.op == "placeholder") for program in programs]
    whole = entering[0].meta["val"].new_empty(facts.input_of(batch))
    pixels.meta["val"] = whole
    patches = [size.input_shape[0] // size.frames for size in facts.sizes]

    def split(pixel_values: Tensor) -> tuple[Tensor, ...]:
        rows = pixel_values.reshape(batch, facts.input_shape[0], -1)
        images = rows.split([patches[size] for size in facts.size_of], 1)
        gathered = (
            torch.cat([image for image, own in zip(images, facts.size_of, strict=True) if own == size], 1)
            for size in range(len(patches))
        )
        return tuple(one.reshape(-1, rows.shape[-1]) for one in gathered)

    names = [f"pixels_{size}" for size in range(len(patches))]
    parts = splice(module, trace_function("split", split, {"pixel_values": whole}, names), {"pixel_values": pixels})
    made = [
        dict(zip(program.outputs, splice(module, program, {"pixel_values": part}), strict=True))
        for program, part in zip(programs, parts, strict=True)
    ]
    counts = {
        f"kept.{stage.planned.name}": [own[place].planned.length_in for own in stages]
        for place, stage in enumerate(stages[0])
    }

    def lay(name: str) -> Node:
        entering = counts.get(name)
        starts = list(accumulate((entering[size] for size in facts.size_of) if entering else (), initial=0))

        def put(*values: Tensor) -> Tensor:
            split = [value.reshape(batch, size.frames, -1, *value.shape[2:])
                     for value, size in zip(values, facts.sizes, strict=True)]  # fmt: skip
            images = []
            for image, (size, place) in enumerate(facts.image_places):
                tokens = split[size][:, place]
                if entering:  # counted in the images of its size so far
                    tokens = tokens + (starts[image] - place * entering[size])
                images.append(tokens)
            return torch.cat(images, 1)

        nodes = {f"size_{size}": outputs[name] for size, outputs in enumerate(made)}
        kind = nodes["size_0"].meta["val"]
        feed = {key: torch.zeros(shape_of(node), dtype=kind.dtype) for key, node in nodes.items()}
        (laid,) = splice(module, trace_function("lay_images", put, feed, ("laid",)), nodes)
        return laid

    outputs = programs[0].outputs
    graph.output(tuple(lay(name) for name in outputs))
    return refresh_shapes(Program("vision", module, outputs))
