"""SmolVLM2 layout: SigLIP-like tower without a CLS token, pixel shuffle, one linear projection, Llama decoder.

Behind the tower every square of ``scale_factor`` by ``scale_factor`` patches becomes one token, and only then comes the
projection: what the decoder sees, and what stages count, are such squares. An image is its global view, resized to the
tower's square; where the geometry has a size of images, the tiles that transformers cuts one of that size into stand
before it, with marks of row and column. Videos are not supported.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby
from types import SimpleNamespace
from typing import Any

from secateur.compiler.families.family import Family, Split, VisionFacts, fixed_size, read_grid, read_image_processor
from secateur.compiler.geometry import Geometry
from secateur.runtime.errors import UserError

_GLOBAL_ONLY = (
    "transformers adds tiles of high resolution to an image where do_image_splitting is set; this bundle shows the "
    "model the global view only, as transformers itself does without; compile with --image-size for tiles"
)


def _read_vision(config: Any, geometry: Geometry) -> VisionFacts:
    vision, merge = config.vision_config, config.scale_factor
    where = f"{config.name_or_path}/config.json"
    side, _ = read_grid(config, where)
    if not isinstance(merge, int) or merge < 1 or side % merge:
        raise UserError(
            f"{side}x{side} patches cannot be put together in squares of {merge}x{merge}",
            where=where,
            fix="scale_factor must be a whole number that divides image_size // patch_size",
        )
    _find_positions(vision.image_size, vision.patch_size)
    split = _read_split(config, geometry)
    return VisionFacts(
        frames=fixed_size(config, geometry, tiles=True) * (split.grids if split else 1),
        split=split,
        image_size=(vision.image_size, vision.image_size),
        grid=(side // merge, side // merge),
        merge=merge,
        linear_projector=True,
        layers=vision.num_hidden_layers,
        feature_layer=vision.num_hidden_layers - 1,
        has_cls=False,
        channels=vision.num_channels,
        every_image="" if split else _GLOBAL_ONLY,
    )


def _read_split(config: Any, geometry: Geometry) -> Split | None:
    """The tiles of an image of the geometry's size, the global view behind them, and the text between them."""
    if (size := geometry.one_size) is None:
        return None
    import numpy as np
    from PIL import Image
    from transformers.image_utils import SizeDict
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
    from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

    told = read_image_processor(config)
    if not told.get("do_image_splitting", True):
        raise UserError(
            "do_image_splitting is off: an image has no tiles", where=f"{config.name_or_path}/preprocessor_config.json",
            fix="leave --image-size out",
        )  # fmt: skip
    side, theirs = config.vision_config.image_size, SmolVLMImageProcessorPil()
    # Only sizes matter here: of a blank image, in the quickest way.
    blank, quick = np.zeros((3, *size), np.uint8), Image.Resampling.NEAREST
    if told.get("do_resize", True):
        longest = (told.get("size") or {}).get("longest_edge", theirs.size["longest_edge"])
        blank = theirs.resize(blank, SizeDict(longest_edge=longest), resample=quick)
    rows, columns = (n // side for n in theirs.resize_for_vision_encoder(blank, side, resample=quick).shape[1:])
    several = rows * columns > 1
    marks = ("{fake_image_token}", "<image>", "{global_image_token}")
    text = get_image_prompt_string(rows * several, columns * several, 1, *marks)
    return Split(size, rows * columns + several, tuple(text.split("<image>")))


def _vision_forward(model: Any, pixel_values: Any, facts: VisionFacts, indices: Any) -> tuple[Any, Any]:
    tower, parts = model.model.vision_model, model.model.vision_model.embeddings
    # Its own forward finds every patch's position in operations on a mask of padding, which whole images do not need.
    patches = parts.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
    hidden = patches + _embed_positions(parts)
    last = tower.post_layernorm(tower.encoder(inputs_embeds=hidden).last_hidden_state)
    return model.model.connector(last), last


def _embed_positions(parts: Any) -> Any:
    """Rows ``[N,D]`` of the position table in the order of an image's patches."""
    import torch

    table = parts.position_embedding.weight
    # Positions that follow each other are one slice: no table of indices has to be a constant of the graph.
    places = enumerate(_find_positions(parts.image_size, parts.patch_size))
    runs = [[place for _, place in run] for _, run in groupby(places, key=lambda at: at[1] - at[0])]
    slices = [table[run[0] : run[0] + len(run)] for run in runs]
    return slices[0] if len(slices) == 1 else torch.cat(slices)


@lru_cache(maxsize=8)
def _find_positions(image_size: int, patch_size: int) -> tuple[int, ...]:
    """The position of each patch of a whole image, as the embedding module itself computes it.

    It rounds, so positions need not be 0, 1, 2 and so on. Called before anything is traced and remembered: inside a
    trace no tensor has values.
    """
    import torch
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

    sizes: Any = SimpleNamespace(hidden_size=1, num_channels=1, image_size=image_size, patch_size=patch_size)
    side = image_size // patch_size
    with torch.no_grad():
        probe = SmolVLMVisionEmbeddings(sizes)
        for parameter in probe.parameters():
            parameter.zero_()
        probe.position_embedding.weight.copy_(torch.arange(side * side)[:, None])
        image, whole = torch.zeros(1, 1, image_size, image_size), torch.ones(1, side, side, dtype=torch.bool)
        return tuple(int(place) for place in probe(image, whole)[0, :, 0].tolist())


SMOLVLM = Family(
    name="smolvlm",
    model_types=("smolvlm",),
    decoder_types=("llama",),
    vision_types=("smolvlm_vision",),
    decoder="model.text_model",
    decoder_layers="model.text_model.layers",
    vision_layers="model.vision_model.encoder.layers",
    projector="model.connector.modality_projection",
    vision_modules=("model.vision_model", "model.connector"),
    embedding="model.text_model.embed_tokens",
    head="lm_head",
    read_vision=_read_vision,
    vision_forward=_vision_forward,
    image_marks=(("fake_image_token", "global_image_token"), ("fake_image_token",)),
    mark_texts={"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"},
)
