"""Token ids to text while they arrive: never half a character, never part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"


class Detokenizer:
    """Turns a growing list of ids into pieces of text whose concatenation is the text of all ids.

    A tokenizer may write a token differently at the start of a text and join several tokens into one
    character, so each piece is the difference between two decodings of a short window that starts at
    tokens already written, and is held back while it ends in half a character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # first token of the window
        self._written = 0  # tokens whose text was returned

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._ids.append(token)
        return self._take(final=False)

    def flush(self) -> str:
        """What is left, even if it ends in half a character."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        before = self._decode(self._ids[self._start : self._written])
        after = self._decode(self._ids[self._start :])
        if len(after) <= len(before) or (after.endswith(_BROKEN) and not final):
            return ""
        self._start, self._written = self._written, len(self._ids)
        return after[len(before) :]


class StopStrings:
    """Passes text through up to the first stop string, holding back what may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Text that is certainly before any stop string. After a stop nothing more comes."""
        if self.found:
            return ""
        text = self._held + text
        at = min((i for i in map(text.find, self._stops) if i >= 0), default=-1)
        if at >= 0:
            self.found, self._held = True, ""
            return text[:at]
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :] if keep else ""
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once it is known that no stop string follows."""
        held, self._held = self._held, ""
        return "" if self.found else held
