"""The passes one by one: what each leaves of a traced graph, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from secateur.compiler import ops, passlist
from secateur.compiler.function import trace_function
from secateur.compiler.pipeline import PASSES, RECIPES, prune
from secateur.compiler.program import Module, Program, ProgramSet
from secateur.passes.drop_noops import drop_noops
from secateur.passes.edit import ancestors, aten, clone_slice, is_call, layer_index
from secateur.passes.fold_constants import fold_constants
from secateur.passes.fold_rms_norm import fold_rms_norm
from secateur.passes.fold_rotary import fold_rotary
from secateur.passes.insert_decoder_stages import find_crossing
from secateur.passes.refresh_shapes import refresh_shapes
from secateur.passes.signals import list_raws
from secateur.passes.straighten_heads import straighten_heads
from secateur.runtime.errors import SecateurError

from .rows import NORMS, SEEING
from .tiny_model import DECODERS

LAYERS = "model.language_model.layers"
DEPTH = 4


def folded(traced: Callable[..., Any], decoder: str = "llama", dtype: str = "fp32") -> Program:
    """The traced decoder after the passes that come before pruning."""
    return prune(traced(decoder, dtype), RECIPES["none"], stop_after="fold_rotary").programs["decoder"]


def calls(program: Program, *targets: Any, scored: bool = False) -> list[torch.fx.Node]:
    """Calls of the layers themselves, or those a stage's score repeats."""
    return [n for n in program.graph.nodes if is_call(n, *targets) and bool(n.meta.get("before_site")) == scored]


def names(program: Program) -> list[str]:
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    return [t.name().partition("::")[2] if hasattr(t, "name") else t.__name__ for t in targets]


def trace_one(function: Callable[..., Any], **feed: Tensor) -> Program:
    return trace_function("test", function, feed, ("y",))


# -- drop_noops -------------------------------------------------------------------------------------------


def test_drop_noops_leaves_what_computes() -> None:
    def function(x: Tensor) -> Tensor:
        y = torch.nn.functional.dropout(x.contiguous(), 0.5, training=False) * 1.0
        y = torch.stack(torch.unbind(y.float().clone(), 0))
        return y.view(6) + 1

    x = torch.arange(6.0).reshape(2, 3)
    program = drop_noops(trace_one(function, x=x))
    assert names(program) == ["reshape", "add.Tensor"]
    torch.testing.assert_close(program.module(x)[0], function(x))


def test_drop_noops_keeps_what_only_looks_like_nothing() -> None:
    def function(x: Tensor) -> Tensor:
        first, second = torch.unbind(x, 0)
        return torch.stack((second, first)) * 2.0 + x.double()

    x = torch.arange(6.0).reshape(2, 3)
    program = drop_noops(trace_one(function, x=x))
    assert {"stack", "unbind.int", "mul.Tensor", "_to_copy"} <= set(names(program))
    torch.testing.assert_close(program.module(x)[0], function(x))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_nothing_of_tracing_is_left(traced: Callable[..., Any], dtype: str) -> None:
    programs = prune(traced(dtype=dtype), RECIPES["none"], stop_after="drop_noops").programs.programs
    left = {name for program in programs.values() for name in names(program)}
    assert not left & {
        "_assert_tensor_metadata",
        "clone",
        "contiguous",
        "alias",
        "detach",
        "view",
        "dropout",
        "to.dtype",
    }


# -- folds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("decoder", "dtype"), [*((d, "fp32") for d in DECODERS), ("llama", "fp16")])
def test_every_norm_and_rotary_is_folded(traced: Callable[..., Any], decoder: str, dtype: str) -> None:
    program = folded(traced, decoder, dtype)
    norms, rotary = calls(program, ops.rms_norm), calls(program, ops.rotary)
    assert [layer_index(n, LAYERS) for n in norms] == [0, 0, 1, 1, 2, 2, 3, 3, None]
    assert [layer_index(n, LAYERS) for n in rotary] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert not calls(program, aten.rsqrt.default, aten.neg.default, aten.pow.Tensor_Scalar)
    # What the first query head and the first key head read.
    assert [n.args[0].meta["val"].shape[1] for n in rotary[:2]] == [4, 2]
    assert {n.args[2] for n in norms} == {traced(decoder, dtype).source.text.rms_norm_eps}
    kinds = {n.args[0].meta["val"].dtype for n in (*norms, *rotary)}
    assert kinds == {torch.float16 if dtype == "fp16" else torch.float32}


def test_the_tower_has_no_rms_norm(pruned: Callable[..., Any]) -> None:
    vision = pruned("none").programs["vision"]
    assert not calls(vision, ops.rms_norm, ops.rotary)
    assert len(calls(vision, aten.layer_norm.default)) == 1 + 2 * 2


def test_fold_rms_norm_computes_the_same() -> None:
    norm = torch.nn.Parameter(torch.linspace(0.5, 1.5, 8))

    class Norm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = norm

        def forward(self, x: Tensor) -> Tensor:
            wide = x.to(torch.float32)
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
            return self.weight * wide.to(x.dtype)

    module, x = Norm(), torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    program = fold_rms_norm(trace_function("test", lambda x: module(x), {"x": x}, ("y",), {"norm": module}))
    assert names(program) == ["rms_norm"]
    torch.testing.assert_close(program.module(x)[0], module(x).detach())


@pytest.mark.parametrize(
    "normalise",
    [
        lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5),
        lambda x: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-5),
        lambda x: x * torch.rsqrt((x - 1).pow(2).mean(-1, keepdim=True) + 1e-5),
        lambda x: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
    ],
    ids=["another axis", "another power", "another value", "a division"],
)
def test_fold_rms_norm_leaves_other_norms(normalise: Callable[[Tensor], Tensor]) -> None:
    module = torch.nn.Linear(8, 8, bias=False)
    x = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    program = trace_function("test", lambda x: module.weight * normalise(x), {"x": x}, ("y",), {"linear": module})
    assert "rms_norm" not in names(fold_rms_norm(program))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, start: int = 4, axis: int = 1) -> Tensor:
    turned = torch.cat((-x[..., start:], x[..., :start]), -1)
    return x * cos.unsqueeze(axis) + turned * sin.unsqueeze(axis)


def rotary_feed() -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(0)
    return {
        n: torch.randn(s, generator=source) for n, s in (("x", (2, 5, 5, 8)), ("cos", (2, 5, 8)), ("sin", (2, 5, 8)))
    }


def test_fold_rotary_computes_the_same() -> None:
    feed = rotary_feed()
    program = fold_rotary(trace_one(lambda x, cos, sin: rotate(x, cos, sin), **feed))
    assert names(program) == ["rotary"]
    torch.testing.assert_close(program.module(*feed.values())[0], rotate(**feed))


def test_fold_rotary_of_rows_without_a_batch() -> None:
    """``x [S,H,d]``, tables ``[S,d]``, as towers that take all their rows at once have them."""
    source = torch.Generator().manual_seed(0)
    feed = {n: torch.randn(s, generator=source) for n, s in (("x", (5, 3, 8)), ("cos", (5, 8)), ("sin", (5, 8)))}
    program = fold_rotary(trace_one(lambda x, cos, sin: rotate(x, cos, sin), **feed))
    assert names(program).count("rotary") == 1
    assert "neg" not in names(program)
    torch.testing.assert_close(program.module(*feed.values())[0], rotate(**feed))


def test_straighten_heads_computes_the_same_without_unbinding() -> None:
    x = torch.randn(5, 3, 2, 4, generator=torch.Generator().manual_seed(0))

    def stack(x: Tensor) -> Tensor:
        query, _, value = x.permute(1, 0, 2, 3).unbind(0)
        return query.transpose(0, 1).unsqueeze(0) - value.transpose(0, 1).unsqueeze(0)

    program = straighten_heads(trace_one(stack, x=x))
    assert "unbind.int" not in names(program)
    torch.testing.assert_close(program.module(x)[0], stack(x))


def test_fold_constants_leaves_what_depends_on_inputs() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([2, 0, 3, 1])

    def tables(x: Tensor) -> Tensor:
        table = torch.cos(torch.arange(6) * 0.5)
        same = x.index_select(0, torch.arange(4)) * torch.ones(6)
        return (same + table)[order][torch.argsort(order)]

    program = fold_constants(trace_one(tables, x=x))
    assert sorted(names(program)) == ["add.Tensor", "index.Tensor", "index.Tensor"]
    torch.testing.assert_close(program.module(x)[0], tables(x))


@pytest.mark.parametrize("options", [{"start": 2}, {"axis": 2}])
def test_fold_rotary_leaves_other_rotations(options: dict[str, int]) -> None:
    program = trace_one(lambda x, cos, sin: rotate(x, cos, sin, **options), **rotary_feed())
    assert "rotary" not in names(fold_rotary(program))


# -- what crosses a site ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("decoder", DECODERS)
def test_hidden_cos_sin_and_length_cross(traced: Callable[..., Any], decoder: str, layer: int) -> None:
    program = folded(traced, decoder)
    crossing = find_crossing(program.graph, LAYERS, layer, "stage0")
    assert crossing.carried == ()
    assert len(crossing.lengths) == 1
    assert is_call(crossing.lengths[0], aten.sym_size.int)
    assert crossing.hidden.meta["val"].shape[2] == 64
    assert crossing.hidden.op == "placeholder" if layer == 0 else layer_index(crossing.hidden, LAYERS) == layer - 1
    cos, sin = crossing.tables
    assert [any(is_call(n, op) for n in ancestors([cos])) for op in (aten.cos.default, aten.sin.default)] == [
        True,
        False,
    ]
    assert [any(is_call(n, op) for n in ancestors([sin])) for op in (aten.cos.default, aten.sin.default)] == [
        False,
        True,
    ]
    assert [tuple(t.meta["val"].shape[2:]) for t in (cos, sin)] == [(16,), (16,)]


def add_crossing(program: Program, make: Callable[[torch.fx.Node], Tensor], target: Any, *rest: Any) -> Program:
    """The program with ``target(hidden, *rest)`` computed before layer 0 and read in layer 2."""
    module = program.edit()
    hidden = next(n for n in module.graph.nodes if n.op == "placeholder" and n.name == "hidden")
    reader = next(n for n in module.graph.nodes if layer_index(n, LAYERS) == 2)
    with module.graph.inserting_after(hidden):
        new = module.graph.call_function(target, (hidden, *rest), name="strange")
    new.meta["val"] = make(hidden)
    with module.graph.inserting_before(reader):
        module.graph.call_function(aten.abs.default, (new,)).meta = {**reader.meta, "val": new.meta["val"]}
    return program.with_module(module)


def test_an_unknown_crossing_value_is_named(traced: Callable[..., Any]) -> None:
    program = add_crossing(
        folded(traced), lambda h: h.meta["val"].transpose(1, 2).contiguous(), aten.transpose.int, 1, 2
    )  # fmt: skip
    with pytest.raises(SecateurError) as caught:
        find_crossing(program.graph, LAYERS, 1, "stage0")
    assert str(caught.value) == (
        "insert_decoder_stages: stage0: value strange [1,64,s] crosses into layer 1 and its token axis is not "
        "dimension 1; the pass must learn this kind of value before the family can be pruned inside the decoder"
    )
    assert find_crossing(program.graph, LAYERS, 3, "stage0").carried == ()


def test_a_second_stream_is_named(traced: Callable[..., Any]) -> None:
    program = add_crossing(folded(traced), lambda h: h.meta["val"], aten.neg.default)
    with pytest.raises(SecateurError, match=r"stage0: 2 hidden streams cross into layer 1: strange, \w+$"):
        find_crossing(program.graph, LAYERS, 1, "stage0")


def test_clone_slice_copies_what_depends_on_the_feed_only() -> None:
    program = trace_one(lambda x, y: (x * 2 + y.cos()) * x, x=torch.ones(2), y=torch.ones(2))
    module = program.edit()
    x, y = (n for n in module.graph.nodes if n.op == "placeholder")
    result = module.graph.output_node().args[0][0]
    with module.graph.inserting_before(module.graph.output_node()):
        (copy,) = clone_slice([result], {x: y}, mark=True)
    module.graph.output_node().args = ((result, copy),)
    made = [n for n in module.graph.nodes if n.meta.get("mark")]
    assert [n.target.name() for n in made] == ["aten::mul.Tensor", "aten::add.Tensor", "aten::mul.Tensor"]
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    got = program.with_module(module, ("a", "b")).module(first, second)
    torch.testing.assert_close(got[1], (second * 2 + second.cos()) * second)


# -- whole programs ---------------------------------------------------------------------------------------


def evicting_layers(programs: Any) -> list[int]:
    return [i for s in programs.segments if s.evicted for i in range(s.first_layer, s.last_layer)]


@pytest.mark.parametrize("recipe", SEEING)
def test_pruned_layers_hold_what_unpruned_ones_do(pruned: Callable[..., Any], recipe: str) -> None:
    programs = pruned(recipe).programs
    for name in ("prefill", "decode"):
        program = programs[name]
        # Layers whose caches keep fewer rows than they saw attend first and write what is left.
        evicting = evicting_layers(programs) if name == "prefill" else []
        caching = [i for i in range(DEPTH) if i not in evicting]
        for op, layers, each, after in (
            (ops.cached_attention, caching, 1, 0), (ops.attention, evicting, 1, 0), (ops.write_rows, evicting, 2, 0),
            (ops.rotary, range(DEPTH), 2, 0), (ops.rms_norm, range(DEPTH), 2, 1),
        ):  # fmt: skip
            found = [layer_index(n, LAYERS) for n in calls(program, op)]
            if op is ops.rms_norm and name == "prefill" and recipe in NORMS:
                found.remove(None)  # the score's own, before the site; of the model's only the last is of no layer
            assert found == [i for i in layers for _ in range(each)] + [None] * after, f"{name} {op}"
    applied = [
        raw for s in pruned(recipe).job.decoder_stages for raw in list_raws(s)
        if raw.where in ("next", "own") and raw.kind.endswith(("query", "key")) and not raw.kind.startswith("plain")
    ]  # fmt: skip
    assert len(calls(programs["prefill"], ops.rotary, scored=True)) == len(applied)


@pytest.mark.parametrize("recipe", SEEING)
def test_every_shape_is_static_and_follows_the_plan(pruned: Callable[..., Any], recipe: str) -> None:
    result = pruned(recipe, batch=2, images=2) if recipe in ("fastv", "divprune") else pruned(recipe)
    job, batch = result.job, result.job.geometry.batch
    for program in result.programs.programs.values():
        for node in program.graph.nodes:
            values = node.meta["val"] if node.op != "output" else ()
            for value in values if isinstance(values, (tuple, list)) else (values,):
                assert not isinstance(value, Tensor) or all(type(n) is int for n in value.shape), node
    assert set(result.programs.programs) == {"vision", "prefill", "decode"}
    vision, prefill = result.programs["vision"], result.programs["prefill"]
    assert tuple(vision.results[0].meta["val"].shape) == (batch, job.features_per_row, 64)
    kept = dict(zip((*vision.outputs, *prefill.outputs), (*vision.results, *prefill.results), strict=True))
    for stage in job.plan.stages:
        if stage.observes or not stage.length_out:
            assert f"kept.{stage.name}" not in kept
            continue
        shape = tuple(kept[f"kept.{stage.name}"].meta["val"].shape)
        assert shape == (batch, stage.groups * stage.length_out)
    attention = {layer_index(n, LAYERS): n for n in calls(prefill, ops.cached_attention, ops.attention)}
    lengths = [attention[s.first_layer].args[0].meta["val"].shape[2] for s in result.programs.segments]
    assert lengths == [s.length for s in result.programs.segments]


def test_one_capacity_per_segment(pruned: Callable[..., Any]) -> None:
    result = pruned("pyramiddrop")
    assert [str(s) for s in result.programs.segments] == [
        "segment s0 layers [0,1) length 40 capacity 48 removed 0",
        "segment s1 layers [1,2) length 32 capacity 40 removed 8",
        "segment s2 layers [2,3) length 28 capacity 36 removed 12",
        "segment s3 layers [3,4) length 26 capacity 34 removed 14",
    ]
    for name in ("prefill", "decode"):
        caches = {n.name: tuple(n.meta["val"].shape) for n in result.programs[name].graph.nodes
                  if n.op == "placeholder" and n.name.startswith("past_")}  # fmt: skip
        assert caches == {f"past_{role}_{i}": (1, 2, c, 16) for i, c in enumerate((48, 40, 36, 34)) for role in
                          ("key", "value")}  # fmt: skip
    decode = result.programs["decode"]
    assert decode.inputs[:6] == ("input_ids", "position", "slot_s0", "slot_s1", "slot_s2", "slot_s3")
    writes = [n.args[5].name for n in calls(decode, ops.cached_attention)]
    assert writes == ["slot_s0", "slot_s1", "slot_s2", "slot_s3"]


@pytest.mark.parametrize(("recipe", "sources"), [
    ("fastv", ["position"] * DEPTH),
    ("pyramiddrop", ["position", "slot_s1", "slot_s2", "slot_s3"]),
])  # fmt: skip
def test_where_a_new_tokens_position_comes_from(pruned: Callable[..., Any], recipe: str, sources: list[str]) -> None:
    """Survivors that keep their numbers continue the prompt's; those numbered anew continue at their slot."""
    found = []
    for node in calls(pruned(recipe).programs["decode"], ops.rotary)[::2]:
        found += [n.name for n in ancestors(node.args[1:]) if n.op == "placeholder"]
    assert found == sources


def test_a_site_before_layer_zero(traced: Callable[..., Any]) -> None:
    from secateur.passes.recipe_file import recipe_from_yaml

    text = "name: first\nstages: [{site: 'decoder.layer[0]', score: {name: seeded_random, options: {seed: 1}}, "
    result = prune(traced(), recipe_from_yaml(text + "select: top_k, share: 0.25}]"))
    assert [str(s) for s in result.programs.segments] == ["segment s0 layers [0,4) length 28 capacity 36 removed 12"]
    assert result.programs["prefill"].inputs[:3] == ("input_ids", "lengths", "features")


def test_misfitting_shapes_name_the_node() -> None:
    program = trace_one(lambda x, y: torch.matmul(x.cos(), y), x=torch.ones(2, 3), y=torch.ones(3, 4))
    module = program.edit()
    next(n for n in module.graph.nodes if n.op == "placeholder").meta["val"] = torch.empty(2, 5)
    with pytest.raises(SecateurError) as caught:
        refresh_shapes(program.with_module(module))
    assert str(caught.value).startswith(
        "refresh_shapes: test: matmul (aten.matmul.default) does not fit its inputs [(2, 5), (3, 4)]: "
    )


def test_calls_of_one_form_are_worked_out_once() -> None:
    asked: list[tuple[int, ...]] = []

    def twice(x: Tensor, times: float = 1) -> Tensor:
        asked.append((*x.shape, times))
        return torch.cat((x, x)) * times

    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(2, dtype=torch.int64)
    first, same = (graph.call_function(twice, (x,)) for _ in range(2))
    longer, float_ = graph.call_function(twice, (same,)), graph.call_function(twice, (x, 1.0))
    graph.output((first, longer, float_))
    program = refresh_shapes(Program("test", Module(torch.nn.Module(), graph), ("first", "longer", "float")))
    values = [node.meta["val"] for node in program.results]
    assert [(tuple(v.shape), v.dtype) for v in values] == [
        ((4,), torch.int64), ((8,), torch.int64), ((4,), torch.float32),
    ]  # fmt: skip
    assert asked == [(2, 1), (4, 1), (2, 1.0)]


def test_a_trace_is_tidied_once_for_all_recipes(traced: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first, tidied = PASSES[0], list[ProgramSet]()

    def run(programs: ProgramSet, job: Any) -> ProgramSet:
        tidied.append(programs)
        return first.run(programs, job)

    trace = traced()
    monkeypatch.setattr(passlist, "PASSES", (replace(first, run=run), *PASSES[1:]))
    assert str(prune(trace, RECIPES["none"])) == str(prune(trace, RECIPES["none"]))
    prune(trace, RECIPES["fastv"], 0.5)
    assert tidied == [trace.programs]
    # What is to be seen is done before one's eyes.
    assert str(prune(trace, RECIPES["none"], stop_after=first.name).programs) == str(first.run(trace.programs, None))
    assert len(tidied) == 2


def test_passes_change_no_program_in_place(traced: Callable[..., Any]) -> None:
    trace = traced()
    before = str(trace.programs)
    prune(trace, RECIPES["pyramiddrop"])
    assert str(trace.programs) == before


def test_pass_names_are_verbs_and_unique() -> None:
    listed = [p.name for p in PASSES]
    assert len(set(listed)) == len(listed)
    assert listed.index("fold_rotary") < listed.index("insert_decoder_stages") < listed.index("attach_caches")
