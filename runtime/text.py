"""Token ids to text while they arrive: never half a character, never part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from secateur.runtime.unicode_text import check_text

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

    def peek(self) -> str:
        """What :meth:`flush` would return."""
        before = self._decode(self._ids[self._start : self._written])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _take(self, final: bool) -> str:
        piece = self.peek()
        if not piece or (piece.endswith(_BROKEN) and not final):
            return ""
        self._start, self._written = self._written, len(self._ids)
        return piece


class StopStrings:
    """Passes text through up to the first stop string, holding back what may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, text: str, hold: int = 0, stop: bool = False) -> str:
        """Text that is certainly before any stop string. After a stop nothing more comes.

        The last ``hold`` letters are held back in any case; with ``stop`` a stop string begins there.
        """
        if self.found:
            return ""
        text = self._held + text
        starts = [i for i in map(text.find, self._stops) if i >= 0] + [max(0, len(text) - hold)] * stop
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        keep = min(len(text), max(keep, hold))
        self._held = text[len(text) - keep :] if keep else ""
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once it is known that no stop string follows."""
        held, self._held = self._held, ""
        return "" if self.found else held


class StopTokens:
    """Finds stop strings in what tokens are written as, special ones too, as transformers' StopStringCriteria does.

    A stop string may begin and end within tokens. ``letters``: how many letters of the answer's text, in which special
    tokens are left out, stand behind the start of the stop string that was found, or of one that may be coming.
    """

    def __init__(self, stops: Sequence[str], bytes_of: Callable[[int], tuple[bytes, bool]]) -> None:
        self._stops = [encode_stop(stop) for stop in stops if stop]
        self._bytes_of = bytes_of
        self._parts: list[tuple[bytes, bool]] = []
        self.found = False
        self.letters = 0

    def push(self, token: int) -> None:
        if not self._stops or self.found:
            return
        self._parts.append(self._bytes_of(token))
        said = b"".join(part for part, _ in self._parts)
        starts = [i for i in map(said.find, self._stops) if i >= 0]
        self.found = bool(starts)
        held = max((n for stop in self._stops for n in range(1, len(stop)) if said.endswith(stop[:n])), default=0)
        self.letters = self._count_letters(min(starts, default=len(said) - held))
        # A stop string to come begins at ``held`` at the earliest.
        while self._parts and sum(len(part) for part, _ in self._parts[1:]) >= held:
            del self._parts[0]

    def _count_letters(self, start: int) -> int:
        shown, at = b"", 0
        for part, is_shown in self._parts:
            if is_shown:
                shown += part[max(0, start - at) :]
            at += len(part)
        return len(shown.decode("utf-8", "replace"))


class AnswerText:
    """One row's text while it grows: whole characters, and nothing of a stop string or behind it."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stops: Sequence[str],
        bytes_of: Callable[[int], tuple[bytes, bool]],
    ) -> None:
        self._detokenizer = Detokenizer(decode)
        self._strings, self._tokens = StopStrings(stops), StopTokens(stops, bytes_of)

    @property
    def stopped(self) -> bool:
        return self._strings.found

    def push(self, token: int) -> str:
        """The text that may be shown now."""
        text = self._detokenizer.push(token)
        self._tokens.push(token)
        if self._tokens.found:
            return self._strings.push(text + self._detokenizer.flush(), self._tokens.letters, stop=True)
        hold = self._tokens.letters
        if hold:
            hold = max(0, hold - len(self._detokenizer.peek()))
        return self._strings.push(text, hold)

    def flush(self) -> str:
        """What was held back, once nothing follows."""
        return self._strings.push(self._detokenizer.flush()) + self._strings.flush()


def encode_stop(stop: str) -> bytes:
    """Raises UserError for text that is not Unicode."""
    return check_text(stop, "stop").encode()
