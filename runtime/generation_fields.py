"""Every field of transformers' GenerationConfig: applied here, left out with a warning, or without a say in an answer.

A test holds the table against the installed transformers, so that a field of a later release is not overlooked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True)
class Applied:
    """``off``: the value that changes nothing, beside None; ``valid`` and ``want`` say what else it may be."""

    off: Any
    valid: Callable[[Any], bool]
    want: str
    sampled: bool = False
    """Whether it only means something where tokens are drawn."""


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[Any], bool]:
    """Finite numbers from ``low`` on, or ``above`` it, up to ``high``."""
    return lambda v: _is_real(v) and math.isfinite(v) and (v > low if above else v >= low) and v <= high


def _whole(low: int) -> Callable[[Any], bool]:
    return lambda v: _is_whole(v) and v >= low


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_ids(value: Any) -> bool:
    return _is_list(value) and all(map(_is_whole, value))


def _is_sequence(value: Any) -> bool:
    return _is_ids(value) and len(value) > 0 and min(value) >= 0


def _is_tokens(value: Any) -> bool:
    return _whole(0)(value) or _is_sequence(value)


def _is_bias(value: Any) -> bool:
    if not _is_list(value):
        return False
    pairs = all(_is_list(pair) and len(pair) == 2 and _is_sequence(pair[0]) for pair in value)
    # Minus infinity forbids; plus infinity would leave no distribution.
    return pairs and all(_is_real(bias) and bias < math.inf for _, bias in value)


def _is_decay(value: Any) -> bool:
    return _is_list(value) and len(value) == 2 and _whole(0)(value[0]) and _number(0, above=True)(value[1])


def _is_stops(value: Any) -> bool:
    return isinstance(value, str) or (_is_list(value) and all(isinstance(one, str) for one in value))


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


_IDS, _SEQUENCES = "a list of token ids", "a list of lists of token ids"

APPLIED: dict[str, Applied] = {
    "max_new_tokens": Applied(None, _whole(1), "a whole number of at least 1"),
    "max_length": Applied(None, _whole(1), "a whole number of at least 1"),
    "min_new_tokens": Applied(0, _whole(0), "a whole number of at least 0"),
    "min_length": Applied(0, _whole(0), "a whole number of at least 0"),
    "max_time": Applied(None, _number(0), "a number of seconds"),
    "stop_strings": Applied((), _is_stops, "a text or a list of texts"),
    "eos_token_id": Applied(None, _is_tokens, "a token id or a list of them"),
    "do_sample": Applied(False, _flag, "true or false"),
    "temperature": Applied(1.0, _number(0, above=True), "above 0", sampled=True),
    "top_h": Applied(None, _number(0, 1, above=True), "in (0, 1]", sampled=True),
    "top_k": Applied(0, _whole(0), "0 (off) or more", sampled=True),
    "top_p": Applied(1.0, _number(0, 1), "in [0, 1]; 1 is off", sampled=True),
    "min_p": Applied(None, _number(0, 1), "in [0, 1]", sampled=True),
    "typical_p": Applied(1.0, _number(0, 1, above=True), "in (0, 1]; 1 is off", sampled=True),
    "epsilon_cutoff": Applied(0.0, _number(0, 1), "in [0, 1]; 0 and 1 are off", sampled=True),
    "eta_cutoff": Applied(0.0, _number(0, 1), "in [0, 1]; 0 and 1 are off", sampled=True),
    "repetition_penalty": Applied(1.0, _number(0, above=True), "above 0; 1 is off"),
    "encoder_repetition_penalty": Applied(1.0, _number(0, above=True), "above 0; 1 is off"),
    "no_repeat_ngram_size": Applied(0, _whole(0), "0 (off) or more"),
    "encoder_no_repeat_ngram_size": Applied(0, _whole(0), "0 (off) or more"),
    "bad_words_ids": Applied((), lambda v: _is_list(v) and all(map(_is_sequence, v)), _SEQUENCES),
    "sequence_bias": Applied((), _is_bias, "a list of pairs of a list of token ids and a number"),
    "forced_eos_token_id": Applied((), _is_tokens, "a token id or a list of them"),
    "suppress_tokens": Applied((), _is_ids, _IDS),
    "begin_suppress_tokens": Applied((), _is_ids, _IDS),
    "exponential_decay_length_penalty": Applied(None, _is_decay, "a pair: tokens before it begins, and a factor"),
    "remove_invalid_values": Applied(False, _flag, "true or false"),
    "renormalize_logits": Applied(False, _flag, "true or false"),
}

LEFT_OUT: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "constraints": (),
    "force_words_ids": (),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "token_healing": (False,),
    "use_mtp": (False,),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "assistant_ensemble_weight": (),
    "speculation_type": (),
    "is_assistant": (False,),
    "cache_implementation": (
        "dynamic", "static", "offloaded", "offloaded_static", "hybrid", "hybrid_chunked", "offloaded_hybrid",
        "offloaded_hybrid_chunked", "sliding_window", "dynamic_full", "paged",
    ),
}  # fmt: skip
"""Fields that ask for another search, or another cache -> their values that do not, beside None."""

WITHOUT_SAY: dict[str, str] = {
    "early_stopping": "of beam search alone",
    "length_penalty": "of beam search alone",
    "diversity_penalty": "of beam search alone",
    "low_memory": "of contrastive search alone",
    "num_assistant_tokens": "of assisted decoding alone",
    "num_assistant_tokens_schedule": "of assisted decoding alone",
    "assistant_confidence_threshold": "of assisted decoding alone",
    "assistant_lookbehind": "of assisted decoding alone",
    "target_lookbehind": "of assisted decoding alone",
    "max_matching_ngram_size": "of assisted decoding alone",
    "decoder_start_token_id": "of models with an encoder and a decoder",
    "forced_bos_token_id": "acts behind a prompt of one token; no prompt with media is that short",
    "bos_token_id": "the tokenizer and the chat template write it",
    "pad_token_id": "rows end at their end, nothing is padded behind",
    "use_cache": "a matter of speed",
    "cache_config": "of caches that are no choice here",
    "max_cache_len": "a matter of memory",
    "prefill_chunk_size": "a matter of memory",
    "compile_config": "a matter of speed",
    "disable_compile": "a matter of speed",
    "continuous_batching_config": "a matter of speed",
    "output_attentions": "what generate returns beside the answer",
    "output_hidden_states": "what generate returns beside the answer",
    "output_scores": "what generate returns beside the answer",
    "output_logits": "what generate returns beside the answer",
    "return_dict_in_generate": "what generate returns beside the answer",
    "return_legacy_cache": "what generate returns beside the answer",
    "_from_model_config": "where the file comes from",
    "_commit_hash": "where the file comes from",
    "transformers_version": "where the file comes from",
}
"""Fields that change no answer of greedy or sampled search -> why."""


def list_left_out(config: Mapping[str, Any]) -> list[str]:
    """``name=value`` of the fields that transformers would heed and Secateur does not, and of unknown ones."""
    found = []
    for name, value in config.items():
        if name in APPLIED or name in WITHOUT_SAY or value is None:
            continue
        if name not in LEFT_OUT or not any(value == quiet for quiet in LEFT_OUT[name]):
            found.append(f"{name}={value!r}")
    return found
