"""The verdict on a mutant: killed, survived, timed out or gone; kept on disk and held while what it rests on stays.

A kill rests on the mutated file's source and on the test file that failed; the other verdicts on the source and on all
test files near it. Before a test file judges anything it passes once on the code as it is, which also says how long it
takes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
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


class Judge:
    """Verdicts on the tree at ``root``, kept below ``work``."""

    def __init__(
        self, root: Path, work: Path, slack: float = 3.0, grace: float = 10.0, seconds_file: Path = nearest.SECONDS
    ) -> None:
        self.root, self.work, self.slack, self.grace = root, work, slack, grace
        self.seconds_file = seconds_file
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
        tests = known["tests"]
        if known["verdict"] == "killed":
            wanted = [known["killer"].partition("::")[0]]
        else:
            wanted = nearest.list_nearest(self.root, mutant.file, self.seconds)
        return known if all(tests.get(test) == digest(self.root / test) for test in wanted) else None

    def judge(self, mutant: Mutant, bench: Bench) -> Verdict:
        """Run the nearest tests, one file after another, until one fails."""
        path = self.root / mutant.file
        changed = find(mutant, path.read_text(encoding="utf-8")) if path.is_file() else None
        verdict: Verdict = {"mutant": str(mutant), "source": digest(path), "tests": {}, "seconds": 0.0}
        if changed is None:
            return self._keep(mutant, {**verdict, "verdict": "gone"})
        for test in self._walk(mutant, bench):
            limit = self.slack * self.seconds[test] + self.grace
            answer = bench.run(test, limit, 6 * limit, (mutant.file, changed))
            verdict["tests"][test] = digest(self.root / test)
            verdict["seconds"] = round(verdict["seconds"] + answer.seconds, 1)
            if answer.late or answer.code:
                killer = answer.failed or f"{test}::(the process ended with {answer.code})"
                kind = "timed out" if answer.late else "killed"
                return self._keep(mutant, {**verdict, "verdict": kind, "killer": killer})
        return self._keep(mutant, {**verdict, "verdict": "survived"})

    def _walk(self, mutant: Mutant, bench: Bench) -> Iterator[str]:
        """Test files from near to far, each measured before it is used."""
        done: set[str] = set()
        while left := [t for t in nearest.list_nearest(self.root, mutant.file, self.seconds) if t not in done]:
            if self._check(left[0], bench):
                done.add(left[0])
                yield left[0]

    def _check(self, test: str, bench: Bench) -> bool:
        """Whether ``test`` passes on the code as it is within a minute; one that needs longer is not near again."""
        state = [digest(self.root / test), self._code]
        if self._passed.get(test) == state:
            return True
        answer = bench.run(test, nearest.MINUTE + 5, 10 * nearest.MINUTE)
        if answer.code and not answer.late:
            bench.log.replace(self.work / "failed.log")
            raise RuntimeError(f"{answer.failed or test} fails on the code as it is; see {self.work / 'failed.log'}")
        self.seconds[test] = 2 * nearest.MINUTE if answer.late else round(answer.seconds, 1)
        nearest.write_seconds(self.seconds, self.seconds_file)
        self._passed[test] = state
        (self.work / "passed.json").write_text(json.dumps(self._passed, indent=0), encoding="utf-8")
        return not answer.late

    def _keep(self, mutant: Mutant, verdict: Verdict) -> Verdict:
        (self.work / f"{mutant.id}.json").write_text(json.dumps(verdict, indent=1) + "\n", encoding="utf-8")
        return verdict

    @staticmethod
    def _read(path: Path) -> Any:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
