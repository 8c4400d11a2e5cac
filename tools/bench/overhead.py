"""What scoring, selecting and gathering adds to prefill: `python -m secateur.tools.bench overhead`.

Each recipe's stages, cut out of its compiled programs, run in turn with the unpruned prefill of a decoder with random
weights: 1,024 visual tokens, of which 128 are left. Run it on a machine that does nothing else; finished rows are kept
below the work folder and hold for the same programs and machine.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from secateur.compiler.pipeline import RECIPES, Geometry, Recipe, plan_job, read_source, trace_model
from secateur.tools.bench import overhead_page
from secateur.tools.bench.isolate import Cut, cut_stages
from secateur.tools.bench.latency import QUIET, describe_machine
from secateur.tools.bench.random_model import PATCH_SIZE, make_random_model, random_config
from secateur.tools.console import notes, quiet_compiler, results
from secateur.tools.sweep.bundles import Bundles
from secateur.tools.sweep.cells import choose_recipes
from secateur.tools.sweep.records import PROGRAM_SOURCES, cell_key, digest_sources, holds, read_record, write_record
from secateur.tools.threads import read_threads

SIDE, KEPT, TEXT_TOKENS, FRAMES, TOWER_LAYERS = 32, 128, 64, 4, 6
TOKENS = SIDE * SIDE
TOWER = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": TOWER_LAYERS}
SLICES = ("cls_attention", "cls_attention_layers", "last_query_attention", "text_attention", "text_to_text_attention")
LIGHT = ("carried", "cls_values", "size", "slots", "source", "text_rows", "tokens", "real_slots")
"""Signals that cost nothing to have, beside the slices."""


@dataclass(frozen=True)
class Sizes:
    """A row's images: one of all tokens, or frames that have as many together."""

    images: int

    @property
    def side(self) -> int:
        """Patches along an image's edge."""
        return SIDE if self.images == 1 else round((TOKENS // self.images) ** 0.5)


def sizes_for(recipe: Recipe) -> Sizes:
    """Recipes that compare or share between images before the first layer need several of them."""
    frames = any(
        s.scope == "window" or (s.site.kind == "decoder.layer" and s.site.layer == 0 and s.scope == "whole")
        for s in recipe.stages
    )
    return Sizes(FRAMES if frames else 1)


def classify(signals: set[str], scans: int) -> str:
    """ "slice", "greedy" or "other", by the signals of all stages and the loops of dependent steps."""
    if scans:
        return "greedy"
    return "slice" if signals & set(SLICES) and signals <= {*SLICES, *LIGHT} else "other"


@dataclass(frozen=True)
class Bench:
    """Where models lie and traces are kept. Stages need no weights, so their model is a configuration alone."""

    work: Path
    threads: int

    def geometry(self, sizes: Sizes) -> Geometry:
        return Geometry(batch=1, images=sizes.images, text_tokens=TEXT_TOKENS, new_tokens=8)

    @cached_property
    def traces(self) -> dict[Sizes, Any]:
        return {}

    def traced(self, sizes: Sizes) -> Any:
        if sizes not in self.traces:
            folder = self.work / "overhead" / f"config-{sizes.images}"
            folder.mkdir(parents=True, exist_ok=True)
            random_config(sizes.side * PATCH_SIZE, TOWER).save_pretrained(folder)
            with quiet_compiler():
                self.traces[sizes] = trace_model(read_source(folder), self.geometry(sizes), "fp32")
        return self.traces[sizes]

    def unpruned(self) -> Path:
        """The bundle without stages, compiled once."""
        bundle = self.work / "overhead" / "none"
        key = cell_key(model="random", plan="none", positions="", sources=digest_sources(*PROGRAM_SOURCES))
        if not holds(read_record(bundle.with_suffix(".json")), key):
            model = make_random_model(self.work / "overhead" / "model", SIDE * PATCH_SIZE, TOWER)
            Bundles(model, self.geometry(Sizes(1)), self.work).compile(RECIPES["none"], 1.0, bundle)
            write_record(bundle.with_suffix(".json"), {"key": key})
        return bundle


def make_ids(image_token: int, features: int) -> dict[str, torch.Tensor]:
    """Prefill's inputs that are no floats: text around the placeholders of ``features`` image tokens, no padding."""
    first = TEXT_TOKENS // 2
    words = torch.full((1, TEXT_TOKENS), 5)
    image = torch.full((1, features), image_token)
    ids = torch.cat([words[:, :first], image, words[:, first:]], 1)
    whole = torch.arange(features)[None]
    return {"input_ids": ids, "lengths": torch.tensor([ids.shape[1]]), "kept": whole}


def open_cut(cut: Cut, threads: int) -> Callable[[], float]:
    """A function that runs a cut once and returns the seconds it took; set up as bundles' sessions are."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(cut.model, options, providers=["CPUExecutionProvider"])
    bound = session.io_binding()
    feed = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in cut.feed.items()}
    for name, value in feed.items():
        bound.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        bound.bind_output(output.name)

    def run() -> float:
        start = time.perf_counter()
        session.run_with_iobinding(bound)
        return time.perf_counter() - start

    return run


def open_prefill(bundle: Path, threads: int) -> tuple[Any, Callable[[], float]]:
    """The unpruned bundle's session, and a function that runs its prefill once."""
    from secateur.runtime.session import Session

    session = Session(bundle, threads=threads)
    request, sizes = session.request(), session.manifest.geometry
    ids = make_ids(session.manifest.model.image_token_id, sizes.features)
    features = torch.randn(1, sizes.features, session.manifest.model.hidden_size).numpy()
    tokens, lengths = ids["input_ids"].numpy(), ids["lengths"].numpy()

    def run() -> float:
        start = time.perf_counter()
        request.prefill(tokens, lengths, features)
        return time.perf_counter() - start

    return session, run


def interleave(stages: Sequence[Callable[[], float]], prefill: Callable[[], float], turns: int) -> tuple[float, float]:
    """Median seconds of all stages together and of prefill, which run in turn; the first turn warms up.

    Stages are short, so each runs several times between two prefills.
    """
    added, whole = [], []
    for turn in range(turns + 1):
        sums = [sum(run() for run in stages) for _ in range(5)]
        taken = prefill()
        if turn:
            added += sums
            whole.append(taken)
    return median(added), median(whole)


def measure(bench: Bench, recipe: Recipe, prefill: Callable[[], float], turns: int) -> dict[str, Any]:
    sizes = sizes_for(recipe)
    traced = bench.traced(sizes)
    job = plan_job(traced.source, traced.geometry, recipe, KEPT / TOKENS)
    ids = make_ids(traced.source.config.image_token_id, job.features_per_row)
    cuts = cut_stages(traced, recipe, KEPT / TOKENS, ids)
    added, whole = interleave([open_cut(cut, bench.threads) for cut in cuts], prefill, turns)
    signals = {name for stage in job.stages for name in stage.signals}
    scans = sum(cut.scans for cut in cuts)
    return {
        "recipe": recipe.name, "class": classify(signals, scans), "share": added / whole, "stages_seconds": added,
        "prefill_seconds": whole, "scans": scans, "nodes": sum(cut.nodes for cut in cuts), "images": sizes.images,
        "plan": str(job.plan),
    }  # fmt: skip


def run(options: argparse.Namespace) -> None:
    load = round(os.getloadavg()[0], 2)
    if load > QUIET:
        notes.print(f"warning: the machine is busy (load {load:.1f}); times will be worse than they need be")
    bench, machine = Bench(options.work, options.threads), describe_machine(options.threads)
    sources = digest_sources(*PROGRAM_SOURCES, "tools/bench/overhead.py", "tools/bench/isolate.py")
    recipes = choose_recipes(options.recipes)
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    records, prefill = [], None
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=notes) as progress:
        task = progress.add_task("overhead", total=len(recipes))
        for recipe in recipes:
            progress.update(task, description=recipe.name)
            key = cell_key(
                model="random", plan=str(recipe), positions=recipe.positions, sources=sources, machine=machine,
                turns=options.turns,
            )  # fmt: skip
            path = options.work / "overhead" / "rows" / f"{recipe.name}.json"
            record = {} if options.fresh else read_record(path)
            if not holds(record, key):
                if prefill is None:
                    _, prefill = open_prefill(bench.unpruned(), options.threads)
                record = {"key": key, "load": load, **measure(bench, recipe, prefill, options.turns)}
                write_record(path, record)
            records.append(record)
            progress.advance(task)
    report = {
        "machine": machine, "records": records, "tokens": TOKENS, "kept": KEPT, "text_tokens": TEXT_TOKENS,
        "frames": FRAMES, "tower_layers": TOWER_LAYERS,
    }  # fmt: skip
    results.print(overhead_page.draw(records))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    if options.recipes is None:
        options.docs.write_text(overhead_page.write(report))
        notes.print(f"wrote {options.docs}")
    else:
        notes.print(f"{options.docs} is written only for all recipes")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m secateur.tools.bench overhead", description=__doc__)
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="rows of the table; all if not given")
    parser.add_argument("--turns", type=int, default=5, help="prefills per recipe, and one to warm up (%(default)s)")
    parser.add_argument("--threads", type=read_threads, default=2, help="threads of ONNX Runtime (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="measure again even where results are there")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="where results are kept (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--docs", type=Path, default=Path("docs/overhead.md"), help="page to write (%(default)s)")
    options = parser.parse_args(arguments)
    from secateur.tools.cli import run_script

    run_script(run, options)


if __name__ == "__main__":
    main()
