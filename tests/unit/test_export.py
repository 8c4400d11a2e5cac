"""Exported graphs: fused alike in every layer, valid, static, the same each time, and the same in both dialects."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from secateur.compiler.function import trace_function
from secateur.compiler.pipeline import RECIPES, Geometry, export, prune, read_source, trace_model
from secateur.exporters.builder import Builder
from secateur.exporters.checkpoint import Checkpoint
from secateur.exporters.dialects import DIALECTS
from secateur.exporters.onnx import Exported, export_program, export_programs, save_model
from secateur.exporters.weights import WEIGHTS_FILE, WeightLayout, write_weights
from secateur.runtime.errors import SecateurError, UserError

from .reference_runs import run_in_reference
from .rows import NORMS, SEEING
from .tiny_model import DECODERS, IMAGE, PAD, write_config

DEPTH = 4
ATTENTION = {
    "onnxruntime": "GroupQueryAttention", "onnxruntime-cuda": "GroupQueryAttention",
    "plain": "Attention", "plain-unrolled": "Attention",
    "tensorrt": "Attention",
}  # fmt: skip
PROGRAMS = ("vision", "prefill", "decode")


def count_ops(model: ir.Model, *, scored: bool = False) -> Counter[str]:
    """Operators of the model itself, or of the copies that a stage's score reads."""
    return Counter(n.op_type for n in model.graph if (n.name or "").startswith("score/") == scored)


def layer_counts(model: ir.Model, op: str) -> list[int]:
    """Nodes of a type per decoder layer."""
    places = [re.match(r"model\.language_model\.layers\.(\d+)\.", n.name or "") for n in model.graph if n.op_type == op]
    found = Counter(int(place[1]) for place in places if place)
    return [found[i] for i in range(DEPTH)]


@pytest.fixture(scope="module")
def exported(pruned: Callable[..., Any]) -> Callable[..., Exported]:
    """``exported(recipe, dialect, ...)``: the other arguments are those of ``pruned``."""
    made: dict[tuple[str, int], Exported] = {}

    def make(recipe: str, dialect: str, keep: float | None = None, **model: Any) -> Exported:
        source = pruned(recipe, keep, **model)
        key = (dialect, id(source))
        if key not in made:
            made[key] = export(source, dialect)
        return made[key]

    return make


@pytest.fixture(scope="module")
def saved(exported: Callable[..., Exported], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``saved(recipe, dialect, ...)`` -> a directory with the graphs and the weights they point into."""
    made: dict[int, Path] = {}

    def make(recipe: str, dialect: str, pruned: Any, **model: Any) -> Path:
        graphs = exported(recipe, dialect, **model)
        if id(graphs) not in made:
            path = made[id(graphs)] = tmp_path_factory.mktemp(f"{recipe}-{dialect}")
            trace = pruned.traced
            write_weights(graphs.layout, Checkpoint(trace.source.path, trace.model), path / WEIGHTS_FILE)
            for name, graph in graphs.models.items():
                save_model(graph, path / f"{name}.onnx")
        return made[id(graphs)]

    return make


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("recipe", SEEING)
def test_every_layer_is_fused_alike(exported: Callable[..., Exported], recipe: str, dialect: str) -> None:
    models = exported(recipe, dialect).models
    assert tuple(models) == PROGRAMS
    for name in ("prefill", "decode"):
        counts = count_ops(models[name])
        own = NORMS.get(recipe, 0) if name == "prefill" else 0
        assert (counts["RotaryEmbedding"], counts["RMSNormalization"]) == (2 * DEPTH, 2 * DEPTH + 1 + own)
        assert counts[ATTENTION[dialect]] == DEPTH
        assert layer_counts(models[name], "RotaryEmbedding") == [2] * DEPTH
        assert layer_counts(models[name], "RMSNormalization") == [2] * DEPTH
        assert layer_counts(models[name], ATTENTION[dialect]) == [1] * DEPTH
        if dialect == "tensorrt":
            assert counts["TensorScatter"] == 2 * DEPTH
    # The tower's last layer follows the one the projector reads, and nobody reads it.
    attention = "MultiHeadAttention" if dialect.startswith("onnxruntime") else "Attention"
    assert count_ops(models["vision"])[attention] == 2


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_is_fused_alike(exported: Callable[..., Exported], decoder: str) -> None:
    counts = count_ops(exported("fastv", "onnxruntime", decoder=decoder).models["prefill"])
    assert [counts[op] for op in ("RotaryEmbedding", "RMSNormalization", "GroupQueryAttention")] == [8, 9, 4]


GREEDY = {
    **dict.fromkeys(
        (
            "divprune",
            "idpruner",
            "idpruner_learned",
            "scope",
            "seats_stage1",
            "todre",
            "vispruner",
            "vispruner_siglip",
            "zoo_prune",
        ),
        "vision",
    ),
    "cdpruner": "prefill",
}
"""Rows whose selector takes dependent steps, and the program it stands in."""
LOOP = {"onnxruntime": "Scan", "onnxruntime-cuda": "Scan", "plain": "Loop"}
"""What these steps are in the dialects that do not write them out."""


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("recipe", SEEING)
def test_a_greedy_selection_is_one_loop(exported: Callable[..., Exported], recipe: str, dialect: str) -> None:
    """TensorRT gets the steps written out: a loop beside attention breaks its builder. OpenVINO imports no Scan that
    reads values around it."""
    models = exported(recipe, dialect).models
    where = GREEDY.get(recipe, "")
    for name, model in models.items():
        counts = Counter(node.op_type for node in model.graph.all_nodes())
        found = {op: counts[op] for op in ("Scan", "Loop", "If", "NonZero", "Unique") if counts[op]}
        assert found == ({LOOP[dialect]: 1} if name == where and dialect in LOOP else {})


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("recipe", SEEING)
def test_every_value_has_a_static_shape_and_a_type(
    exported: Callable[..., Exported], recipe: str, dialect: str
) -> None:
    for model in exported(recipe, dialect).models.values():
        for node in model.graph.all_nodes():
            for value in node.outputs:
                assert value.dtype is not None, value
                assert value.shape is not None, value
                assert all(isinstance(n, int) for n in value.shape), value
        taken = [v.name for n in model.graph.all_nodes() for v in n.outputs]
        assert len(taken) == len(set(taken)), "names are unique, in loop bodies as well"


@pytest.mark.parametrize("recipe", SEEING)
def test_plain_graphs_pass_the_checker(saved: Callable[..., Path], pruned: Callable[..., Any], recipe: str) -> None:
    """The full check infers every shape anew and compares it with the one written down."""
    path = saved(recipe, "plain", pruned(recipe))
    for name in PROGRAMS:
        onnx.checker.check_model(str(path / f"{name}.onnx"), full_check=True)
        model = onnx.load(path / f"{name}.onnx", load_external_data=False)
        assert {(o.domain, o.version) for o in model.opset_import} == {("", 23)}
        assert {n.domain for n in model.graph.node} == {""}


@pytest.mark.parametrize("dialect", ["onnxruntime", "plain"])
@pytest.mark.parametrize("recipe", SEEING)
def test_graphs_load_in_onnx_runtime(
    saved: Callable[..., Path], pruned: Callable[..., Any], recipe: str, dialect: str
) -> None:
    result = pruned(recipe)
    path = saved(recipe, dialect, result)
    for name in PROGRAMS:
        session = open_session(path / f"{name}.onnx")
        program = result.programs[name]
        ports = [re.sub(r"^(past_key|past_value|slot)_", r"\1.", n) for n in program.inputs]
        assert [i.name for i in session.get_inputs()] == ports
        assert [o.name for o in session.get_outputs()] == list(program.outputs)
        assert [tuple(o.shape) for o in session.get_outputs()] == [tuple(n.meta["val"].shape) for n in program.results]


def open_session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_both_phases(path: Path, result: Any, run: Callable[..., dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Vision, prefill of rows of different lengths, and one decode step, by hand. ``run(path, program, **feed)``."""
    job, outputs = result.job, {}
    g, random = job.geometry, np.random.default_rng(0)
    pixels = random.standard_normal((g.batch * g.images, 3, 32, 32), np.float32)
    vision = run(path, "vision", pixel_values=pixels)
    ids = np.full((g.batch, job.sequence), PAD)
    lengths = np.array([job.sequence - 3 * row for row in range(g.batch)])
    for row, length in enumerate(lengths):
        ids[row, :length] = random.integers(4, 200, length)
        ids[row, 5 : 5 + job.features_per_row] = IMAGE
    shapes = {n.name: n.meta["val"].shape for n in result.programs["prefill"].graph.nodes if n.op == "placeholder"}
    caches = {n.replace("_key_", "_key.").replace("_value_", "_value."): np.zeros(s, np.float32)
              for n, s in shapes.items() if n.startswith("past_")}  # fmt: skip
    feed = {"input_ids": ids, "lengths": lengths, "features": vision["features"], **caches}
    prefill = run(path, "prefill", **feed)
    for segment in result.programs.segments:
        outputs[f"slot.{segment.name}"] = lengths - segment.removed
    past = {n.replace("present", "past"): v for n, v in prefill.items() if n.startswith("present")}
    decode = run(path, "decode", input_ids=ids[:, :1] * 0 + 7, position=lengths, **outputs, **past)
    left = {n: v for n, v in prefill.items() if not n.startswith("present")}
    return {**vision, **left, **{f"decode {n}": v for n, v in decode.items()}}


def run_in_runtime(path: Path, program: str, **feed: np.ndarray) -> dict[str, np.ndarray]:
    session = open_session(path / f"{program}.onnx")
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True))


def run_by_definition(path: Path, program: str, **feed: np.ndarray) -> dict[str, np.ndarray]:
    return run_in_reference(path / f"{program}.onnx", feed)


@pytest.mark.parametrize(("run", "close"), [(run_in_runtime, 2e-5), (run_by_definition, 2e-4)])
@pytest.mark.parametrize("recipe", ["pyramiddrop", "divprune", "visionzip"])
def test_both_dialects_compute_the_same(
    saved: Callable[..., Path],
    pruned: Callable[..., Any],
    recipe: str,
    run: Callable[..., dict[str, np.ndarray]],
    close: float,
) -> None:
    """Plain graphs in ONNX Runtime and in ONNX's reference evaluator, as the other dialect's in ONNX Runtime. NumPy
    sums in another order: 2e-6 between features grow to 5e-5 in one sensitive row of the last layer's keys."""
    batch = {"batch": 2, "images": 2}
    result = pruned(recipe, **batch)
    mine = run_both_phases(saved(recipe, "onnxruntime", result, **batch), result, run_in_runtime)
    other = run_both_phases(saved(recipe, "plain", result, **batch), result, run)
    assert list(mine) == list(other)
    assert {n for n in mine if n.startswith("kept")} == {f"kept.{s.name}" for s in result.job.plan.stages}
    filled = {s.name: s.length - s.capacity for s in result.programs.segments}
    assert filled
    for name, value in mine.items():
        if name.startswith("decode present"):
            layer = int(name.rpartition(".")[2])
            segment = next(s for s in result.programs.segments if s.first_layer <= layer < s.last_layer)
            for row in range(2):  # what lies behind a row's last token is nobody's business
                real = result.job.sequence - 3 * row - segment.removed + 1
                np.testing.assert_allclose(value[row, :, :real], other[name][row, :, :real], atol=close, err_msg=name)
        else:
            np.testing.assert_allclose(value, other[name], atol=2e-4, err_msg=name)


def test_the_same_programs_give_the_same_bytes(pruned: Callable[..., Any]) -> None:
    result = pruned("pyramiddrop")
    again = prune(result.traced, RECIPES["pyramiddrop"])
    assert str(again) == str(result)
    for dialect in DIALECTS:
        first, second = export(result, dialect), export(again, dialect)
        assert first.layout == second.layout
        assert str(first) == str(second)
        for name in PROGRAMS:
            assert to_bytes(first.models[name]) == to_bytes(second.models[name])


def to_bytes(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def test_no_weights_are_read_or_needed(tmp_path: Path) -> None:
    trace = trace_model(read_source(write_config(tmp_path, layers=2)), Geometry())
    exported = export(prune(trace, RECIPES["fastv"]), "onnxruntime")
    external = [v.const_value for m in exported.models.values() for v in m.graph.initializers.values()
                if isinstance(v.const_value, ir.ExternalTensor)]  # fmt: skip
    assert len(external) > 50
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("decoder", ["llama", "qwen2"])
def test_initializers_point_into_one_file(exported: Callable[..., Exported], decoder: str) -> None:
    """Every weight lies at its place once, tied ones included; constants are small and inside the graphs."""
    graphs = exported("none", "onnxruntime", decoder=decoder)
    layout = graphs.layout
    ends = sorted((p.offset, p.offset + p.length) for p in layout.tensors.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
    assert ends[0][0] % 64 == 0
    assert ends[-1][1] == layout.size
    seen = set()
    for model in graphs.models.values():
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                place = layout.find(str(value.name))
                assert (tensor.location, tensor.offset, tensor.length) == (WEIGHTS_FILE, place.offset, place.length)
                seen.add(place.offset)
            else:
                assert tensor is not None
                assert tensor.nbytes < 4096
    assert seen == {p.offset for p in layout.tensors.values()}
    tied = [n for n in ("lm_head.weight", "model.language_model.embed_tokens.weight") if n in layout.tensors]
    assert len(tied) == (1 if decoder == "qwen2" else 2)


def test_norms_and_scores_stay_in_fp32(exported: Callable[..., Exported]) -> None:
    models = exported("fastv", "tensorrt", dtype="fp16").models
    softmax = [n for m in models.values() for n in m.graph if n.op_type == "Softmax"]
    assert [n.inputs[0].dtype for n in softmax] == [ir.DataType.FLOAT]
    top = [n for n in models["prefill"].graph if n.op_type == "TopK"]
    assert top
    assert top[0].inputs[0].dtype == ir.DataType.FLOAT
    for node in models["vision"].graph:
        if node.op_type == "LayerNormalization":
            assert {v.dtype for v in node.inputs if v is not None} == {ir.DataType.FLOAT}
    stash = {n.attributes["stash_type"].as_int() for n in models["prefill"].graph if n.op_type == "RMSNormalization"}
    assert stash == {1}


def test_an_operator_without_a_lowering_is_named() -> None:
    program = trace_function("stage0", lambda x: torch.special.bessel_j0(x), {"x": torch.zeros(3)}, ("y",))
    with pytest.raises(SecateurError) as caught:
        export_program(program, DIALECTS["plain"], WeightLayout({}, b"", {}))
    assert str(caught.value) == (
        "export: node special_bessel_j0 in a stage: no ONNX lowering for aten.special_bessel_j0.default; "
        "write it with operators that exporters/lowering*.py knows, or add a lowering there"
    )


def test_only_squares_that_lie_side_by_side_are_averaged() -> None:
    def pool(image: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(image, 2)

    def export(side: int) -> ir.Model:
        program = trace_function("pool", pool, {"image": torch.zeros(1, 3, side, side)}, ("y",))
        return export_program(program, DIALECTS["plain"], WeightLayout({}, b"", {}))

    assert count_ops(export(6)) == {"AveragePool": 1}
    with pytest.raises(SecateurError, match=r"average pooling with .* is not supported; pool with a stride"):
        export(7)


def test_an_unknown_dialect_lists_the_known() -> None:
    with pytest.raises(UserError) as caught:
        export_programs({}, "tflite", WeightLayout({}, b"", {}))
    known = "onnxruntime, onnxruntime-cuda, plain, plain-unrolled, tensorrt"
    assert str(caught.value) == f"export: no dialect 'tflite' (available: {known})"


def test_equal_constants_are_shared() -> None:
    builder = Builder(torch.nn.Module(), {})
    assert builder.ints(1, 2) is builder.constant(np.array([1, 2]))
    assert builder.ints(1, 2) is not builder.constant(np.array([1, 2]), torch.float32)
    assert builder.constant(0.0, torch.float32) is not builder.constant(-0.0, torch.float32)
