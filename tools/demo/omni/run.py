"""Questions put to compiled bundles of the omni demo model, program by program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.runtime.request import Request
from secateur.runtime.schema import Manifest
from secateur.tools.demo.ask import Asked as Answered
from secateur.tools.demo.ask import Bundle
from secateur.tools.demo.omni.inputs import CHUNK_AUDIO, CHUNK_VIDEO, cut_patches, hear_mels, write_prompt
from secateur.tools.demo.omni.language import KINDS, build_tokenizer
from secateur.tools.demo.omni.questions import Asked

Ints = NDArray[np.int64]


def ask_bundle(bundle: Bundle, questions: Sequence[Asked], advance: Callable[[], None]) -> None:
    """Greedy answers to all questions; an answer is right only if it also stops."""
    request = bundle.session.request()
    for asked in questions:
        ids = answer(request, asked)
        ends = bundle.session.manifest.model.eos_token_ids
        text = build_tokenizer().decode([token for token in ids if token not in ends]).strip()
        # A stage that leaves nothing chooses nothing.
        kept = [places[0] for places in request.kept.values() if places.shape[1]]
        bundle.asked.append(Answered(text, text == asked.answer and ids[-1] in ends, kept))
        advance()


def answer(request: Request, asked: Asked) -> list[int]:
    """Ids of a greedy answer, the stop token included where one came before the caches were full."""
    manifest = request.manifest
    patches = cut_patches(asked.frames)
    shape = next(port.shape for port in manifest.programs["vision"].inputs if port.name == "pixel_values")
    request.encode(patches.reshape(shape), hear_mels(asked.wave)[None])
    logits = request.prefill(*encode_prompt(asked.text, manifest))
    ids: list[int] = []
    while True:
        ids.append(int(logits[0].argmax()))
        if ids[-1] in manifest.model.eos_token_ids or len(ids) == manifest.geometry.new_tokens:
            return ids
        logits = request.decode(np.array(ids[-1:], np.int64))


def encode_prompt(text: str, manifest: Manifest) -> tuple[Ints, Ints]:
    """``input_ids`` int64 [1, N], padded on the right, and how many are real [1]. The bundle has one placeholder for
    tokens of both kinds."""
    tokenizer = build_tokenizer()
    ids = np.array(tokenizer.encode(write_prompt(text)), np.int64)
    ids[np.isin(ids, tokenizer.convert_tokens_to_ids(["<|VIDEO|>", "<|AUDIO|>"]))] = manifest.model.image_token_id
    row = np.full((1, manifest.geometry.sequence), manifest.model.pad_token_id, np.int64)
    row[0, : len(ids)] = ids
    return row, np.array([len(ids)], np.int64)


def split_places(places: Ints) -> tuple[Ints, Ints]:
    """Which video tokens and which audio tokens some places of a clip are, each counted from 0 in order of time."""
    chunk, within = np.divmod(places, CHUNK_VIDEO + CHUNK_AUDIO)
    seen = within < CHUNK_VIDEO
    video = chunk[seen] * CHUNK_VIDEO + within[seen]
    return video, chunk[~seen] * CHUNK_AUDIO + within[~seen] - CHUNK_VIDEO


def measure_kinds(answered: Sequence[Answered], questions: Sequence[Asked]) -> dict[str, float]:
    """Share of right answers per kind of question, and of all under 'all'."""
    right = {
        kind: [told.right for told, asked in zip(answered, questions, strict=True) if asked.kind == kind]
        for kind in KINDS
    }
    shares = {kind: float(np.mean(values)) for kind, values in right.items() if values}
    return shares | {"all": float(np.mean([told.right for told in answered]))}


def report(bundles: Sequence[Bundle], questions: Sequence[Asked], samples: int) -> dict[str, Any]:
    """Everything as plain data; the first ``samples`` questions are the shipped ones, the others are held out."""
    return {
        "samples": [
            {"clip": asked.name, "question": asked.text, "expected": asked.answer,
             "answers": {b.label: {"text": b.asked[i].text, "right": b.asked[i].right} for b in bundles}}
            for i, asked in enumerate(questions[:samples])
        ],
        "bundles": [
            {
                "label": b.label,
                "bundle": str(b.session.path),
                "recipe": b.session.manifest.recipe.name,
                "keep": b.session.manifest.recipe.keep,
                "accuracy": measure_kinds(b.asked[samples:], questions[samples:]),
                "tokens": [{"layers": layers, "tokens": tokens} for layers, tokens in b.visual_tokens],
                "flops": b.flops,
                "unpruned_flops": b.unpruned_flops,
                "cache_bytes": b.cache_bytes,
            }
            for b in bundles
        ],
    }  # fmt: skip
