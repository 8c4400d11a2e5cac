"""A bundle's self-test is made: media and prompts for every geometry, and what the finished bundle makes of them.

Files, ids and pixels need no program. Survivors, tokens and logits come from running the bundle's own programs, which
takes a target that runs here, a library, and a model that is small enough.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray

from secateur.compiler.function import first_line
from secateur.compiler.self_test_media import write_picture, write_sound
from secateur.runtime.backends import open_backend
from secateur.runtime.errors import UserError
from secateur.runtime.manifest import Manifest, file_entry
from secateur.runtime.processing import Processor
from secateur.runtime.request import Request
from secateur.runtime.row_media import PARTS
from secateur.runtime.schema_self_test import (
    SELF_TEST,
    Case,
    Chat,
    MediaFiles,
    Numbers,
    Pixels,
    Row,
    Sampled,
    SelfTest,
    write_self_test,
)
from secateur.runtime.self_test import why_not_here
from secateur.runtime.self_test_run import Seen, run_programs, see
from secateur.runtime.tower_inputs import PatchInputs

LEVELS = ("auto", "full", "inputs", "none")
FOLDER = "self_test"
MOST_FLOPS = 20_000_000_000
"""Of all geometries: about a second on one core, and no decoder beyond some hundred million parameters. What is larger
has a self-test of files, ids and pixels, unless it is asked for."""
TOLERANCE = 1e-4
"""Largest difference allowed in a value, where the largest stored one is at most 1; in proportion to it above. The bar
of every comparison with Hugging Face (compiler/parity.py): libraries that sum in another order stay some hundred times
below it, a wrong step does not."""

_TOKENS = 9
"""One of prefill and eight of decode, where the caches hold as many."""
_QUESTIONS = ("Describe what is shown here.", "What is shown?", "What?", "a")
"""The first that fits; the next one in every second row, for rows of different length."""
_OPENING = "Look closely."
_ODD_SIZES = ((200, 120), (90, 150))
"""Width and height of pictures that have to be resized, whatever the bundle was compiled for."""
_DIFFERENT = 4
"""Pictures of one size; frames and images of a row take them in turn."""
_PLACES = 64
_log = logging.getLogger(__name__)


def check_level(level: str, target: str, dtype: str) -> None:
    """Refuse a self-test that cannot be made, before anything is traced."""
    if level not in LEVELS:
        raise UserError(f"no self-test {level!r}", where="--self-test", available=LEVELS)
    lacks = why_not_here(target, dtype) if level == "full" else ""
    if lacks:
        raise UserError(
            f"{lacks}; its survivors, tokens and logits cannot be made here", where="--self-test full",
            fix="--self-test inputs makes the rest",
        )  # fmt: skip


def add_self_test(work: Path, manifest: Manifest, level: str) -> Manifest:
    """Write the self-test of a bundle that is whole but for its manifest; returns the manifest that names it.

    ``level``: ``full`` runs the programs, ``inputs`` does not, ``auto`` does where that is possible here and takes up
    to :data:`MOST_FLOPS`, ``none`` makes nothing. Raises SecateurError for programs that do not run with ``full``.
    """
    if level == "none":
        return manifest
    geometries = manifest.each_variant()
    processors = [Processor(work, one) for one in geometries]
    cases = [case for number in range(len(geometries)) for case in _make_cases(work, number, geometries, processors)]
    made_with = {"numpy": np.__version__, "pillow": PIL.__version__}
    if level == "full" or (level == "auto" and _can_run(manifest)):
        try:
            cases = _add_numbers(work, manifest, cases, processors)
            made_with["onnxruntime"] = _library_version()
        except Exception as error:
            # The bundle is whole without them: what a library cannot do here must not cost it.
            if level == "full":
                raise
            _log.warning("the self-test holds no survivors, tokens and logits: %s", first_line(error))
    write_self_test(work, SelfTest(made_with=made_with, cases=cases))
    paths = [work / SELF_TEST, *(work / file for file in sorted({file for case in cases for file in case.media()}))]
    for unused in {*work.glob(f"{FOLDER}/*")} - {*paths}:
        unused.unlink()
    files = manifest.files | {path.relative_to(work).as_posix(): file_entry(path) for path in paths}
    return manifest.model_copy(update={"files": files, "self_test": SELF_TEST})


def _library_version() -> str:
    """Of ONNX Runtime as it is imported: its package has other names where it runs on GPUs."""
    import onnxruntime

    return str(onnxruntime.__version__)


def _can_run(manifest: Manifest) -> bool:
    steps = _TOKENS - 1
    flops = sum(
        one.programs["vision"].flops + one.programs["prefill"].flops + steps * one.programs["decode"].flops
        for one in manifest.each_variant()
    )
    if why := why_not_here(manifest.target, manifest.dtype):
        _log.info("the self-test holds no survivors, tokens and logits: %s", why)
    elif flops > MOST_FLOPS:
        _log.info(
            "the self-test holds no survivors, tokens and logits: they would take %.0f GFLOPs, more than %.0f; "
            "--self-test full makes them",
            flops / 1e9, MOST_FLOPS / 1e9,
        )  # fmt: skip
    return not why and flops <= MOST_FLOPS


def _make_cases(work: Path, number: int, geometries: Sequence[Manifest], processors: Sequence[Processor]) -> list[Case]:
    """Both cases of a geometry without numbers; fewer where the processor refuses pictures of other sizes, or no
    question fits beside the media."""
    manifest, processor, cases = geometries[number], processors[number], list[Case]()
    for name in ("resized", "exact"):
        rows = _list_rows(work, manifest, processor, name == "exact")
        try:
            seen = see(processor, rows, work)
            asked = [_ask(manifest, processor, row, seen, place) for place, row in enumerate(rows)]
        except UserError as error:
            _log.debug("geometry %d has no case %s in its self-test: %s", number, name, error)
            continue
        made = Case(
            name=name,  # type: ignore[arg-type]  # one of the two
            geometry=number,
            rows=asked,
            chat=_chat(manifest, processor, asked[0].prompt, seen),
            pixels=_sample_pixels(seen),
            sound=_sample_sound(seen),
        )
        cases.append(made)
    return cases


def _list_rows(work: Path, manifest: Manifest, processor: Processor, exact: bool) -> list[MediaFiles]:
    """The media of every row, written where they are not there yet."""
    geometry, drawn, rows = manifest.geometry, 0, list[MediaFiles]()
    sizes = [(width, height) for height, width in geometry.sizes_seen] if exact else list(_ODD_SIZES)
    for number in range(geometry.batch):
        files = []
        for place in range(geometry.frames or geometry.images):
            # Frames of one video are of one size.
            width, height = sizes[(number if geometry.frames else place) % len(sizes)]
            seed = drawn % _DIFFERENT
            file, drawn = f"{FOLDER}/{width}x{height}-{seed}.png", drawn + 1
            if not (work / file).exists():
                write_picture(work / file, width, height, seed)
            files.append(file)
        images, video = ([], files) if geometry.frames else (files, [])
        fps, audio = geometry.fps if video else None, _list_sound(work, processor, number)
        rows.append(MediaFiles(images=images, video=video, video_fps=fps, audio=audio))
    return rows


def _list_sound(work: Path, processor: Processor, row: int) -> list[str]:
    inputs = processor.tower_inputs
    if not isinstance(inputs, PatchInputs) or inputs.sound is None:
        return []
    seed = row % _DIFFERENT
    file = f"{FOLDER}/{inputs.sound.samples}-{seed}.wav"
    if not (work / file).exists():
        # As long as the bundle was compiled for: tokens of silence are alike, and which of those survive is chance.
        write_sound(work / file, inputs.sound.samples, inputs.sound.rate, seed)
    return [file]


def _ask(manifest: Manifest, processor: Processor, row: MediaFiles, seen: Seen, number: int) -> Row:
    """The row's media with a question. Raises UserError where not even the shortest fits."""
    last: UserError | None = None
    for prompt in _QUESTIONS[number % 2 :]:
        try:
            ids = processor.encode(prompt, f"row {number}", seen.times[number])
        except UserError as error:
            last = error
            continue
        text = processor.prompts.render(prompt, manifest.items)[0]
        return Row(**row.model_dump(), prompt=prompt, text=text, ids=ids)
    assert last is not None
    raise last


def _chat(manifest: Manifest, processor: Processor, question: str, seen: Seen) -> Chat | None:
    """The question in a message, after the media and, where it fits, a sentence before them; None where there is no
    template, or it takes no such message."""
    if processor.prompts.template is None:
        return None
    parts = [*({"type": PARTS[item][0]} for item in manifest.items), {"type": "text", "text": question}]
    for content in ([{"type": "text", "text": _OPENING}, *parts], parts):
        messages = [{"role": "user", "content": content}]
        try:
            text = processor.prompts.render(messages, manifest.items)[0]
            return Chat(messages=messages, text=text, ids=processor.encode(messages, "messages", seen.times[0]))
        except UserError as error:
            _log.debug("the self-test holds no such message: %s", error)
    return None


def _add_numbers(work: Path, manifest: Manifest, cases: Sequence[Case], processors: Sequence[Processor]) -> list[Case]:
    """One thread: sums are then made in one order, whatever the machine has."""
    backend = open_backend(None, work, manifest, threads=1)
    try:
        return [
            case if case.name != "exact" else case.model_copy(
                update={"numbers": _measure(work, case, processors[case.geometry],
                                            Request(backend, manifest, case.geometry))}
            )
            for case in cases
        ]  # fmt: skip
    finally:
        backend.close()


def _measure(work: Path, case: Case, processor: Processor, request: Request) -> Numbers:
    steps = min(_TOKENS, request.manifest.geometry.new_tokens)
    ran = run_programs(request, case.rows, see(processor, case.rows, work), steps)
    return Numbers(
        features=sample(ran.features, _choose(ran.features.size)),
        survivors={stage: kept.tolist() for stage, kept in ran.survivors.items()},
        tokens=ran.tokens,
        logits=[sample(logits, _choose_logits(logits)) for logits in ran.logits],
    )


def _choose_logits(logits: NDArray[np.float32]) -> list[int]:
    """The four likeliest tokens of every row, and some whatever they are."""
    batch, vocab = logits.shape
    likeliest = np.argsort(-logits, axis=-1, kind="stable")[:, :4]
    fixed = np.array(_choose(vocab, 8))
    return sorted({int(row * vocab + token) for row in range(batch) for token in (*likeliest[row], *fixed)})


def _sample_pixels(seen: Seen) -> Pixels:
    at = _choose(seen.pixel_values.size)
    return Pixels(
        pillow=PIL.__version__,
        sha256=hashlib.sha256(seen.levels.tobytes()).hexdigest(),
        levels=seen.levels.reshape(-1)[at].tolist(),
        values=sample(seen.pixel_values, at),
    )


def _sample_sound(seen: Seen) -> Sampled | None:
    heard = seen.input_features
    return None if heard is None else sample(heard, _choose(heard.size))


def sample(values: NDArray[np.float32], at: Sequence[int]) -> Sampled:
    """Values at flat indices, rounded to six digits."""
    some = [float(f"{value:.6g}") for value in values.reshape(-1)[list(at)]]
    return Sampled(
        shape=list(values.shape),
        at=list(at),
        values=some,
        tolerance=float(f"{TOLERANCE * max(1.0, *map(abs, some)):.3g}"),
    )


def _choose(size: int, count: int = _PLACES) -> list[int]:
    """Places that follow from the size alone, increasing."""
    seed = np.frombuffer(hashlib.shake_256(b"places").digest(8 * count), "<u8")
    return sorted({int(place) for place in seed % np.uint64(size)})
