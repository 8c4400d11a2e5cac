"""Words that tests add to the vocabulary, which belongs to the process: they must not meet the next file's."""

from __future__ import annotations

from secateur.passes.methods import own
from secateur.passes.methods.registry import MERGES, SCORES, SELECTORS


def forget_own() -> None:
    """Take out of the vocabulary everything that is not this package's."""
    for key in list(own._OWN):
        role, _, name = key.partition(" ")
        del own._OWN[key], {"score": SCORES, "selector": SELECTORS, "merge": MERGES}[role][name]
