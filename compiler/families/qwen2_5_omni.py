"""Qwen2.5-Omni's thinker: the tower and decoder of Qwen2.5-VL, a Whisper-like tower for sound, time in position ids.

Sound is encoded in chunks of two seconds that do not attend to each other; two positions become one token, 25 a second.
A video may bring its sound along: then the tokens of every two seconds follow each other, those that are seen first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from secateur.compiler.families import qwen_vision
from secateur.compiler.families.family import AudioTower, Tower, VisionFacts
from secateur.compiler.families.qwen2_vl import QWEN2_VL
from secateur.compiler.geometry import Geometry
from secateur.compiler.layout import Layout
from secateur.compiler.media import Axes, Item, MediaLayout, moments_beside
from secateur.runtime.errors import UserError

MEL_FRAMES = 100
"""Mel frames in a second of sound."""
_VISION_MARKS = ("vision_start_token_id", "vision_end_token_id")
SOUND_MARKS = ("audio_start_token_id", "audio_end_token_id")
MARKS = {**dict.fromkeys(("image", "video", "video with sound"), _VISION_MARKS), "audio": SOUND_MARKS}


def _read_audio(config: Any, geometry: Geometry) -> VisionFacts:
    audio = config.audio_config
    where = f"{config.name_or_path}/config.json"
    chunk = 2 * audio.n_window
    if audio.n_window % 2:
        raise UserError(f"n_window is {audio.n_window}", where=where, fix="it is an even number of mel frames")
    frames = geometry.audio_seconds * MEL_FRAMES
    if frames % chunk:
        raise UserError(
            f"{geometry.audio_seconds} s of sound do not fill chunks of {chunk / MEL_FRAMES:g} s",
            where="--audio-seconds", fix=f"give a multiple of {chunk / MEL_FRAMES:g}",
        )  # fmt: skip
    return VisionFacts(
        image_size=(0, 0),
        grid=(1, audio.n_window // 2),
        merge=(1, 2),
        layers=audio.encoder_layers,
        feature_layer=audio.encoder_layers - 1,
        has_cls=False,
        frames=frames // chunk,
        input_name="input_features",
        input_shape=(1, audio.num_mel_bins, frames),
        packed=True,
    )


def _audio_indices(config: Any, facts: VisionFacts, rows: int) -> dict[str, Any]:
    import torch

    chunks, length = facts.frames * rows, config.audio_config.n_window
    return {
        "chunk_lengths": torch.full((chunks,), 2 * length),
        "valid_indices": torch.arange(chunks * length),
        "pool_indices": torch.arange(0, chunks * length, 2),
        "cu_seqlens": tuple(length * chunk for chunk in range(chunks + 1)),
    }


def _audio_forward(model: Any, features: Any, facts: VisionFacts, indices: Mapping[str, Any]) -> tuple[Any, Any]:
    rows, bins, _ = features.shape
    chunks = features.reshape(rows, bins, facts.frames, -1).transpose(1, 2).flatten(0, 1)
    out = model.model.audio_tower(None, feature_lens=None, padded_feature=chunks, max_seqlen=0, **indices)
    tokens = out.last_hidden_state
    return tokens.reshape(rows * facts.frames, facts.tokens_per_image, -1), tokens


def audio_reference(model: Any, features: Any, facts: VisionFacts) -> Any:
    """The tokens of whole mel features ``[B,bins,frames]`` as transformers computes them: ``[B*frames,N,D]``."""
    import torch

    mask = torch.ones(features.shape[0], features.shape[2], dtype=torch.long)
    tokens = model.get_audio_features(features, feature_attention_mask=mask, return_dict=True).last_hidden_state
    return tokens.reshape(-1, facts.tokens_per_image, tokens.shape[-1])


def _read_media(config: Any, geometry: Geometry, seen: VisionFacts, heard: VisionFacts | None) -> MediaLayout:
    interval = config.vision_config.temporal_patch_size / geometry.fps
    ticks = config.position_id_per_seconds
    times = [int(grid * interval * ticks) for grid in range(seen.frames)]
    if heard is None:
        plain = qwen_vision.plain_media(config, geometry, seen, times, whole_span=True)
        return MediaLayout(plain.items, plain.runs, plain.offsets, plain.layout, MARKS)
    items, offsets = qwen_vision.seen_items(config, geometry, seen, times, whole_span=True)
    sounds: list[Axes] = [(i, i, i) for i in range(heard.tokens_per_row)]
    grids = list(qwen_vision.layout_seen(seen).frames)
    if geometry.frames:
        moments = [min(int(i / ticks / interval), seen.frames - 1) for i in range(len(sounds))]
    else:
        moments = moments_beside(grids, len(sounds))
    if not geometry.interleaves:
        count = len(sounds)
        return MediaLayout(
            (*items, Item("audio", count, count, count)), ((0, len(offsets)), (1, count)), (*offsets, *sounds),
            Layout((*grids, *moments), (0,) * len(offsets) + (1,) * count), MARKS,
        )  # fmt: skip
    chunk = int(ticks * config.seconds_per_chunk)
    cuts = [cut_chunks([axes[0] for axes in each], chunk) for each in (offsets, sounds)]
    runs: list[tuple[int, int]] = []
    places: list[Axes] = []
    frames: list[int] = []
    for index in range(max(map(len, cuts))):
        for kind, (each, when) in enumerate(((offsets, grids), (sounds, moments))):
            if index < len(cuts[kind]):
                start, end = cuts[kind][index]
                runs.append((kind, end - start))
                places += each[start:end]
                frames += when[start:end]
    last = places[len(places) - runs[-1][1] :]
    span, reach = (max(max(axes) for axes in each) + 1 for each in (last, places))
    kinds = tuple(kind for kind, count in runs for _ in range(count))
    item = Item("video with sound", len(places), span, reach)
    return MediaLayout(
        (item,), tuple(runs), tuple(places), Layout(tuple(frames), kinds), MARKS, SOUND_MARKS
    )  # fmt: skip


def cut_chunks(times: list[int], chunk: int) -> list[tuple[int, int]]:
    """Where chunks of ``chunk`` ticks begin and end; a new one begins with the first token at or behind its time."""
    starts = [0]
    for index, time in enumerate(times):
        if time >= len(starts) * chunk:
            starts.append(index)
    return list(pairwise([*starts, len(times)]))


def reference_positions(model: Any, ids: Any, source: Any, geometry: Geometry) -> Any:
    """Position ids ``[3,N]`` of a prompt with sound as transformers numbers them."""
    import torch

    facts, vision = source.vision, source.config.vision_config
    merge = int(vision.spatial_merge_size)
    grids = qwen_vision.list_grids(facts, merge)
    given: dict[str, Any] = {"image_grid_thw": torch.tensor(grids)}
    if geometry.frames:
        given = {
            "video_grid_thw": torch.tensor([[len(grids), *grids[0][1:]]]),
            "second_per_grids": torch.tensor([vision.temporal_patch_size / geometry.fps]),
        }
    if source.audio is not None:
        given["audio_seqlens"] = torch.tensor([source.audio.input_shape[2]])
    found = model.model.get_rope_index(
        ids, attention_mask=torch.ones_like(ids), use_audio_in_video=geometry.interleaves, **given
    )[0]
    return found[:, 0].long()


QWEN2_5_OMNI = replace(
    QWEN2_VL,
    name="qwen2_5_omni",
    model_types=("qwen2_5_omni", "qwen2_5_omni_thinker"),
    decoder_types=("qwen2_5_omni_text",),
    vision_types=("qwen2_5_omni_vision_encoder",),
    read_vision=qwen_vision.read_vision,
    tested_transformers=("5.21", "5.24"),
    lacking_before="the decoder apart, as model.language_model",
    auto_class="AutoModelForMultimodalLM",
    inner_config="thinker_config",
    read_media=_read_media,
    reference_positions=reference_positions,
    audio=AudioTower(
        tower=Tower("model.audio_tower.layers", "model.audio_tower.proj", "self_attn"),
        modules=("model.audio_tower",),
        read=_read_audio,
        forward=_audio_forward,
        indices=_audio_indices,
        reference=audio_reference,
    ),
)
