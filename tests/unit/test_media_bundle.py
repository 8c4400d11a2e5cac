"""From the command line to an answer: bundles for videos and sound, asked with files."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime")

from secateur import Session
from secateur.tools.cli import main

from . import tiny_qwen

SIZE, FRAMES, SECONDS, NEW = (56, 84), 4, 2, 3


def call(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """Standard output of the command; standard error where it fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    assert ended.value.code == code, told.err
    return told.err if code else told.out


def write_media(directory: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A video as frames, GIF and .npy, and sound; returns both."""
    random = np.random.default_rng(3)
    film = random.integers(0, 256, (FRAMES, *SIZE, 3), dtype=np.uint8)
    sound = random.integers(-(2**14), 2**14, 16000 * SECONDS)
    (directory / "frames").mkdir()
    for index, frame in enumerate(film):
        Image.fromarray(frame).save(directory / "frames" / f"{index}.png")
    np.save(directory / "film.npy", film)
    with wave.open(str(directory / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(sound.astype("<i2").tobytes())
    return film, (sound / 2**15).astype(np.float32)


def test_a_bundle_for_a_video_with_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_qwen.write_model(tmp_path / "model", kind="qwen2_5_omni", layers=2)
    film, sound = write_media(tmp_path)
    bundle = tmp_path / "bundle"
    made = json.loads(
        call(
            capsys, "compile", source, "-o", bundle, "--image-size", "56x84", "--frames", FRAMES, "--fps", 2,
            "--audio-seconds", SECONDS, "--text-tokens", 80, "--new-tokens", NEW, "--json",
        )
    )  # fmt: skip
    assert made["media"] == "a video of 4 frames, 2 a second, of 56x84 with 2 s of sound"
    assert made["next"].endswith('--video video.gif --audio sound.wav --prompt "What is in the video?"')
    assert made["media"] in " ".join(call(capsys, "inspect", bundle).split())

    with Session(bundle, threads=1) as session:
        answer = session.generate("what?", videos=film, audio=sound, ignore_eos=True)
        again = session.generate(["what?"], videos=[list(film)], audio=[sound], ignore_eos=True)
        inputs, request = session.processor(["what?"], None, [[film]], [[sound]]), session.request()
        logits = session.prefill(
            request, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values,
            input_features=inputs.input_features,
        )  # fmt: skip
    assert answer.tokens == again[0].tokens
    assert answer.tokens[0] == logits[0].argmax()
    for video in ("frames", "film.npy"):
        told = call(
            capsys,
            "run",
            bundle,
            "--video",
            tmp_path / video,
            "--audio",
            tmp_path / "sound.wav",
            "-p",
            "what?",
            "--json",
        )
        tokens = json.loads(told)[0]["tokens"]
        assert tokens == answer.tokens[: len(tokens)]

    told = call(capsys, "run", bundle, "--video", tmp_path / "film.npy", "-p", "what?", code=2)
    assert "the sound of the video is missing" in told
    two = ("--video", tmp_path / "frames") * 2
    assert "2 files for 1 prompt" in call(capsys, "run", bundle, *two, "-p", "what?", code=2)


def test_sizes_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_qwen.write_config(tmp_path / "model")
    for wrong in ("448", "448x", "axb", "-28x28"):
        told = call(capsys, "explain", "none", source, f"--image-size={wrong}", code=2)
        assert "is not height x width; write 448x448, in pixels" in told
    assert "give multiples of 28, such as 448x448" in call(
        capsys, "explain", "none", source, "--image-size", "440x448", code=2
    )
    assert "does not hear; leave --audio-seconds out" in call(
        capsys, "explain", "none", source, "--audio-seconds", 2, code=2
    )
