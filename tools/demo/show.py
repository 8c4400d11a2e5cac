"""The demo's table: answers side by side, and beneath them what each bundle costs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from secateur.runtime.schema import PROGRAMS
from secateur.runtime.sizes import size_text
from secateur.tools.demo.ask import TIMES, Asked, Bundle, Question
from secateur.tools.inspect import flops_text

LABELS = {"ttft": "first token", "tpot": "next token", "decode": "decode step"}


def draw_table(bundles: Sequence[Bundle], questions: Sequence[Question]) -> Table:
    """One table; the first bundle is the unpruned one, ratios say how many times less the others take."""
    whole = bundles[0]
    table = Table(
        title="The same questions, unpruned and pruned", title_justify="left", title_style="bold", box=SIMPLE_HEAD,
        caption="In brackets: how many times less than unpruned. Times are medians, taken in turn.",
        caption_justify="left", pad_edge=False,
    )  # fmt: skip
    for column in ("", "question", "expected", *(bundle.label for bundle in bundles)):
        table.add_column(column)
    picture = ""
    for index, question in enumerate(questions):
        if picture != question.image.stem:
            table.add_section()
        picture = question.image.stem
        table.add_row(Text(picture), question.text, question.answer, *(mark_answer(b.asked[index]) for b in bundles))
    table.add_section()
    table.add_row("", "answered right", "", *(f"{sum(a.right for a in b.asked)} of {len(questions)}" for b in bundles))
    table.add_row("", "visual tokens", "", *(tokens_text(b.visual_tokens) for b in bundles))
    rows: list[tuple[str, list[tuple[str, float]]]] = [
        (f"{LABELS.get(name, name)} FLOPs", [(flops_text(b.flops[name]), b.flops[name]) for b in bundles])
        for name in PROGRAMS
    ]
    rows.append(("KV caches", [(size_text(b.cache_bytes), b.cache_bytes) for b in bundles]))
    if whole.seconds:
        rows += [
            (f"{LABELS.get(name, name)} time", [(f"{b.seconds[name] * 1e3:.2f} ms", b.seconds[name]) for b in bundles])
            for name in TIMES
        ]
    for label, values in rows:
        first, *others = values
        table.add_row("", label, "", first[0], *(with_ratio(text, first[1], own) for text, own in others))
    return table


def mark_answer(asked: Asked) -> Text:
    """Green with a tick, or red with a cross."""
    return Text(f"{'✓' if asked.right else '✗'} {asked.text}", style="green" if asked.right else "red")


def tokens_text(segments: Sequence[tuple[int, int]]) -> str:
    """``196 in 1 layer, 49 in 7``."""
    (layers, tokens), *others = segments
    first = f"{tokens} in {layers} layer{'s' if layers > 1 else ''}"
    return ", ".join([first, *(f"{tokens} in {layers}" for layers, tokens in others)])


def with_ratio(text: str, whole: float, own: float) -> str:
    """``text`` and how many times less ``own`` is than ``whole``."""
    return f"{text} ({whole / own:.2f}×)" if own else text
