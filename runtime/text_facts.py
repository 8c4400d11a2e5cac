"""What a bundle's tokenizer and chat template ask of a host, written down as data for its manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from secateur.runtime.pixel_steps import describe_inputs
from secateur.runtime.processing import Processor
from secateur.runtime.processor_files import TEMPLATE
from secateur.runtime.prompts import TOKENIZER, Prompts
from secateur.runtime.row_media import PARTS
from secateur.runtime.schema_inputs import Placeholder, Preprocessing, Run
from secateur.runtime.schema_text import PromptFacts, TokenizerFacts

_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
_NOT_OPTIONS = ("type", "vocab", "merges")


def describe_tokenizer(prompts: Prompts) -> TokenizerFacts:
    """From the tokenizer as it is used, not from its file."""
    said = json.loads(prompts.tokenizer.to_str(pretty=False))
    added, own = said.get("added_tokens") or [], said["model"]
    found = prompts.tokenizer.encode("a")
    mask = found.special_tokens_mask
    first = mask.index(0) if 0 in mask else len(mask)
    last = len(mask) - mask[::-1].index(0) if 0 in mask else len(mask)
    return TokenizerFacts(
        file=TOKENIZER,
        model=str(own.get("type") or type(prompts.tokenizer.model).__name__),
        model_options=sorted(key for key, value in own.items() if value and key not in _NOT_OPTIONS),
        normalizers=list(_types(said.get("normalizer"), "normalizers")),
        pre_tokenizers=list(_types(said.get("pre_tokenizer"), "pretokenizers")),
        post_processors=list(_types(said.get("post_processor"), "processors")),
        decoders=list(_types(said.get("decoder"), "decoders")),
        added_tokens=len(added),
        special_tokens=sum(bool(token.get("special")) for token in added),
        added_flags=[flag for flag in _FLAGS if any(token.get(flag) for token in added)],
        before=list(found.ids[:first]),
        behind=list(found.ids[last:]),
        unless_begins=prompts.bos or None,
        clean_up_spaces=prompts.clean_up,
    )


def describe_prompt(prompts: Prompts) -> PromptFacts:
    """The chat template's file, what it is given, and how media are named in words."""
    return PromptFacts(
        template=TEMPLATE if prompts.template is not None else None,
        variables=dict(sorted(prompts.special.items())) if prompts.template is not None else {},
        placeholders={kind: prompts.spell([token]) for token, kind in prompts.kinds.items()},  # type: ignore[misc]
        forbidden=list(prompts.inner),
    )


def describe_preprocessing(processor: Processor) -> Preprocessing:
    """Of the geometry that the processor is held to."""
    tokens = {kind: token for token, kind in processor.prompts.kinds.items()}
    kinds = [PARTS[item][0] for item in processor.items]
    placeholders = [
        Placeholder(kind=kind, token=tokens[kind], becomes=list(_runs(parts)))  # type: ignore[arg-type]  # pydantic
        for kind, parts in zip(kinds, processor.expansion(), strict=True)
    ]
    return describe_inputs(processor.tower_inputs).model_copy(update={"placeholders": placeholders})


def _runs(parts: list[list[int] | None]) -> Iterator[Run]:
    tokens = (token for part in parts for token in ([None] if part is None else part))
    for token, same in groupby(tokens):
        yield Run(token=token, count=len(list(same)))


def _types(part: Any, inside: str) -> Iterator[str]:
    """The types of a part of ``tokenizer.json``; a sequence holds its own under ``inside``."""
    if not isinstance(part, dict):
        return
    if part.get("type") != "Sequence":
        yield str(part.get("type"))
        return
    for each in part.get(inside) or []:
        yield from _types(each, inside)
