"""Every field of transformers' GenerationConfig has an answer, and what is applied equals transformers' own classes."""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig
from transformers.generation import logits_process, stopping_criteria
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS
from transformers.generation.utils import GenerationMixin

from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.generation_fields import APPLIED, LEFT_OUT, WITHOUT_SAY, list_left_out
from secateur.runtime.generation_options import DEFAULTS, resolve
from secateur.runtime.logits_processors import PROCESSORS
from secateur.runtime.logits_warpers import WARPERS
from secateur.runtime.sampling import Sampler, Sampling

VOCABULARY, END = 40, [2, 5]
OWN_CLASSES = {
    "MinLengthLogitsProcessor": "min_length",
    "MinNewTokensLengthLogitsProcessor": "min_new_tokens",
    "TemperatureLogitsWarper": "temperature",
    "RepetitionPenaltyLogitsProcessor": "repetition_penalty",
    "EncoderRepetitionPenaltyLogitsProcessor": "encoder_repetition_penalty",
    "TopPLogitsWarper": "top_p",
    "TopKLogitsWarper": "top_k",
    "TopHLogitsWarper": "top_h",
    "MinPLogitsWarper": "min_p",
    "TypicalLogitsWarper": "typical_p",
    "EpsilonLogitsWarper": "epsilon_cutoff",
    "EtaLogitsWarper": "eta_cutoff",
    "NoRepeatNGramLogitsProcessor": "no_repeat_ngram_size",
    "EncoderNoRepeatNGramLogitsProcessor": "encoder_no_repeat_ngram_size",
    "SequenceBiasLogitsProcessor": "sequence_bias",
    "NoBadWordsLogitsProcessor": "bad_words_ids",
    "ForcedBOSTokenLogitsProcessor": "forced_bos_token_id",
    "ForcedEOSTokenLogitsProcessor": "forced_eos_token_id",
    "InfNanRemoveLogitsProcessor": "remove_invalid_values",
    "ExponentialDecayLengthPenalty": "exponential_decay_length_penalty",
    "LogitNormalization": "renormalize_logits",
    "SuppressTokensAtBeginLogitsProcessor": "begin_suppress_tokens",
    "SuppressTokensLogitsProcessor": "suppress_tokens",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
    "WatermarkLogitsProcessor": "watermarking_config",
    "SynthIDTextWatermarkLogitsProcessor": "watermarking_config",
    "MaxLengthCriteria": "max_length",
    "MaxTimeCriteria": "max_time",
    "StopStringCriteria": "stop_strings",
    "EosTokenCriteria": "eos_token_id",
    "ConfidenceCriteria": "assistant_confidence_threshold",
}
NO_FIELD = {
    "LogitsProcessor", "StoppingCriteria", "PrefixConstrainedLogitsProcessor", "WhisperTimeStampLogitsProcessor",
    "WhisperNoSpeechDetection", "ClassifierFreeGuidanceLogitsProcessor", "AlternatingCodebooksLogitsProcessor",
    "BarkEosPrioritizerLogitsProcessor", "DiaClassifierFreeGuidanceLogitsProcessor",
    "DiaEOSChannelFilterLogitsProcessor", "DiaEOSDelayPatternLogitsProcessor",
}  # fmt: skip
"""Of the base, of an argument of ``generate``, or of models that make no text."""

VALUES: dict[str, list[Any]] = {
    "sequence_bias": [[[[7], 4.0], [[1, 9], -3.5], [[9], -2.0], [[3, 4, 5], 2.0]]],
    "encoder_repetition_penalty": [1.7, 0.6],
    "repetition_penalty": [1.3, 0.7],
    "no_repeat_ngram_size": [1, 2, 3, 30],
    "encoder_no_repeat_ngram_size": [1, 2, 3, 30],
    "bad_words_ids": [[[4], [2], [6, 7], [1, 2, 3], [0]]],
    "min_length": [10, 14],
    "min_new_tokens": [1, 3],
    "forced_eos_token_id": [5, [2, 5]],
    "remove_invalid_values": [True],
    "exponential_decay_length_penalty": [[1, 1.2], [3, 0.9], [0, 4]],
    "suppress_tokens": [[0, 3, 17, -1, 4000]],
    "begin_suppress_tokens": [[0, 2, 5, 30]],
    "temperature": [0.3, 1.7],
    "top_h": [0.2, 0.6],
    "top_k": [1, 7, 100],
    "top_p": [0.0, 0.4, 0.95],
    "min_p": [0.05, 0.5, 1.0],
    "typical_p": [0.2, 0.9],
    "epsilon_cutoff": [0.02, 0.2],
    "eta_cutoff": [0.02, 0.3],
    "renormalize_logits": [True],
}


# -- the registry ------------------------------------------------------------------------------------------


def test_every_field_has_an_answer() -> None:
    known = [*APPLIED, *LEFT_OUT, *WITHOUT_SAY]
    assert len(known) == len(set(known))
    assert set(GenerationConfig().to_dict()) - set(known) == set()
    # Kept for files of earlier releases.
    assert set(known) - set(GenerationConfig().to_dict()) == {"return_legacy_cache", "_commit_hash"}
    assert {"quantized"} == set(ALL_CACHE_IMPLEMENTATIONS) - set(LEFT_OUT["cache_implementation"])


def test_the_page_names_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs" / "generation.md").read_text(encoding="utf-8")
    for name in (*APPLIED, *LEFT_OUT):
        assert f"`{name}`" in page, name
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for name, why in WITHOUT_SAY.items():
        assert [row for row in rows if f"`{name}`" in row and row.endswith(f"| {why} |")], name


def test_every_class_of_transformers_has_a_field() -> None:
    found = {
        name
        for module, base in (
            (logits_process, logits_process.LogitsProcessor),
            (stopping_criteria, stopping_criteria.StoppingCriteria),
        )
        for name, one in vars(module).items()
        if inspect.isclass(one) and issubclass(one, base)
    }
    assert found == {*OWN_CLASSES, *NO_FIELD}
    named = {*PROCESSORS, *WARPERS, "renormalize_logits"}
    assert named == set(VALUES)
    assert named <= set(OWN_CLASSES.values())


def test_the_order_is_that_of_transformers() -> None:
    """Read from the source: classes in the order in which they are appended."""
    source = ast.parse(textwrap.dedent(inspect.getsource(GenerationMixin._get_logits_processor)))
    calls = [n for n in ast.walk(source) if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "append"]
    appended = [n.args[0].func for n in sorted(calls, key=lambda n: n.lineno) if isinstance(n.args[0], ast.Call)]
    order = [OWN_CLASSES.get(name.id, "") for name in appended if isinstance(name, ast.Name)]
    assert [name for name in order if name in PROCESSORS] == list(PROCESSORS)
    assert [name for name in order if name in WARPERS] == list(WARPERS)
    assert order[-1] == "renormalize_logits"


def test_transformers_own_defaults() -> None:
    theirs = GenerationConfig._get_default_generation_params()
    for name, value in DEFAULTS.items():
        assert theirs[name] == value
    for name, rule in APPLIED.items():
        if name in theirs and name not in ("top_k", "max_length"):
            assert theirs[name] == rule.off or (theirs[name] is None and rule.off == ()), name
    assert list_left_out(theirs) == []
    assert list_left_out(GenerationConfig().to_dict()) == []


@pytest.mark.parametrize("name", APPLIED)
def test_off_is_as_if_nothing_was_said(name: str) -> None:
    """Wherever off is a value that may be said, and not the absence of one."""
    off = APPLIED[name].off
    if off is None:
        return
    drawn = {"do_sample": True, "top_k": 0} if APPLIED[name].sampled else {}
    assert resolve({**drawn, name: off}) == resolve(drawn)
    for value in VALUES.get(name, ()):
        assert resolve({**drawn, name: value}) != resolve(drawn)


def test_what_asks_for_no_other_search_is_not_left_out() -> None:
    quiet = {
        "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "penalty_alpha": 0.0, "guidance_scale": 1.0,
        "token_healing": False, "use_mtp": False, "is_assistant": False, "cache_implementation": "static",
    }  # fmt: skip
    assert list_left_out(quiet) == []
    assert len(list_left_out({**dict.fromkeys(quiet, 7), "cache_implementation": "no_such"})) == len(quiet)


# -- one by one, and together --------------------------------------------------------------------------------


def make_theirs(fields: dict[str, Any], prompt: torch.Tensor, room: int) -> Any:
    """transformers' own chain for a prompt, as ``generate`` makes it."""
    config = GenerationConfig(**fields)
    config.update(**GenerationConfig._get_default_generation_params(), defaults_only=True)
    config._eos_token_tensor, config.max_length = torch.tensor(END), prompt.shape[1] + room
    mixin: Any = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False))
    mixin._merge_criteria_processor_list = lambda default, custom: default
    return GenerationMixin._get_logits_processor(
        mixin, config, input_ids_seq_length=prompt.shape[1], encoder_input_ids=prompt, device="cpu",
        model_kwargs={"attention_mask": torch.ones_like(prompt)},
    )  # fmt: skip


def compare_steps(fields: dict[str, Any], seed: int, steps: int = 6, odd: bool = False) -> None:
    """Random logits step by step; tokens are drawn from few, so that they repeat. ``odd``: some are not finite."""
    random = np.random.default_rng(seed)
    prompt = random.integers(0, 10, 9)
    ids = torch.tensor(prompt)[None]
    chain = make_theirs(fields, ids, steps)
    how = resolve(fields).sampling
    sampler = Sampler(how, [prompt], VOCABULARY, max_new_tokens=steps, eos=END)
    for _ in range(steps):
        logits = (random.standard_normal(VOCABULARY) * 3).astype(np.float32)
        if odd:
            logits[[1, 2, 3]] = np.nan, np.inf, -np.inf
        want = chain(ids, torch.tensor(logits)[None])[0].numpy()
        got = sampler.weigh(0, logits)
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
        token = int(random.integers(0, 10))
        sampler._histories[0].append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in VALUES.items() for value in values])
def test_each_equals_its_class(name: str, value: Any) -> None:
    fields = {name: value}
    if APPLIED[name].sampled:
        fields |= {"do_sample": True} | ({} if name == "top_k" else {"top_k": 0})
    for seed in range(4):
        compare_steps(fields, seed)
    if name in PROCESSORS:
        for seed in range(2):
            compare_steps(fields | {"remove_invalid_values": True}, seed, odd=name == "remove_invalid_values")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_together_in_their_order(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(VALUES)), max_size=6, unique=True))
    fields = {name: data.draw(st.sampled_from(VALUES[name])) for name in names}
    # Filters of mass cut at a sum of float32 there and float64 here; exp is steep at a low temperature.
    draws = data.draw(st.booleans())
    if not draws:
        fields = {name: value for name, value in fields.items() if not APPLIED[name].sampled}
    elif "no_repeat_ngram_size" in fields or "encoder_no_repeat_ngram_size" in fields:
        fields.pop("forced_eos_token_id", None)  # with all else ruled out nothing is left to draw from
    if draws and "forced_eos_token_id" in fields:
        fields["forced_eos_token_id"] = 5  # which of two equal candidates a filter leaves is up to the sort
    if draws and "remove_invalid_values" in fields:
        # A forbidden end at the least number is then raised to infinity: no distribution, there neither.
        fields.pop("exponential_decay_length_penalty", None)
    compare_steps({"do_sample": draws, "top_k": 50, **fields} if draws else fields, data.draw(st.integers(0, 999)))


def test_the_end_forced_where_it_is_forbidden() -> None:
    """Several rules at one token: the forced end comes after the forbidden one, as there."""
    compare_steps({"forced_eos_token_id": 5, "min_new_tokens": 6, "suppress_tokens": [2]}, seed=1)
    compare_steps({"bad_words_ids": [[5], [7]], "exponential_decay_length_penalty": [0, 2.0], "min_length": 12}, seed=2)


def test_nothing_left_to_draw() -> None:
    sampler = Sampler(Sampling(temperature=1.0, suppress_tokens=[0, 1, 2, 3]), [[1]], 4)
    with pytest.raises(UserError, match="every token is ruled out"):
        sampler.draw(np.zeros((1, 4), np.float32))


# -- what is said of them -------------------------------------------------------------------------------------


def test_who_has_the_last_word() -> None:
    defaults = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "max_new_tokens": 7, "max_length": 30}
    how = resolve(defaults)
    assert (how.sampling.temperature, how.sampling.top_p, how.sampling.top_k) == (0.5, 0.9, 50)
    assert (how.room(100, 20), how.room(4, 20), how.asked_tokens) == (7, 4, None)
    greedy = resolve(defaults, {"temperature": 0})
    assert greedy.sampling == Sampling()
    assert resolve(defaults, {"do_sample": False}).sampling == Sampling()
    assert resolve({}, {"temperature": 0.7}).sampling == Sampling(temperature=0.7, top_k=50)
    assert resolve({"top_k": 3}, {"temperature": 0.7, "top_k": 0}).sampling == Sampling(temperature=0.7)
    assert resolve(defaults, {"max_length": 25}).room(100, 20) == 5
    assert resolve({"max_length": 24}).room(100, 20) == 4
    with pytest.raises(UserError, match=r"the prompt has 24 tokens, max_length is 24; give max_new_tokens"):
        resolve({"max_length": 24}).room(100, 24)
    # Sampling's options in a greedy checkpoint mean nothing there, whatever they are.
    assert resolve({"do_sample": False, "temperature": 0.0, "top_p": 7}).sampling == Sampling()
    assert (resolve({"eos_token_id": 3}).eos, resolve({"eos_token_id": 3}, {"eos_token_id": 4}).eos) == (None, [4])
    assert resolve({"stop_strings": "a"}).stop == ["a"]
    assert resolve({"stop_strings": ["a", "b"]}, {"stop_strings": []}).stop == []
    assert resolve({"sequence_bias": [[[1], 2.0]]}, {"sequence_bias": {(3, 4): 1.0}}).sampling.sequence_bias == [
        ([3, 4], 1.0)
    ]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_beams": 4}, r"^generation: num_beams is not applied here.* \(available: max_new_tokens, .*top_k"),
        ({"use_cache": False}, r"^generation: use_cache changes no answer here \(a matter of speed\) \(available: "),
        ({"no_such": 1}, r"^generation: no option 'no_such' \(available: max_new_tokens, "),
        ({"top_k": 5}, "top_k says how to draw tokens, but the likeliest is taken; give a temperature above 0"),
        ({"do_sample": True, "temperature": 0}, "do_sample is True, temperature is 0;"),
        ({"do_sample": False, "temperature": 0.5}, "do_sample is False, temperature is 0.5;"),
        ({"temperature": -1}, "temperature is -1; it must be 0 .greedy. or more"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size is -2; it must be 0 .off. or more"),
        ({"no_repeat_ngram_size": True}, "no_repeat_ngram_size is True"),
        ({"bad_words_ids": [[]]}, "bad_words_ids is .*; it must be a list of lists of token ids"),
        ({"bad_words_ids": "word"}, "bad_words_ids is 'word'"),
        ({"suppress_tokens": 3}, "suppress_tokens is 3; it must be a list of token ids"),
        ({"sequence_bias": [[[1], float("inf")]]}, "sequence_bias is "),
        ({"exponential_decay_length_penalty": [1]}, "exponential_decay_length_penalty is "),
        ({"max_time": -1.0}, "max_time is -1.0; it must be a number of seconds"),
        ({"stop_strings": [3]}, "stop_strings is .3.; it must be a text or a list of texts"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be a whole number of at least 1"),
    ],
)
def test_what_a_caller_cannot_ask(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        resolve({}, given)
    if set(given) <= set(APPLIED) and "top_k" not in given and "temperature" not in given:
        with pytest.raises(BundleError, match=f"^a/generation_config.json: {next(iter(given))} is "):
            resolve(given, where="a/generation_config.json")


def test_what_is_left_out_is_named() -> None:
    config = {
        "num_beams": 4, "length_penalty": 2.0, "guidance_scale": 1.0, "penalty_alpha": 0.6, "top_k": 4,
        "cache_implementation": "quantized", "token_healing": None, "chat_format": "chatml", "use_cache": False,
    }  # fmt: skip
    assert list_left_out(config) == [
        "num_beams=4", "penalty_alpha=0.6", "cache_implementation='quantized'", "chat_format='chatml'",
    ]  # fmt: skip
