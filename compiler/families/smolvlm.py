"""SmolVLM2 layout: SigLIP-like tower without a CLS token, pixel shuffle, one linear projection, Llama decoder.

Behind the tower every square of ``scale_factor`` by ``scale_factor`` patches becomes one token, and only then comes the
projection: what the decoder sees, and what stages count, are such squares. An image is its global view, resized to the
tower's square. The tiles that transformers adds to it, and videos, are not supported.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby
from types import SimpleNamespace
from typing import Any

from secateur.compiler.families.family import Family, VisionFacts, fixed_size, read_grid
from secateur.compiler.geometry import Geometry
from secateur.runtime.errors import UserError


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
    return VisionFacts(
        frames=fixed_size(config, geometry),
        image_size=(vision.image_size, vision.image_size),
        grid=(side // merge, side // merge),
        merge=merge,
        linear_projector=True,
        layers=vision.num_hidden_layers,
        feature_layer=vision.num_hidden_layers - 1,
        has_cls=False,
        channels=vision.num_channels,
        every_image="transformers adds tiles of high resolution to an image where do_image_splitting is set; this "
        "bundle shows the model the global view only, as transformers itself does without",
    )


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
