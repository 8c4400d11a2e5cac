"""Answers of bundles equal those of transformers' ``generate`` under the same generation_config.json."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from secateur.compiler import pipeline
from secateur.compiler.pipeline import Geometry
from secateur.runtime.errors import UserError
from secateur.runtime.session import Session

from .tiny_model import BOS, EOS, PAD

GEOMETRY = Geometry(text_tokens=24, new_tokens=8)
PROMPT = "a<image>fox?"
GREEDY = {"do_sample": False, "max_new_tokens": 8}
TOKENS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


@pytest.fixture(scope="module")
def compiled(
    model_dir: Callable[..., Path], traced: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The unpruned tiny Llama model; do not change it."""
    out = tmp_path_factory.mktemp("unpruned") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "trace_model", lambda source, geometry, dtype: traced())
        assert pipeline.compile(model_dir(), out, recipe="none", geometry=GEOMETRY) == out
    return out


@pytest.fixture(scope="module")
def session(compiled: Path) -> Session:
    return Session(compiled, threads=1)


@pytest.fixture(scope="module")
def theirs(model_dir: Callable[..., Path]) -> Callable[..., list[int]]:
    """Tokens of ``generate`` with a generation_config.json of these fields."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

    model: Any = AutoModelForImageTextToText.from_pretrained(model_dir(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir())

    def ask(inputs: Any, fields: dict[str, Any]) -> list[int]:
        model.generation_config = GenerationConfig(**{**TOKENS, **fields})
        ids = torch.tensor(inputs.prompt_ids(0))[None]
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.tensor(inputs.pixel_values),
                tokenizer=tokenizer,
            )  # fmt: skip
        return [int(token) for token in out[0, ids.shape[1] :]]

    return ask


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def answer(session: Session, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a bundle whose checkpoint says ``fields``."""
    eos = fields.get("eos_token_id", EOS)
    model = session.manifest.model.model_copy(update={"eos_token_ids": eos if isinstance(eos, list) else [eos]})
    monkeypatch.setattr(session, "_defaults", {**TOKENS, **fields})
    monkeypatch.setattr(session, "manifest", session.manifest.model_copy(update={"model": model}))
    return session.generate([PROMPT], [[picture()]])[0]


@pytest.fixture(scope="module")
def plain(session: Session) -> list[int]:
    """The greedy answer that nothing changes."""
    return session.generate([PROMPT], [[picture()]], ignore_eos=True, temperature=0.0)[0].tokens


def cases(plain: list[int], prompt: int) -> list[dict[str, Any]]:
    first, second, third = plain[:3]
    return [
        {},
        {"suppress_tokens": plain[:3]},
        {"begin_suppress_tokens": [first]},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"encoder_no_repeat_ngram_size": 1},
        {"repetition_penalty": 1.9},
        {"encoder_repetition_penalty": 3.0},
        {"bad_words_ids": [[first], [second, third]]},
        {"sequence_bias": [[[first], -9.0], [[40, 50], 60.0], [[40], 5.0]]},
        {"eos_token_id": second},
        {"eos_token_id": [EOS, third, second]},
        {"eos_token_id": second, "min_new_tokens": 5},
        {"eos_token_id": second, "min_length": prompt + 4},
        {"eos_token_id": second, "exponential_decay_length_penalty": [2, 1.5], "min_new_tokens": 3},
        {"forced_eos_token_id": 9},
        {"forced_bos_token_id": 9},
        {"max_new_tokens": 3, "forced_eos_token_id": [9, 10]},
        {"max_new_tokens": None, "max_length": prompt + 5},
        {"max_new_tokens": 4, "max_length": prompt + 2},
        {"remove_invalid_values": True, "suppress_tokens": plain, "renormalize_logits": True},
        {"do_sample": True, "top_k": 1},
        {"do_sample": True, "top_p": 0.0, "repetition_penalty": 1.5},
        {"do_sample": True, "temperature": 1e-6, "no_repeat_ngram_size": 1},
        {"do_sample": True, "min_p": 1.0},
        {"temperature": 0.3, "top_k": 5, "top_p": 0.1},
    ]


def test_greedy_answers_equal_theirs(
    session: Session, theirs: Callable[..., list[int]], plain: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = session.processor([PROMPT], [[picture()]])
    changed = 0
    for fields in cases(plain, len(inputs.prompt_ids(0))):
        fields = GREEDY | fields
        with monkeypatch.context() as patch:
            got = answer(session, fields, patch).tokens
        assert got == theirs(inputs, fields), fields
        changed += got != plain
    assert changed > 15


def test_stop_strings_of_the_checkpoint(
    session: Session, theirs: Callable[..., list[int]], plain: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ordinary text, a special token, and text across both; the special token is made likely by a bias."""
    inputs = session.processor([PROMPT], [[picture()]])
    bias = {"sequence_bias": [[[plain[1], PAD], 90.0]]}  # <pad> is a special token, and ends nothing
    spell = session.processor.prompts.token_bytes
    second = spell(plain[1])[0].decode("utf-8", "replace")
    for stop in ("<pad>", f"{second}<pad>", "d><", ["nowhere", "ad>"], "pa"):
        fields = GREEDY | bias | {"stop_strings": stop}
        with monkeypatch.context() as patch:
            got = answer(session, fields, patch)
        assert got.tokens == theirs(inputs, fields), stop
        if stop != "d><":
            assert got.finish_reason == "stop"
            assert got.tokens == [*plain[:2], PAD]
            ends = [stop] if isinstance(stop, str) else stop
            assert not any(end in got.text for end in ends)


def test_sampled_answers_are_of_their_candidates(
    session: Session, theirs: Callable[..., list[int]], plain: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint draws, so we draw; the caller may still want the likeliest."""
    fields = {**TOKENS, "do_sample": True, "temperature": 2.0, "top_k": 4, "max_new_tokens": 3}
    monkeypatch.setattr(session, "_defaults", fields)
    asked = [session.generate([PROMPT], [[picture()]], seed=seed)[0].tokens for seed in range(12)]
    assert len({tuple(tokens) for tokens in asked}) > 1
    inputs = session.processor([PROMPT], [[picture()]])
    logits = session.prefill(session.request(), inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)
    assert {tokens[0] for tokens in asked} <= set(np.argsort(-logits[0])[:4].tolist())
    assert session.generate([PROMPT], [[picture()]], temperature=0.0)[0].tokens == plain[:3]
    assert session.generate([PROMPT], [[picture()]], generation={"do_sample": False})[0].tokens == plain[:3]


def test_what_a_call_may_say(session: Session, plain: list[int]) -> None:
    def ask(**how: Any) -> list[int]:
        return list(session.generate([PROMPT], [[picture()]], temperature=0.0, **how)[0].tokens)

    assert ask(generation={"suppress_tokens": plain[:1]})[0] != plain[0]
    assert ask(generation={"eos_token_id": plain[2]}) == plain[: plain.index(plain[2]) + 1]
    assert ask(generation={"max_new_tokens": 2}) == plain[:2]
    assert ask(generation={"top_k": None}) == ask()
    with pytest.raises(UserError, match="max_new_tokens is given twice"):
        ask(max_new_tokens=2, generation={"max_new_tokens": 2})
    with pytest.raises(UserError, match="generation: num_beams is not applied here"):
        ask(generation={"num_beams": 2})
    with pytest.raises(UserError, match="a str is no generation options"):
        ask(generation="num_beams=2")
    late = session.generate([PROMPT], [[picture()]], ignore_eos=True, generation={"max_time": 1e-9})[0]
    assert (late.finish_reason, len(late.tokens)) == ("time", 1)


def test_compiling_says_once_what_is_not_applied(
    model_dir: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = shutil.copytree(model_dir(), tmp_path / "model")
    said = {**TOKENS, "num_beams": 4, "guidance_scale": 1.5, "length_penalty": 2.0, "no_repeat_ngram_size": 3}
    (model / "generation_config.json").write_text(json.dumps(said))
    with caplog.at_level(logging.WARNING, "secateur"):
        bundle = pipeline.compile(model, tmp_path / "bundle", recipe="none", geometry=GEOMETRY)
    told = [r.getMessage() for r in caplog.records if "generation_config" in r.getMessage()]
    assert len(told) == 1
    assert "not applied: num_beams=4, guidance_scale=1.5; answers are greedy or drawn" in told[0]
    with Session(bundle, threads=1) as session:  # type: ignore[arg-type]
        assert told[0] in session.manifest.notes
        assert len(session.generate(PROMPT, picture(), ignore_eos=True).tokens) == 8


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"suppress_tokens": "all"}, "suppress_tokens is 'all'; it must be a list of token ids"),
        ({"do_sample": True, "temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"bad_words_ids": [[100000]]}, "bad_words_ids names token 100000; the vocabulary's are 0 to 259"),
    ],
)
def test_defaults_that_cannot_be_followed(
    model_dir: Callable[..., Path], tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    model = shutil.copytree(model_dir(), tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({**TOKENS, **fields}))
    with pytest.raises(UserError) as caught:
        pipeline.compile(model, tmp_path / "bundle", recipe="none", geometry=GEOMETRY)
    assert str(caught.value) == f"{model / 'generation_config.json'}: {says}"
    assert not (tmp_path / "bundle").exists()
