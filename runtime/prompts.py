"""Prompts to token ids and back: the bundle's tokenizer and chat template, as the HF processor uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from secateur.runtime.chat import ChatTemplate, Message
from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.processor_files import TOKENIZER_CONFIG, list_templates, read_json
from secateur.runtime.row_media import KINDS, PARTS
from secateur.runtime.token_bytes import TokenBytes


class Prompts:
    """Renders, encodes and decodes.

    ``placeholder`` is the text that stands for one image (``<image>``), ``placeholder_id`` its token; ``others`` are
    the tokens that stand for media of other kinds (``video``, ``audio``), where the checkpoint has them.
    """

    def __init__(
        self, directory: Path, placeholder: str, placeholder_id: int, others: Mapping[str, int | None] | None = None
    ) -> None:
        self.placeholder, self.placeholder_id = placeholder, placeholder_id
        try:
            self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # the library raises plain Exception
            raise BundleError(f"cannot be read ({error})", where=f"{directory}: tokenizer.json") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.token_bytes = TokenBytes(self._tokenizer)
        if self._tokenizer.token_to_id(placeholder) != placeholder_id:
            raise BundleError(f"{placeholder} is not token {placeholder_id}", where=f"{directory}: tokenizer.json")
        self.kinds = {placeholder_id: "image"}
        """Placeholder -> kind of what it stands for."""
        self.kinds |= {token: kind for kind, token in (others or {}).items() if token is not None}
        config = read_json(directory / TOKENIZER_CONFIG)
        special = _special_tokens(config)
        self._bos = special.get("bos_token")
        # WordPiece-era clean-up; transformers leaves it out for BPE, where it would eat real spaces.
        self._clean_up = bool(config.get("clean_up_tokenization_spaces")) and (
            type(self._tokenizer.model).__name__ != "BPE"
        )
        template = next(iter(list_templates(directory)), None)
        self.template = ChatTemplate(template.text, special) if template is not None and template.text else None

    def render(self, prompt: str | Sequence[Message], items: Sequence[str]) -> tuple[str, bool]:
        """The text to encode and whether the tokenizer adds its special tokens (BOS) to it.

        ``items`` are the kinds of the row's media in their order. A plain prompt that names its media itself is taken
        as it is; otherwise it becomes one user message behind them, or, without a template, text behind placeholders.
        """
        if isinstance(prompt, str):
            spelled = {kind: self.spell([token]) for token, kind in self.kinds.items()}
            named = any(text and text in prompt for text in spelled.values())
            if named or self.template is None or not items:
                missing = "" if named else "".join(spelled[PARTS[item][0]] for item in items)
                return missing + ("\n" if missing else "") + prompt, True
            prompt = [{"role": "user", "content": prompt}]
        if self.template is None:
            raise UserError("the bundle has no chat template for messages", fix="give a plain prompt")
        text = self.template.render(put_media(prompt, items))
        # A template that writes BOS itself must not get a second one; transformers' processors do the same.
        return text, not (self._bos and text.startswith(self._bos))

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def spell(self, tokens: Sequence[int]) -> str:
        """Special tokens as they are written in a prompt."""
        return "".join(self._tokenizer.id_to_token(token) or "" for token in tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens. Half a UTF-8 character shows as U+FFFD at the end."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return _clean_up_spaces(text) if self._clean_up else text


def put_media(messages: Sequence[Message], items: Sequence[str]) -> list[Message]:
    """Messages that say where their media are; if none does, they stand before the first user's text.

    The sound of a video that brings it along has no place of its own: a part for it is left out.
    """
    taken = {part for item in items for part in PARTS[item]}
    checked = [_check_message(message, taken) for message in messages]
    if "video with sound" in items:
        checked = [_without_audio(message) for message in checked]
    named = any(
        part.get("type") in taken for m in checked if not isinstance(m["content"], str) for part in m["content"]
    )
    if named or not items:
        return checked
    for index, message in enumerate(checked):
        if message["role"] == "user":
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
            media = [{"type": PARTS[item][0]} for item in items]
            checked[index] = {**message, "content": [*media, *parts]}
            return checked
    raise UserError(f"no message of role 'user' to put the {'/'.join(sorted(taken))} in", where="messages")


def _without_audio(message: Message) -> Message:
    content = message["content"]
    if isinstance(content, str):
        return message
    return {**message, "content": [part for part in content if part.get("type") != "audio"]}


def _check_message(message: Message, taken: set[str]) -> Message:
    content = message.get("content") if isinstance(message, dict) else None
    good = isinstance(content, str) or (
        isinstance(content, (list, tuple)) and all(isinstance(part, dict) for part in content)
    )
    if not good or not isinstance(message.get("role"), str):
        raise UserError(
            "a message must be {'role': …, 'content': …}",
            where="messages",
            fix="content is text, or a list of {'type': 'image'} and {'type': 'text', 'text': …}",
        )
    kinds = [part.get("type") for part in content] if isinstance(content, (list, tuple)) else []
    if other := next((kind for kind in kinds if kind in KINDS and kind not in taken), None):
        raise UserError(f"a message holds {other}", where="messages", available=[*sorted(taken), "text"])
    return message


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """``bos_token`` and the like, whether written as text or as an object with ``content``."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _clean_up_spaces(text: str) -> str:
    for before, after in (
        (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
        (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
    ):  # fmt: skip
        text = text.replace(before, after)
    return text
