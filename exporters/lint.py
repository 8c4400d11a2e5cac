"""Refuses, with the fix in the message, what a backend would reject late or accept and compute wrongly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from secateur.exporters.lint_rules import GRAPH_RULES, NODE_RULES
from secateur.exporters.lint_subject import Subject
from secateur.runtime.errors import UserError

__all__ = ["Finding", "lint_graph", "refuse"]


@dataclass(frozen=True)
class Finding:
    """One thing a backend would trip over. ``node`` is ``name (Op)``, or None when it is the whole graph."""

    rule: str
    node: str | None
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.node or 'graph'}: {self.what}; {self.fix} [{self.rule}]"


def lint_graph(model: ir.Model, target: str, dtype: str, sm: int | None = None) -> list[Finding]:
    """Every rule of ``target`` over every node, those inside loop bodies too; findings in graph order.

    ``target`` is onnxruntime, plain, tensorrt or tensorrt-rtx; ``dtype`` the bundle's (fp32, fp16, bf16);
    ``sm`` the GPU architecture an engine is built for. Unknown dtypes and shapes are let through.
    """
    subject = Subject(model, target, dtype, sm)
    found = []
    for graph_rule in GRAPH_RULES:
        if target in graph_rule.targets:
            found += [Finding(graph_rule.name, None, *problem) for problem in graph_rule.check(subject)]
    rules = [rule for rule in NODE_RULES if target in rule.targets]
    for node in model.graph.all_nodes():
        for rule in rules:
            if node.op_type in rule.ops or "*" in rule.ops:
                found += [Finding(rule.name, _label(node), *problem) for problem in rule.check(subject, node)]
    return found


def refuse(findings: Iterable[Finding], where: str | None = None) -> None:
    """Raise UserError for the first finding and say how many more there are; no findings, no error."""
    findings = list(findings)
    if not findings:
        return
    first = findings[0]
    place = ": ".join(part for part in (where, first.node) if part)
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    raise UserError(f"{first.what}{more}", where=place or None, fix=f"{first.fix} [{first.rule}]")


def _label(node: ir.Node) -> str:
    return f"{node.name or node.outputs[0].name or 'unnamed'} ({node.op_type})"
