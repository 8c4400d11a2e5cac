"""The manifest's account of text: how a prompt becomes ids, for hosts that bring their own tokenizer library."""

from __future__ import annotations

from typing import Literal

from secateur.runtime.schema_fields import BundlePath, Count, Frozen


class TokenizerFacts(Frozen):
    """What a reader of the bundle's ``tokenizer.json`` has to be able to do, and how it is used.

    Padding and truncation that the file speaks of are not used.
    """

    file: BundlePath
    """The file, in the format of the library ``tokenizers``."""
    model: str
    """``type`` of the file's ``model``: BPE, WordPiece, WordLevel or Unigram."""
    model_options: list[str]
    """Options of that model that are on, or name something."""
    normalizers: list[str]
    """Types of the normalizers, in order; those inside a ``Sequence`` one by one."""
    pre_tokenizers: list[str]
    """Types of the pre-tokenizers, likewise."""
    post_processors: list[str]
    """Types of the post-processors, likewise."""
    decoders: list[str]
    """Types of the decoders, likewise."""
    added_tokens: Count
    """Tokens that are found in a text before anything else is done to it."""
    special_tokens: Count
    """Those of them that are special: left out of an answer's text."""
    added_flags: list[str]
    """Flags that any of them has: ``lstrip``, ``rstrip``, ``single_word``, ``normalized``."""
    before: list[Count]
    """Ids that the post-processor puts before every text: a BOS token, or nothing."""
    behind: list[Count]
    """Ids that it puts after every text."""
    unless_begins: str | None = None
    """Neither is put to what a chat template wrote if that begins with this text: the template wrote its own BOS."""
    clean_up_spaces: bool
    """Whether an answer's text loses spaces before punctuation and English contractions."""


class PromptFacts(Frozen):
    """How messages and plain prompts become text."""

    template: BundlePath | None = None
    """The chat template, in Jinja; None where a checkpoint has none: messages are refused then."""
    variables: dict[str, str] = {}
    """What the template is given beside ``messages``, ``tools`` and ``documents`` (none) and
    ``add_generation_prompt`` (true): special tokens by their names."""
    placeholders: dict[Literal["image", "video", "audio"], str]
    """Kind of media -> the text that stands for one item of it in a prompt."""
    forbidden: list[str] = []
    """Texts that may stand in no prompt: the model takes them for a piece of an image."""
