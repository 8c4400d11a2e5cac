"""The signals a method may ask for by parameter name: where each exists, and its options. Data only.

The passes that compute them (taps) read the options from here as well, so that a recipe and a tap cannot disagree.
G counts groups (images, windows of images, or rows of the batch, as the stage's scope says), N a group's prunable
tokens, H heads, d a head's width, D the stream's width, A layers, T the slots of text in a row (padding included),
L all slots of a row. Every float signal arrives in float32.

Where a model puts several patches together behind its tower, a visual token is such a square of patches. The tower's
signals are then per square as well: attention to it is the sum over its patches, so that a query still pays one in
all; attention of it, queries, keys and values are the mean over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from secateur.compiler.site import SITE_KINDS


@dataclass(frozen=True)
class TowerLayers:
    """An option that names layers of the vision tower: "read" (the one whose output the projector reads), "next" (the
    one after it), "3/24" (layer 3 of a published depth of 24, scaled as sites are) or "3". ``several`` takes a
    list; layers that scale to the same one count once."""

    several: bool = False


@dataclass(frozen=True)
class Number:
    """An option that takes a number: an integer where ``default`` is one; ``low`` is the least allowed."""

    default: float
    low: float = 0


Option = tuple[str, ...] | TowerLayers | Number
"""Choices, of which the first is the default, or one of the above."""


@dataclass(frozen=True)
class Signal:
    """``shape`` is what a method receives; ``sites`` are site kinds; ``options`` maps an option to what it takes.
    ``reads_layer_before`` lists the sites (or, when the signal has options, the choices) at which the layer before
    the site is read, so that layer 0 will not do."""

    name: str
    shape: str
    doc: str
    sites: tuple[str, ...]
    options: Mapping[str, Option] = field(default_factory=dict)
    reads_layer_before: tuple[str, ...] = ()


_TOWER_SITES = ("vision.layer", "vision.out", "projector.out")
_PROJECTOR_SITES = ("projector.out",)
_DECODER_SITES = ("decoder.layer",)
_BEFORE = ("vision.layer",)
_PROJECTIONS = {"projections": ("previous", "next", "own")}
_LAYER = {"layer": TowerLayers()}
_LAYERS = {"layers": TowerLayers(several=True)}
_FROM = (
    "projections: 'previous' as the layer before the site computed it, 'next' by the layer about to run on its own "
    "input, 'own' by the layer before the site applied again to that layer's output"
)
_IN_TOWER = (
    "of the tower layer before the site; after the tower, of the layer the option names, by default the one whose "
    "output the projector reads"
)

SIGNALS: dict[str, Signal] = {
    signal.name: signal
    for signal in (
        # What a token is.
        Signal("tokens", "[G,N,D]", "hidden rows at the site", SITE_KINDS),
        Signal(
            "normed_tokens",
            "[G,N,D]",
            "hidden rows at the site, through the decoder's final norm",
            _DECODER_SITES,
        ),
        Signal(
            "size",
            "[G,N]",
            "how many of the tokens that entered the program each row stands for: 1, more after a merge",
            SITE_KINDS,
        ),
        Signal(
            "carried",
            "[G,N]",
            "what the last stage with a score carries on for the tokens it kept: its score, or what the score "
            "function returned as carry; a parameter with default None takes None where no stage came before",
            SITE_KINDS,
        ),
        Signal(
            "source",
            "[G,N]",
            "int64, ascending: each token's index among the prunable tokens that entered the program, per group",
            SITE_KINDS,
        ),
        # Attention of the vision tower.
        Signal(
            "cls_attention",
            "[G,H,N]",
            f"attention of the CLS token to the patches, softmax over CLS and patches, {_IN_TOWER}; heads 'joint' "
            "(H = 1) takes all heads' widths as one head of scale D ** -0.5",
            _TOWER_SITES,
            {**_LAYER, "heads": ("split", "joint")},
            _BEFORE,
        ),
        Signal(
            "cls_attention_layers",
            "[G,A,H,N]",
            "cls_attention of several tower layers, lowest first",
            ("vision.out", "projector.out"),
            _LAYERS,
        ),
        Signal(
            "received_attention",
            "[G,H,N]",
            f"attention each token receives, mean over all queries; in the tower (queries: CLS and patches) {_IN_TOWER}"
            f"; in the decoder queries are the real tokens of the prompt, {_FROM}",
            SITE_KINDS,
            {**_LAYER, **_PROJECTIONS},
            (*_BEFORE, "previous", "own"),
        ),
        Signal(
            "received_attention_layers",
            "[G,A,H,N]",
            "received_attention of several tower layers, lowest first",
            ("vision.out", "projector.out"),
            _LAYERS,
        ),
        Signal(
            "self_attention",
            "[G,H,N,N]",
            "attention of prunable tokens (dim 2) to prunable tokens of their group (dim 3), softmax over everything "
            f"a query sees, in the decoder causally; in the tower {_IN_TOWER}; in the decoder {_FROM}",
            SITE_KINDS,
            {**_LAYER, **_PROJECTIONS},
            (*_BEFORE, "previous", "own"),
        ),
        Signal(
            "queries",
            "[G,H,N,d]",
            f"attention queries; in the tower {_IN_TOWER}; in the decoder {_FROM}; rotary 'none' is before rotation",
            SITE_KINDS,
            {**_LAYER, **_PROJECTIONS, "rotary": ("applied", "none")},
            (*_BEFORE, "previous", "own"),
        ),
        Signal(
            "keys",
            "[G,H,N,d]",
            f"attention keys (in the decoder H counts key heads); in the tower {_IN_TOWER}; in the decoder {_FROM}; "
            "rotary 'none' is before rotation",
            SITE_KINDS,
            {**_LAYER, **_PROJECTIONS, "rotary": ("applied", "none")},
            (*_BEFORE, "previous", "own"),
        ),
        Signal(
            "values",
            "[G,H,N,d]",
            f"attention values; in the tower {_IN_TOWER}; in the decoder {_FROM}",
            SITE_KINDS,
            {**_LAYER, **_PROJECTIONS},
            (*_BEFORE, "previous", "own"),
        ),
        Signal("cls_values", "[G,H,d]", f"the CLS token's attention values {_IN_TOWER}", _TOWER_SITES, _LAYER, _BEFORE),
        # The projector.
        Signal(
            "projector_inputs",
            "[G,N,Dv]",
            "the rows the projector reads",
            _PROJECTOR_SITES,
        ),
        Signal(
            "probe_slopes",
            "[G,m,N,D]",
            "finite differences (P(x + step*u) - P(x - step*u)) / (2*step) of the projector P at each token x along "
            "m unit directions u, the same for every token, drawn from a normal distribution by ``seed``",
            _PROJECTOR_SITES,
            {"directions": Number(64, 1), "step": Number(0.01, 1e-6), "seed": Number(0)},
        ),
        # Attention inside the decoder.
        Signal(
            "last_query_attention",
            "[G,H,N]",
            f"attention of the last real prompt token to the prunable tokens, softmax over the whole real prompt; "
            f"{_FROM}",
            _DECODER_SITES,
            _PROJECTIONS,
            ("previous", "own"),
        ),
        Signal(
            "text_attention",
            "[G,H,T,N]",
            "attention of the text slots (see text_rows for those that count) to the prunable tokens, causal softmax "
            f"over everything a query sees; softmax 'none' is the scaled product before it; {_FROM}",
            _DECODER_SITES,
            {**_PROJECTIONS, "softmax": ("full", "none")},
            ("previous", "own"),
        ),
        Signal(
            "text_to_text_attention",
            "[G,H,T,T]",
            f"attention of the text slots to the text slots, as text_attention; {_FROM}",
            _DECODER_SITES,
            _PROJECTIONS,
            ("previous", "own"),
        ),
        Signal(
            "text_rows",
            "[G,T]",
            "bool: which text slots count: 'question' those behind the row's last prunable token, 'all' every one; "
            "padding never does",
            _DECODER_SITES,
            {"which": ("question", "all")},
        ),
        Signal("text_tokens", "[G,T,D]", "hidden rows of the text slots at the site", _DECODER_SITES),
        Signal(
            "normed_text", "[G,T,D]", "hidden rows of the text slots, through the decoder's final norm", _DECODER_SITES
        ),
        Signal(
            "text_keys",
            "[G,H,T,d]",
            f"attention keys of the text slots; {_FROM}; rotary 'none' is before rotation",
            _DECODER_SITES,
            {**_PROJECTIONS, "rotary": ("applied", "none")},
            ("previous", "own"),
        ),
        Signal(
            "attention_logits",
            "[G,H,L,L]",
            f"scaled products of all queries (dim 2) and keys, -inf where causality or padding hides a key; {_FROM}",
            _DECODER_SITES,
            _PROJECTIONS,
            ("previous", "own"),
        ),
        Signal("slots", "[G,N]", "int64: where each prunable token stands in the row's L slots", _DECODER_SITES),
        Signal("real_slots", "[G,L]", "bool: the slots of the row that are not padding", _DECODER_SITES),
        Signal(
            "branch_inputs",
            "[G,2,L,D]",
            "of the layer before the site, for every slot: what its attention (0) and its MLP (1) read, after the norm",
            _DECODER_SITES,
            reads_layer_before=("decoder.layer",),
        ),
        Signal(
            "branch_outputs",
            "[G,2,L,D]",
            "of the layer before the site, for every slot: what its attention (0) and its MLP (1) add to the stream",
            _DECODER_SITES,
            reads_layer_before=("decoder.layer",),
        ),
    )
}
