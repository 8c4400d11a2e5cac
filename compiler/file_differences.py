"""Where two files of a checkpoint say different things of the same setting, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.runtime import audio, images, patches
from secateur.runtime.processor_files import Settings, Template

_ASIDE = frozenset({
    "auto_map", "processor_class", "use_fast", "_valid_processor_keys", "return_tensors", "data_format",
    "input_data_format", "device", "disable_grouping", "return_metadata",
})  # fmt: skip
"""Keys that change nothing in what a model sees or hears."""
_MOST_SHOWN = 4
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {**images.DEFAULTS, **patches.DEFAULTS, **audio.DEFAULTS}


def tell_difference(taken: str, other: str, keys: Sequence[str]) -> str:
    """One line for a user: which files differ in which keys, and which of them counts."""
    shown = ", ".join(keys[:_MOST_SHOWN]) + (f" and {len(keys) - _MOST_SHOWN} more" if len(keys) > _MOST_SHOWN else "")
    return f"{taken} and {other} differ in {shown}: {taken} is taken, as transformers does"


def compare_settings(kind: str, found: Sequence[Settings]) -> list[str]:
    """What the settings of a kind of media that are not taken, all but the first, say otherwise."""
    notes = []
    for other in found[1:]:
        if kind == "audio" and "feature_extractor_type" not in other.values:
            continue  # An older file of images alone says nothing of sound.
        ours, theirs = (_spell_out(each.values, kind) for each in (found[0], other))
        if keys := sorted(key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]):
            notes.append(tell_difference(found[0].where, other.where, keys))
    return notes


def compare_templates(found: Sequence[Template]) -> list[str]:
    """What is to be said of the chat templates of a checkpoint, of which the first counts."""
    if not found:
        return []
    if found[0].text is None:
        return [f"{found[0].file}: no chat template is the default one; the bundle takes plain prompts only"]
    return [
        tell_difference(found[0].file, other.file, ["the chat template"])
        for other in found[1:]
        if other.text is not None and other.text.strip() != found[0].text.strip()
    ]


def _spell_out(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Settings in one spelling, with what the type of processor takes where they say nothing."""
    said = {key: value for key, value in values.items() if value is not None and key not in _ASIDE}
    name = next((str(said[key]) for key in _TYPE_KEYS[kind] if key in said), "")
    name = name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor") \
        if kind != "audio" else name  # fmt: skip
    if kind == "video":
        name = name.replace("ImageProcessor", "VideoProcessor")
    found = {**_DEFAULTS.get(name, {}), **{key: value for key, value in said.items() if not key.endswith("_type")}}
    if name:
        found["type of processor"] = name
    size = found.get("size")
    size = {"shortest_edge": size} if isinstance(size, int) else dict(size) if isinstance(size, Mapping) else {}
    for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        size |= {edge: found.pop(key)} if key in found else {}
    found |= {"size": {key: value for key, value in size.items() if value is not None}} if size else {}
    if isinstance(crop := found.get("crop_size"), int):
        found["crop_size"] = {"height": crop, "width": crop}
    if isinstance(crop := found.get("crop_size"), Mapping):
        found["crop_size"] = {key: value for key, value in crop.items() if value is not None}
    return found


_TYPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "image": ("image_processor_type", "feature_extractor_type"),
    "video": ("video_processor_type", "image_processor_type"),
    "audio": ("feature_extractor_type",),
}
