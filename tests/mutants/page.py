"""``docs/mutants.md``: how many mutants the nearest tests kill, and what is known of the others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .nearest import LIMIT
from .sample import Mutant, group

REASONS = Path(__file__).with_name("reasons.json")
KINDS = ("killed", "timed out", "equivalent", "survived", "gone", "not judged")


def read_reasons(path: Path = REASONS) -> dict[str, dict[str, str]]:
    """mutant -> {"kind": "equivalent" or "timed out", "why": …}, written by hand."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def classify(verdict: Mapping[str, Any], reason: Mapping[str, str] | None) -> str:
    """A survivor that is known to change nothing is an equivalent; what a test kills is killed, whatever was thought.

    >>> classify({"verdict": "survived"}, {"kind": "equivalent", "why": "the clamp does it again"})
    'equivalent'
    >>> classify({"verdict": "killed"}, {"kind": "equivalent", "why": "the clamp does it again"})
    'killed'
    """
    if verdict["verdict"] == "survived" and reason is not None and reason["kind"] == "equivalent":
        return "equivalent"
    return str(verdict["verdict"])


def share(kinds: Iterable[str]) -> float:
    """Killed, of those that were judged and are not equivalent; a time-out is not counted as killed."""
    counted = [kind for kind in kinds if kind not in ("equivalent", "gone", "not judged")]
    return counted.count("killed") / len(counted) if counted else 1.0


def list_faults(kinds: Mapping[str, str], reasons: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What is not in order with the reasons: verdicts that want one and have none, and reasons of what was killed."""
    faults = [f"{name} timed out, and reasons.json says nothing of it" for name, kind in kinds.items()
              if kind == "timed out" and reasons.get(name, {}).get("kind") != "timed out"]  # fmt: skip
    return faults + [
        f"{name} is called equivalent in reasons.json, and a test kills it"
        for name, kind in kinds.items()
        if kind == "killed" and reasons.get(name, {}).get("kind") == "equivalent"
    ]


def table(mutants: list[Mutant], kinds: Mapping[str, str]) -> list[list[str]]:
    """Header, a line per folder, and the sum."""
    rows = [["folder", "drawn", *KINDS, "killed of the rest"]]
    for name, some in [*group(mutants), ("all", mutants)]:
        here = [kinds.get(mutant.id, "not judged") for mutant in some]
        counts = [str(here.count(kind)) for kind in KINDS]
        shown = "" if "not judged" in here else f"{100 * share(here):.1f} %"  # those that survive take longest
        rows.append([name, str(len(some)), *counts, shown])
    return rows


def write(
    mutants: list[Mutant], drawn: Mapping[str, int], verdicts: Mapping[str, Mapping[str, Any]],
    reasons: Mapping[str, Mapping[str, str]],
) -> str:  # fmt: skip
    """The page; a mutant without a verdict is not judged."""
    kinds = {mutant.id: "not judged" for mutant in mutants}
    kinds |= {name: classify(verdict, reasons.get(name)) for name, verdict in verdicts.items()}
    rows = table(mutants, kinds)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    longest = max((float(verdict["seconds"]) for verdict in verdicts.values()), default=0.0)
    total = sum(float(verdict["seconds"]) for verdict in verdicts.values())
    text = [
        "# Mutants", "", *HEAD.format(count=len(mutants), limit=LIMIT, **drawn).splitlines(), "", *lines, "",
        f"The tests of all mutants took {total / 60:.0f} minutes of one core, those of one mutant at most "
        f"{longest:.0f} seconds.", "",
    ]  # fmt: skip
    for kind, title in TITLES.items():
        here = [mutant for mutant in mutants if kinds[mutant.id] == kind]
        text += [f"## {title} ({len(here)})", ""]
        for mutant in here:
            why = reasons.get(mutant.id, {}).get("why", "")
            text.append(
                f"* {mutant.id} `{mutant.file}`, {mutant.operator} ({mutant.occurrence}): ``{mutant.text}``"
                + (f"<br>{why}" if why else "")
            )
        text += [""] if here else ["None.", ""]
    return "\n".join(text).rstrip() + "\n"


TITLES = {"timed out": "Timed out", "equivalent": "Equivalent", "survived": "Survived", "gone": "Gone",
          "not judged": "Not judged yet"}  # fmt: skip
HEAD = """\
Written by `make mutants`. A mutant is a small change of the code: another operator, another number, a condition turned
round, a loop that runs no more. A test near it should fail. {count} mutants were drawn once (seed {seed}) of the
{lines} lines of `passes/`, `runtime/` and `exporters/lowering*` that an operator of
[cosmic-ray](https://github.com/sixty-north/cosmic-ray) changes: lines uniformly, then one of the operators that apply
on the line. They are kept in `tests/mutants/sample.json`, and found again by the text of their line. Left out are `|`
in type annotations, `if TYPE_CHECKING`, and changes that Python refuses to compile or warns of. Strings are not
changed; numbers and operators inside messages are.

Each mutant meets the test files nearest to its module, one at a time until one fails: by the number of imports between
them, then by name, then by time, at most {limit:.0f} seconds of one core together. *Equivalent* are those that change
nothing which can be seen, *gone* those whose line has been rewritten since; a time-out does not count as killed."""
