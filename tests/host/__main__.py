"""A host of its own: runs a bundle's self-test without Secateur, from the bundle and docs/ports.md.

    python -m tests.host BUNDLE

Prints one line of JSON for every case: what came out as the self-test says, and how far numbers are away. Needs NumPy,
Pillow, jinja2, tokenizers and onnxruntime.
"""

from __future__ import annotations

import hashlib
import json
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np

from .pixels import run_images, run_video
from .programs import Programs
from .sound import run_sound
from .text import Text

Json = dict[str, Any]
Array = np.ndarray[Any, Any]


def main(bundle: Path) -> int:
    whole = read_manifest(bundle)
    test, failed = json.loads((bundle / whole["self_test"]).read_text(encoding="utf-8")), 0
    for case in test["cases"]:
        manifest = whole | (whole["variants"][case["geometry"] - 1] if case["geometry"] else {})
        found = run_case(bundle, manifest, case)
        failed += not all(value is True or (type(value) is float and value <= 1) for value in found.values())
        print(json.dumps({"geometry": case["geometry"], "case": case["name"], **found}))  # noqa: T201
    return 1 if failed else 0


def read_manifest(bundle: Path) -> Json:
    """Checked by its own digest, and every file by the manifest's."""
    manifest: Json = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    signed = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    text = json.dumps(signed, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    assert hashlib.sha256(text.encode()).hexdigest() == manifest["manifest_sha256"]
    for file, entry in manifest["files"].items():
        assert hashlib.sha256((bundle / file).read_bytes()).hexdigest() == entry["sha256"], file
    return manifest


def run_case(bundle: Path, manifest: Json, case: Json) -> Json:
    """Of every step: whether it is equal, or its largest difference as a multiple of its tolerance."""
    text, rows = Text(bundle, manifest), case["rows"]
    read = [see(bundle, manifest["preprocessing"], row) for row in rows]
    ids = [text.encode(row["prompt"], times(manifest, row)) for row in rows]
    feeds = {name: np.concatenate([one[name] for one in read]) for name in read[0]}
    found: Json = {
        "ids": ids == [row["ids"] for row in rows],
        "pixels": check_pixels(manifest, case["pixels"], feeds["pixel_values"]),
        "values": compare(case["pixels"]["values"], feeds["pixel_values"]),
    }
    if "chat" in case:
        found["chat"] = text.encode(case["chat"]["messages"], times(manifest, rows[0])) == case["chat"]["ids"]
    if "sound" in case:
        found["sound"] = compare(case["sound"], feeds["input_features"])
    if "numbers" in case:
        found |= run_programs(bundle, manifest, case["numbers"], feeds, ids)
    return found


def run_programs(bundle: Path, manifest: Json, expected: Json, feeds: dict[str, Array], ids: list[list[int]]) -> Json:
    programs, tokens = Programs(bundle, manifest), np.array(expected["tokens"])
    features = programs.encode(feeds)
    logits = [programs.prefill(ids)]
    logits += [programs.decode(tokens[:, step]) for step in range(tokens.shape[1] - 1)]
    return {
        "features": compare(expected["features"], features),
        "survivors": {name: kept.tolist() for name, kept in programs.survivors.items()} == expected["survivors"],
        "tokens": np.array_equal(np.stack([each.argmax(-1) for each in logits], axis=1), tokens),
        "logits": max(compare(want, have) for want, have in zip(expected["logits"], logits, strict=True)),
    }


def see(bundle: Path, preprocessing: Json, row: Json) -> dict[str, Array]:
    """What ``vision`` reads of a row."""
    if "images" in row:
        found = {"pixel_values": run_images(preprocessing, [bundle / file for file in row["images"]])}
    else:
        found = {"pixel_values": run_video(preprocessing, [bundle / file for file in row["video"]])}
    if "audio" in row:
        clip = read_wave(bundle / row["audio"][0], preprocessing["sound"]["sampling_rate"])
        found["input_features"] = run_sound(preprocessing["sound"], clip)[None]
    return found


def read_wave(path: Path, rate: int) -> Array:
    """Unsigned bytes, silence at 128."""
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 1, rate)
        return (np.frombuffer(file.readframes(file.getnframes()), np.uint8).astype(np.float32) - 128) / 128


def times(manifest: Json, row: Json) -> list[float]:
    """Mean seconds of the frames of every grid of the row's video, whose frames are seen one after the other."""
    if "video" not in row or not (manifest["media"] or {}).get("timestamp"):
        return []
    step = manifest["preprocessing"]["video"]["steps"][-1]["temporal_patch"]
    seconds = [number / row["video_fps"] for number in range(len(row["video"]))]
    return [(seconds[at] + seconds[at + step - 1]) / 2 for at in range(0, len(seconds), step)]


def check_pixels(manifest: Json, expected: Json, pixel_values: Array) -> bool:
    """The digest of the levels, which are pixel values before they were scaled and normalised."""
    preprocessing = manifest["preprocessing"]
    steps = preprocessing["images"][0] if preprocessing["images"] else preprocessing["video"]["steps"]
    how = {step["op"]: step for step in steps}
    levels = pixel_values.astype(np.float64)
    if "normalize" in how:
        # Colours are the second axis of pictures; of patches the first of what each is made of.
        shape = (1, 3, 1, 1) if pixel_values.ndim == 4 else (1, 3, 1)
        levels = levels.reshape(len(levels), 3, -1) if pixel_values.ndim == 2 else levels
        levels = levels * np.reshape(how["normalize"]["std"], shape) + np.reshape(how["normalize"]["mean"], shape)
    levels = np.rint(levels / how["rescale"]["factor"] if "rescale" in how else levels)
    return hashlib.sha256(levels.astype(np.uint8).tobytes()).hexdigest() == str(expected["sha256"])


def compare(expected: Json, found: Array) -> float:
    """The largest difference at the stored places, as a multiple of the tolerance."""
    assert list(found.shape) == expected["shape"]
    away = np.abs(found.reshape(-1)[expected["at"]] - np.array(expected["values"])).max()
    return float(away) / float(expected["tolerance"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
