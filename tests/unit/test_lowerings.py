"""Every operator we write does in ONNX's reference evaluator and in ONNX Runtime what torch does, with every operand.

The calls are in lowering_cases.py. A lowering without one, and an operand that none gives, fail here.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import getitem
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, fx, nn

from secateur.compiler import score_ops
from secateur.compiler.program import Program, operands_of
from secateur.exporters.builder import Builder
from secateur.exporters.dialects import DIALECTS
from secateur.exporters.expand_scores import expand_scores
from secateur.exporters.lowering_shapes import LOWERINGS
from secateur.exporters.onnx import export_program
from secateur.exporters.weights import WeightLayout
from secateur.runtime.errors import SecateurError

from .lowering_cases import CASES, ELSEWHERE, MEMORY, SEEN_IN, Call
from .reference_runs import evaluate

NO_KERNEL = {"TensorScatter": "ONNX Runtime has none for opset 24 on the CPU; the reference evaluator has"}
NO_REFERENCE = {"com.microsoft": "operators of ONNX Runtime's own, which ONNX does not define; ONNX Runtime runs them"}


def build(target: Any, call: Call) -> tuple[Program, dict[str, np.ndarray], list[Tensor]]:
    """One call as a program, what to feed it, and what torch makes of it."""
    graph, feeds = fx.Graph(), {}

    def place(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [place(v) for v in value]
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(f"x{len(feeds)}")
        node.meta["val"], feeds[node.name] = value, value.numpy()
        return node

    node = graph.call_function(target, tuple(map(place, call.args)), {k: place(v) for k, v in call.kwargs.items()})
    results = node.meta["val"] = target(*call.args, **call.kwargs)
    out = [node]
    if not isinstance(results, Tensor):
        out = [graph.call_function(getitem, (node, i)) for i in range(len(results))]
        for part, result in zip(out, results, strict=True):
            part.meta["val"] = result
    graph.output(tuple(out))
    expected = [results] if isinstance(results, Tensor) else list(results)
    names = tuple(f"y{i}" for i in range(len(out)))
    return Program("case", fx.GraphModule(nn.Module(), graph), names), feeds, expected


def list_forms() -> Iterator[tuple[str, Any]]:
    """Every operator in every form that some dialect writes it in: dialect and operator."""
    seen: set[tuple[Any, Any]] = set()
    for name in sorted(DIALECTS, key=lambda name: name != "plain"):
        for target, lower in {**LOWERINGS, **DIALECTS[name].lowerings, **dict.fromkeys(score_ops.PLAIN)}.items():
            if target in CASES and (target, lower) not in seen:
                seen.add((target, lower))
                yield name, target


def show(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def check_against_schema(model: onnx.ModelProto) -> None:
    """Inputs, outputs, attributes and element types are such as the operator's schema has them."""
    versions = {entry.domain: entry.version for entry in model.opset_import}
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    kinds = {v.name: v.type.tensor_type.elem_type for part in (inferred.graph.input, inferred.graph.value_info,
             inferred.graph.output) for v in part} | {t.name: t.data_type for t in model.graph.initializer}  # fmt: skip
    for node in model.graph.node:
        if node.domain:
            continue
        schema = onnx.defs.get_schema(node.op_type, versions[""], "")
        assert schema.min_input <= len(node.input) <= schema.max_input, node.op_type
        assert schema.min_output <= len(node.output) <= schema.max_output, node.op_type
        for attribute in node.attribute:
            assert int(schema.attributes[attribute.name].type.value) == attribute.type, (node.op_type, attribute.name)
        allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
        for index, name in enumerate(node.input):
            port = schema.inputs[min(index, len(schema.inputs) - 1)]
            if name in kinds:
                kind = f"tensor({onnx.TensorProto.DataType.Name(kinds[name]).lower()})"
                assert kind in allowed.get(port.type_str, {port.type_str}), (node.op_type, port.name, kind)


def run_in_runtime(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def list_operators(model: onnx.ModelProto) -> set[tuple[str, str]]:
    return {(node.domain, node.op_type) for node in model.graph.node}


@pytest.mark.parametrize(("dialect", "target"), list(list_forms()), ids=show)
def test_what_is_written_is_what_torch_computes(dialect: str, target: Any) -> None:
    for call in CASES[target]:
        program, feeds, expected = build(target, call)
        if call.refused:
            with pytest.raises(SecateurError, match=call.refused):
                export_program(program, DIALECTS[dialect], WeightLayout({}, b"", {}))
            continue
        model = ir.to_proto(export_program(program, DIALECTS[dialect], WeightLayout({}, b"", {})))
        check_against_schema(model)
        written = list_operators(model)
        runs = []
        if not {domain for domain, _ in written} & set(NO_REFERENCE):
            runs.append(list(evaluate(model, feeds).values()))
        if not {name for _, name in written} & set(NO_KERNEL):
            runs.append(run_in_runtime(model, feeds))
        assert runs
        for found in runs:
            for value, wanted in zip(found, expected, strict=True):
                close = 2e-3 if wanted.dtype == torch.float16 else 1e-5
                torch.testing.assert_close(torch.from_numpy(np.array(value)), wanted, rtol=close, atol=close)


def test_every_lowering_has_a_case() -> None:
    for dialect in DIALECTS.values():
        for target in {**LOWERINGS, **dialect.lowerings, **dict.fromkeys(score_ops.PLAIN)}:
            if target in SEEN_IN:
                holder = SEEN_IN[target][0]
                program, _, _ = build(holder, CASES[holder][0])
                assert any(n.target is target for n in expand_scores(program).graph.nodes), target
            elif target not in ELSEWHERE:
                assert CASES.get(target), f"{target} has a lowering and no case in lowering_cases.py"


@pytest.mark.parametrize("target", CASES, ids=show)
def test_every_operand_is_given_by_a_case(target: Any) -> None:
    """With a value that is not its default: then torch, the reference evaluator and ONNX Runtime say whether it was
    read."""
    arguments = target._schema.arguments
    given = set()
    for call in CASES[target]:
        values = dict(zip((a.name for a in arguments), call.args, strict=False)) | dict(call.kwargs)
        for argument in arguments:
            value = values.get(argument.name, argument.default_value)
            same = not isinstance(value, Tensor) and value == argument.default_value
            if not (argument.has_default_value() and same):
                given.add(argument.name)
    left = [a.name for a in arguments if a.name not in given and a.name not in MEMORY]
    assert not left, f"no case of {target} gives {left}"


def test_an_operand_that_no_lowering_reads_is_refused() -> None:
    """Whatever a lowering forgets: the builder compares what was read with the schema."""
    aten = torch.ops.aten
    program, _, _ = build(aten.add.Tensor, Call((torch.ones(2), torch.ones(2)), {"alpha": 2}))
    builder = Builder(program.module, {aten.add.Tensor: lambda b, node: b.operands(node)["self"]}, dialect="plain")
    with pytest.raises(SecateurError) as caught:
        builder.lower(program.graph)
    assert str(caught.value) == (
        "export: node add_tensor in a stage: aten.add.Tensor with other has no form in dialect plain; "
        "leave other at its default, or give it a form in exporters/lowering*.py"
    )
    (node,) = program.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    assert list(operands_of(node)) == ["self", "other", "alpha"]
    assert builder.operands(node).unread == ["other", "alpha"]
