"""Every recipe against its eager oracle on the demo model's held-out questions: `python -m secateur.tools.parity`.

Two tables. Identity: at keep 1.0 the bundle's tokens are those of Hugging Face ``generate``. Choices and numbers:
kept indices equal the oracle's, ties told apart; with the choice held equal, features, hidden rows, caches and
teacher-forced logits agree. Finished cells are kept and hold as long as weights and programs do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from secateur.compiler.inputs import RowInput
from secateur.compiler.oracle import Oracle
from secateur.compiler.parity import KINDS, TOLERANCE, Parity, compare_runs, expected_kinds
from secateur.compiler.pipeline import RECIPES, Geometry, Recipe, plan_job
from secateur.compiler.recording import load_recording_model
from secateur.compiler.runs import CompiledRun, OracleRun
from secateur.runtime.session import Session
from secateur.tools.console import notes, results, set_up_logging
from secateur.tools.sweep.bundles import Bundles
from secateur.tools.sweep.cells import choose_recipes
from secateur.tools.sweep.records import (
    PROGRAM_SOURCES,
    cell_key,
    digest_model,
    digest_sources,
    holds,
    read_record,
    write_record,
)
from secateur.tools.threads import read_threads

NEW_TOKENS = 4
TEXT_TOKENS = 24
Tick = Callable[[], None]


@dataclass(frozen=True)
class Asked:
    """A held-out question as prefill takes it, with what Hugging Face answers."""

    prompt: str
    image: Any
    pixel_values: np.ndarray[Any, Any]
    tokens: list[int]
    logits: np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sweep:
    """One walk over the cells."""

    model: Path
    work: Path
    questions: int
    threads: int

    @cached_property
    def hf(self) -> Any:
        return load_recording_model(self.bundles(1).source)

    def bundles(self, batch: int) -> Bundles:
        return _bundles(self.model, self.work, batch)

    @cached_property
    def asked(self) -> list[Asked]:
        """The questions through Hugging Face's own processor and ``generate``."""
        from transformers import AutoProcessor

        from secateur.tools.demo.scenes import held_out

        processor = AutoProcessor.from_pretrained(self.model, local_files_only=True)
        samples = held_out(self.questions)
        found = []
        with progress() as bar:
            for image, question, _, _ in bar.track(samples, description="Hugging Face generate"):
                messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
                text = processor.apply_chat_template(messages, add_generation_prompt=True)
                feed = processor(images=[image], text=[text], return_tensors="pt")
                with torch.no_grad():
                    out = self.hf.generate(
                        **feed, do_sample=False, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True,
                        output_logits=True,
                    )  # fmt: skip
                tokens = out.sequences[0, feed["input_ids"].shape[1] :].tolist()
                logits = torch.stack(out.logits)[:, 0].numpy()
                found.append(Asked(question, image, feed["pixel_values"].numpy(), tokens, logits))
        return found

    def identity(self, recipe: Recipe, tick: Tick) -> dict[str, Any]:
        """Tokens and logits at keep 1.0 against Hugging Face."""
        same, worst = 0, 0.0
        with self.bundles(1).borrow(recipe, 1.0) as path, Session(path, threads=self.threads) as session:
            for asked in self.asked:
                answer = session.generate(asked.prompt, asked.image, max_new_tokens=NEW_TOKENS, temperature=0.0)
                same += answer.tokens == asked.tokens
                inputs = session.processor([asked.prompt], [[asked.image]])
                request = session.request()
                logits = session.prefill(request, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)
                for step, reference in enumerate(asked.logits):
                    assert logits[0].shape == reference.shape, "another vocabulary"
                    worst = max(worst, float(np.abs(logits[0] - reference).max()))
                    if step + 1 < len(asked.logits):
                        logits = session.decode(request, np.array([asked.tokens[step]]))
                tick()
        return {"rows": len(self.asked), "same_tokens": same, "logits": worst}

    def compare(self, recipe: Recipe, keep: float, batch_sizes: tuple[int, ...], tick: Tick) -> dict[str, Any]:
        """Choices and numbers; the oracle runs a row once for all batch sizes."""
        source = self.bundles(1).source
        oracle = Oracle(plan_job(source, _geometry(1), recipe, keep), self.hf)
        reference = OracleRun(oracle, remember=True)
        found: dict[str, Any] = {}
        items: list[RowInput] = []
        for size in batch_sizes:
            parity = Parity(expects=expected_kinds(recipe))
            made = self.bundles(size).borrow(recipe, keep, expose=True)
            with made as path, Session(path, threads=self.threads) as session:
                items = items or [self._row(session, asked) for asked in self.asked]
                compare_runs(
                    reference, CompiledRun(session.manifest, session.request()), items, size, parity, referee=oracle,
                    watch=lambda item, ours, theirs: tick(),
                )  # fmt: skip
            found[str(size)] = parity.as_json()
        return found

    def _row(self, session: Session, asked: Asked) -> RowInput:
        ids = session.processor.encode(asked.prompt)
        # Two forced tokens: what the model says, then whatever follows, so that decode reads pruned caches.
        forced = [asked.tokens[0], asked.tokens[min(1, len(asked.tokens) - 1)]]
        return RowInput(ids, asked.pixel_values, forced)


def _geometry(batch: int) -> Geometry:
    return Geometry(batch=batch, images=1, text_tokens=TEXT_TOKENS, new_tokens=NEW_TOKENS)


_made: dict[tuple[Path, Path, int], Bundles] = {}


def _bundles(model: Path, work: Path, batch: int) -> Bundles:
    """One trace per batch size and process."""
    return _made.setdefault((model, work, batch), Bundles(model, _geometry(batch), work))


def progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=notes, transient=True)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(options.threads)
    sweep = Sweep(options.model, options.work, options.questions, options.threads)
    stamp = {"model": digest_model(options.model), "code": digest_sources(*PROGRAM_SOURCES, "tools/parity.py")}
    recipes = choose_recipes(options.recipes)
    cells: list[tuple[str, Recipe, float | None]] = [("identity", RECIPES["none"], None)]
    cells += [("identity", r, None) for r in recipes if r.identity_at_one]
    cells += [("compare", r, keep) for r in recipes for keep in options.keeps]
    records = []
    with progress() as bar:
        for kind, recipe, keep in cells:
            name = f"{kind}-{recipe.name}" + (f"-{keep:g}" if keep else "")
            path = options.work / "cells" / f"{name}.json"
            others = {**stamp, "questions": options.questions, "batches": options.batches, "kind": kind}
            key = cell_key(plan=f"{recipe} {keep}", positions=recipe.positions, **others)
            record = read_record(path)
            if not holds(record, key):
                rounds = options.questions * (1 if keep is None else len(options.batches))
                sweep.asked  # noqa: B018  (its own bar first)
                task = bar.add_task(name, total=rounds)
                tick = lambda task=task: bar.advance(task)  # noqa: E731
                if keep is None:
                    outcome = sweep.identity(recipe, tick)
                else:
                    outcome = sweep.compare(recipe, keep, tuple(options.batches), tick)
                bar.remove_task(task)
                record = {"key": key, "kind": kind, "recipe": recipe.name, "keep": keep, "outcome": outcome}
                write_record(path, record)
            records.append(record)
    return records


def draw(records: list[dict[str, Any]]) -> tuple[Table, Table]:
    identity = Table("recipe at keep 1", "questions", "same tokens", "largest logit difference", title="Identity")
    compared = Table(
        "recipe", "keep", "batch", "rows", "equal", "tied", "different", *KINDS, title="Choices and numbers"
    )
    for row in identity_rows(records):
        identity.add_row(*row)
    for row in compared_rows(records):
        compared.add_row(*row)
    return identity, compared


def identity_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    found = [(r["recipe"], r["outcome"]) for r in records if r["kind"] == "identity"]
    return [[name, f"{o['rows']}", f"{o['same_tokens']}", f"{o['logits']:.1e}"] for name, o in found]


def compared_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for record in (r for r in records if r["kind"] == "compare"):
        for batch, o in record["outcome"].items():
            counts = [f"{o[n]}" for n in ("rows", "chose_equally", "tied", "chose_differently")]
            values = [f"{o[kind]:.1e} of {o['scales'][kind]:.0f}" if kind in o["scales"] else "" for kind in KINDS]
            rows.append([record["recipe"], f"{record['keep']:g}", batch, *counts, *values])
    return rows


def passed(records: list[dict[str, Any]]) -> bool:
    """The bar: same tokens everywhere, nothing chosen differently, absolute differences within the tolerance."""
    if not records:
        return False
    for record in records:
        o = record["outcome"]
        if record["kind"] == "identity":
            if not o["rows"] or o["same_tokens"] != o["rows"] or o["logits"] > TOLERANCE:
                return False
        elif not o or any(not c["complete"] or c["chose_differently"] or largest(c) > TOLERANCE for c in o.values()):
            return False
    return True


def largest(outcome: dict[str, Any]) -> float:
    """The largest absolute difference of any kind."""
    return max(float(outcome[kind]) for kind in KINDS)


def say_misses(records: list[dict[str, Any]]) -> str:
    """How many lines of the table miss the tolerance, by how much, and how much that is of the magnitude compared."""
    lines = [o for r in records if r["kind"] == "compare" for o in r["outcome"].values()]
    over = [o for o in lines if largest(o) > TOLERANCE]
    if not over:
        return f"No line of {len(lines)} misses it."
    relative = max(float(o[kind]) / max(1.0, scale) for o in over for kind, scale in o["scales"].items())
    return (
        f"{len(over)} of {len(lines)} lines miss the last one, by values that differ by {max(map(largest, over)):.1e} "
        f"at most; that is {relative:.1e} of the magnitudes compared. measurements.md says whose rounding it is."
    )


def write_page(records: list[dict[str, Any]], options: argparse.Namespace, path: Path) -> None:
    def table(head: list[str], rows: list[list[str]]) -> str:
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])

    path.parent.mkdir(parents=True, exist_ok=True)
    verdict = "All within the bar." if passed(records) else "**Not all within the bar.**"
    path.write_text(
        f"""# Parity

Made by `make parity` (`python -m secateur.tools.parity`) on the demo model's {options.questions} held-out questions,
fp32, ONNX Runtime on the CPU. Model digest `{digest_model(options.model)[:16]}`. {verdict}

The bar: the same tokens as Hugging Face `generate` at keep 1; kept indices equal to the eager oracle's, ties apart;
and with the choice held equal, absolute differences of at most {TOLERANCE:g}.
{say_misses(records)}

## Identity at keep 1

Tokens against Hugging Face `generate` (greedy, the model's own processor), and the largest absolute difference of
logits over all steps, teacher-forced.

{table(["recipe", "questions", "same tokens", "largest logit difference"], identity_rows(records))}

## Choices and numbers

*equal*: every stage kept what the oracle kept. *tied*: it did not, and interchanging scores within 256 units of
float32 rounding of the largest one explains the choice. *different*: anything else. The other columns are largest
absolute differences over all rows, "of" the largest magnitude compared: projected features, hidden rows each decoder
stage leaves, keys and values of every layer, teacher-forced logits after the prompt and two decode steps. Batch 3 packs
rows of different length.

{table(["recipe", "keep", "batch", "rows", "equal", "tied", "different", *KINDS], compared_rows(records))}
"""
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m secateur.tools.parity", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("demo/model"))
    parser.add_argument("--work", type=Path, default=Path("build/parity"), help="where finished cells are kept")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--recipes", nargs="*", default=None, help="rows of the table (all)")
    parser.add_argument("--keeps", type=float, nargs="*", default=[0.5, 0.1])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 3])
    parser.add_argument("--threads", type=read_threads, default=2)
    parser.add_argument("--page", type=Path, default=Path("docs/parity.md"), help="the table as Markdown")
    options = parser.parse_args(arguments)
    set_up_logging()
    records = run(options)
    for table in draw(records):
        results.print(table)
    write_page(records, options, options.page)
    sys.exit(0 if passed(records) else 1)


if __name__ == "__main__":
    main()
