"""How every recipe stands to the floor (``random``) and the ceiling (``oracle-keep``), and why where it is outside."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from secateur.compiler.pipeline import RECIPES, Recipe
from secateur.recipes import Site, Stage, Term
from secateur.tools.sweep.cells import ORACLE, ORACLE_COMPACT, Cell

Record = dict[str, Any]
FLOOR = "random"
CONTROL = ", control"
SIGNIFICANT = 0.05
FIRST, LAST, DEPTH = 12, 24, 32
"""Where the control's first and last decoder stage stand: at these layers of a decoder of so many."""
LAST_TOWER = 18
"""From which of CLIP's 24 layers on the control leaves stages in the tower."""
EXPLAINED = 0.5
"""The part of the distance to ``random`` that a control must win back to be an explanation."""


@dataclass(frozen=True)
class Control:
    """An experiment that tells why a recipe loses: what it changes, in the table and as an explanation."""

    change: Callable[[Recipe], Recipe | None]
    shown: str
    why: str


@dataclass(frozen=True)
class Standing:
    """A recipe at one keep ratio against a bound: questions only it, and only the bound, answers right."""

    row: str
    ratio: float
    accuracy: float
    bound: float
    won: int
    lost: int

    @property
    def p(self) -> float:
        """Two-sided sign test over the questions that exactly one of the two answers right."""
        return sign_test(self.won, self.lost)


def sign_test(won: int, lost: int) -> float:
    """How likely a fair coin parts ``won + lost`` throws at least this unevenly."""
    throws, fewer = won + lost, min(won, lost)
    return min(1.0, 2.0 * sum(math.comb(throws, i) for i in range(fewer + 1)) / 2**throws)


def compare(records: Sequence[Record], bound: str) -> list[Standing]:
    """Every recipe at every ratio below 1 at which ``bound`` was asked the same questions."""
    bounds = {r["ratio"]: r for r in records if r["row"] == bound and r["ratio"] < 1.0}
    found = []
    for record in records:
        other = bounds.get(record["ratio"])
        if other is None or record["row"] in (FLOOR, ORACLE, ORACLE_COMPACT, "none") or is_control(record):
            continue
        pairs = list(zip(record["right"], other["right"], strict=True))
        won, lost = pairs.count(("1", "0")), pairs.count(("0", "1"))
        found.append(
            Standing(record["row"], record["ratio"], record["accuracy"], other["accuracy"], won, lost)
        )  # fmt: skip
    return found


def under_floor(records: Sequence[Record]) -> list[Standing]:
    """Those that lose to the floor by more than chance."""
    return [s for s in compare(records, FLOOR) if s.won < s.lost and s.p < SIGNIFICANT]


def level_with_floor(records: Sequence[Record]) -> list[Standing]:
    """Those at or under the floor, by no more than chance."""
    return [s for s in compare(records, FLOOR) if s.accuracy <= s.bound and s not in under_floor(records)]


def over_ceiling(records: Sequence[Record]) -> list[Standing]:
    """Those that beat the ceiling by more than chance."""
    return [s for s in compare(records, ORACLE) if s.won > s.lost and s.p < SIGNIFICANT]


def control_cells(records: Sequence[Record]) -> list[Cell]:
    """For every cell under the floor its control, where it has one."""
    return [
        Cell(s.row + CONTROL, replace(changed, name=s.row + CONTROL), s.ratio)
        for s in under_floor(records)
        if (changed := _control_of(s.row).change(RECIPES[s.row]))
    ]


def move_later(recipe: Recipe) -> Recipe | None:
    """The recipe with its stages inside the decoder spread from layer 12 to 24 of 32; None where it has none."""
    inside = [i for i, stage in enumerate(recipe.stages) if _is_inside(stage.site)]
    if not inside:
        return None
    stages = list(recipe.stages)
    for step, index in enumerate(inside):
        layer = FIRST + round((LAST - FIRST) * step / max(len(inside) - 1, 1))
        stages[index] = replace(stages[index], site=Site("decoder.layer", layer, DEPTH))
    return replace(recipe, stages=tuple(stages))


def _change_stages(change: Callable[[Stage], Stage]) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, stages=tuple(map(change, recipe.stages)))


def _cluster_all(stage: Stage) -> Stage:
    assert stage.select is not None, "PACT's one stage selects"
    options = {**stage.select.options, "candidates": 1.0}
    return replace(stage, select=replace(stage.select, options=options))


def _score_read_layer(stage: Stage) -> Stage:
    """Signals of the tower layer the projector reads instead of the one after it."""
    signals = {
        name: {key: "read" if (key, value) == ("layer", "next") else value for key, value in options.items()}
        for name, options in stage.signals.items()
    }
    return replace(stage, signals=signals)


def _score_by_cls(stage: Stage) -> Stage:
    return replace(stage, site=Site("projector.out"), score=Term("min_max", of=(Term("cls_attention_mean"),)))


def _prune_last(recipe: Recipe) -> Recipe:
    """Without the cuts before the last tower layers."""
    stages = [s for s in recipe.stages if s.site.layer is None or s.site.layer >= LAST_TOWER]
    return replace(recipe, stages=tuple(stages))


def _exit_later(stage: Stage) -> Stage:
    return replace(stage, site=Site("decoder.layer", LAST, DEPTH))


def _compare_rows(stage: Stage) -> Stage:
    return replace(stage, score=Term("frame_change", {"compare": "previous"}), select=Term("top_k"))


def is_control(record: Record) -> bool:
    return str(record["row"]).endswith(CONTROL)


def _control_of(row: str) -> Control:
    return _CONTROLS.get(row, _LATER)


def _is_inside(site: Site) -> bool:
    return site.kind == "decoder.layer" and bool(site.layer)


def write(records: Sequence[Record]) -> str:
    """The page's section on bounds."""
    return "\n\n".join(part for part in (_write_floor(records), _write_ceiling(records)) if part)


def _write_floor(records: Sequence[Record]) -> str:
    under, level = under_floor(records), level_with_floor(records)
    compared = len(compare(records, FLOOR))
    if not compared:
        return ""
    text = f"""## At or under `random`

{compared} cells were compared with `random` at the same keep ratio, question by question. {len(under)} answer fewer
right by more than chance (two-sided sign test, p < {SIGNIFICANT:g})."""
    if level:
        listed = ", ".join(f"{s.row} {s.ratio:g} ({_percent(s.accuracy)} to {_percent(s.bound)})" for s in level)
        text += f"\nNo more right answers than `random`, and no fewer than chance allows: {listed}."
    if not under:
        return text
    lines = ["| recipe | keep | accuracy | random | control |", "| --- | ---: | ---: | ---: | --- |"]
    found = {(r["row"], r["ratio"]): float(r["accuracy"]) for r in records if is_control(r)}
    for s in under:
        accuracy = found.get((s.row + CONTROL, s.ratio))
        shown = "" if accuracy is None else f"{_percent(accuracy)}, {_control_of(s.row).shown}"
        lines.append(f"| {s.row} | {s.ratio:g} | {_percent(s.accuracy)} | {_percent(s.bound)} | {shown} |")
    reasons = []
    for control in dict.fromkeys(_control_of(s.row) for s in under):
        rows = ", ".join(dict.fromkeys(f"`{s.row}`" for s in under if _control_of(s.row) is control))
        reasons.append(f"* {rows}: {control.why}")
    unexplained = [f"{s.row} {s.ratio:g}" for s in under if not _is_explained(s, records)]
    left = (
        f"**Neither level with `random` nor half of the distance to it won back: {', '.join(unexplained)}.**"
        if unexplained
        else "Every control comes level with `random` or wins back at least half of the distance to it."
    )
    table, why = "\n".join(lines), "\n".join(reasons)
    return "\n\n".join(part for part in (text, table, why, left) if part)


def _is_explained(lost: Standing, records: Sequence[Record]) -> bool:
    """Whether the control comes level with the floor, or wins back the better part of the distance to it."""
    renamed = [{**r, "row": lost.row} for r in records if (r["row"], r["ratio"]) == (lost.row + CONTROL, lost.ratio)]
    if not renamed:
        return False
    floor = [r for r in records if r["row"] == FLOOR]
    won_back = renamed[0]["accuracy"] - lost.accuracy
    return not under_floor([*floor, *renamed]) or won_back >= EXPLAINED * (lost.bound - lost.accuracy)


def _write_ceiling(records: Sequence[Record]) -> str:
    over = over_ceiling(records)
    if not over:
        return ""
    ratios = sorted({s.ratio for s in over}, reverse=True)
    ceilings = {r["ratio"]: r for r in records if r["row"] == ORACLE}
    lines = []
    for ratio in ratios:
        kinds = ceilings[ratio]["kinds"]
        worst = min(kinds, key=lambda kind: float(kinds[kind]))
        names = ", ".join(f"{s.row} {_percent(s.accuracy)}" for s in over if s.ratio == ratio)
        lines.append(
            f"* keep {ratio:g}: the ceiling answers {_percent(ceilings[ratio]['accuracy'])} %, worst on "
            f"*{worst.replace('_', ' ')}* ({_percent(kinds[worst])} %). Above it: {names}."
        )
    return f"""## Over `{ORACLE}`

The ceiling takes the patches with most ink before the decoder. That is as good as can be while there is room for all
digits. With less room it thins digits out and leaves no background, which counting needs; a recipe that spreads its
choice, merges what it drops, or cuts inside the decoder, whose first layers have then read every patch, can know more:

{chr(10).join(lines)}"""


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


_LATER = Control(
    move_later,
    "stages further in",
    "ranks by what the words of the question attend to, from the published layer 2 or 3 of 32 on. The demo decoder has "
    "8 layers, so that the first cuts fall before its layers 1 and 2. There the words have found what the question "
    "names and not yet what it asks for: questions about the digit beside another lose most. Control: the same "
    f"stages, spread over layers {FIRST} to {LAST} of {DEPTH}.",
)
_READ_LAYER = Control(
    _change_stages(_score_read_layer),
    "signals of the layer read",
    "scores with the tower layer after the one the projector reads, which CLIP was trained with. The demo tower's was "
    "not: nothing it was trained for lies behind it, so its attention is arbitrary. Control: the layer read.",
)
_LAST_LAYERS = Control(
    _prune_last,
    "cuts behind the last layer",
    "takes tokens out after every layer or every second one of the tower. CLIP gives LLaVA 23 layers, the demo tower "
    "4: a quarter of the tokens, or more, goes before patches know what they are part of. Control: the same cuts, all "
    "behind the last layer. (At keep 0.5 ToMe's matching has to take every second patch, whatever it resembles.)",
)
_CACHES_STAY = Control(
    lambda recipe: replace(recipe, cache="ragged"),
    "caches as the layers saw them",
    "takes every visual token out of the caches as well before the answer's second token is made. The demo model was "
    "trained with them in sight: it names the right word and then does not end. Control: caches keep what their layers "
    "saw.",
)
_CONTROLS = {
    "cdpruner": Control(
        _change_stages(_score_by_cls),
        "relevance from CLS attention",
        "multiplies diversity by relevance to the question, in CLIP's space of images and texts. The nearest thing the "
        "demo model has, its decoder's embeddings, was never trained to bring the two together. Control: the same "
        "kernel and search with CLS attention as relevance.",
    ),
    "crossget": _LAST_LAYERS,
    "dycoke": Control(
        _change_stages(_compare_rows),
        "rows compared one by one",
        "is made for video: of four frames the first stays whole. For a single picture its rows of patches stand in "
        "for frames, and whole rows of background stay. Control: every row against the one before, no row ahead.",
    ),
    "flowcut": _LAST_LAYERS,
    "pact": Control(
        _change_stages(_cluster_all),
        "every token a candidate",
        "first drops 45 % of the tokens by what the mean visual query attends to. Most patches of these scenes are "
        "background, so is the mean query, and it attends to background: the digits go first. Control: no token is "
        "dropped by that score, the clusters alone choose.",
    ),
    "prumerge": _READ_LAYER,
    "prumerge_plus": Control(
        lambda recipe: _change_stages(_score_read_layer)(
            _change_stages(lambda stage: replace(stage, score=Term("cls_attention_mean")))(recipe)
        ),
        "signals of the layer read, no grid",
        "gives three quarters of its places to an even grid, which leaves a digit a patch or two when few are kept, "
        "and scores the others with the untrained layer that `prumerge` uses. Control: the layer read, no grid.",
    ),
    "recoverable": _READ_LAYER,
    "seats": _CACHES_STAY,
    "seats_qwen3_omni": _CACHES_STAY,
    "tome": _LAST_LAYERS,
    "visual_exit": Control(
        _change_stages(_exit_later),
        f"exit before layer {LAST} of {DEPTH}",
        "drops every visual token half way through the decoder, whatever the keep ratio; that layer is our choice. "
        "Control: three quarters of the way.",
    ),
}
