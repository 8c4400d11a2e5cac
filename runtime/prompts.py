"""Prompts to token ids and back: the bundle's tokenizer and chat template, as the HF processor uses them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from secateur.runtime.chat import ChatTemplate, Message
from secateur.runtime.errors import BundleError, UserError


class Prompts:
    """Renders, encodes and decodes.

    ``placeholder`` is the text that stands for one image (``<image>``), ``placeholder_id`` its token.
    """

    def __init__(self, directory: Path, placeholder: str, placeholder_id: int) -> None:
        self.placeholder, self.placeholder_id = placeholder, placeholder_id
        try:
            self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # the library raises plain Exception
            raise BundleError(f"cannot be read ({error})", where=f"{directory}: tokenizer.json") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if self._tokenizer.token_to_id(placeholder) != placeholder_id:
            raise BundleError(f"{placeholder} is not token {placeholder_id}", where=f"{directory}: tokenizer.json")
        config = read_json(directory / "tokenizer_config.json")
        special = _special_tokens(config)
        self._bos = special.get("bos_token")
        # WordPiece-era clean-up; transformers leaves it out for BPE, where it would eat real spaces.
        self._clean_up = bool(config.get("clean_up_tokenization_spaces")) and (
            type(self._tokenizer.model).__name__ != "BPE"
        )
        source = _template_source(directory, config)
        self.template = ChatTemplate(source, special) if source else None

    def render(self, prompt: str | Sequence[Message], images: int) -> tuple[str, bool]:
        """The text to encode and whether the tokenizer adds its special tokens (BOS) to it.

        A plain prompt that names its images itself is taken as it is; otherwise it becomes one user
        message behind its images, or, without a template, text behind its placeholders.
        """
        if isinstance(prompt, str):
            if self.placeholder in prompt or (self.template is None) or not images:
                missing = 0 if self.placeholder in prompt else images
                return self.placeholder * missing + ("\n" if missing else "") + prompt, True
            prompt = [{"role": "user", "content": prompt}]
        if self.template is None:
            raise UserError("the bundle has no chat template for messages", fix="give a plain prompt")
        text = self.template.render(put_images(prompt, images))
        # A template that writes BOS itself must not get a second one; transformers' processors do the same.
        return text, not (self._bos and text.startswith(self._bos))

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens. Half a UTF-8 character shows as U+FFFD at the end."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return _clean_up_spaces(text) if self._clean_up else text


def put_images(messages: Sequence[Message], images: int) -> list[Message]:
    """Messages that say where their images are; if none does, they stand before the first user's text."""
    checked = [_check_message(message) for message in messages]
    named = sum(
        part.get("type") == "image" for m in checked if not isinstance(m["content"], str) for part in m["content"]
    )
    if named or not images:
        return checked
    for index, message in enumerate(checked):
        if message["role"] == "user":
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
            checked[index] = {**message, "content": [{"type": "image"}] * images + parts}
            return checked
    raise UserError("no message of role 'user' to put the images in", where="messages")


def _check_message(message: Message) -> Message:
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
    if other := next((kind for kind in kinds if kind in ("video", "audio")), None):
        raise UserError(f"a message holds {other}", where="messages", fix="this version takes images and text only")
    return message


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a bundle's file; an absent file is an empty object."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"not JSON ({error})", where=str(path)) from None
    if not isinstance(value, dict):
        raise BundleError("not a JSON object", where=str(path))
    return value


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """``bos_token`` and the like, whether written as text or as an object with ``content``."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _template_source(directory: Path, config: dict[str, Any]) -> str | None:
    """The template's own file, in either of its forms, or else the tokenizer configuration's field."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BundleError(f"the chat template is not UTF-8 ({error.reason})", where=str(path)) from None
    source = read_json(directory / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None


def _clean_up_spaces(text: str) -> str:
    for before, after in (
        (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
        (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
    ):  # fmt: skip
        text = text.replace(before, after)
    return text
