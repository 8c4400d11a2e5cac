"""Timing and memory of bundles: the numbers behind `secateur profile`."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from secateur.runtime.errors import SecateurError, UserError
from secateur.runtime.pictures import ImageLike
from secateur.runtime.results import Metrics
from secateur.runtime.session import Session
from secateur.runtime.video import VideoLike
from secateur.runtime.waveform import AudioLike

_log = logging.getLogger(__name__)

_RATE = 16000
"""Hz of the noise; what Whisper's extractor takes."""
TIMES = ("preprocess", "vision", "prefill", "ttft", "tpot")
"""What is timed. TTFT includes preprocessing; TPOT is per decode step, all steps of all runs together."""


@dataclass(frozen=True)
class Workload:
    """What is asked, per row of the batch, and how many tokens are generated whatever they are."""

    prompts: list[str]
    images: list[list[ImageLike]]
    new_tokens: int
    videos: list[list[VideoLike]] | None = None
    audio: list[list[AudioLike]] | None = None
    variant: int = 0
    """Which of the bundle's geometries it runs in."""


@dataclass
class Samples:
    """Seconds, by the names in :data:`TIMES`."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in TIMES})

    def add(self, metrics: Metrics) -> None:
        for name in ("preprocess", "vision", "prefill", "ttft"):
            self.seconds[name].append(getattr(metrics, f"{name}_s"))
        self.seconds["tpot"].extend(metrics.step_s)

    def summary(self) -> dict[str, dict[str, float]]:
        """p50, p90, p99 in seconds and the number of samples, per time."""
        return {
            name: {**{f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}, "count": len(values)}
            for name, values in self.seconds.items()
            if values
        }


def make_workload(
    session: Session,
    prompt: str | None = None,
    images: Sequence[Path] = (),
    new_tokens: int | None = None,
    variant: int = 0,
) -> Workload:
    """The given prompt and images for every row; where absent, random pixels and text that fills the bucket. Sound is
    always noise."""
    geometry = session.manifest.variant(variant).geometry
    count = geometry.new_tokens if new_tokens is None else new_tokens
    if not 1 <= count <= geometry.new_tokens:
        raise UserError(f"{count} new tokens, the bundle's caches hold {geometry.new_tokens}", where="--new-tokens")
    chosen: list[ImageLike] = list(images)
    videos: list[VideoLike] = []
    sounds: list[AudioLike] = []
    random = np.random.default_rng(0)
    shape = (geometry.image_height, geometry.image_width, 3)
    if geometry.frames:
        videos = [random.integers(0, 256, (geometry.frames, *shape), dtype=np.uint8)]
    elif not chosen:
        sizes = [(one.height, one.width, 3) for one in geometry.sizes] or [shape] * geometry.images
        chosen = [random.integers(0, 256, size, dtype=np.uint8) for size in sizes]
    if geometry.audio_seconds:
        sounds = [random.uniform(-0.5, 0.5, geometry.audio_seconds * _RATE)]
    text = _fill_bucket(session, variant) if prompt is None else prompt
    rows = geometry.batch
    return Workload([text] * rows, [chosen] * rows, count, [videos] * rows, [sounds] * rows, variant)


def _fill_bucket(session: Session, variant: int) -> str:
    """The longest run of one short word that fits the text bucket."""
    low, high = 0, session.geometries[variant].geometry.text_tokens
    while low < high:
        middle = (low + high + 1) // 2
        try:
            session.processors[variant].encode("a " * middle)
            low = middle
        except UserError:
            high = middle - 1
    return "a " * low


def time_bundles(
    sessions: Sequence[Session], workloads: Sequence[Workload], *, repeat: int, warmup: int
) -> list[Samples]:
    """Run every bundle in turn, A B A B, so that a machine that slows down slows all of them."""
    samples = [Samples() for _ in sessions]
    for turn in range(warmup + repeat):
        for session, workload, sample in zip(sessions, workloads, samples, strict=True):
            metrics = run_once(session, workload)
            if turn >= warmup:
                sample.add(metrics)
        _log.debug("run %d of %d", turn + 1, warmup + repeat)
    return samples


def run_once(session: Session, workload: Workload) -> Metrics:
    """One whole generation, greedy, not stopped by an end-of-sequence token."""
    answers = session.generate(
        workload.prompts,
        workload.images,
        videos=workload.videos,
        audio=workload.audio,
        audio_rate=_RATE if any(workload.audio or ()) else None,
        max_new_tokens=workload.new_tokens,
        temperature=0.0,
        ignore_eos=True,
        stop=(),
        variant=workload.variant,
    )  # a list of prompts gives a list
    return answers[0].metrics


def measure_memory(bundle: Path, *, threads: int | None, new_tokens: int | None, variant: int = 0) -> dict[str, int]:
    """Peak resident bytes of a process of its own that opens the bundle and generates once.

    ``baseline`` is what the interpreter and its libraries took before the bundle was opened. Mapped weight
    files count as far as they were touched.
    """
    command = [sys.executable, "-m", "secateur.tools.measure", str(bundle), str(threads or 0), str(new_tokens or 0)]
    command.append(str(variant))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        # What the process says of an error of ours begins with its class.
        reason = re.sub(r"^secateur\.[\w.]*Error: ", "", last)
        raise SecateurError(f"measuring memory failed: {reason}", where=str(bundle))
    found: dict[str, int] = json.loads(done.stdout)
    return found


def resident_mark(process: int | str = "self") -> int | None:
    """Peak resident bytes of a living process, the kernel's own mark; None where there is none to read."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def peak_resident_bytes() -> int:
    """Of this process. What getrusage says, where there is no mark, may stem from the parent process."""
    if (mark := resident_mark()) is not None:
        return mark
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def ratios(own: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, float]]:
    """``other`` over ``own``: how many times less time, and how many times fewer FLOPs, per time and program."""
    found = {}
    programs = {"vision": ["vision"], "prefill": ["prefill"], "ttft": ["vision", "prefill"], "tpot": ["decode"]}
    for name, parts in programs.items():
        if name in own["times"] and name in other["times"]:
            flops = [sum(bundle["flops"][part] for part in parts) for bundle in (other, own)]
            found[name] = {
                "time": other["times"][name]["p50"] / own["times"][name]["p50"],
                "flops": flops[0] / flops[1] if flops[1] else float("nan"),
            }
    return found


def _main(bundle: str, threads: str, new_tokens: str, variant: str) -> None:
    import onnxruntime  # noqa: F401  its own share belongs to the baseline

    baseline = peak_resident_bytes()
    with Session(bundle, threads=int(threads) or None) as session:
        run_once(session, make_workload(session, new_tokens=int(new_tokens) or None, variant=int(variant)))
    sys.stdout.write(json.dumps({"baseline": baseline, "peak": peak_resident_bytes()}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
