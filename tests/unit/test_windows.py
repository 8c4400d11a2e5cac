"""Sliding windows shorter than a row: in unpruned rows as transformers, in pruned ones by the positions tokens keep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from secateur.compiler import ops, pipeline
from secateur.compiler.bundle import outline
from secateur.compiler.inputs import RowInput, random_rows
from secateur.compiler.oracle import Oracle
from secateur.compiler.parity import Parity, compare_runs
from secateur.compiler.pipeline import Geometry, prune, read_source, trace_model
from secateur.compiler.program import Segment
from secateur.compiler.recording import load_recording_model
from secateur.compiler.runs import CompiledRun, EagerBackend, OracleRun, Weights
from secateur.passes.attend_in_windows import attend_in_windows, position_input, window_of
from secateur.passes.edit import is_call, layer_index
from secateur.passes.recipe_file import load_recipe
from secateur.runtime.errors import UserError
from secateur.runtime.request import Request
from secateur.runtime.session import Session

from . import tiny_gemma3, tiny_model
from .layout_checks import check_found
from .test_shrinking_caches import write_recipe
from .tiny_gemma3 import load_processor

WINDOW, IMAGES, TEXT, NEW = 20, 2, 56, 8


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, of which all but the third attend through a window of 20 tokens."""
    return tiny_gemma3.write_model(tmp_path_factory.mktemp("windows") / "model", text={"sliding_window": WINDOW})


@pytest.fixture(scope="module")
def trace(source: Path) -> Any:
    return trace_model(read_source(source), Geometry(batch=3, images=IMAGES, text_tokens=TEXT, new_tokens=NEW))


@pytest.fixture(scope="module")
def hold(trace: Any) -> Callable[..., tuple[Any, Parity]]:
    """``hold(recipe)`` -> the pruned programs, and what came of holding them against the oracle."""
    model = load_recording_model(trace.source)

    def run(recipe: str, trace: Any = trace, model: Any = model) -> tuple[Any, Parity]:
        row = load_recipe(recipe)
        pruned = prune(trace, row, 0.5 if row.stages else None, expose=True)
        told = outline(pruned.job, pruned.programs)
        weights = Weights(trace.source, trace.model)
        ours = CompiledRun(told, Request(EagerBackend(pruned.programs.programs, weights), told))
        found = Parity()
        rows = choose_rows(random_rows(told, 12, NEW, seed=3))
        compare_runs(ours, OracleRun(Oracle(pruned.job, model)), rows, 3, found)
        return pruned, found

    return run


def choose_rows(rows: list[RowInput]) -> list[RowInput]:
    """The longest row, the shortest, and one between them."""
    rows = sorted(rows, key=lambda row: len(row.input_ids))
    assert len(rows[-1].input_ids) > max(2 * WINDOW, len(rows[0].input_ids) + WINDOW)
    return [rows[-1], rows[0], rows[len(rows) // 2]]


def planes(pruned: Any) -> list[str]:
    """Segments whose cached positions prefill hands to decode."""
    out = [n for n in pruned.programs["prefill"].outputs if n.startswith("positions.")]
    assert out == [f"positions.{n[10:]}" for n in pruned.programs["decode"].inputs if n.startswith("positions_")]
    return [name.removeprefix("positions.") for name in out]


@pytest.mark.parametrize("given", [False, True])
def test_the_rule_is_transformers_own(given: bool) -> None:
    """Queries and keys of one row, and a new token before cached ones."""
    from transformers.masking_utils import sliding_window_overlay

    positions = torch.tensor([[0, 1, 4, 5, 9, 10, 11, 12], [0, 3, 4, 5, 6, 7, 8, 30]])
    numbers = positions if given else torch.arange(8).expand(2, 8)
    mask = ops.causal_mask(torch.zeros(2, dtype=torch.int64), 8, 8, 5, None, positions if given else None)
    for row in range(2):
        near = sliding_window_overlay(5)(0, 0, numbers[row][:, None], numbers[row][None])  # type: ignore[arg-type]
        assert torch.equal(mask[row, 0], near & torch.ones(8, 8, dtype=torch.bool).tril())
    # Six slots of the prompt, two of new tokens, of which the second is the query.
    known = torch.cat([positions[:, :6], torch.full((2, 3), ops.BEHIND)], 1)
    own = positions[:, 5:6] + 2
    seen = ops.causal_mask(torch.full((2,), 7), 1, 9, 5, None, own, known)[:, 0, 0]
    whole = torch.cat([positions[:, :6], positions[:, 5:6] + 1, own], 1)
    for row in range(2):
        near = sliding_window_overlay(5)(0, 0, own[row], whole[row])  # type: ignore[arg-type]
        assert seen[row].tolist() == [*near.tolist(), False]


@pytest.mark.parametrize(("recipe", "handed"), [("none", []), ("fastv", ["s1"]), ("divprune", []), ("pyramiddrop", [])])
def test_pruned_rows_see_as_far_as_the_oracles(
    hold: Callable[..., tuple[Any, Parity]], recipe: str, handed: list[str]
) -> None:
    """Rows of different length side by side; decode goes on past the window. Where what is left is numbered afresh,
    slots tell."""
    pruned, found = hold(recipe)
    assert planes(pruned) == handed
    check_found(found)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_caches_that_shrink_keep_the_positions_of_what_is_left(
    hold: Callable[..., tuple[Any, Parity]], tmp_path: Path, positions: str
) -> None:
    """Two stages that read a sliding layer's attention, behind one in front of the decoder."""
    recipe = write_recipe(tmp_path / "shrinks.yaml", positions=positions, vision=positions == "original")
    pruned, found = hold(recipe)
    assert planes(pruned) == (["s0", "s1", "s2"] if positions == "original" else ["s0", "s1"])
    check_found(found)


@pytest.mark.parametrize(
    ("decoder", "text"),
    [
        ("mistral", {"sliding_window": WINDOW}),
        ("qwen2", {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    ],
)
def test_other_decoders_with_windows(
    hold: Callable[..., tuple[Any, Parity]], tmp_path: Path, decoder: str, text: dict[str, Any]
) -> None:
    path = tiny_model.write_model(tmp_path / "model", decoder=decoder, layers=3, text=text)
    trace = trace_model(read_source(path), Geometry(batch=3, images=IMAGES, text_tokens=TEXT, new_tokens=NEW))
    pruned, found = hold("fastv", trace, load_recording_model(trace.source))
    assert planes(pruned) == ["s1"]
    check_found(found)


@pytest.mark.parametrize(("span", "windows"), [(WINDOW, set()), (WINDOW + 1, {0, 1, 3})])
def test_only_windows_that_hide_something_are_left(trace: Any, span: int, windows: set[int]) -> None:
    """A row's last token sees its first through a window as long as the row, and not through one shorter by one."""
    layers = trace.source.family.decoder_layers
    row = [Segment("s0", 0, 2, 60, 68, 0), Segment("s1", 2, 4, 50, 58, 10)]
    decoder = attend_in_windows(trace.programs["decoder"], layers, row, ["s1"], span)
    attends = [n for n in decoder.graph.nodes if is_call(n, ops.attention)]
    assert {layer_index(n, layers) for n in attends if window_of(n) is not None} == windows
    assert {layer_index(n, layers) for n in position_input(decoder.graph).users if n in attends} == windows & {3}


def test_bundles_answer_through_windows(source: Path, tmp_path: Path) -> None:
    """An unpruned one as transformers' own generate, whose caches forget; a pruned one as the oracle."""
    from transformers import AutoModelForImageTextToText

    geometry = Geometry(images=1, text_tokens=TEXT, new_tokens=NEW)
    bundle = pipeline.compile(source, tmp_path / "none", recipe="none", geometry=geometry)
    prompt = "a quick fox <start_of_image> jumps over dogs?"
    image = tiny_gemma3_picture()
    with Session(bundle, threads=1) as session:  # type: ignore[arg-type]
        answer = session.generate([prompt], [[image]], ignore_eos=True)[0]
    feed = load_processor(source)(text=prompt, images=[image], return_tensors="pt")
    assert feed["input_ids"].shape[1] > 2 * WINDOW
    model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        want = model.generate(**feed, do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW)
    assert answer.tokens == want[0, feed["input_ids"].shape[1] :].tolist()
    assert len(set(answer.tokens)) > 2

    pruned = pipeline.compile(source, tmp_path / "fastv", recipe="fastv", keep=0.5, geometry=geometry)
    found = pipeline.verify(pruned, source, threads=1, rows=3).parity  # type: ignore[arg-type]
    assert found is not None
    check_found(found)


def tiny_gemma3_picture() -> Any:
    from PIL import Image

    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (36, 40, 3), dtype=np.uint8))


def test_engines_are_built_of_windows(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    geometry = Geometry(batch=2, images=1, text_tokens=TEXT, new_tokens=NEW)
    bundle = pipeline.compile(
        source, tmp_path / "engines", recipe="fastv", keep=0.5, geometry=geometry, target="tensorrt-rtx", dtype="fp16"
    )
    assert (bundle / "decode.engine").is_file()  # type: ignore[operator]


def test_windows_are_refused_where_positions_have_several_axes(trace: Any) -> None:
    decoder = trace.programs["decoder"]
    decoder = decoder.with_module(decoder.edit())
    root = position_input(decoder.graph)
    root.meta["val"] = root.meta["val"].expand(3, *root.meta["val"].shape)
    row = [Segment("s0", 0, 4, 60, 68, 0)]
    with pytest.raises(UserError, match="layer 0 attends through a window of 20, shorter than a row of 68 slots"):
        attend_in_windows(decoder, trace.source.family.decoder_layers, row, [], 68)
