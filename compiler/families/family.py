"""What the compiler must know of a model family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class VisionFacts:
    """Static facts of the image side, read off a configuration."""

    image_size: tuple[int, int]
    """Height, width in pixels."""
    tokens_per_image: int
    """Placeholders one image stands for before pruning."""
    layers: int
    feature_layer: int
    """0-based tower layer whose output the projector reads."""
    has_cls: bool
    channels: int = 3


@dataclass(frozen=True)
class Family:
    """Facts of one family. Paths are module paths inside the Hugging Face model."""

    name: str
    model_types: tuple[str, ...]
    decoder_types: tuple[str, ...]
    """``text_config.model_type`` values whose layouts were checked."""
    vision_types: tuple[str, ...]
    decoder: str
    decoder_layers: str
    vision_layers: str
    projector: str
    vision_modules: tuple[str, ...]
    """Modules that own every parameter ``vision_forward`` uses."""
    embedding: str
    head: str
    read_vision: Callable[[Any], VisionFacts]
    """configuration -> facts; raises UserError for a layout that is not supported."""
    vision_forward: Callable[[Any, Any], tuple[Any, Any]]
    """(model, pixel_values [M,3,H,W]) -> (features [M,N,D], last tower state): every tower layer must be
    reachable from the two, so that signals may be read from layers the features do not need."""
