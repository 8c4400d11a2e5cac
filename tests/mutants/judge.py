"""The verdict on a mutant: killed, survived, timed out or gone; kept on disk and held while what it rests on stays.

A kill rests on the mutated file's source and on the test that failed; other verdicts on the source and on all test
files near it. A test that kills is run once on the code as it is; where it fails there too, its file judges nothing.
"""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

from . import nearest
from .bench import Bench
from .sample import Mutant, find

Verdict = dict[str, Any]


def digest(*paths: Path) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(path.read_bytes() if path.is_file() else b"")
    return found.hexdigest()[:16]


def digest_test(root: Path, test: str) -> str:
    """Of the function of ``path::name[parameters]`` as it is written; of the whole file where there is none."""
    file, _, name = test.partition("::")
    text = (root / file).read_text(encoding="utf-8") if (root / file).is_file() else ""
    wanted = name.partition("[")[0].rpartition("::")[2]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name == wanted:
            lines = text.splitlines()[
                min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1 : node.end_lineno
            ]
            text = "\n".join(lines)
            break
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Judge:
    """Verdicts on the tree at ``root``, kept below ``work``. ``failing`` are test files that fail without a mutant."""

    def __init__(
        self,
        root: Path,
        work: Path,
        slack: float = 3.0,
        grace: float = 10.0,
        limit: float = nearest.LIMIT,
        fresh: bool = False,
        seconds_file: Path = nearest.SECONDS,
    ) -> None:
        self.root, self.work, self.slack, self.grace = root, work, slack, grace
        self.limit, self.seconds_file = limit, seconds_file
        self.failing: set[str] = set()
        self.fresh = fresh
        self.seconds = nearest.read_seconds(seconds_file)
        self.work.mkdir(parents=True, exist_ok=True)
        sources = (root / folder for folder in nearest.FOLDERS)
        self._code = digest(*sorted(path for source in sources for path in source.rglob("*.py")))
        self._passed: dict[str, list[str]] = self._read(work / "passed.json") or {}

    def held(self, mutant: Mutant) -> Verdict | None:
        """The verdict of an earlier run, if it still holds."""
        known = self._read(self.work / f"{mutant.id}.json")
        if known is None or known["source"] != digest(self.root / mutant.file) or known["mutant"] != str(mutant):
            return None
        if known["verdict"] == "killed":
            return known if known.get("state") == digest_test(self.root, known["killer"]) else None
        tests = known["tests"]
        if known["verdict"] == "gone":
            return known
        return known if all(tests.get(test) == digest(self.root / test) for test in self._near(mutant)) else None

    def judge(self, mutant: Mutant, bench: Bench) -> Verdict:
        """Run the nearest tests, one file after another, until one fails that passes on the code as it is."""
        root = bench.tree  # as it was copied, whatever is edited meanwhile
        path = root / mutant.file
        changed = find(mutant, path.read_text(encoding="utf-8")) if path.is_file() else None
        verdict: Verdict = {"mutant": str(mutant), "source": digest(path), "tests": {}, "seconds": 0.0}
        if changed is None:
            return self._keep(mutant, {**verdict, "verdict": "gone"})
        before = self._read(self.work / f"{mutant.id}.json") or {}
        if not self.fresh and before.get("verdict") == "survived" and before["source"] == verdict["source"]:
            passed = {test: state for test, state in before["tests"].items() if state == digest(root / test)}
            verdict = {**verdict, "tests": passed, "seconds": before["seconds"]}
        while left := [test for test in self._near(mutant) if test not in verdict["tests"]]:
            test = left[0]
            known = self.seconds.get(test, nearest.MINUTE / self.slack)
            limit = self.slack * known + self.grace
            answer = bench.run(test, limit, 6 * limit, (mutant.file, changed))
            if answer.late and test not in self.seconds:
                self._measure(test, limit, bench)
                continue
            verdict["tests"][test] = digest(root / test)
            verdict["seconds"] = round(verdict["seconds"] + answer.seconds, 1)
            if answer.late or answer.code:
                if not answer.late and not self._passes(answer.failed or test, bench):
                    continue
                killer = answer.failed or f"{test}::(the process ended with {answer.code})"
                verdict |= {"verdict": "timed out" if answer.late else "killed", "killer": killer}
                return self._keep(mutant, {**verdict, "state": digest_test(root, killer)})
            self._note(test, answer.seconds)
        return self._keep(mutant, {**verdict, "verdict": "survived"})

    def _near(self, mutant: Mutant) -> list[str]:
        near = nearest.list_nearest(self.root, mutant.file, self.seconds, self.limit)
        return [test for test in near if test not in self.failing]

    def _measure(self, test: str, limit: float, bench: Bench) -> None:
        """How long a test file takes on the code as it is, at most ``limit``."""
        answer = bench.run(test, limit, 6 * limit)
        if answer.code and not answer.late:
            self._leave(answer.failed or test, bench)
        else:
            self._note(test, 2 * nearest.MINUTE if answer.late else answer.seconds)

    def _leave(self, test: str, bench: Bench) -> None:
        bench.log.replace(self.work / "failed.log")
        self.failing.add(test.partition("::")[0])

    def _note(self, test: str, seconds: float) -> None:
        """A file's time on a mutant that it lets pass is its time on the code as it is."""
        if test not in self.seconds:
            self.seconds[test] = round(seconds, 1)
            nearest.write_seconds(self.seconds, self.seconds_file)

    def _passes(self, test: str, bench: Bench) -> bool:
        """Whether a test, or a file, passes on the code as it is; one that does not judges nothing in this run."""
        state = [digest(bench.tree / test.partition("::")[0]), self._code]
        if self._passed.get(test) != state:
            if bench.run(test, 3 * nearest.MINUTE, 20 * nearest.MINUTE).code:
                self._leave(test, bench)
                return False
            self._passed[test] = state
            (self.work / "passed.json").write_text(json.dumps(self._passed, indent=0), encoding="utf-8")
        return True

    def _keep(self, mutant: Mutant, verdict: Verdict) -> Verdict:
        (self.work / f"{mutant.id}.json").write_text(json.dumps(verdict, indent=1) + "\n", encoding="utf-8")
        return verdict

    @staticmethod
    def _read(path: Path) -> Any:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
