"""The omni demo's table: sample answers side by side, accuracy on held-out clips, what each bundle costs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from secateur.runtime.schema import PROGRAMS
from secateur.runtime.sizes import size_text
from secateur.tools.demo.ask import Bundle
from secateur.tools.demo.omni.questions import Asked
from secateur.tools.demo.omni.run import measure_kinds
from secateur.tools.demo.show import mark_answer, tokens_text, with_ratio
from secateur.tools.inspect import flops_text


def draw_table(bundles: Sequence[Bundle], questions: Sequence[Asked], samples: int) -> Table:
    """One table; the first bundle is the unpruned one, the first ``samples`` questions are shown one by one."""
    whole = bundles[0]
    table = Table(
        title="The same clips, unpruned and pruned", title_justify="left", title_style="bold", box=SIMPLE_HEAD,
        caption="In brackets: how many times less than unpruned.", caption_justify="left", pad_edge=False,
    )  # fmt: skip
    for column in ("", "question", "expected", *(bundle.label for bundle in bundles)):
        table.add_column(column)
    for index, asked in enumerate(questions[:samples]):
        table.add_row(asked.name, asked.text, asked.answer, *(mark_answer(b.asked[index]) for b in bundles))
    table.add_section()
    measured = [measure_kinds(bundle.asked[samples:], questions[samples:]) for bundle in bundles]
    for kind in measured[0]:
        table.add_row(
            "", f"right, {kind.replace('_', ' ')}", "", *(f"{100 * shares[kind]:.1f} %" for shares in measured)
        )
    table.add_section()
    table.add_row("", "video and audio tokens", "", *(tokens_text(b.visual_tokens) for b in bundles))
    rows: list[tuple[str, list[tuple[str, float]]]] = [
        (f"{name} FLOPs", [(flops_text(b.flops[name]), b.flops[name]) for b in bundles]) for name in PROGRAMS
    ]
    rows.append(("KV caches", [(size_text(b.cache_bytes), b.cache_bytes) for b in bundles]))
    for label, values in rows:
        ratios = (with_ratio(text, values[0][1], own) for text, own in values[1:])
        table.add_row("", label, "", values[0][0], *ratios)
    table.caption = f"{table.caption} {whole.session.manifest.geometry.audio_seconds} s of video with sound a clip."
    return table
