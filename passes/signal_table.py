"""The signals a method may ask for by parameter name: where each exists, and its options. Data only.

The passes that compute them (taps) read the options from here as well, so that a recipe and a tap cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from secateur.compiler.recipe import SITE_KINDS


@dataclass(frozen=True)
class Signal:
    """``shape`` per group of N prunable tokens; ``sites`` are site kinds; ``options`` maps an option to its choices,
    of which the first is the default. ``reads_layer_before`` lists the sites (or, when the signal has options, the
    choices) at which the layer before the site is read, so that layer 0 will not do.
    """

    name: str
    shape: str
    doc: str
    sites: tuple[str, ...]
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reads_layer_before: tuple[str, ...] = ()


_TOWER_SITES = ("vision.layer", "vision.out", "projector.out")
_TOWER_LAYER = "of the tower layer before the site; after the tower, of the layer whose output the projector reads"

SIGNALS: dict[str, Signal] = {
    signal.name: signal
    for signal in (
        Signal("tokens", "[G,N,D]", "hidden rows at the site", SITE_KINDS),
        Signal(
            "cls_attention",
            "[G,H,N]",
            f"attention of the CLS token to the patches, softmax over CLS and patches, {_TOWER_LAYER}",
            _TOWER_SITES,
            reads_layer_before=("vision.layer",),
        ),
        Signal(
            "keys",
            "[G,H,N,d]",
            f"attention keys {_TOWER_LAYER}",
            _TOWER_SITES,
            reads_layer_before=("vision.layer",),
        ),
        Signal(
            "last_query_attention",
            "[G,H,N]",
            "attention of the last real prompt token to the prunable tokens, softmax over the whole real prompt; "
            "projections: 'previous' as the layer before the site computed it, 'next' by the layer about to run on "
            "its own input, 'own' by the layer before the site applied again to that layer's output",
            ("decoder.layer",),
            options={"projections": ("previous", "next", "own")},
            reads_layer_before=("previous", "own"),
        ),
    )
}
