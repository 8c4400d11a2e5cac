"""Rotary embeddings of every kind, on every decoder, against transformers: below and beyond their usual length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from secateur.compiler import pipeline
from secateur.compiler.bundle import outline
from secateur.compiler.families import _families
from secateur.compiler.inputs import random_rows
from secateur.compiler.meta_model import build_meta_model
from secateur.compiler.oracle import Oracle
from secateur.compiler.parity import Parity, compare_runs
from secateur.compiler.pipeline import Geometry, load_recipe, prune, read_source
from secateur.compiler.recording import load_recording_model
from secateur.compiler.rope import BY_LENGTH, CONSTANT, SteadyRotary, follow_length
from secateur.compiler.runs import CompiledRun, EagerBackend, OracleRun, Weights
from secateur.compiler.trace import trace_model
from secateur.runtime.errors import SecateurError, UserError
from secateur.runtime.request import Request
from secateur.runtime.session import Session

from . import tiny_gemma3, tiny_internvl, tiny_model, tiny_qwen, tiny_qwen_more
from .layout_checks import load_model, pictures

TOLERANCE = 2e-5
LIMIT = 32
"""Positions of pretraining. Rows of the geometries below have 20 to 46."""
KINDS = sorted({"default", *ROPE_INIT_FUNCTIONS})


def say(kind: str, width: int, limit: int = LIMIT) -> dict[str, Any]:
    """What a configuration says of a kind, for heads of ``width`` numbers. A new kind has no answer."""
    near, far = (np.linspace(1, end, width // 2).round(2).tolist() for end in (1.5, 6.0))
    told: dict[str, dict[str, Any]] = {
        "default": {},
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 3.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": limit},
        "longrope": {
            "factor": 4.0, "short_factor": near, "long_factor": far, "original_max_position_embeddings": limit,
        },
        "llama3": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": limit,
        },
        "proportional": {"partial_rotary_factor": 0.5},
    }  # fmt: skip
    return {"rope_type": kind, "rope_theta": 5000.0, **told[kind]}


def _change_llava(decoder: str) -> Callable[..., Any]:
    return lambda make, path, text: make(tiny_model)(path, decoder=decoder, layers=3, text=text)


def _change_sparse(make: Callable[[Any], Any], path: Path, text: Mapping[str, Any]) -> Path:
    sparse = {"model_type": "qwen3_moe", "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
              "moe_intermediate_size": 48}  # fmt: skip
    made: Path = make(tiny_internvl)(
        path, text_config=tiny_internvl.make_config(3)["text_config"] | sparse | dict(text)
    )
    return made


def _change_qwen(kind: str, module: Any) -> Callable[..., Any]:
    return lambda make, path, text: make(module)(path, kind=kind, layers=4, text=text)


DECODERS: dict[str, tuple[Callable[..., Any], int, dict[str, Any]]] = {
    "llama": (_change_llava("llama"), 16, {}),
    "mistral": (_change_llava("mistral"), 16, {}),
    "qwen2": (_change_llava("qwen2"), 16, {}),
    "qwen3_moe": (_change_sparse, 16, {}),
    "gemma3_text": (lambda make, path, text: make(tiny_gemma3)(path, layers=3, text=text), 24, {}),
    "qwen2_5_vl_text": (_change_qwen("qwen2_5_vl", tiny_qwen), 16, {"mrope_section": [2, 3, 3]}),
    "qwen2_5_omni_text": (_change_qwen("qwen2_5_omni_thinker", tiny_qwen), 16, {"mrope_section": [2, 3, 3]}),
    "qwen2_vl_text": (_change_qwen("qwen2_vl", tiny_qwen_more), 16, {"mrope_section": [2, 3, 3]}),
    **{
        decoder: (_change_qwen(kind, tiny_qwen_more), 24, {"mrope_section": [4, 4, 4], "mrope_interleaved": True})
        for decoder, kind in (
            ("qwen3_vl_text", "qwen3_vl"), ("qwen3_vl_moe_text", "qwen3_vl_moe"),
            ("qwen3_omni_moe_text", "qwen3_omni_moe_thinker"),
        )
    },
}  # fmt: skip
"""``text_config.model_type`` -> how a directory is made, width of a head, what rope says beside its kind."""


def write(path: Path, decoder: str, kind: str, limit: int = LIMIT, whole: bool = True) -> Path:
    """A directory whose decoder has rope of this kind, in Gemma 3 in the layers that see everything."""
    change, width, more = DECODERS[decoder]
    told: dict[str, Any] = say(kind, width, limit) | more
    if decoder == "gemma3_text":
        told = {"full_attention": told, "sliding_attention": say("default", width)}
    name = "write_model" if whole else "write_config"
    made: Path = change(
        lambda module: getattr(module, name), path, {"rope_parameters": told, "max_position_embeddings": limit}
    )
    return made


# -- the tables themselves: every kind on every decoder ---------------------------------------------------


def test_every_kind_of_transformers_has_an_answer() -> None:
    assert sorted(CONSTANT + BY_LENGTH) == KINDS


def test_every_decoder_is_looked_at() -> None:
    assert set(DECODERS) == {kind for family in _families() for kind in family.decoder_types}


@pytest.fixture(scope="module")
def class_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The class of a decoder's rotary embedding."""

    def find(decoder: str) -> Any:
        source = read_source(write(tmp_path_factory.mktemp("rope") / decoder, decoder, "default", whole=False))
        return type(build_meta_model(source, "fp32").get_submodule(source.family.decoder).rotary_emb)

    return cache(find)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_tables_are_those_of_transformers(
    class_of: Callable[[str], Any], tmp_path: Path, decoder: str, kind: str
) -> None:
    """Also of rows that stand beside longer ones, which transformers would turn by the longest of a batch."""
    source = read_source(write(tmp_path, decoder, kind, whole=False))
    built = class_of(decoder)
    fresh = built(source.text)
    types = sorted(getattr(fresh, "layer_types", ())) or [None]
    told = source.text.rope_parameters
    following = ("full_attention" if types[0] else "",) if kind in BY_LENGTH else ()
    ours = SteadyRotary(fresh, following)
    hidden = torch.zeros(1)
    for layer_type in types:
        named = {} if layer_type is None else {"layer_type": layer_type}
        counts = (LIMIT - 9, LIMIT, LIMIT + 1, 3 * LIMIT, LIMIT - 1)
        rows = [torch.arange(count).flip(0) % count for count in counts]
        if "mrope_section" in (told.get("full_attention") or told):
            rows = [torch.stack([row, row // 2, row // 3])[:, None] for row in rows]
        else:
            rows = [row[None] for row in rows]
        for ids in rows:
            for found, want in zip(ours(hidden, ids, **named), built(source.text)(hidden, ids, **named),
                                   strict=True):  # fmt: skip
                torch.testing.assert_close(found, want, rtol=0, atol=2e-5)
        short, long = rows[0], rows[3][..., : rows[0].shape[-1]]
        together = ours(hidden, torch.cat([short, long], -2), **named)
        for place, ids in enumerate((short, long)):
            for found, want in zip(together, built(source.text)(hidden, ids, **named), strict=True):
                torch.testing.assert_close(found[place : place + 1], want, rtol=0, atol=2e-5)


# -- whole programs, pruned and not, against transformers under hooks -------------------------------------

_STAGES = """
  - {{site: projector.out, score: {{name: seeded_random, options: {{seed: 3}}}}, select: top_k, share: 0.75}}
  - {{site: 'decoder.layer[1]', score: last_query_attention_mean, select: top_k, scope: whole, share: 0.5,
     signals: {{last_query_attention: {{projections: next}}}}}}
  - {{site: 'decoder.layer[2]', score: mean_query_importance, select: top_k, scope: whole, share: 0.3,
     signals: {{queries: {{projections: next, rotary: none}}, keys: {{projections: next, rotary: none}}}}}}
"""
NUMBERINGS = ("original", "compact")


def hold(path: Path, folder: Path, recipes: tuple[str, ...], batch: int = 2) -> dict[str, Parity]:
    """Random rows of several lengths through the programs, before they are exported, and through the oracle."""
    traced = trace_model(read_source(path), Geometry(batch=batch, text_tokens=24, new_tokens=6))
    model, found = load_recording_model(traced.source), {}
    for recipe in recipes:
        if recipe in NUMBERINGS:
            file = folder / f"{recipe}.yaml"
            file.write_text(f"name: {recipe}\npositions: {recipe}\nstages:{_STAGES.format()}")
        pruned = prune(traced, load_recipe(str(file) if recipe in NUMBERINGS else recipe), expose=True)
        told = outline(pruned.job, pruned.programs)
        backend = EagerBackend(pruned.programs.programs, Weights(traced.source, traced.model))
        ours, found[recipe] = CompiledRun(told, Request(backend, told)), Parity()
        items = random_rows(told, 2 * batch, 6, seed=1)
        compare_runs(ours, OracleRun(Oracle(pruned.job, model)), items, batch, found[recipe])
    return found


def check(found: Mapping[str, Parity]) -> None:
    for recipe, parity in found.items():
        assert parity.passed, (recipe, parity)
        for kind, scale in parity.scales.items():
            assert parity.kind(kind).largest <= TOLERANCE * max(1.0, scale), (recipe, kind, parity.worst)
        assert parity.kind("logits").scale > 0.1, "a comparison of zeros proves nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_programs_of_every_kind(tmp_path: Path, kind: str) -> None:
    check(hold(write(tmp_path / "model", "llama", kind), tmp_path, ("none", *NUMBERINGS)))


@pytest.mark.parametrize(
    ("decoder", "kind", "recipes"),
    [
        *((decoder, "dynamic", ("none", "compact")) for decoder in DECODERS if decoder != "llama"),
        *((decoder, "longrope", ("original",)) for decoder in ("gemma3_text", "qwen2_5_vl_text", "qwen3_vl_text")),
    ],
)
def test_programs_of_every_decoder(tmp_path: Path, decoder: str, kind: str, recipes: tuple[str, ...]) -> None:
    check(hold(write(tmp_path / "model", decoder, kind), tmp_path, recipes, batch=1))


def test_within_the_limit_dynamic_is_plain(tmp_path: Path) -> None:
    """Graphs of rows that never get beyond the limit are those of plain rope; one more new token makes others."""
    sources = [read_source(write(tmp_path / kind, "llama", kind, 48, whole=False)) for kind in ("default", "dynamic")]
    plain, dynamic = (str(trace_model(source, Geometry(text_tokens=24, new_tokens=8))) for source in sources)
    assert dynamic.replace("rotary_emb_rotary_", "rotary_emb_") == plain
    assert follow_length(sources[1], Geometry(text_tokens=24, new_tokens=8)) == ()
    assert follow_length(sources[1], Geometry(text_tokens=24, new_tokens=9)) == ("",)
    assert follow_length(sources[0], Geometry(text_tokens=24, new_tokens=9)) == ()


# -- bundles against transformers' unmodified model -------------------------------------------------------


def check_bundle(bundle: Path, path: Path, prompts: Mapping[str, int], images: int = 1) -> None:
    """Prompts, by variant that takes them, have the tokens and logits of ``generate`` of a model just loaded."""
    new = 6
    with Session(bundle, threads=1) as session:
        for prompt, variant in prompts.items():
            seen = pictures(3, images)
            answer = session.generate([prompt], [seen], ignore_eos=True, max_new_tokens=new)[0]
            assert answer.metrics.variant == variant
            inputs = session.processors[variant]([prompt], [seen])
            ids = torch.tensor([inputs.prompt_ids(0)])
            pixels = {"pixel_values": torch.from_numpy(inputs.pixel_values)}
            with torch.no_grad():
                want = load_model(path).generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), **pixels, do_sample=False, min_new_tokens=new,
                    max_new_tokens=new, return_dict_in_generate=True, output_logits=True,
                )  # fmt: skip
            assert answer.tokens == want.sequences[0, ids.shape[1] :].tolist()
            request = session.request(variant)
            logits = session.prefill(request, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)
            for step, theirs in enumerate(want.logits):
                np.testing.assert_allclose(logits[0], theirs[0].numpy(), rtol=0, atol=1e-4)
                logits = session.decode(request, np.array(answer.tokens[step : step + 1]))


SHORT, LONG = "<image>a?", "what may <image> this be, and why?"


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_bundles_answer_as_transformers_does(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
    """Rows that end before the limit, cross it while they are answered, and begin beyond it; nothing on stderr."""
    path = write(tmp_path / "model", "llama", kind)
    capfd.readouterr()
    pipeline.compile(path, tmp_path / "out", geometry=Geometry(text_tokens=40, new_tokens=8))
    assert "Traceback" not in capfd.readouterr().err
    check_bundle(tmp_path / "out", path, dict.fromkeys((SHORT, "<image>what is this", LONG), 0))


def test_geometries_on_both_sides_of_the_limit(tmp_path: Path) -> None:
    """One trace does not serve both."""
    path = write(tmp_path / "model", "llama", "dynamic")
    sizes = [Geometry(text_tokens=text, new_tokens=6) for text in (10, 40)]
    pipeline.compile(path, tmp_path / "out", geometry=sizes)
    check_bundle(tmp_path / "out", path, {SHORT: 0, LONG: 1})


@pytest.mark.parametrize("limit", [LIMIT, 32768])
def test_published_decoders_of_internvl3(tmp_path: Path, limit: int) -> None:
    said = {
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}, "rope_theta": 1000000.0,
        "max_position_embeddings": limit, "max_window_layers": 70, "sliding_window": None, "use_sliding_window": False,
    }  # fmt: skip
    text = tiny_internvl.make_config(3)["text_config"] | said
    path = tiny_internvl.write_model(tmp_path / "model", text_config=text)
    pipeline.compile(path, tmp_path / "out", geometry=Geometry(text_tokens=40, new_tokens=8))
    check_bundle(tmp_path / "out", path, dict.fromkeys((SHORT, LONG), 0))


# -- what config.json may say -----------------------------------------------------------------------------

DYNAMIC = {"factor": 3.0}


@pytest.mark.parametrize(
    "said",
    [
        {"rope_scaling": {"type": "dynamic", **DYNAMIC}, "rope_theta": 5000.0},
        {"rope_scaling": {"rope_type": "dynamic", **DYNAMIC}, "rope_theta": 5000.0},
        {"rope_scaling": {"rope_type": "dynamic", "type": "dynamic", **DYNAMIC}, "rope_theta": 5000.0},
        {"rope_parameters": {"rope_type": "dynamic", **DYNAMIC}, "rope_theta": 5000.0},
        {"rope_parameters": {"type": "dynamic", "rope_theta": 5000.0, **DYNAMIC}},
    ],
)
def test_old_and_new_spelling(tmp_path: Path, said: dict[str, Any]) -> None:
    text = {"max_position_embeddings": LIMIT, **said}
    source = read_source(tiny_model.write_config(tmp_path, decoder="qwen2", text=text))
    assert follow_length(source, Geometry(text_tokens=40)) == ("",)
    want = read_source(write(tmp_path / "new", "qwen2", "dynamic", whole=False)).text
    ids, hidden = torch.arange(3 * LIMIT)[None], torch.zeros(1)
    rotary = type(load_rotary(source))
    torch.testing.assert_close(SteadyRotary(rotary(source.text), ("",))(hidden, ids), rotary(want)(hidden, ids))


def load_rotary(source: Any) -> Any:
    return build_meta_model(source, "fp32").get_submodule(source.family.decoder).rotary_emb


def test_old_spelling_of_several_axes_and_of_layer_types(tmp_path: Path) -> None:
    text = {"rope_parameters": None, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "rope_theta": 1e4}
    seen = read_source(tiny_qwen_more.write_config(tmp_path / "qwen", "qwen2_vl", text=text))
    assert seen.text.rope_parameters["rope_type"] == "default"
    text = {"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e6}
    told = read_source(tiny_gemma3.write_config(tmp_path / "gemma", text=text | {"rope_local_base_freq": 1e4})).text
    assert told.rope_parameters["full_attention"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    assert told.rope_parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": 1e4}


AVAILABLE = f"(available: {', '.join(CONSTANT + BY_LENGTH)})"


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"rope_type": "axial"}, f"no decoder is compiled with rope of the kind 'axial' {AVAILABLE}; use a checkpoint"),
        ({"rope_type": "mrope"}, f"no decoder is compiled with rope of the kind 'mrope' {AVAILABLE}; use a checkpoint"),
        ({"rope_type": "spiral", "factor": 2.0}, "no decoder is compiled with rope of the kind 'spiral' (available"),
        (
            {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
            "rope of the kind 'linear' turns 8 of a head's 16 numbers; these decoders turn all of them",
        ),
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 7, "factor": 2.0},
            "transformers cannot compute rope of the kind 'longrope' from rope_theta 10000.0, rope_type longrope",
        ),
        ({"rope_type": "dynamic", "factor": "two"}, "transformers cannot compute rope of the kind 'dynamic' from"),
        ({"rope_type": "linear", "factor": 0}, "rope of the kind 'linear' has frequencies that are not finite"),
    ],
)
@pytest.mark.parametrize("decoder", ["qwen2", "gemma3_text"])
def test_what_cannot_be_compiled_is_refused_by_its_name(
    tmp_path: Path, decoder: str, told: dict[str, Any], message: str
) -> None:
    told = {"rope_theta": 1e4, **told}
    if decoder == "gemma3_text":
        told = {"full_attention": told, "sliding_attention": say("default", 24)}
        message = message.replace("8 of a head's 16", "12 of a head's 24")
    path = DECODERS[decoder][0](lambda module: module.write_config, tmp_path, {"rope_parameters": told})
    with pytest.raises(UserError) as caught:
        read_source(path)
    place = "text_config.rope_parameters" + (".full_attention" if decoder == "gemma3_text" else "")
    assert str(caught.value).startswith(f"{path / 'config.json'}: {place}: {message}")
    assert "\n" not in str(caught.value)


def test_sections_that_do_not_fit_do_not_blame_the_recipe(tmp_path: Path) -> None:
    text = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 4]}}
    source = read_source(tiny_qwen_more.write_config(tmp_path, "qwen2_vl", text=text))
    with pytest.raises(SecateurError, match=r"cannot trace decoder: .*; this is transformers' own code"):
        trace_model(source, Geometry(image_size=(56, 56)))
