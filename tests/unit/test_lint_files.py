"""`secateur lint` over files of any exporter and over bundles; and our own exports, which it finds nothing in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from secateur.compiler.pipeline import build, check_target, export
from secateur.exporters.lint import lint_graph
from secateur.exporters.lint_files import guess_dtype, lint_path, list_rules
from secateur.exporters.lint_rules import EVERY, GRAPH_RULES, NODE_RULES
from secateur.exporters.onnx import save_model
from secateur.runtime.errors import BundleError, UserError
from secateur.tools import cli

from .lint_traps import BROKEN, graph

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

DOCS = Path(__file__).parents[2] / "docs" / "lint.md"
LONG = graph(*BROKEN["topk_is_within_limit"])


def secateur(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, out, err


def test_findings_end_with_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    save_model(LONG, path)
    code, out, _ = secateur(capsys, "lint", path, "--for", "tensorrt", "--json")
    (found,) = json.loads(out)
    assert (code, found["graph"], found["for"], found["dtype"]) == (1, str(path), "tensorrt", "fp32")
    assert found["findings"] == [
        {
            "rule": "topk_is_within_limit", "node": "v (TopK)", "effect": "refused",
            "why": "TopK of 3841, TensorRT takes at most 3840",
            "fix": "sort runs of at most that many and merge them, as the tensorrt dialect does",
        }
    ]  # fmt: skip
    code, out, _ = secateur(capsys, "lint", path, "--for", "tensorrt")
    assert code == 1
    assert out.splitlines()[0].strip() == "model.onnx for tensorrt, fp32"
    assert out.split()[4:9] == ["rule", "node", "effect", "why", "fix"]


def test_nothing_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    save_model(LONG, path)
    code, out, _ = secateur(capsys, "lint", path, "--for", "onnxruntime")
    assert (code, out) == (0, "model.onnx for onnxruntime, fp32: nothing found\n")


def test_graphs_of_other_exporters(tmp_path: Path) -> None:
    """Functions are looked into, and types that nobody wrote down are found."""
    text = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
    g (float16[2,8] x) => (float16[2,1] y) { y = local.Energy (x) }
    <domain: "local", opset_import: ["" : 21]> Energy (x) => (y)
    { axis = Constant <value_ints=[1]> () squares = Mul (x, x) y = ReduceSum (squares, axis) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "foreign.onnx")
    (linted,) = lint_path(tmp_path / "foreign.onnx", "tensorrt-rtx")
    assert linted.dtype == "fp16"
    assert [(found.rule, found.effect) for found in linted.findings] == [("sum_fits_half", "risk")]
    assert linted.findings[0].what == "a sum of squares in fp16 may leave its range of 65504"


def test_the_dtype_is_that_of_most_weights() -> None:
    assert guess_dtype(graph("float16[2,8] x, float16[2,8] z", "float[2,8] y", "y = Cast <to=1> (x)")) == "fp16"
    assert guess_dtype(graph("int64[2] x", "int64[2] y", "y = Neg (x)")) == "fp32"


def test_what_cannot_be_linted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(UserError, match=r"model\.onnx: is no ONNX graph: "):
        lint_path(tmp_path / "model.onnx", "plain")
    with pytest.raises(UserError, match=r"nothing\.onnx: no such file"):
        lint_path(tmp_path / "nothing.onnx", "plain")
    with pytest.raises(UserError, match=r"model\.onnx: what the graph is meant for is not said .*; add --for"):
        lint_path(tmp_path / "model.onnx")
    with pytest.raises(UserError, match=r"--for: no target 'tpu' \(available: onnxruntime, onnxruntime-cuda, plain, "):
        lint_path(tmp_path / "model.onnx", "tpu")
    with pytest.raises(UserError, match=r"--dtype: no dtype 'int8' \(available: fp32, fp16, bf16\)"):
        lint_path(tmp_path / "model.onnx", "plain", "int8")
    with pytest.raises(BundleError):
        lint_path(tmp_path)
    assert secateur(capsys, "lint")[::2] == (
        2, "error: secateur lint: no graph is given; name an ONNX file or a bundle, or add --rules\n",
    )  # fmt: skip


def test_rules_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = list_rules()
    assert [row.rule for row in rows] == [rule.name for rule in (*GRAPH_RULES, *NODE_RULES)]
    assert all(len(row.about) > 20 and row.about.endswith(".") for row in rows)
    code, out, _ = secateur(capsys, "lint", "--rules", "--for", "plain", "--json")
    assert code == 0
    listed = {row["rule"] for row in json.loads(out)}
    assert {rule.name for rule in NODE_RULES if rule.targets == EVERY} < listed
    assert "topk_is_within_limit" not in listed
    code, out, _ = secateur(capsys, "lint", "--rules")
    assert (code, out.split()[0]) == (0, "Rules")


def test_every_rule_is_documented() -> None:
    """With its effect, in the table of docs/lint.md, and no other."""
    cells = [[cell.strip() for cell in line.split("|")] for line in DOCS.read_text().splitlines() if line[:3] == "| `"]
    told = {cell[1].strip("`"): cell[2] for cell in cells}
    assert told == {row.rule: row.effect for row in list_rules()}


def test_a_bundle_says_what_it_is_for(
    pruned: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, bundle = pruned("fastv"), tmp_path / "bundle"
    build(one, export(one, "onnxruntime"), check_target("onnxruntime", "fp32", None), bundle)
    code, out, _ = secateur(capsys, "lint", bundle)
    assert code == 0
    assert {line.split(" for ")[1] for line in out.splitlines()} == {"onnxruntime, fp32: nothing found"}
    assert {line.split(" for ")[0] for line in out.splitlines()} == {"decode.onnx", "prefill.onnx", "vision.onnx"}
    # TensorRT takes no operators of another's domain.
    code, out, _ = secateur(capsys, "lint", bundle, "--for", "tensorrt-rtx", "--json")
    assert code == 1
    assert {found["rule"] for one in json.loads(out) for found in one["findings"]} >= {"domain_is_known"}


@pytest.mark.parametrize(
    ("dialect", "target", "dtype"),
    [("onnxruntime", "onnxruntime", "fp32"), ("plain", "plain", "fp32"), ("tensorrt", "tensorrt-rtx", "fp16")],
)
@pytest.mark.parametrize("recipe", ["none", "fastv", "visionzip"])
def test_our_exports_pass(recipe: str, dialect: str, target: str, dtype: str, pruned: Callable[..., Any]) -> None:
    """A few; that every bundle and engine the tests make passes is seen to in conftest.py and by the matrix."""
    models = export(pruned(recipe, dtype=dtype), dialect).models
    assert {name: [str(f) for f in lint_graph(model, target, dtype)] for name, model in models.items()} == {
        name: [] for name in models
    }
