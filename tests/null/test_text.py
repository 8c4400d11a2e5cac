"""Streaming text: whole characters, nothing of a stop string, and in sum exactly the decoded text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from secateur.runtime.prompts import Prompts
from secateur.runtime.text import Detokenizer, StopStrings, StopTokens


@pytest.fixture(scope="session")
def prompts(built: Path) -> Prompts:
    return Prompts(built, "<image>", 3)


def pieces(decode: object, ids: Sequence[int]) -> list[str]:
    stream = Detokenizer(decode)  # type: ignore[arg-type]
    return [*(stream.push(token) for token in ids), stream.flush()]


@pytest.mark.parametrize("text", ["plain", "grüße", "日本語", "a👩‍👩‍👧b", "🙂", "é" * 5, "x\ufffdy", "\ufffd"])
def test_no_half_characters(prompts: Prompts, text: str) -> None:
    ids = prompts.encode(text, add_special_tokens=False)
    got = pieces(prompts.decode, ids)
    assert "".join(got) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in got)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=12))
def test_pieces_make_the_text(prompts: Prompts, text: str) -> None:
    ids = prompts.encode(text, add_special_tokens=False)
    assert "".join(pieces(prompts.decode, ids)) == prompts.decode(ids)


def test_a_broken_end_comes_with_the_flush(prompts: Prompts) -> None:
    ids = prompts.encode("a🙂", add_special_tokens=False)[:-1]
    got = pieces(prompts.decode, ids)
    assert got[:-1] == ["a", "", "", ""]
    assert got[-1] == "\ufffd"


@pytest.mark.parametrize("decoder", [None, decoders.Metaspace(), decoders.WordPiece()])
def test_spaces_between_words(decoder: object) -> None:
    words = ["▁red", "▁7", "is", "##n", "."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="is"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder is not None:
        tokenizer.decoder = decoder
    ids = [0, 1, 2, 3, 4, 0]
    assert "".join(pieces(tokenizer.decode, ids)) == tokenizer.decode(ids)


def feed(stops: list[str], texts: list[str]) -> tuple[list[str], bool]:
    stream = StopStrings(stops)
    got = [stream.push(text) for text in texts]
    return [*got, stream.flush()], stream.found


@pytest.mark.parametrize(
    ("stops", "texts", "shown", "found"),
    [
        ([], ["ab", "c"], "abc", False),
        (["END"], ["abE", "ND", "x"], "ab", True),
        (["END"], ["abE", "Nx"], "abENx", False),
        (["END"], ["ab EN"], "ab EN", False),
        (["aab"], ["a", "a", "a", "b"], "a", True),
        (["bc", "ab"], ["xabc"], "x", True),
        (["", "y"], ["xyz"], "x", True),
        (["\n\n"], ["a\n", "b\n", "\nc"], "a\nb", True),
    ],
)
def test_stop_strings(stops: list[str], texts: list[str], shown: str, found: bool) -> None:
    got, was_found = feed(stops, texts)
    assert ("".join(got), was_found) == (shown, found)


def test_a_possible_stop_is_held_back() -> None:
    assert feed(["END"], ["abE", "N", "x"])[0] == ["ab", "", "ENx", ""]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab", max_size=3), max_size=6), st.lists(st.text("ab", min_size=1, max_size=3), max_size=2))
def test_text_up_to_the_first_stop(texts: list[str], stops: list[str]) -> None:
    whole = "".join(texts)
    ends = [whole[:at] for stop in stops if (at := whole.find(stop)) >= 0]
    got, found = feed(stops, texts)
    # Pieces are judged as they come: a stop completed earlier wins over one that starts earlier.
    assert found == bool(ends)
    assert whole.startswith("".join(got))
    if not ends:
        assert "".join(got) == whole
    else:
        assert not any(stop in "".join(got) for stop in stops)


@pytest.mark.parametrize(
    ("pushed", "found", "letters"),
    [(["ab"], True, 2), (["a"], False, 1), (["a", "b"], True, 2), (["x", "abc"], True, 3), (["x"], False, 0)],
)
def test_a_stop_string_may_begin_with_the_answer(pushed: list[str], found: bool, letters: int) -> None:
    """``letters``: what the answer loses, from where the stop string begins or may have begun."""
    tokens = StopTokens(["ab"], lambda token: (pushed[token].encode(), True))
    for token in range(len(pushed)):
        tokens.push(token)
    assert (tokens.found, tokens.letters) == (found, letters)
