"""Refuses, with the fix in the message, what a backend would reject late or accept and compute wrongly."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from secateur.exporters.lint_rules import GRAPH_RULES, NODE_RULES, Effect, GraphRule, Rule
from secateur.exporters.lint_subject import Subject
from secateur.runtime.errors import UserError

__all__ = ["Finding", "lint_graph", "refuse"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """One thing a backend would trip over. ``node`` is ``name (Op)``, or None when it is the whole graph."""

    rule: str
    node: str | None
    what: str
    fix: str
    effect: Effect = "refused"

    def __str__(self) -> str:
        return f"{self.node or 'graph'}: {self.what}; {self.fix} [{self.rule}]"

    @property
    def stops(self) -> bool:
        """Whether nothing should be built: the backend refuses it, or computes something else."""
        return self.effect in ("refused", "wrong")


def lint_graph(
    model: ir.Model, target: str, dtype: str, sm: int | None = None, directory: Path | None = None
) -> list[Finding]:
    """Every rule of ``target`` over every node, those inside loop bodies too; findings in graph order.

    ``target`` is onnxruntime, onnxruntime-cuda, plain, tensorrt or tensorrt-rtx; ``dtype`` the bundle's (fp32, fp16,
    bf16); ``sm`` the GPU architecture an engine is built for; ``directory`` where the weights lie, once they do.
    Unknown dtypes and shapes are let through.
    """
    subject = Subject(model, target, dtype, sm, directory)
    found = []
    for graph_rule in GRAPH_RULES:
        if target in graph_rule.targets:
            found += [_finding(graph_rule, None, problem) for problem in graph_rule.check(subject)]
    rules = [rule for rule in NODE_RULES if target in rule.targets]
    for node in model.graph.all_nodes():
        for rule in rules:
            if node.op_type in rule.ops or "*" in rule.ops:
                found += [_finding(rule, node, problem) for problem in rule.check(subject, node)]
    return found


def refuse(findings: Iterable[Finding], where: str | None = None) -> None:
    """Raise UserError for the first finding that stops and say how many more there are; log a warning for others."""
    findings = list(findings)
    stopping = [finding for finding in findings if finding.stops]
    if not stopping:
        for finding in findings:
            _log.warning("%s%s", f"{where}: " if where else "", finding)
        return
    first = stopping[0]
    place = ": ".join(part for part in (where, first.node) if part)
    more = f" (and {len(stopping) - 1} more)" if len(stopping) > 1 else ""
    raise UserError(f"{first.what}{more}", where=place or None, fix=f"{first.fix} [{first.rule}]")


def _finding(rule: Rule | GraphRule, node: ir.Node | None, problem: tuple[str, str]) -> Finding:
    what, fix = problem
    label = None if node is None else f"{node.name or node.outputs[0].name or 'unnamed'} ({node.op_type})"
    return Finding(rule.name, label, what, fix, rule.effect)
