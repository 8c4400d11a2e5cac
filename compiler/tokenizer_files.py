"""The tokenizer that transformers makes of a checkpoint's files, as the one file a bundle carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from secateur.compiler.file_differences import tell_difference
from secateur.compiler.function import first_line
from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.processor_files import TOKENIZER_CONFIG, read_json

TOKENIZER = "tokenizer.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
_FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")
_SAVE = "save the processor with transformers (AutoProcessor.save_pretrained) into the model directory"


@dataclass(frozen=True)
class TakenTokenizer:
    """``text`` is a ``tokenizer.json`` that holds all of it; ``words`` what a bundle's ``tokenizer_config.json`` says:
    special tokens by their names, and whether spaces are cleaned up. ``notes`` name files that say otherwise."""

    backend: Tokenizer
    text: str
    words: Mapping[str, Any]
    notes: tuple[str, ...]


def take_tokenizer(directory: Path) -> TakenTokenizer:
    """Raises UserError for files that transformers makes no tokenizer of."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file, notes = directory / TOKENIZER, list[str]()
    whole = _read_whole(file) if file.is_file() else None
    said = {name: _read_object(directory / name) for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS)}
    how: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        taken = AutoTokenizer.from_pretrained(directory, **how)
    except Exception as error:  # the library has no class of its own
        reason = first_line(error.__cause__ or error)
        if whole is None:
            raise UserError(f"no {TOKENIZER}", where=str(directory), fix=_SAVE) from None
        if "auto_map" not in said[TOKENIZER_CONFIG]:
            raise UserError(f"not a tokenizer ({reason})", where=str(file), fix="download the file again") from None
        # Its class comes with the checkpoint and is not run; the file describes the tokenizer without it.
        taken = PreTrainedTokenizerFast.from_pretrained(directory, **how)
    vocabularies = [name for name in (*taken.vocab_files_names.values(), TOKENIZER) if (directory / name).is_file()]
    if not vocabularies:
        raise UserError(f"no {TOKENIZER}", where=str(directory), fix=_SAVE)
    backend = taken.backend_tokenizer
    words = dict(sorted(taken.special_tokens_map.items())) | {
        "clean_up_tokenization_spaces": bool(taken.clean_up_tokenization_spaces)
    }
    told = {TOKENIZER: _added_tokens(whole)} if whole is not None else {}
    added = said[TOKENIZER_CONFIG].get("added_tokens_decoder") or {}
    told[TOKENIZER_CONFIG] = {str(flags["content"]): {"id": int(id_)} | flags for id_, flags in added.items()}
    for name in (ADDED_TOKENS, *(name for name in vocabularies if name.endswith(".json") and name != TOKENIZER)):
        told[name] = {text: {"id": id_} for text, id_ in _read_object(directory / name).items()}
    notes += _compare_tokens(told, backend)
    notes += _compare_names({name: said[name] for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS)}, words)
    return TakenTokenizer(backend, backend.to_str(), words, tuple(notes))


def _read_whole(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library has no class of its own
        raise UserError(f"not a tokenizer ({error})", where=str(file), fix="download the file again") from None


def _read_object(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except BundleError:
        raise UserError("not a JSON object", where=str(file), fix="download the file again") from None


def _added_tokens(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """Added tokens by their text: id and flags."""
    found = tokenizer.get_added_tokens_decoder()
    return {each.content: {"id": id_, **{flag: getattr(each, flag) for flag in _FLAGS}} for id_, each in found.items()}


def _compare_tokens(told: Mapping[str, Mapping[str, Mapping[str, Any]]], taken: Tokenizer) -> list[str]:
    """Notes on tokens, by file and text, that the tokenizer does not have as a file says."""
    added, vocabulary = _added_tokens(taken), taken.get_vocab(with_added_tokens=True)

    def agrees(text: str, said: Mapping[str, Any] | None) -> bool:
        has = added.get(text, {"id": vocabulary.get(text)})
        return said is not None and all(has.get(key, value) == value for key, value in said.items() if key != "content")

    notes = []
    for name, tokens in told.items():
        if wrong := [text for text, said in tokens.items() if not agrees(text, said)]:
            right = [o for o in told if o != name and all(agrees(text, told[o].get(text)) for text in wrong)]
            notes.append(tell_difference(right[0] if right else "what the other files say", name, wrong))
    return notes


def _compare_names(told: Mapping[str, Mapping[str, Any]], taken: Mapping[str, Any]) -> list[str]:
    """Notes on special tokens whose name stands for another text in a file than in the tokenizer."""
    notes = []
    for name, words in told.items():
        texts = {
            key: value.get("content") if isinstance(value, dict) else value
            for key, value in words.items()
            if key.endswith("_token")
        }
        wrong = [key for key, text in texts.items() if isinstance(text, str) and taken.get(key) != text]
        if wrong:
            notes.append(tell_difference(next(other for other in told if other != name), name, wrong))
    return notes
