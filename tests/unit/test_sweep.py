"""`secateur sweep`: the questions it takes, the cells it walks, goes on with and survives, and what it writes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secateur.runtime.errors import UserError
from secateur.tools.sweep import frontier, page
from secateur.tools.sweep.cells import Cell, choose_recipes, list_cells
from secateur.tools.sweep.data import is_right, read_jsonl, read_questions
from secateur.tools.sweep.engine import Engine, add_agreement
from secateur.tools.sweep.verb import run_sweep


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """``write(*lines)``: a JSONL file of texts or objects beside two small pictures, a.png and b.png."""
    from PIL import Image

    for seed, name in enumerate(("a.png", "b.png")):
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)

    def write(*lines: Any) -> Path:
        path = tmp_path / "questions.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
        return path

    return write


def ask(image: Any = "a.png", question: Any = "what?", answer: Any = "yes", **more: Any) -> dict[str, Any]:
    return {"image": image, "question": question, "answer": answer, **more}


def test_lines_become_questions(write: Callable[..., Path]) -> None:
    path = write(ask(id=7), "", ask(["b.png"], "why?"), "not read")
    found = read_jsonl(path, 2)
    assert [(q.text, q.answer, q.where) for q in found.asked] == [
        ("what?", "yes", f"{path}:1"),
        ("why?", "yes", f"{path}:3"),
    ]
    assert found.asked[1].images == (path.parent / "b.png",)
    assert found.images == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a line of JSON"),
        ("[1]", "not a JSON object"),
        ({"image": "a.png", "answer": "x"}, "no field 'question' (available: image, answer)"),
        ({"question": "x", "answer": "x"}, "no field 'image' (available: question, answer)"),
        ({"image": "a.png", "question": "x"}, "no field 'answer', or an empty one; give the expected text"),
        (ask(answer=" "), "no field 'answer', or an empty one"),
        (ask(answer=3), "question and answer must be text"),
        (ask(image=[]), "image must be a path or a list of paths"),
        (ask(image="c.png"), "no image "),
        (ask(image=["a.png", "b.png"]), "2 images, "),
    ],
)
def test_a_bad_line_is_named(write: Callable[..., Path], line: Any, message: str) -> None:
    path = write(ask(), line)
    with pytest.raises(UserError) as caught:
        read_jsonl(path, None)
    assert str(caught.value).startswith(f"{path}:2: {message}")


def test_no_questions_are_an_error(write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no question in it"):
        read_jsonl(write(""), None)
    with pytest.raises(UserError, match="cannot read it: No such file"):
        read_questions(str(tmp_path / "absent.jsonl"), None)


def test_the_digest_follows_texts_answers_and_pixels(write: Callable[..., Path], tmp_path: Path) -> None:
    before = read_jsonl(write(ask()), None).digest
    assert read_jsonl(write(ask(id=1)), None).digest == before
    assert read_jsonl(write(ask(answer="no")), None).digest != before
    path = write(ask())
    (tmp_path / "a.png").write_bytes((tmp_path / "b.png").read_bytes())
    assert read_jsonl(path, None).digest != before


@pytest.mark.parametrize(
    ("given", "wanted", "right"),
    [("Yes.", "yes", True), (" two  cups ", "Two cups", True), ("yes no", "yes", False), ("", "yes", False)],
)
def test_answers_are_compared_as_text(given: str, wanted: str, right: bool) -> None:
    assert is_right(given, wanted) is right


def test_recipes_are_what_the_other_verbs_take() -> None:
    stacked = "divprune:keep=0.5+fastv:keep=0.5"
    assert [recipe.name for recipe in choose_recipes(["fastv", stacked, "none"])] == ["fastv", stacked]
    with pytest.raises(UserError, match="--recipes: 'fastv' is there twice"):
        choose_recipes(["fastv", "fastv"])
    cells = list_cells(choose_recipes([stacked]), [0.5], oracle=False, budget="mean-keep")
    assert [str(cell) for cell in cells] == ["none", f"{stacked} 0.5"]
    assert cells[1].asked.mean_keep == 0.5
    assert re.fullmatch(r"[\w.=+-]+\.json", cells[1].file_name)


# One real sweep of a tiny model, and what a second one makes of it.


@pytest.fixture(scope="module")
def swept(model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The arguments of a sweep and its report: two recipes of which one does not fit the tiny model."""
    from PIL import Image

    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("sweep")
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    lines = [json.dumps(ask(f"{i}.png", f"q{i}?", "x")) for i in range(3)]
    (folder / "q.jsonl").write_text("\n".join(lines))
    (folder / "deep.yaml").write_text(
        "name: deep\nstages:\n  - {site: 'decoder.layer[20]', score: last_query_attention_mean, select: top_k, "
        "share: 0.5}\n"
    )
    how: dict[str, Any] = {
        "recipes": ["fastv", str(folder / "deep.yaml")], "keeps": [0.5], "new_tokens": 3, "text_tokens": 24,
        "repeat": 2, "out": folder / "out", "threads": 1,
    }  # fmt: skip
    report = run_sweep(model_dir(), str(folder / "q.jsonl"), **how)
    return {"how": how, "report": report, "data": str(folder / "q.jsonl"), "model": model_dir(), "out": folder / "out"}


@pytest.mark.slow
def test_a_sweep_measures_every_cell_and_survives_one_that_fails(swept: dict[str, Any]) -> None:
    report = swept["report"]
    assert [record["row"] for record in report["cells"]] == ["none", "fastv"]
    (failure,) = report["failures"]
    assert failure["cell"] == "deep 0.5"
    assert "decoder.layer[20] is beyond the last layer" in failure["reason"]
    none, fastv = report["cells"]
    assert none["agreement"] == 1.0
    assert len(fastv["answers"]) == len(fastv["right"]) == 3
    assert fastv["segments"] == [[1, 16], [3, 8]]
    assert fastv["times"]["ratio"]["prefill"] > 0
    assert frontier.flops_left(none) == 1.0 > frontier.flops_left(fastv)


@pytest.mark.slow
def test_a_sweep_writes_data_page_and_picture(swept: dict[str, Any]) -> None:
    out = swept["out"]
    assert json.loads((out / "sweep.json").read_text())["frontier"] == swept["report"]["frontier"]
    assert (out / "index.html").read_text().startswith("<!doctype html>")
    pytest.importorskip("matplotlib")
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in out.iterdir() if path.name.startswith("bundle-")]


@pytest.mark.slow
def test_a_second_sweep_measures_what_is_new(swept: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    real = Engine._measure

    def measure(self: Engine, cell: Cell, *rest: Any) -> dict[str, Any]:
        measured.append(str(cell))
        return real(self, cell, *rest)

    monkeypatch.setattr(Engine, "_measure", measure)
    how = swept["how"] | {"recipes": ["fastv"]}
    again = run_sweep(swept["model"], swept["data"], **how)
    assert measured == []
    assert again["cells"] == swept["report"]["cells"]
    run_sweep(swept["model"], swept["data"], **how, questions=2)
    assert measured == ["none", "fastv 0.5"], "other questions, other answers"
    run_sweep(swept["model"], swept["data"], **how | {"keeps": [0.5, 0.25]}, questions=2)
    assert measured[2:] == ["fastv 0.25"]


@pytest.mark.slow
def test_a_prompt_too_long_is_refused_before_anything_is_asked(swept: dict[str, Any], tmp_path: Path) -> None:
    path = Path(swept["data"]).with_name("long.jsonl")
    path.write_text(json.dumps(ask("0.png", "w" * 50)))
    with pytest.raises(UserError, match=rf"^{path}:1: the prompt has \d+ text tokens, .* compile with --text-tokens"):
        run_sweep(swept["model"], str(path), **swept["how"] | {"out": tmp_path, "recipes": ["fastv"]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keeps", "0.5,x"], "--keeps: 'x' is no number; write --keeps 0.5,0.25"),
        (["--keeps", "2"], "--keeps: 2 is out of (0, 1]"),
        (["--budget", "time"], "--budget: no budget 'time' (available: keep, mean-keep, flops-keep)"),
        (["--recipes", "fastq"], "--recipe: no recipe 'fastq'"),
        (["--oracle"], "--oracle: nobody knows the best patches of these questions; leave it out"),
    ],
)
def test_wrong_options_are_one_line(
    write: Callable[..., Path], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from secateur.tools.cli import main

    with pytest.raises(SystemExit) as caught:
        main(["sweep", "model", str(write(ask())), *arguments])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


# The page and the frontier, without a model.


def record(row: str, ratio: float, accuracy: float, left: float, **changes: Any) -> dict[str, Any]:
    return {
        "row": row, "ratio": ratio, "accuracy": accuracy, "questions": 3, "answers": ["a", "b", "c"], "times": {},
        "title": row, "link": "", "flops": {"vision": 0, "prefill": 1000 * left},
        "unpruned_flops": {"vision": 0, "prefill": 1000}, **changes,
    }  # fmt: skip


RECORDS = [
    record("none", 1.0, 0.9, 1.0),
    record("good", 0.5, 0.9, 0.6, link="https://arxiv.org/abs/1", title='a "good" <one>'),
    record("bad", 0.5, 0.5, 0.7, answers=["a", "b", "x"]),
    record("random", 0.5, 0.4, 0.5),
    record("oracle-keep", 0.25, 0.95, 0.3),
]


def report() -> dict[str, Any]:
    add_agreement(RECORDS)
    return {
        "model": "tiny & small", "model_sha256": "m", "data": "q.jsonl", "data_sha256": "d", "questions": 3,
        "repeat": 2, "budget": "keep", "failures": [{"cell": "odd 0.5", "reason": "it <broke>"}], "cells": RECORDS,
        "frontier": frontier.find_frontier(RECORDS),
    }  # fmt: skip


def test_the_frontier_is_what_nothing_beats() -> None:
    assert report()["frontier"] == ["random 0.5", "good 0.5"]
    assert [record["agreement"] for record in RECORDS] == [1, 1, pytest.approx(2 / 3), 1, 1]


class Tags(HTMLParser):
    """Counts elements, and checks that they close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "line", "rect", "circle", "path", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_escapes_what_it_is_given() -> None:
    text = page.write(report())
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert not [attrs for tag, attrs in tags.seen if tag in ("script", "link", "img", "iframe") and attrs]
    assert "tiny &amp; small" in text
    assert "it &lt;broke&gt;" in text
    assert 'title="a &quot;good&quot; &lt;one&gt;"' in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags.seen
    assert sum(tag == "tr" for tag, _ in tags.seen) == 1 + len(RECORDS)
    assert sum(tag == "circle" for tag, _ in tags.seen) == 2


def test_a_page_of_one_cell_has_axes() -> None:
    single = report() | {"cells": RECORDS[:1], "frontier": ["none"], "failures": []}
    assert '="nan' not in page.write(single)


def test_the_picture_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert frontier.plot(report(), tmp_path / "f.png") == ["f.png"]
    assert (tmp_path / "f.png").stat().st_size > 1000
