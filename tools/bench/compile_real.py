"""What compiling whole checkpoints costs: `python -m secateur.tools.bench.compile_real [NAME ...] [--json FILE]`.

For each layout of the table a checkpoint of true size is written, whose data are holes (`sparse_checkpoint.py`), and
`secateur compile --weights reference` makes a bundle of it in a process of its own: seconds from its start to its end,
and its peak resident memory. The files are hashed as any are, holes and all, as fast as real weights in the page cache.
Half precision needs a target whose graphs may hold it and that builds nothing from the weights: `plain`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from secateur.tools.bench.compile_scale import LLAVA_7B
from secateur.tools.bench.qwen_configs import (
    OMNI3_TOKENS,
    OMNI_TOKENS,
    QWEN2_5_OMNI_7B,
    QWEN2_5_VL_7B,
    QWEN3_OMNI_30B,
    QWEN_PIXELS,
    QWEN_SOUND,
    QWEN_TOKENS,
)
from secateur.tools.console import notes, results
from secateur.tools.measure import resident_mark

_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Layout:
    """A row of the table: ``config`` is its config.json, ``pixels`` its preprocessor_config.json. ``original`` says
    whether its files name and shape tensors as the hub's do, or as the model holds them. ``options`` of compiling say
    what a prompt holds, ``tokens`` are the special ones beside the image's. ``seconds`` and ``gib`` are what compiling
    it may take on two idle cores."""

    config: dict[str, Any]
    pixels: dict[str, Any]
    dtype: str = "fp16"
    recipe: str = "fastv"
    original: bool = True
    seconds: float = 90.0
    gib: float = 3.0
    options: tuple[str, ...] = ()
    tokens: Mapping[str, int] = field(default_factory=dict)


def clip_pixels(size: int) -> dict[str, Any]:
    """CLIP's image processor for square images of so many pixels a side."""
    square = {"height": size, "width": size}
    norm = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size}, "crop_size": square, **norm}


def with_layers(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The same with so many layers in the decoder."""
    return config | {"text_config": config["text_config"] | {"num_hidden_layers": layers}}


_CLIP = ("--image-size", "448x448", "--frames", "32", "--fps", "2", "--audio-seconds", "16")


def qwen3_omni(config: dict[str, Any], original: bool = True) -> Layout:
    """Of Qwen3-Omni's thinker; ``original`` as for :class:`Layout`."""
    pixels = QWEN_SOUND | {"patch_size": 16}
    return Layout(
        config, pixels, "bf16", "seats", original=original, seconds=300.0, gib=6.0, options=_CLIP, tokens=OMNI3_TOKENS
    )  # fmt: skip


LAYOUTS = {
    "llava-1.5-7b": Layout(LLAVA_7B, clip_pixels(336)),
    # Windows of four sizes: what is least even takes longest.
    "qwen2.5-vl-7b": Layout(
        QWEN2_5_VL_7B, QWEN_PIXELS, "bf16", options=("--image-size", "728x1036"), tokens=QWEN_TOKENS
    ),
    "qwen2.5-omni-7b": Layout(
        QWEN2_5_OMNI_7B,
        QWEN_SOUND,
        "bf16",
        "seats",
        options=_CLIP,
        tokens=OMNI_TOKENS,
    ),
    # Experts stacked as the model holds them: files that graphs can point at.
    "qwen3-omni-30b-a3b": qwen3_omni(QWEN3_OMNI_30B, original=False),
    # As the hub has them, apart: experts are stacked, 54 GiB to write; and a sixth of the layers, 9 GiB.
    "qwen3-omni-30b-a3b-apart": qwen3_omni(QWEN3_OMNI_30B),
    "qwen3-omni-30b-a3b-8-layers-apart": qwen3_omni(with_layers(QWEN3_OMNI_30B, 8)),
}


def measure(name: str, layout: Layout, weights: str = "reference") -> dict[str, Any]:
    """Compile one layout; returns what it took and what the bundle holds. Raises CalledProcessError if it fails."""
    with tempfile.TemporaryDirectory(prefix="compile-real-") as folder:
        model, bundle = Path(folder) / "model", Path(folder) / "bundle"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(layout.config))
        write_processor(model, layout)
        form = () if layout.original else ("--in-memory",)
        run_module("secateur.tools.bench.sparse_checkpoint", str(model), "--dtype", layout.dtype, *form)
        begin = time.perf_counter()
        used = run_module(
            "secateur", "compile", str(model), "-o", str(bundle), "--recipe", layout.recipe,
            "--target", "plain", "--dtype", "auto", "--weights", weights,
            *layout.options,
        )  # fmt: skip
        seconds = time.perf_counter() - begin
        return {
            "layout": name, "options": layout.options,
            "recipe": layout.recipe, "dtype": layout.dtype, "weights": weights, "seconds": seconds,
            **used, "may_take": {"seconds": layout.seconds, "gib": layout.gib}, "load": os.getloadavg()[0],
            **_describe(model, bundle),
        }  # fmt: skip


def run_module(module: str, *arguments: str) -> dict[str, Any]:
    """Run a module in a process of its own; returns the peak of its resident memory, its CPU seconds, and what it
    logged of its phases' seconds."""
    command = [sys.executable, "-m", module, *arguments]
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, text=True)
        try:
            status, usage, peak = _watch(child.pid)
        except BaseException:
            child.kill()
            child.wait()
            raise
        child.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    if child.returncode:
        notes.print(text[-2000:], markup=False)
        raise subprocess.CalledProcessError(child.returncode, command, text)
    phases = {name: float(seconds) for name, seconds in re.findall(r"^(\w+) +([\d.]+) s$", text, re.M)}
    cpu = usage.ru_utime + usage.ru_stime
    return {"peak_gib": peak / 2**30, "cpu_seconds": cpu, "phases": phases}


def _watch(process: int) -> tuple[int, Any, int]:
    """Wait for a child; its exit status, its usage, and its peak of resident bytes. The mark is read while it lives:
    the peak in its usage may be what this process held when the child began."""
    peak = 0
    while True:
        peak = resident_mark(process) or peak
        done, status, usage = os.wait4(process, os.WNOHANG)
        if done:
            return status, usage, peak or usage.ru_maxrss * 1024
        time.sleep(_LOOK_SECONDS)


def _describe(model: Path, bundle: Path) -> dict[str, Any]:
    from secateur.runtime.manifest import check_files, read_manifest

    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    files = [bundle / path for path in manifest.weights]
    return {
        "parameters_gib": sum(manifest.files[path].bytes for path in manifest.weights) / 2**30,
        "shards": len(files),
        "linked": all(os.path.samefile(path, model / path.name) for path in files if (model / path.name).exists()),
        "graphs_mib": sum(manifest.files[p].bytes for p in manifest.program_files()) / 2**20,
        "segments": [f"[{s.first_layer},{s.last_layer}) {s.length}" for s in manifest.segments],
    }


def write_processor(directory: Path, layout: Layout) -> None:
    """The least a bundle can be opened with: a tokenizer of bytes that knows the image token, and the images' shape."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    image = next(int(layout.config[key]) for key in ("image_token_index", "image_token_id") if key in layout.config)
    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    special = {**layout.tokens} if image in layout.tokens.values() else {"<image>": image, **layout.tokens}
    tokenizer = Tokenizer(models.BPE(vocab={**{n: i for i, n in enumerate(names)}, **special}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *special])
    tokenizer.save(str(directory / "tokenizer.json"))
    shown = next(name for name, token in special.items() if token == image)
    for name, content in (
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "image_token": shown}),
        ("preprocessor_config.json", layout.pixels),
        ("generation_config.json", {"bos_token_id": 1, "eos_token_id": 2}),
    ):
        (directory / name).write_text(json.dumps(content))


def draw(reports: list[dict[str, Any]]) -> Table:
    columns = ("layout", "recipe", "dtype", "GiB", "files", "seconds", "CPU seconds", "peak GiB")
    table = Table(*columns, title="From a checkpoint to a bundle, weights by reference", box=None, pad_edge=False)
    for r in reports:
        table.add_row(
            r["layout"], r["recipe"], r["dtype"], f"{r['parameters_gib']:.1f}",
            f"{r['shards']} {'linked' if r['linked'] else 'copied'}",
            f"{r['seconds']:.1f} of {r['may_take']['seconds']:.0f}", f"{r['cpu_seconds']:.1f}",
            f"{r['peak_gib']:.2f} of {r['may_take']['gib']:.0f}",
        )  # fmt: skip
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m secateur.tools.bench.compile_real", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(LAYOUTS)}; all if none is given")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    chosen = parser.parse_args(arguments)
    if unknown := [name for name in chosen.names if name not in LAYOUTS]:
        parser.error(f"no layout {unknown[0]!r} (available: {', '.join(LAYOUTS)})")
    reports = []
    for name in chosen.names or LAYOUTS:
        notes.print(f"compiling {name}")
        reports.append(measure(name, LAYOUTS[name]))
        if chosen.json is not None:
            chosen.json.write_text(json.dumps(reports, indent=1) + "\n")
    results.print(draw(reports))


if __name__ == "__main__":
    main()
