"""What transformers takes of a checkpoint's tokenizer and processor files: this is what a bundle carries.

Checkpoints of several ages say the same thing in several files. A bundle has one file of each kind, made of what
transformers takes, so that its runtime has nothing left to choose; where two files differ, a note says so.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from secateur.compiler.file_differences import compare_settings, compare_templates
from secateur.compiler.generation_files import GENERATION, read_generation
from secateur.compiler.tokenizer_files import TOKENIZER, TakenTokenizer, take_tokenizer
from secateur.runtime import audio, images, patches
from secateur.runtime.errors import BundleError, SecateurError, UserError
from secateur.runtime.leftovers import held_directory
from secateur.runtime.manifest import Manifest
from secateur.runtime.processing import Processor
from secateur.runtime.processor_files import (
    NESTED,
    PARTS,
    TEMPLATE,
    TEMPLATE_FOLDER,
    TOKENIZER_CONFIG,
    Settings,
    list_settings,
    list_templates,
    read_json,
)

VIDEO_TYPES: Mapping[str, str] = {
    "llava_onevision": "LlavaOnevisionVideoProcessor",
    "qwen2_vl": "Qwen2VLVideoProcessor",
    "qwen2_5_vl": "Qwen2VLVideoProcessor",
    "qwen2_5_omni": "Qwen2VLVideoProcessor",
    "qwen3_omni_moe": "Qwen2VLVideoProcessor",
    "qwen3_vl": "Qwen3VLVideoProcessor",
    "qwen3_vl_moe": "Qwen3VLVideoProcessor",
}
"""``model_type`` -> its processor of videos. transformers has the same table, and empties it without torchvision."""


@dataclass(frozen=True)
class ProcessorFiles:
    """``texts`` are a bundle's files by name; ``origins`` say where the checkpoint has what each kind of media (image,
    video, audio) is processed by, and the chat template; ``notes`` name files that differ, and which of them counts."""

    tokenizer: TakenTokenizer
    texts: Mapping[str, str]
    origins: Mapping[str, str]
    notes: tuple[str, ...]

    def write(self, directory: Path) -> None:
        for name, text in self.texts.items():
            (directory / name).write_text(text, encoding="utf-8")


def take_processor_files(directory: Path) -> ProcessorFiles:
    """The files of a model directory, as transformers reads them. Raises UserError for those it could not load."""
    files = sorted(path for path in (*directory.iterdir(), *(directory / TEMPLATE_FOLDER).glob("*")) if path.is_file())
    seen = tuple((path.name, (stat := path.stat()).st_mtime_ns, stat.st_size) for path in files)
    return _take(directory, seen)


@lru_cache(maxsize=4)
def _take(directory: Path, seen: tuple[tuple[str, int, int], ...]) -> ProcessorFiles:
    """``seen`` are the files as they are now: another size or time of one of them is another checkpoint."""
    del seen
    tokenizer = take_tokenizer(directory)
    notes = list(tokenizer.notes)
    try:
        templates = list_templates(directory)
        settings = {kind: list_settings(directory, kind) for kind in PARTS}
    except BundleError as error:
        raise UserError(str(error)) from None
    texts = {TOKENIZER: tokenizer.text, TOKENIZER_CONFIG: _write(tokenizer.words)}
    notes += compare_templates(templates)
    if templates and templates[0].text is not None:
        texts[TEMPLATE] = templates[0].text
    model_type = _read_model_type(directory)
    nested = {}
    for kind, found in settings.items():
        if not found:
            continue
        values, told = _name_type(kind, found[0], model_type)
        if values is not None:
            nested[PARTS[kind][0]] = values
            notes += [*told, *compare_settings(kind, found)]
    texts[NESTED] = _write(nested)
    defaults, differing = read_generation(directory)
    notes += differing
    if defaults is not None:
        texts[GENERATION] = defaults
    origins = {kind: found[0].where for kind, found in settings.items() if found}
    origins |= {TEMPLATE: templates[0].file} if templates else {}
    return ProcessorFiles(tokenizer, texts, origins, tuple(notes))


def open_processor(directory: Path, manifest: Manifest) -> Processor:
    """The processor that a bundle of the model in ``directory`` has. Raises UserError, which names the model's files,
    for what no bundle could be opened with."""
    taken = take_processor_files(directory)
    with held_directory(Path(tempfile.gettempdir()), "secateur-files-") as work:
        taken.write(Path(work))
        try:
            return Processor(Path(work), manifest)
        except (UserError, BundleError) as error:
            raise _blame_source(directory, taken, error) from None


def _blame_source(directory: Path, taken: ProcessorFiles, error: SecateurError) -> SecateurError:
    """The runtime's complaint about one of the files it was given, under the name it has in the model directory."""
    for name in taken.texts:
        _, found, rest = str(error).partition(name)
        if not found:
            continue
        place, _, reason = rest.partition(": ")
        kind = next((kind for kind, parts in PARTS.items() if place.removeprefix(", ") in parts), name)
        return UserError(
            reason.removesuffix("; compile the bundle again"), where=str(directory / taken.origins.get(kind, name)),
            fix="take the processor files that belong to this checkpoint",
        )  # fmt: skip
    return error


def _name_type(kind: str, taken: Settings, model_type: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The settings with the type of processor that transformers makes of them, and what is to be said of that; None
    where they are not of this kind."""
    values = {key: value for key, value in taken.values.items() if key != "auto_map"}
    key, usual = f"{PARTS[kind][0]}_type", _usual_types(kind)
    said = values.get(key)
    if said is None and kind == "image" and (older := values.get("feature_extractor_type")):
        said = str(older).replace("FeatureExtractor", "ImageProcessor")
    if said is None and kind == "video" and (image := values.get("image_processor_type")):
        # With "Fast" in its name it names no processor of videos: the model type decides.
        inferred = str(image).replace("ImageProcessor", "VideoProcessor")
        said = inferred if inferred in {**images.DEFAULTS, **patches.DEFAULTS} else None
    if kind == "audio" and taken.file != NESTED and not (model_type in usual or said in audio.DEFAULTS):
        return None, []  # An older file of images alone, which its type may call those of a feature extractor.
    own = usual.get(model_type)
    if said is None:
        return ({**values, key: own} if own else values if kind == "image" else None), []
    if own is not None and _strip(str(said)) not in {_strip(name) for name in usual.values()}:
        note = f"{taken.where}: {key} {said!r} is none of transformers'; {own} is taken, that of {model_type} models"
        return {**values, key: own}, [note]
    return {**values, key: said}, []


def _usual_types(kind: str) -> dict[str, str]:
    """``model_type`` -> the processor that transformers makes where a checkpoint names none it knows."""
    # Taken from where they are defined: before 5.20 the package hides the second module where torchvision is missing.
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    if kind == "audio":
        return dict(FEATURE_EXTRACTOR_MAPPING_NAMES)
    if kind == "video":
        return dict(VIDEO_TYPES)
    listed = IMAGE_PROCESSOR_MAPPING_NAMES.items()
    return {of: _strip(name) for of, names in listed if (name := next(filter(None, names.values()), None))}


def _strip(name: str) -> str:
    return name.removesuffix("Fast").removesuffix("Pil")


def _read_model_type(directory: Path) -> str:
    return str(read_json(directory / "config.json").get("model_type"))


def _write(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
