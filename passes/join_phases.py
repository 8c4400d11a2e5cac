"""Join embedding, decoder and head into the programs that run: ``prefill`` and ``decode``.

Embedding lookup and the merge of image features into the text stream happen inside prefill:
``where(id is a placeholder, features[rank], embedding[id])``, which is static and takes any interleaving.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from secateur.compiler import ops
from secateur.compiler.deepstack import is_plane
from secateur.compiler.families.family import Tiles
from secateur.compiler.function import trace_function
from secateur.compiler.program import Module, Program, args_of, splice
from secateur.passes.edit import Node, aten, erase_dead
from secateur.passes.tile_rows import count_in_images, place_survivors


class Axes(NamedTuple):
    """Position ids of three axes. ``offsets`` are those of every place of the media from the first id of its item;
    None where the ids count slots. ``places`` are those of the tokens that enter, None where a stage chose them."""

    offsets: Sequence[tuple[int, int, int]] | None
    places: tuple[int, ...] | None


def join_prefill(
    decoder: Program,
    embedding: Program,
    head: Program,
    *,
    features: Tensor,
    sequence: int,
    image_token: int,
    pad_token: int,
    tokens_per_item: int,
    kept_per_item: int,
    original_positions: bool,
    extra_rows: int = 0,
    tiles: Tiles | None = None,
    axes: Axes | None = None,
    blocks: bool = False,
    chosen: bool = False,
    by_length: bool = False,
) -> Program:
    """``input_ids [B,N]``, ``lengths [B]``, ``features [B,F,D]`` (and ``kept [B,V]``) -> ``logits`` and more.

    The features of an item (an image, or a video) are ``kept_per_item`` visual tokens, ``V`` in a row, and
    ``extra_rows`` rows that are not prunable. ``original_positions`` numbers the features by the tokens they came from:
    those of item j start after ``j * (tokens_per_item + extra_rows)`` media tokens, survivor p of it at ``kept``'s
    index, its extra rows behind all its tokens, and text counts all of them. The decoder may read ``carried [B,V]``,
    which becomes an input here.
    Without ``tiles`` the extra rows stand behind an item's tokens, with them where those say; ``kept`` is read then
    as well where stages have ``chosen`` among the tokens.
    With ``axes`` that have offsets ``positions [B,N]`` becomes one as well: ids of text, and of media the first of
    their item.
    With ``blocks`` it reads ``block_ids [B,N]``: image tokens that follow each other without a gap are one block.
    With ``by_length`` rotary frequencies follow the largest position id of a row: those of pads are 0.
    Planes of DeepStack, ``deepstack_<i> [B,F,D]``, are laid out to ``[B,N,D]``, zero at text.
    """
    batch, count = features.shape[0], features.shape[1]
    per_item, whole = kept_per_item + extra_rows, tokens_per_item + extra_rows
    items = count // per_item

    def enter(input_ids: Tensor, lengths: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        image = input_ids == image_token
        rank = (torch.cumsum(image.to(torch.int64), 1) - 1).clamp(0, count - 1)
        entered = torch.where(image, pad_token, input_ids), image, rank, lengths - 1
        if not extra_rows:
            return entered
        if tiles is not None and kept:
            placed = place_survivors(count_in_images(kept[0], items, tokens_per_item), tiles)
            return *entered, image & placed.tokens.reshape(batch, count).gather(1, rank)
        if tiles is not None:
            tokens = torch.tensor([place >= 0 for place in tiles.order] * items)
            return *entered, image & tokens[rank]
        return *entered, image & (rank - rank // per_item * per_item < kept_per_item)

    def mix(image: Tensor, rank: Tensor, features: Tensor, embedded: Tensor) -> Tensor:
        return torch.where(image[..., None], ops.take_rows(features, rank), embedded)

    def lay_out(image: Tensor, rank: Tensor, plane: Tensor) -> Tensor:
        return torch.where(image[..., None], ops.take_rows(plane, rank), 0.0)

    def count_slots(input_ids: Tensor) -> Tensor:
        return torch.arange(sequence).expand(batch, sequence)

    def count_patches(image: Tensor, rank: Tensor, kept: Tensor) -> Tensor:
        text = torch.arange(sequence) - torch.cumsum(image.to(torch.int64), 1)
        done = (rank + 1) // per_item * whole
        # A slot before the first image has rank 0 and has completed none.
        done = torch.where(torch.cumsum(image.to(torch.int64), 1) > 0, done, 0)
        return torch.where(image, text + 1 + number_features(kept).gather(1, rank), text + done)

    def clear_pads(positions: Tensor, last: Tensor) -> Tensor:
        return torch.where(torch.arange(sequence) <= last[:, None], positions, 0)

    def number_features(kept: Tensor) -> Tensor:
        """Each feature's place among all the image tokens of an unpruned row: ``[B,V]`` -> ``[B,F]``."""
        if not extra_rows:
            return kept
        item = torch.arange(items)[:, None]
        if tiles is not None:
            slots = place_survivors(count_in_images(kept, items, tokens_per_item), tiles).slots
            return (slots.reshape(batch, items, per_item) + item * whole).reshape(batch, count)
        patches = kept.reshape(batch, items, kept_per_item) + item * extra_rows
        behind = item * whole + tokens_per_item + torch.arange(extra_rows)
        return torch.cat((patches, behind.expand(batch, items, extra_rows)), 2).reshape(batch, count)

    def add_offsets(positions: Tensor, image: Tensor, rank: Tensor, *kept: Tensor) -> Tensor:
        assert axes is not None
        assert axes.offsets is not None
        # Without a choice the tokens that enter are at places known beforehand: their offsets are one table.
        offsets = axes.offsets if axes.places is None else [axes.offsets[place] for place in axes.places]
        table = torch.tensor(list(zip(*offsets, strict=True)))
        flat = (kept[0].gather(1, rank) if kept else rank).reshape(-1)
        moved = table.index_select(1, flat).reshape(3, batch, sequence)
        return positions + torch.where(image, moved, 0)

    ids = torch.zeros(batch, sequence, dtype=torch.int64)
    flags, rows = torch.ones(batch, sequence, dtype=torch.bool), torch.zeros(batch, sequence, dtype=torch.int64)
    module = Module(nn.Module(), fx.Graph())
    graph = module.graph
    laid_out = tiles is not None and chosen
    numbered = original_positions if axes is None else axes.offsets is not None and axes.places is None
    given = axes is not None and axes.offsets is not None
    asked = [name for name, wanted in (("kept", numbered or laid_out), ("positions", given)) if wanted]
    names = ["input_ids", "lengths", "features", *asked]
    port = {name: graph.placeholder(name) for name in names}
    for node in decoder.graph.nodes:
        if node.op == "placeholder" and (node.name == "carried" or node.name.startswith("past_")):
            port[node.name] = graph.placeholder(node.name)
            port[node.name].meta = dict(node.meta)
    planes = {n.name: graph.placeholder(n.name) for n in decoder.graph.nodes if is_plane(n) and n.op == "placeholder"}
    port["input_ids"].meta["val"], port["features"].meta["val"] = ids, features
    port["lengths"].meta["val"] = torch.zeros(batch, dtype=torch.int64)
    outputs = ("ids", "image", "rank", "last", *(["prunable"] if extra_rows else []))
    read = {"input_ids": ids, "lengths": ids[:, 0].contiguous()}
    if laid_out:
        read["kept"] = torch.arange(items * kept_per_item).expand(batch, -1).contiguous()
        port["kept"].meta["val"] = read["kept"]
    entry = trace_function("enter", enter, read, outputs)
    text, image, rank, last, *patches = splice(module, entry, port)
    (embedded,) = splice(module, embedding, {"ids": text})
    values = {
        "image": flags,
        "rank": rows,
        "features": features,
        "embedded": features.new_zeros(*ids.shape, features.shape[2]),
    }
    (hidden,) = splice(
        module, trace_function("mix", mix, values, ("hidden",)),
        {"image": image, "rank": rank, "features": port["features"], "embedded": embedded},
    )  # fmt: skip
    for name, plane in planes.items():
        plane.meta["val"] = features
        laid = trace_function(
            "lay_out", lay_out, {n: values[n] for n in ("image", "rank")} | {"plane": features}, (name,)
        )
        (port[name],) = splice(module, laid, {"image": image, "rank": rank, "plane": plane})
    if axes is not None and axes.offsets is not None:
        port["positions"].meta["val"] = ids
        feed_axes = {"positions": ids, "image": flags, "rank": rows}
        from_axes = {"positions": port["positions"], "image": image, "rank": rank}
        if numbered:
            port["kept"].meta["val"] = torch.zeros(batch, count, dtype=torch.int64)
            feed_axes["kept"], from_axes["kept"] = port["kept"].meta["val"], port["kept"]
        numbering = trace_function("add_offsets", add_offsets, feed_axes, ("positions",))
        (positions,) = splice(module, numbering, from_axes)
    elif axes is not None:
        numbering = trace_function(
            "count_slots", lambda input_ids: count_slots(input_ids).expand(3, batch, sequence), {"input_ids": ids},
            ("positions",),
        )  # fmt: skip
        (positions,) = splice(module, numbering, port)
    elif original_positions:
        kept = torch.zeros(batch, items * kept_per_item, dtype=torch.int64)
        port["kept"].meta["val"] = kept
        numbering = trace_function(
            "count_patches", count_patches, {"image": flags, "rank": rows, "kept": kept}, ("positions",)
        )
        (positions,) = splice(module, numbering, {"image": image, "rank": rank, "kept": port["kept"]})
    else:
        numbering = trace_function("count_slots", count_slots, {"input_ids": ids}, ("positions",))
        (positions,) = splice(module, numbering, port)
    if by_length:
        entering = {"positions": torch.zeros(positions.meta["val"].shape, dtype=torch.int64), "last": ids[:, 0].clone()}
        clearing = trace_function("clear_pads", clear_pads, entering, ("positions",))
        (positions,) = splice(module, clearing, {"positions": positions, "last": last})
    prunable = patches[0] if patches else image
    feed = {**port, "hidden": hidden, "position_ids": positions, "prunable": prunable, "last": last}
    if any(n.op == "placeholder" and n.name == "question" for n in decoder.graph.nodes):
        counted = trace_function(
            "question", lambda image, last: last - (image * torch.arange(sequence)).amax(1),
            {"image": flags, "last": rows[:, 0].contiguous()}, ("question",),
        )  # fmt: skip
        (feed["question"],) = splice(module, counted, {"image": image, "last": last})
    if blocks:
        numbers = trace_function("number_blocks", number_blocks, {"image": flags}, ("block_ids",))
        (feed["block_ids"],) = splice(module, numbers, {"image": image})
    normed, end, *rest = splice(module, decoder, feed)
    index = graph.call_function(aten.unsqueeze.default, (end, 1))
    row = graph.call_function(aten.squeeze.dim, (graph.call_function(ops.take_rows, (normed, index)), 1))
    (logits,) = splice(module, head, {"row": row})
    graph.output((logits, *rest))
    _fix_length(module, sequence)
    if laid_out or given:
        # Places of survivors may be asked for by stages alone, positions by nobody where a stage before the first layer
        # numbers all rows anew.
        erase_dead(module)
        for name in asked:
            if not port[name].users:
                graph.erase_node(port[name])
    return Program("prefill", module, ("logits", *decoder.outputs[2:])).with_module(module)


def number_blocks(image: Tensor) -> Tensor:
    """Which run of image tokens each slot ``[B,N]`` is in, counted from 0; -1 in none."""
    before = torch.cat((torch.zeros_like(image[:, :1]), image[:, :-1]), 1)
    return torch.where(image, torch.cumsum((image & ~before).to(torch.int64), 1) - 1, -1)


def join_decode(decoder: Program, embedding: Program, head: Program, batch: int) -> Program:
    """``input_ids [B,1]``, ``position [B]``, ``slot_<s> [B]``, caches -> ``logits`` and the caches.

    Where every segment numbers its tokens by their slots there is no ``position``.
    """
    module = Module(nn.Module(), fx.Graph())
    graph = module.graph
    port: dict[str, Node] = {name: graph.placeholder(name) for name in ("input_ids", "position")}
    port["input_ids"].meta["val"] = torch.zeros(batch, 1, dtype=torch.int64)
    port["position"].meta["val"] = torch.zeros(batch, dtype=torch.int64)
    inputs = [n for n in decoder.graph.nodes if n.op == "placeholder" and n.name not in ("hidden", "position_ids")]
    slots = [n for n in inputs if n.name.startswith("slot_s")]
    # Segments in order, whichever pass asked for its slot first.
    slots.sort(key=lambda n: int(n.name.removeprefix("slot_s")))
    for node in (*slots, *inputs):
        if node.name not in port:
            port[node.name] = graph.placeholder(node.name)
            port[node.name].meta = dict(node.meta)
    (hidden,) = splice(module, embedding, {"ids": port["input_ids"]})
    positions = graph.call_function(aten.unsqueeze.default, (port["position"], 1))
    wanted = next(n.meta["val"] for n in decoder.graph.nodes if n.op == "placeholder" and n.name == "position_ids")
    if wanted.dim() == 3:  # a word stands at the same place on every axis
        positions = graph.call_function(aten.expand.default, (positions, [3, batch, 1]))
    normed, *rest = splice(module, decoder, {**port, "hidden": hidden, "position_ids": positions})
    (logits,) = splice(module, head, {"row": graph.call_function(aten.squeeze.dim, (normed, 1))})
    graph.output((logits, *rest))
    _fix_length(module, 1)
    if not port["position"].users:
        graph.erase_node(port["position"])
    return Program("decode", module, ("logits", *decoder.outputs[1:])).with_module(module)


def _fix_length(module: fx.GraphModule, sequence: int) -> None:
    """Make every length a number: a segment's own after a site, the whole sequence before the first."""
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target is aten.sym_size.int:
            length = node.meta["val"] if isinstance(node.meta["val"], int) else sequence
            for user in list(node.users):
                _put_number(user, node, length)
            module.graph.erase_node(node)
    erase_dead(module)


def _put_number(user: Node, node: Node, number: int) -> None:
    def swap(argument: Node) -> Any:
        return number if argument is node else argument

    user.args, user.kwargs = fx.map_arg(args_of(user), swap), fx.map_arg(user.kwargs, swap)
