"""Which fused layers TensorRT made of each layer of the model: equal to what the model has there, pruned or not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from secateur.compiler.trace import Source
from secateur.exporters.tensorrt import ParsedLayer

NAMES = {
    "ATTENTION_INPUT": "attention",
    "ROTARY_EMBEDDING": "rotary",
    "RMS_NORMALIZATION": "RMS norm",
    "NORMALIZATION": "layer norm",
    "KV_CACHE_UPDATE": "cache update",
}
"""TensorRT's layer types, and what they are called here."""
Counts = Mapping[str, Mapping[str, int]]
"""A layer of the model, such as ``model.language_model.layers.3``, or a module outside all layers -> name -> number."""

_LAYER = re.compile(r"(?P<stack>.+?\.(?:layers?|blocks))\.\d+(?=[./])")


def count_fused(layers: Iterable[ParsedLayer]) -> Counts:
    """Fused layers of a parsed network by the place in the model of the ONNX node they stem from.

    A copy of a layer's nodes that a stage's score reads has a place of its own, which starts with ``score/``.
    """
    found: dict[str, Counter[str]] = {}
    for layer in layers:
        if layer.type in NAMES:
            name = layer.node or layer.name
            match = _LAYER.match(name)
            place = match[0] if match else name.rpartition("/")[0]
            found.setdefault(place, Counter())[NAMES[layer.type]] += 1
    return {place: dict(counts) for place, counts in found.items()}


def expect_fused(source: Source, model: Any) -> dict[str, Counts]:
    """Program -> what its layers have to become, read off the modules of the Hugging Face ``model``.

    Norms by their classes; in the decoder one attention, a rotation of queries and one of keys, and an update of two
    caches a layer. A tower has as many layers as the projector reads, and rotates if one of its modules makes angles.
    How many attention nodes a tower's layer is depends on its windows: nothing is said of them here.
    """
    norms: dict[str, Counter[str]] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind.endswith("Norm") and (match := _LAYER.match(name)):
            norms.setdefault(match[0], Counter())["RMS norm" if kind.endswith("RMSNorm") else "layer norm"] += 1

    def layers(stack: str, depth: int, more: Mapping[str, int]) -> dict[str, Mapping[str, int]]:
        return {place: {**norms[place], **more} for place in (f"{stack}.{index}" for index in range(depth))}

    family = source.family
    towers = [(family.vision_layers, source.vision.feature_layer + 1)]
    if source.audio is not None and family.audio is not None:
        towers.append((family.audio.tower.layers, source.audio.feature_layer + 1))
    encoder: dict[str, Mapping[str, int]] = {}
    for stack, depth in towers:
        encoder |= layers(stack, depth, {"rotary": 2} if _rotates(model, stack) else {})
    has = {"attention": 1, "rotary": 2, "cache update": 2}
    decoder = layers(family.decoder_layers, source.decoder_layers, has)
    return {"vision": encoder, "prefill": decoder, "decode": decoder}


def _rotates(model: Any, stack: str) -> bool:
    tower = model.get_submodule(stack.rpartition(".")[0])
    return any("Rotary" in type(module).__name__ for module in tower.modules())


def differences(found: Counts, expected: Counts, unpruned: Counts) -> Iterator[str]:
    """A line for every place of a program whose fused layers are not those of the model (``expected``), or not those
    of the same program without a recipe (``unpruned``)."""
    for place, counts in expected.items():
        has = found.get(place, {})
        if not has.get("attention"):
            yield f"{place} has no fused attention"
        elif wrong := [name for name, number in counts.items() if has.get(name, 0) != number]:
            yield f"{place} has {_say(has)}, and the model has {_say({n: counts[n] for n in wrong})}"
    for place, counts in unpruned.items():
        if (has := found.get(place, {})) != counts:
            yield f"{place} has {_say(has)}, and without a recipe {_say(counts)}"


def _say(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items()) or "nothing fused"


def summarize(found: Counts) -> dict[str, dict[str, Any]]:
    """Stack of layers -> how many ``layers`` it has, and per name the least and the most of a layer."""
    stacks: dict[str, list[Mapping[str, int]]] = {}
    for place, counts in found.items():
        if match := _LAYER.match(f"{place}."):
            stacks.setdefault(match["stack"], []).append(counts)
    return {
        stack: {"layers": len(layers)} | {
            name: [min(each), max(each)]
            for name in NAMES.values() if any(each := [counts.get(name, 0) for counts in layers])
        }
        for stack, layers in stacks.items()
    }  # fmt: skip
