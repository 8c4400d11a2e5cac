"""Tracing: one attention node per layer, a symbolic length, the parameters' own names, no weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.compiler import ops
from secateur.compiler.pipeline import Geometry, read_source, trace_model
from secateur.compiler.program import Program, Segment
from secateur.passes.attend_in_windows import attend_in_windows, window_of
from secateur.passes.edit import is_call, layer_index
from secateur.runtime.errors import SecateurError, UserError

from .tiny_model import DECODERS, make_config, write_config

DECODER_LAYERS = "model.language_model.layers"
TOWER_LAYERS = "model.vision_tower.encoder.layers"


def attention_layers(program: Program, layers: str) -> list[int | None]:
    return [layer_index(node, layers) for node in program.graph.nodes if is_call(node, ops.attention)]


@pytest.mark.parametrize("decoder", DECODERS)
def test_one_attention_node_per_layer(traced: Callable[..., Any], decoder: str) -> None:
    programs = traced(decoder).programs
    assert attention_layers(programs["decoder"], DECODER_LAYERS) == [0, 1, 2, 3]
    assert attention_layers(programs["vision"], TOWER_LAYERS) == [0, 1, 2]
    for name in ("embedding", "head"):
        assert attention_layers(programs[name], "") == []


@pytest.mark.parametrize("decoder", DECODERS)
def test_attention_is_causal_in_the_decoder_alone_and_grouped(traced: Callable[..., Any], decoder: str) -> None:
    programs = traced(decoder).programs
    for name, causal, heads in (("decoder", True, (4, 2)), ("vision", False, (2, 2))):
        for node in programs[name].graph.nodes:
            if is_call(node, ops.attention):
                assert (node.args[4], [a.meta["val"].shape[1] for a in node.args[:2]]) == (causal, [*heads])


@pytest.mark.parametrize("decoder", DECODERS)
def test_only_the_length_is_symbolic(traced: Callable[..., Any], decoder: str) -> None:
    programs = traced(decoder).programs
    for program in programs.programs.values():
        for node in program.graph.nodes:
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor):
                continue
            symbols = [n for n in value.shape if not isinstance(n, int)]
            assert len(symbols) <= (program.name in ("decoder", "embedding")), (program.name, node, value.shape)
    hidden = next(n for n in programs["decoder"].graph.nodes if n.op == "placeholder")
    assert isinstance(hidden.meta["val"].shape[1], torch.SymInt)


@pytest.mark.parametrize("decoder", DECODERS)
def test_weights_carry_the_models_names_and_stay_on_meta(traced: Callable[..., Any], decoder: str) -> None:
    trace = traced(decoder)
    used: dict[str, torch.Tensor] = {}
    for program in trace.programs.programs.values():
        used |= program.weights()
    every = dict(trace.model.named_parameters(remove_duplicate=False))
    assert all(tensor.device.type == "meta" for tensor in used.values())
    assert {n: tuple(t.shape) for n, t in used.items()} == {n: tuple(every[n].shape) for n in used}
    # What no program reads: the norm after the tower, which makes CLIP's own embedding.
    assert {n for n in set(every) - set(used) if "post_layernorm" not in n} == set()


def test_qwen2_has_biases_where_llama_has_none(traced: Callable[..., Any]) -> None:
    biases = {
        decoder: {n.rpartition(".")[0].rpartition(".")[2] for n in traced(decoder).programs["decoder"].weights() if
                  n.endswith(".bias")}
        for decoder in DECODERS
    }  # fmt: skip
    assert biases == {"llama": set(), "mistral": set(), "qwen2": {"q_proj", "k_proj", "v_proj"}}


def test_constants_are_real_tensors(traced: Callable[..., Any]) -> None:
    """Rotary frequencies and position indices are in no checkpoint: they are computed."""
    constants = {
        name: getattr(program.module, node.target)
        for name, program in traced().programs.programs.items()
        for node in program.graph.nodes
        if node.op == "get_attr" and "weight" not in node.meta
    }
    assert {name: tuple(c.shape) for name, c in constants.items()} == {"decoder": (8,), "vision": (1, 17)}
    assert all(c.device.type == "cpu" for c in constants.values())
    torch.testing.assert_close(constants["decoder"], 10000.0 ** (-torch.arange(8) / 8))


def test_it_prints_itself_the_same_each_time(traced: Callable[..., Any]) -> None:
    trace = traced()
    again = trace_model(trace.source, trace.geometry, trace.dtype)
    assert str(again) == str(trace)
    assert "0x" not in str(trace)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_window_longer_than_the_sequence_or_none(traced: Callable[..., Any], decoder: str, tmp_path: Path) -> None:
    """Mistral's default window is 4096 tokens; Qwen2 states one and does not use it."""
    windows = {n.args[5] if len(n.args) > 5 else None for n in traced(decoder).programs["decoder"].graph.nodes
               if is_call(n, ops.attention)}  # fmt: skip
    assert windows == ({4096} if decoder == "mistral" else {None})
    row = [Segment("s0", 0, 4, 40, 48, 0)]
    windowless = attend_in_windows(traced(decoder).programs["decoder"], DECODER_LAYERS, row, ["s0"], 48)
    assert all(window_of(n) is None for n in windowless.graph.nodes if is_call(n, ops.attention))


def test_mistral_without_a_window(tmp_path: Path) -> None:
    write_config(tmp_path, decoder="mistral", layers=1, text={"sliding_window": None})
    decoder = trace_model(read_source(tmp_path), Geometry()).programs["decoder"]
    assert [n.args[5:] for n in decoder.graph.nodes if is_call(n, ops.attention)] in ([()], [(None,)], [(None, None)])


def test_a_shape_that_depends_on_data_is_named() -> None:
    from secateur.compiler.function import trace_function

    with pytest.raises(
        SecateurError,
        match=r"^trace: cannot trace stage0: the shape of .+ is dynamic "
        r"\(.+test_trace.py:\d+ in <lambda>: .+x\[x > 0\].+\); scores, selectors and merges must have",
    ):
        trace_function("stage0", lambda x: x[x > 0], {"x": torch.zeros(3)}, ("y",))


def test_what_is_written_in_place_is_traced_as_values() -> None:
    from secateur.compiler.function import trace_function

    def double(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y[:, 0] += 1
        return y.mul_(2)

    program = trace_function("double", double, {"x": torch.zeros(2, 3)}, ("y",))
    assert not [n for n in program.graph.nodes if n.op == "call_function" and n.target._schema.is_mutable]
    x = torch.arange(6.0).reshape(2, 3)
    torch.testing.assert_close(program.module(x)[0], double(x))


def test_switching_gradients_off_once_more_is_no_part_of_a_trace() -> None:
    from secateur.compiler.function import aten, trace_function

    @torch.no_grad()
    def turn(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = x.sin()
        return y.cos()

    program = trace_function("turn", turn, {"x": torch.zeros(2)}, ("y",))
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert targets == [aten.sin.default, aten.cos.default]
    assert not getattr(torch.fx.config, "do_not_emit_stack_traces", False)  # what others trace is as it was


def _router(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    top, at = x.topk(2)
    top /= top.sum(-1, keepdim=True)
    return top + at


def _twice(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x * 2
    before = z + 1
    z += y
    z *= y
    return z + before


def _view(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x * 2
    row = z[0]
    z += y
    return z + row


def _view_of_a_write(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x * 2
    row = z.add_(y)[0]
    z *= y
    return z + row


def _narrow(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x.half()
    z += y
    return z


@pytest.mark.parametrize(
    ("function", "cheap"),
    [(_router, True), (_twice, True), (_view, False), (_view_of_a_write, False), (_narrow, False)],
)
def test_only_what_has_no_views_is_written_as_values_at_once(
    function: Any, cheap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others go through the exporter's decompositions, which know of memory; both compute what was written."""
    from secateur.compiler.function import trace_function

    real, asked = torch.export.ExportedProgram.run_decompositions, []

    def decompose(self: Any, *given: Any) -> Any:
        asked.append(self)
        return real(self, *given)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", decompose)
    source = torch.Generator().manual_seed(0)
    feed = {"x": torch.rand(3, 4, generator=source), "y": torch.rand(3, 4, generator=source)}
    program = trace_function("function", function, feed, ("out",))
    assert bool(asked) != cheap
    torch.testing.assert_close(program.module(*feed.values())[0], function(*feed.values()))


TYPES = (
    "gemma3, internvl, llava, llava_next, llava_onevision, qwen2_5_omni, qwen2_5_omni_thinker, qwen2_5_vl, "
    "qwen2_vl, qwen3_omni_moe, qwen3_omni_moe_thinker, qwen3_vl, qwen3_vl_moe, smolvlm"
)
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no model type": (
        {"model_type": None},
        "{config}: no model_type (available: {types}); choose a model of a supported family",
    ),
    "unknown model type": (
        {"model_type": "bert"},
        "{config}: unknown model type 'bert' (available: {types}); choose a model of a supported family",
    ),
    "unknown decoder": (
        {"text_config": {"model_type": "gemma2"}},
        "{config}: text_config.model_type 'gemma2' is unknown (available: llama, mistral, qwen2)",
    ),
    "unknown tower": (
        {"vision_config": {"model_type": "siglip_vision_model"}},
        "{config}: vision_config.model_type 'siglip_vision_model' is unknown (available: clip_vision_model)",
    ),
    "quantised": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "{config}: checkpoint is quantised (bitsandbytes); use the unquantised checkpoint",
    ),
    "own code": (
        {"model_type": "llava_of_my_own", "auto_map": {"AutoConfig": "modeling.Config"}},
        "{config}: model type 'llava_of_my_own' is code of the checkpoint's own (auto_map), which is never run "
        "(available: {types}); use a version of this model that transformers has classes for (often called …-hf)",
    ),
    "all tower layers": (
        {"vision_feature_layer": [-2, -5]},
        "{config}: vision_feature_layer is [-2, -5]; only a single feature layer is supported; LLaVA-1.5 uses -2",
    ),
    "full strategy": (
        {"vision_feature_select_strategy": "full"},
        "{config}: vision_feature_select_strategy is 'full' (available: default); "
        "the 'full' strategy sends the CLS row to the decoder, which no recipe here expects",
    ),
    "no such tower layer": (
        {"vision_feature_layer": -9},
        "{config}: vision_feature_layer -9 does not exist in a tower of 3 layers",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_cannot_be_compiled_is_one_line(tmp_path: Path, case: str) -> None:
    changes, text = CONFIGS[case]
    (path := write_config(tmp_path) / "config.json").write_text(json.dumps(make_config(**changes)))
    with pytest.raises(UserError) as caught:
        read_source(tmp_path)
    assert str(caught.value) == text.format(config=path, types=TYPES)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{", "not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        (b"\xff", "not valid JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)"),
        (b"[]", "not a JSON object"),
    ],
)
def test_a_broken_configuration_is_one_line(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_source(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'config.json'}: {text}; download the file again"


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    fix = "give the directory of a Hugging Face model"
    for path, text in ((tmp_path / "absent", "no such directory"), (tmp_path, "no config.json")):
        with pytest.raises(UserError) as caught:
            read_source(path)
        assert str(caught.value) == f"{path}: {text}; {fix}"
    write_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        read_source(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: this is an adapter, not a model; merge it into its base model and save that"
    )
