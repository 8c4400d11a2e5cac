"""What a bundle says of its model: the checkpoint's facts, and the tokens that mean something, by their ids."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from secateur.compiler.generation_defaults import find_generation_file, read_generation_defaults
from secateur.compiler.processor_files import take_processor_files
from secateur.compiler.pruned import Job
from secateur.compiler.tokenizer_files import TOKENIZER
from secateur.runtime import manifest as m
from secateur.runtime.errors import UserError
from secateur.runtime.processor_files import TOKENIZER_CONFIG


def describe_model(job: Job, weights_sha256: str) -> m.Model:
    """Raises UserError for a tokenizer or generation defaults that do not belong to the checkpoint."""
    source, text = job.source, job.source.text
    heads = text.num_attention_heads
    token, named = int(source.config.image_token_id), _named_tokens(job)
    mark = named.get("prompt_token_id")
    return m.Model(
        family=source.family.name,
        model_type=source.config.model_type,
        architecture=_architecture(source.config, source.family.auto_class),
        source=source.path.resolve().name,
        license=_license(source.path),
        config_sha256=m.hash_file(source.path / "config.json"),
        weights_sha256=weights_sha256,
        layers=source.decoder_layers,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        image_token=token_text(source.path, token if mark is None else mark),
        image_token_id=token,
        bos_token_id=getattr(text, "bos_token_id", None),
        eos_token_ids=_stop_tokens(source.path, source.config),
        pad_token_id=source.pad_token,
        **named,
    )


def _architecture(config: Any, auto_class: str) -> str:
    """The class a configuration names; some releases name none at its top, then the one transformers takes for it."""
    import transformers

    if config.architectures:
        return str(config.architectures[0])
    return str(getattr(transformers, auto_class)._model_mapping[type(config)].__name__)


def _stop_tokens(path: Path, config: Any) -> list[int]:
    """End-of-sequence ids: of the generation defaults, else of the configuration."""
    found = read_generation_defaults(path).get("eos_token_id")
    where = path / "config.json" if found is None else find_generation_file(path)
    for holder in (config, config.text_config):
        found = getattr(holder, "eos_token_id", None) if found is None else found
    if found is None or found == []:
        raise UserError("no eos_token_id", where=str(path), fix="set it in generation_config.json")
    ids, size = found if isinstance(found, list) else [found], config.text_config.vocab_size
    if not all(type(i) is int and 0 <= i < size for i in ids):
        raise UserError(
            f"eos_token_id {found!r} is none of the {size} tokens of the vocabulary", where=str(where),
            fix="set it to the id of the token that ends an answer",
        )  # fmt: skip
    return sorted(set(ids))


def token_text(path: Path, token: int) -> str:
    """The text of a token of the tokenizer in ``path``."""
    text = take_processor_files(path).tokenizer.backend.id_to_token(token)
    if text is None:
        raise UserError(
            f"image token {token} is not in the tokenizer", where=str(path / TOKENIZER),
            fix="use the tokenizer that belongs to this checkpoint",
        )  # fmt: skip
    return str(text)


def _named_tokens(job: Job) -> dict[str, Any]:
    """Ids of the tokens around an image, and of the one that marks a video.

    Where a family has tokens around its images, ``tokenizer_config.json`` names them all, as named special tokens.
    """
    source = job.source
    if not any(source.family.image_marks):
        return {key: getattr(source.config, key, None) for key in ("video_token_id", "audio_token_id")}
    named = named_texts(job)
    before, behind = ([_token_id(source.path, named.get(n), n) for n in names] for names in source.family.image_marks)
    video = _token_id(source.path, named["video_token"], "video_token") if "video_token" in named else None
    found: dict[str, Any] = {"image_before": before, "image_behind": behind, "video_token_id": video}
    if mark := source.family.prompt_mark:
        found |= {"prompt_token_id": _token_id(source.path, named.get(mark), mark)}
        found |= {"image_space": list(source.family.mark_space)}
    return found


def named_texts(job: Job) -> dict[str, Any]:
    """The texts of special tokens by their names."""
    return {**job.source.family.mark_texts, **take_processor_files(job.source.path).tokenizer.words}


def _token_id(path: Path, text: Any, name: str) -> int:
    """The id of a named special token."""
    backend = take_processor_files(path).tokenizer.backend
    found = backend.token_to_id(text) if isinstance(text, str) else None
    if found is None:
        what = f"names no {name}" if text is None else f"calls {name} {text!r}, which {TOKENIZER} does not have"
        raise UserError(
            what, where=str(path / TOKENIZER_CONFIG), fix="use the tokenizer that belongs to this checkpoint"
        )
    return int(found)


def _license(path: Path) -> str | None:
    """The ``license:`` field of the model card's front matter."""
    card = path / "README.md"
    if not card.is_file():
        return None
    found = re.search(r"\A---\n.*?^license:\s*(\S+)\s*$.*?^---$", card.read_text(errors="replace"), re.S | re.M)
    return found[1] if found else None
