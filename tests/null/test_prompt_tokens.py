"""Prompts as checkpoints' own processors write them: whose placeholders, and how many tokens are counted."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from secateur.runtime.prompt_tokens import count_unpruned, spell_prompt
from secateur.runtime.session import Session

from .conftest import draw_image

IMAGE, VIDEO, AUDIO = 3, 4, 5


def manifest(kinds: list[tuple[str, int]] | None, frames: int = 0, **model: Any) -> Any:
    told = {
        "image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": AUDIO, "image_before": [],
        "image_behind": [], "prompt_token_id": None,
    } | model  # fmt: skip
    media = None if kinds is None else SimpleNamespace(items=[SimpleNamespace(kind=k, tokens=n) for k, n in kinds])
    return SimpleNamespace(model=SimpleNamespace(**told), media=media, geometry=SimpleNamespace(frames=frames))


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        (manifest([("image", 2), ("audio", 2)]), [9, IMAGE, IMAGE, 8, AUDIO, AUDIO, 7]),
        (manifest([("video", 2), ("video", 2)]), [9, VIDEO, VIDEO, 8, VIDEO, VIDEO, 7]),
        (manifest([("video with sound", 4)]), [9, AUDIO, VIDEO, 8, VIDEO, VIDEO, 7]),
        (manifest([("video", 2), ("audio", 2)], audio_token_id=None), [9, VIDEO, VIDEO, 8, IMAGE, IMAGE, 7]),
        (manifest(None), [9, IMAGE, IMAGE, 8, IMAGE, IMAGE, 7]),
        (manifest(None, frames=2), [9, VIDEO, VIDEO, 8, VIDEO, VIDEO, 7]),
        (manifest(None, frames=2, video_token_id=None), [9, IMAGE, IMAGE, 8, IMAGE, IMAGE, 7]),
        (manifest(None, frames=2, image_before=[8]), [9, IMAGE, IMAGE, 8, IMAGE, IMAGE, 7]),
    ],
)
def test_placeholders_are_the_checkpoints(told: Any, wanted: list[int]) -> None:
    assert spell_prompt(told, [9, IMAGE, IMAGE, 8, IMAGE, IMAGE, 7]) == wanted


def test_a_pruned_prompt_is_as_long_as_before(session: Session) -> None:
    """Four patches an image, of which three enter the decoder."""
    inputs = session.processor(["<image>what"], [[draw_image(0)]])
    assert count_unpruned(session.manifest, inputs.lengths) == len(inputs.prompt_ids(0)) + 1


def test_lengths_count_the_unpruned_prompt_and_the_longest_of_a_batch(tiny: ModuleType, tmp_path: Path) -> None:
    pictures = [[draw_image(seed)] for seed in range(2)]
    with Session(tiny.build(tmp_path / "b", tiny.Tiny(batch=2)), threads=1) as session:
        inputs = session.processor(["<image>what", "<image>why not"], pictures)
        longest = int(inputs.lengths.max()) + 1
        for length, new in ((longest + 1, 1), (longest + 5, 5), (longest + 100, 8)):
            answers = session.generate(
                ["<image>what", "<image>why not"], pictures, ignore_eos=True, generation={"max_length": length}
            )
            assert [len(answer.tokens) for answer in answers] == [new, new]


@pytest.fixture(scope="module")
def session(built: Path) -> Any:
    with Session(built, threads=1) as session:
        assert np.prod(session.manifest.geometry.places) == 4
        yield session
