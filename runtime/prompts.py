"""Prompts to token ids and back: the bundle's tokenizer and chat template, as the HF processor uses them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from secateur.runtime.chat import ChatTemplate, Message
from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.messages import Conversation, read_messages
from secateur.runtime.processor_files import TOKENIZER_CONFIG, list_templates, read_json
from secateur.runtime.row_media import PARTS
from secateur.runtime.token_bytes import TokenBytes
from secateur.runtime.unicode_text import check_text

TOKENIZER = "tokenizer.json"


class Prompts:
    """Renders, encodes and decodes.

    ``placeholder`` is the text that stands for one image (``<image>``), ``placeholder_id`` its token; ``others`` are
    the tokens that stand for media of other kinds (``video``, ``audio``), where the checkpoint has them; ``inner``
    those that placeholders become and no prompt may write.
    """

    def __init__(
        self,
        directory: Path,
        placeholder: str,
        placeholder_id: int,
        others: Mapping[str, int | None] | None = None,
        inner: Iterable[int] = (),
    ) -> None:
        self.placeholder, self.placeholder_id = placeholder, placeholder_id
        try:
            self.tokenizer = Tokenizer.from_file(str(directory / TOKENIZER))
        except Exception as error:  # the library raises plain Exception
            raise BundleError(f"cannot be read ({error})", where=f"{directory}: {TOKENIZER}") from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.token_bytes = TokenBytes(self.tokenizer)
        if self.tokenizer.token_to_id(placeholder) != placeholder_id:
            raise BundleError(f"{placeholder} is not token {placeholder_id}", where=f"{directory}: {TOKENIZER}")
        self.kinds = {placeholder_id: "image"}
        """Placeholder -> kind of what it stands for."""
        self.kinds |= {token: kind for kind, token in (others or {}).items() if token is not None}
        config = read_json(directory / TOKENIZER_CONFIG)
        self.inner = tuple(filter(None, (self.spell([token]) for token in inner)))
        special = _special_tokens(config)
        self.special, self.bos = special, special.get("bos_token")
        # WordPiece-era clean-up; transformers leaves it out for BPE, where it would eat real spaces.
        self.clean_up = bool(config.get("clean_up_tokenization_spaces")) and (
            type(self.tokenizer.model).__name__ != "BPE"
        )
        template = next(iter(list_templates(directory)), None)
        if template is not None and template.text:
            check_text(template.text, template.file, BundleError)
        self.template = ChatTemplate(template.text, special) if template is not None and template.text else None

    def render(
        self, prompt: str | Sequence[Message] | Conversation, items: Sequence[str], where: str = "prompt"
    ) -> tuple[str, bool]:
        """The text to encode and whether the tokenizer adds its special tokens (BOS) to it.

        ``items`` are the kinds of the row's media in their order. A plain prompt that names its media itself is taken
        as it is; otherwise it becomes one user message behind them, or, without a template, text behind placeholders.
        Messages name their media by parts, or in their words as a plain prompt does, every one of them.
        """
        before = "" if where == "prompt" else f"{where}, "
        if isinstance(prompt, str):
            check_text(prompt, where)
            self._refuse_inner(prompt, where)
            spelled = {kind: self.spell([token]) for token, kind in self.kinds.items()}
            named = any(text and text in prompt for text in spelled.values())
            if named or self.template is None or not items:
                missing = "" if named else "".join(spelled[PARTS[item][0]] for item in items)
                return missing + ("\n" if missing else "") + prompt, True
            prompt = [{"role": "user", "content": prompt}]
        if self.template is None:
            raise UserError("the bundle has no chat template for messages", fix="give a plain prompt")
        read = prompt if isinstance(prompt, Conversation) else read_messages(prompt, before)
        messages = read.messages if self._spelled(read, items, before) else put_media(read.messages, items)
        text = check_text(self.template.render(messages), "chat_template.jinja", BundleError)
        # A template that writes BOS itself must not get a second one; transformers' processors do the same.
        return text, not (self.bos and text.startswith(self.bos))

    def _spelled(self, read: Conversation, items: Sequence[str], before: str) -> bool:
        """Whether the words of messages without parts for media spell the placeholder of each item, in its order.

        transformers takes every such spelling for a place. Where that cannot be meant, it is refused: the model would
        see a place without a picture in it, or the wrong one.
        """
        kinds = {text: kind for token, kind in self.kinds.items() if (text := self.spell([token]))}
        any_of = re.compile("|".join(re.escape(text) for text in sorted(kinds, key=len, reverse=True)))
        found: list[tuple[str, str]] = []
        for index, message in enumerate(read.messages):
            for place, text in _texts(message, f"{before}messages[{index}].content"):
                self._refuse_inner(text, place)
                found += [(place, match) for match in any_of.findall(text)]
        if not found:
            return False
        by_parts = any(read.places.values())
        if not by_parts and [kinds[text] for _, text in found] == [PARTS[item][0] for item in items]:
            return True
        place, text = found[0]
        spell = "spell it otherwise" if by_parts else "spell the placeholder of every one, in their order"
        raise UserError(
            f"the words hold {text!r}, which is the place of an item of kind {kinds[text]}", where=place,
            fix=f"give media as parts, such as {{'type': '{kinds[text]}'}}; in words {spell}",
        )  # fmt: skip

    def _refuse_inner(self, text: str, where: str) -> None:
        for inner in self.inner:
            if inner in text:
                raise UserError(
                    f"the words hold {inner!r}, which the model takes for a piece of an image", where=where,
                    fix=f"spell it otherwise; the place of an image is {self.placeholder}",
                )  # fmt: skip

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def spell(self, tokens: Sequence[int]) -> str:
        """Special tokens as they are written in a prompt."""
        return "".join(self.tokenizer.id_to_token(token) or "" for token in tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens. Half a UTF-8 character shows as U+FFFD at the end."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return _clean_up_spaces(text) if self.clean_up else text


def put_media(messages: Sequence[Message], items: Sequence[str]) -> list[Message]:
    """Messages that say where their media are; if none does, they stand before the first user's text.

    The sound of a video that brings it along has no place of its own: a part for it is left out.
    """
    taken = {part for item in items for part in PARTS[item]}
    for message in messages:
        if other := next((part["type"] for part in _parts(message) if part["type"] not in {*taken, "text"}), None):
            raise UserError(f"a message holds {other}", where="messages", available=[*sorted(taken), "text"])
    checked = [_without_audio(message) for message in messages] if "video with sound" in items else [*messages]
    named = any(part["type"] in taken for message in checked for part in _parts(message))
    if named or not items:
        return checked
    for index, message in enumerate(checked):
        if message["role"] == "user":
            content = message.get("content", "")
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
            media = [{"type": PARTS[item][0]} for item in items]
            checked[index] = {**message, "content": [*media, *parts]}
            return checked
    raise UserError(f"no message of role 'user' to put the {'/'.join(sorted(taken))} in", where="messages")


def _without_audio(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [part for part in content if part["type"] != "audio"]}


def _parts(message: Message) -> list[Mapping[str, Any]]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _texts(message: Message, where: str) -> Iterator[tuple[str, str]]:
    """The words of a message, and where they stand."""
    content = message.get("content")
    if isinstance(content, str):
        yield where, content
    for number, part in enumerate(_parts(message)):
        if part["type"] == "text":
            yield f"{where}[{number}]", part["text"]


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """``bos_token`` and the like, whether written as text or as an object with ``content``."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = check_text(text, f"tokenizer_config.json: {name}", BundleError)
    return found


def _clean_up_spaces(text: str) -> str:
    for before, after in (
        (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
        (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
    ):  # fmt: skip
        text = text.replace(before, after)
    return text
