"""What the vision towers of the Qwen families share: patches in one row, squares of which become one token.

The processor lays an image's patches out square by square. Some towers attend in windows, and put the squares of a
window together for that; they undo it behind the merger. All sizes are known when a bundle is compiled, so that the
towers' indices are computed once, by transformers' own functions, and handed to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from secateur.compiler.families.family import VisionFacts
from secateur.compiler.geometry import Geometry
from secateur.compiler.layout import Layout
from secateur.compiler.media import Item, MediaLayout, grid_axes
from secateur.runtime.errors import UserError

MARKS = dict.fromkeys(("image", "video"), ("vision_start_token_id", "vision_end_token_id"))
"""What stands around images and videos; transformers takes two side by side for one without it."""
USUAL_SIZE = (448, 448)
"""Height, width in pixels where a geometry does not say."""


def read_vision(config: Any, geometry: Geometry) -> VisionFacts:
    """Facts of a tower with ``depth`` layers that reads flattened patches."""
    if geometry.sizes:
        different = tuple(dict.fromkeys(geometry.sizes))
        each = [replace(geometry, image_size=size, images=geometry.sizes.count(size)) for size in different]
        return join_sizes([read_vision(config, one) for one in each], [different.index(s) for s in geometry.sizes])
    vision = config.vision_config
    where = f"{config.name_or_path}/config.json"
    patch, merge, depth = _read_side(vision.patch_size, where), vision.spatial_merge_size, vision.depth
    height, width = geometry.one_size or USUAL_SIZE
    if height % (patch * merge) or width % (patch * merge):
        near = [max(1, round(n / (patch * merge))) * patch * merge for n in (height, width)]
        raise UserError(
            f"images of {height}x{width} cannot be cut into {merge}x{merge} patches of {patch} pixels",
            where="--image-size", fix=f"give multiples of {patch * merge}, such as {near[0]}x{near[1]}",
        )  # fmt: skip
    temporal = vision.temporal_patch_size
    if geometry.frames % temporal:
        raise UserError(
            f"{geometry.frames} frames, of which {temporal} become one grid", where="--frames",
            fix=f"give a multiple of {temporal}",
        )  # fmt: skip
    grids = geometry.frames // temporal or geometry.images
    rows, columns = height // patch, width // patch
    # Where a configuration has both, hidden_size is the width of what comes out.
    size_of = "embed_dim" if hasattr(vision, "embed_dim") else "hidden_size"
    heads, dim = vision.num_heads, getattr(vision, size_of)
    if dim % heads:
        raise UserError(f"{size_of} {dim} is no multiple of num_heads {heads}", where=where, fix="check vision_config")
    windows = getattr(vision, "fullatt_block_indexes", None)
    return VisionFacts(
        frames=grids,
        image_size=(height, width),
        grid=(rows // merge, columns // merge),
        merge=merge,
        layers=depth,
        feature_layer=depth - 1,
        has_cls=False,
        input_shape=(grids * rows * columns, vision.in_channels * temporal * patch * patch),
        patch_order=patch_order(rows, columns, merge, patch, getattr(vision, "window_size", 0) if windows else 0),
        attends_whole=tuple(windows or ()),
        packed=True,
    )


def join_sizes(sizes: Sequence[VisionFacts], size_of: Sequence[int]) -> VisionFacts:
    """Facts of a row whose images are of several sizes, ``size_of`` each."""
    tokens, patches = (sum(each) for each in ((s.tokens_per_row for s in sizes), (s.input_shape[0] for s in sizes)))
    largest = max(sizes, key=lambda size: size.tokens_per_image)
    return replace(
        largest, frames=1, grid=(1, tokens), input_shape=(patches, *largest.input_shape[1:]), patch_order=(),
        sizes=tuple(sizes), size_of=tuple(size_of),
    )  # fmt: skip


def list_grids(facts: VisionFacts, merge: int) -> list[list[int]]:
    """Patches of every grid of a row: in time (one), down and across, as transformers is told of images."""
    return [[1, image.grid[0] * merge, image.grid[1] * merge] for image in facts.images]


def _read_side(size: Any, where: str) -> int:
    """Pixels along a patch."""
    if not isinstance(size, int):
        raise UserError(f"patch_size is {size!r}", where=where, fix="only square patches are supported: one number")
    return size


def patch_order(rows: int, columns: int, merge: int, patch: int, window: int) -> tuple[int, ...]:
    """Of each of a grid's patches, row by row, its place in the tower; ``window`` in pixels, 0 for none."""
    squares = window_order(rows // merge, columns // merge, window // merge // patch if window else 0)
    places: dict[tuple[int, int], int] = {}
    for index, square in enumerate(squares):
        top, left = square // (columns // merge) * merge, square % (columns // merge) * merge
        for inside in range(merge * merge):
            places[top + inside // merge, left + inside % merge] = index * merge * merge + inside
    return tuple(places[row, column] for row in range(rows) for column in range(columns))


def window_order(rows: int, columns: int, window: int) -> list[int]:
    """Squares, row by row, in the order of windows of ``window`` by ``window``; in their own where that is 0."""
    if not window:
        return list(range(rows * columns))
    return [
        row * columns + column
        for top in range(0, rows, window) for left in range(0, columns, window)
        for row in range(top, min(top + window, rows)) for column in range(left, min(left + window, columns))
    ]  # fmt: skip


def vision_indices(config: Any, facts: VisionFacts, rows: int) -> dict[str, Any]:
    """What a tower computes from its grids, for ``rows`` rows: patch positions, the order of windows, where runs of
    patches that attend to each other begin and end. Values are tensors on the CPU, bounds tuples of numbers."""
    import torch

    vision, grids = config.vision_config, facts.frames * rows
    merge, (down, across) = int(vision.spatial_merge_size), facts.grid
    size = down * across * merge * merge
    at = [
        (top * merge + row, left * merge + column)
        for top in range(down) for left in range(across) for row in range(merge) for column in range(merge)
    ]  # fmt: skip
    made: dict[str, Any] = {
        "position_ids": torch.tensor(at * grids),
        "cu_seqlens": tuple(size * grid for grid in range(grids + 1)),
    }
    if facts.attends_whole:
        side = vision.window_size // merge // vision.patch_size
        order, first = window_order(down, across, side), [0]
        for _ in range(grids):
            for top in range(0, down, side):
                for left in range(0, across, side):
                    squares = min(side, down - top) * min(side, across - left)
                    first.append(first[-1] + squares * merge * merge)
        index = [grid * down * across + square for grid in range(grids) for square in order]
        made |= {"window_index": torch.tensor(index), "cu_window_seqlens": tuple(first)}
    return made


def vision_forward(model: Any, patches: Any, facts: VisionFacts, indices: Mapping[str, Any]) -> tuple[Any, ...]:
    """Patches ``[B*S,...]`` -> features ``[B*frames,N,D]``, the tower's last state, features of inner layers."""
    rows = patches.shape[0] // facts.input_shape[0]
    # Lengths are read off the bounds by whoever attends; the tower only hands them on.
    out = model.model.visual(patches, grid_thw=None, max_seqlen=0, max_window_seqlen=0, **indices)
    planes = out.deepstack_features if facts.deepstack else []
    features, *inner = (
        each.reshape(rows * facts.frames, facts.tokens_per_image, -1) for each in (out.pooler_output, *planes)
    )
    return features, out.last_hidden_state, *inner


def reference_forward(model: Any, patches: Any, facts: VisionFacts) -> tuple[Any, ...]:
    """The features as transformers computes them from grids, and those of inner layers: ``[B*frames,N,D]``."""
    import torch

    merge = int(model.config.vision_config.spatial_merge_size)
    rows = patches.shape[0] // facts.input_shape[0]
    grid = torch.tensor(list_grids(facts, merge) * rows)
    out = model.get_image_features(patches, image_grid_thw=grid, return_dict=True)
    planes = out.deepstack_features if facts.deepstack else []
    features = torch.stack(list(out.pooler_output))
    # transformers 5.20 splits planes by image as it splits features; before, all rows of a plane are one tensor.
    return features, *(torch.cat(list(plane)).reshape(features.shape) for plane in planes)


def reference_positions(model: Any, ids: Any, source: Any, geometry: Geometry) -> Any:
    """Position ids ``[3,N]`` of a prompt as transformers numbers them."""
    import torch

    vision, facts = source.config.vision_config, source.vision
    merge = int(vision.spatial_merge_size)
    grids = list_grids(facts, merge)
    types = (ids == source.config.image_token_id).int() + 2 * (ids == source.config.video_token_id).int()
    given: dict[str, Any] = {"image_grid_thw": torch.tensor(grids)}
    if geometry.frames:
        given = {"video_grid_thw": torch.tensor([[len(grids), *grids[0][1:]]])}
    if hasattr(vision, "tokens_per_second"):
        given["second_per_grid_ts"] = torch.tensor([vision.temporal_patch_size / geometry.fps])
    return model.model.get_rope_index(input_ids=ids, mm_token_type_ids=types, **given)[0][:, 0]


def seen_items(
    config: Any, geometry: Geometry, facts: VisionFacts, times: Sequence[int], whole_span: bool
) -> tuple[list[Item], list[tuple[int, int, int]]]:
    """The images, or the one video whose grids stand at ``times``, and the offsets of their tokens. The text behind a
    video goes on behind its last position with ``whole_span``, else behind the longer side of one grid."""
    if not geometry.frames:
        items = [Item("image", one.tokens_per_image, max(one.grid), max(one.grid)) for one in facts.images]
        return items, [axes for one in facts.images for axes in grid_axes([0], *one.grid)]
    rows, columns = facts.grid
    side = max(rows, columns)
    reach = max(times[-1] + 1, side)
    video = Item("video", facts.tokens_per_row, reach if whole_span else side, reach)
    return [video], grid_axes(times, rows, columns)


def layout_seen(facts: VisionFacts) -> Layout:
    return Layout.of_counts([image.tokens_per_image for image in facts.images])


def plain_media(
    config: Any, geometry: Geometry, facts: VisionFacts, times: Sequence[int], whole_span: bool
) -> MediaLayout:
    """How the media lie in families that do not hear."""
    items, offsets = seen_items(config, geometry, facts, times, whole_span)
    return MediaLayout(tuple(items), ((0, facts.tokens_per_row),), tuple(offsets), layout_seen(facts), MARKS)


def refuse_sound(config: Any, geometry: Geometry) -> None:
    if geometry.audio_seconds:
        raise UserError(
            f"a {config.model_type} model does not hear", where=f"{config.name_or_path}/config.json",
            fix="leave --audio-seconds out",
        )  # fmt: skip
