"""Qwen3-Omni's thinker: the tower and DeepStack of Qwen3-VL, a tower for sound, a decoder of experts.

Sound is encoded second by second, 13 tokens each, which attend to each other in windows of several seconds. A video
may bring its sound along: then every grid stands before what is heard from its time on. A video's grids have no texts
between them; the first axis of position ids says when they are seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from secateur.compiler.families import qwen3_vl, qwen_vision
from secateur.compiler.families.family import AudioTower, Tower, VisionFacts
from secateur.compiler.families.qwen2_5_omni import MARKS, MEL_FRAMES, SOUND_MARKS, audio_reference, reference_positions
from secateur.compiler.geometry import Geometry
from secateur.compiler.layout import Layout
from secateur.compiler.media import Axes, Item, MediaLayout, moments_beside
from secateur.runtime.errors import UserError

TOKENS = 13
"""Of a second of sound: 100 mel frames, halved three times and rounded up."""


def _read_vision(config: Any, geometry: Geometry) -> VisionFacts:
    for key in {*MARKS["image"], *SOUND_MARKS}:
        if not hasattr(config, key):
            raise UserError(
                f"thinker_config has no {key}", where=f"{config.name_or_path}/config.json",
                fix="take the config.json that belongs to this checkpoint",
            )  # fmt: skip
    return qwen3_vl.read_vision(config, geometry)


def _read_audio(config: Any, geometry: Geometry) -> VisionFacts:
    audio = config.audio_config
    where = f"{config.name_or_path}/config.json"
    if 2 * audio.n_window != MEL_FRAMES:
        raise UserError(
            f"n_window is {audio.n_window}", where=where,
            fix=f"only chunks of {MEL_FRAMES} mel frames become {TOKENS} tokens each: n_window {MEL_FRAMES // 2}",
        )  # fmt: skip
    seconds, most = geometry.audio_seconds, audio.n_window_infer // MEL_FRAMES
    if seconds > most and seconds % most:
        raise UserError(
            f"{seconds} s of sound do not fill the windows of {most} s in which the tower attends",
            where="--audio-seconds", fix=f"give up to {most}, or a multiple of {most}",
        )  # fmt: skip
    windows = max(1, seconds // most)
    return VisionFacts(
        image_size=(0, 0),
        grid=(1, TOKENS * seconds // windows),
        layers=audio.encoder_layers,
        feature_layer=audio.encoder_layers - 1,
        has_cls=False,
        frames=windows,
        input_name="input_features",
        input_shape=(1, audio.num_mel_bins, seconds * MEL_FRAMES),
        packed=True,
    )


def _audio_indices(config: Any, facts: VisionFacts, rows: int) -> dict[str, Any]:
    import torch

    chunks = rows * facts.input_shape[2] // MEL_FRAMES
    return {
        "chunk_lengths": torch.full((chunks,), MEL_FRAMES),
        "valid_indices": torch.arange(chunks * TOKENS),
        "cu_seqlens": tuple(facts.tokens_per_image * window for window in range(rows * facts.frames + 1)),
    }


def _audio_forward(model: Any, features: Any, facts: VisionFacts, indices: Mapping[str, Any]) -> tuple[Any, Any]:
    rows, bins, _ = features.shape
    chunks = features.reshape(rows, bins, -1, MEL_FRAMES).transpose(1, 2).flatten(0, 1)
    out = model.model.audio_tower(None, feature_lens=None, padded_feature=chunks, max_seqlen=0, **indices)
    tokens = out.last_hidden_state
    return tokens.reshape(rows * facts.frames, facts.tokens_per_image, -1), tokens


def _read_media(config: Any, geometry: Geometry, seen: VisionFacts, heard: VisionFacts | None) -> MediaLayout:
    seconds = config.vision_config.temporal_patch_size / geometry.fps
    interval = seconds * config.position_id_per_seconds
    if geometry.frames and interval != int(interval):
        raise UserError(
            f"grids of a video {interval:g} position ids apart", where="--fps",
            fix=f"give a rate of which {config.position_id_per_seconds * config.vision_config.temporal_patch_size} is "
            "a multiple",
        )  # fmt: skip
    times = [grid * int(interval) for grid in range(seen.frames)]
    items, offsets = qwen_vision.seen_items(config, geometry, seen, times, whole_span=True)
    grids = list(qwen_vision.layout_seen(seen).frames)
    if heard is None:
        return MediaLayout(tuple(items), ((0, len(offsets)),), tuple(offsets), qwen_vision.layout_seen(seen), MARKS)
    count = heard.tokens_per_row
    sounds: list[Axes] = [(i, i, i) for i in range(count)]
    if geometry.frames:
        moments = [min(int(i / TOKENS / seconds), seen.frames - 1) for i in range(count)]
    else:
        moments = moments_beside(grids, count)
    if not geometry.interleaves:
        return MediaLayout(
            (*items, Item("audio", count, count, count)), ((0, len(offsets)), (1, count)), (*offsets, *sounds),
            Layout((*grids, *moments), (0,) * len(offsets) + (1,) * count), MARKS, sound_padding="longest",
        )  # fmt: skip
    runs: list[tuple[int, int]] = []
    places: list[Axes] = []
    frames: list[int] = []
    when = (grids, moments)
    for kind, each in merge_by_time(offsets, sounds):
        runs.append((kind, len(each)))
        at = sum(size for other, size in runs if other == kind) - len(each)
        places += each
        frames += when[kind][at : at + len(each)]
    last = places[len(places) - runs[-1][1] :]
    span, reach = (max(max(axes) for axes in each) + 1 for each in (last, places))
    kinds = tuple(kind for kind, size in runs for _ in range(size))
    item = Item("video with sound", len(places), span, reach)
    return MediaLayout(
        (item,), tuple(runs), tuple(places), Layout(tuple(frames), kinds), MARKS, SOUND_MARKS, sound_marks_count=True,
        sound_padding="longest",
    )  # fmt: skip


def merge_by_time(seen: list[Axes], heard: list[Axes]) -> list[tuple[int, list[Axes]]]:
    """Runs of what is seen (0) and heard (1), in order of time; of one time, what is seen comes first."""
    runs: list[tuple[int, list[Axes]]] = []
    marked = [(axes[0], 0, axes) for axes in seen] + [(axes[0], 1, axes) for axes in heard]
    for _, kind, axes in sorted(marked, key=lambda token: token[:2]):
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append(axes)
    return runs


QWEN3_OMNI = replace(
    qwen3_vl.QWEN3_VL,
    name="qwen3_omni",
    model_types=("qwen3_omni_moe", "qwen3_omni_moe_thinker"),
    decoder_types=("qwen3_omni_moe_text",),
    vision_types=("qwen3_omni_moe_vision_encoder",),
    read_vision=_read_vision,
    tested_transformers=("5.21", "5.24"),
    lacking_before="the decoder apart, as model.language_model",
    auto_class="AutoModelForMultimodalLM",
    inner_config="thinker_config",
    read_media=_read_media,
    reference_positions=reference_positions,
    audio=AudioTower(
        tower=Tower("model.audio_tower.layers", "model.audio_tower.proj2", "self_attn"),
        modules=("model.audio_tower",),
        read=_read_audio,
        forward=_audio_forward,
        indices=_audio_indices,
        reference=audio_reference,
    ),
)
