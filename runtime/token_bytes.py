"""The bytes a token stands for in any text, special tokens by the way they are written.

As transformers' StopStringCriteria reads a vocabulary: a token has the same bytes wherever it stands, and half a
character is a token's own.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

_BEFORE = "abcdef"
"""Decoded before a token, so that a decoder that writes the start of a text otherwise does not meet it there."""


class TokenBytes:
    """Token id -> its bytes, and whether an answer's text shows it: special tokens are left out of that."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._decoder = tokenizer, tokenizer.decoder
        self._known: dict[int, tuple[bytes, bool]] = {}
        added = tokenizer.get_added_tokens_decoder()
        self._hidden = {token for token, how in added.items() if how.special}
        kinds = _decoder_kinds(self._decoder)
        self._fallback = "ByteFallback" in kinds
        self._letters = _byte_letters() if "ByteLevel" in kinds and not self._fallback else {}
        ids = tokenizer.encode(_BEFORE, add_special_tokens=False).ids
        self._before = [tokenizer.id_to_token(token) or "" for token in ids]

    def __call__(self, token: int) -> tuple[bytes, bool]:
        if token not in self._known:
            written = self._tokenizer.id_to_token(token)
            self._known[token] = (self._encode(written or "", token), token not in self._hidden)
        return self._known[token]

    def _encode(self, written: str, token: int) -> bytes:
        if not written or token in self._hidden:
            return written.encode("utf-8")  # a decoder would spoil a special token that has a letter of its own
        if self._letters and all(letter in self._letters for letter in written):
            return bytes(self._letters[letter] for letter in written)
        if self._fallback and len(written) == 6 and written.startswith("<0x") and written.endswith(">"):
            try:
                return bytes([int(written[3:5], 16)])
            except ValueError:
                pass
        text = self._join([*self._before, written])
        _, found, behind = text.partition(_BEFORE)
        # A vocabulary that lacks those letters writes them otherwise.
        return (behind if found else text.removeprefix(self._join(self._before))).encode("utf-8")

    def _join(self, tokens: list[str]) -> str:
        return " ".join(tokens) if self._decoder is None else str(self._decoder.decode(tokens))


def _decoder_kinds(decoder: Any) -> set[str]:
    """The types of a decoder and of those it is made of."""
    if decoder is None:
        return set()
    found, parts = set(), [json.loads(decoder.__getstate__())]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            found.add(str(part.get("type")))
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    return found


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes with: those of printable bytes stand for themselves, the
    others, in order, for letters from U+0100 on (GPT-2)."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    plain = sorted(letter for letter in letters if ord(letter) < 256)
    own = {letter: ord(letter) for letter in plain}
    rest = sorted(set(range(256)) - set(own.values()))
    return own | {chr(256 + place): byte for place, byte in enumerate(rest)}
