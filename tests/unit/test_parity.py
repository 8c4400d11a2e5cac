"""Recipes' bundles against their eager oracle on held-out questions; `make parity` runs all 1,000 and every row.

Here stands one row of each kind; the others come up in ``test_matrix_sample.py``.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from secateur.compiler.inputs import random_rows
from secateur.compiler.oracle import Oracle
from secateur.compiler.parity import TOLERANCE, Parity, compare_runs
from secateur.compiler.pipeline import RECIPES, plan_job
from secateur.compiler.runs import CompiledRun, OracleRun
from secateur.runtime.session import Session
from secateur.tools.parity import Sweep, passed

MODEL = Path(__file__).parents[2] / "demo" / "model"
QUESTIONS = 32
ROWS = ("random", "fastv", "pyramiddrop", "fastervlm", "divprune", "visionzip")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    torch.set_num_threads(1)
    return Sweep(MODEL, tmp_path_factory.mktemp("parity"), QUESTIONS, threads=1)


def compare(session: Session, oracle: Oracle, parity: Parity) -> None:
    """Two random rows through both."""
    ours, rows = CompiledRun(session.manifest, session.request()), random_rows(session.manifest, 2, 2, seed=0)
    compare_runs(OracleRun(oracle), ours, rows, 1, parity, referee=oracle)


@pytest.mark.parametrize("name", [n for n in ("none", *ROWS) if RECIPES[n].identity_at_one])
def test_keep_one_answers_as_hugging_face(sweep: Sweep, name: str) -> None:
    outcome = sweep.identity(RECIPES[name], lambda: None)
    assert (outcome["same_tokens"], outcome["rows"]) == (QUESTIONS, QUESTIONS)
    assert outcome["logits"] <= TOLERANCE


@pytest.mark.parametrize(("name", "keep"), list(zip(ROWS, itertools.cycle([0.5, 0.1]), strict=False)))
def test_bundle_equals_oracle(sweep: Sweep, name: str, keep: float) -> None:
    outcome = sweep.compare(RECIPES[name], keep, (1, 3), lambda: None)
    assert passed([{"kind": "compare", "outcome": outcome}]), outcome
    for size, found in outcome.items():
        assert found["rows"] >= QUESTIONS, size
        assert found["chose_equally"] + found["tied"] == found["rows"], size
        assert found["tied"] <= 2, "ties are rare; many of them hide something"
        assert found["scales"]["cache"] > 0.1, "a comparison of zeros proves nothing"


def test_another_choice_is_noticed_and_told_from_another_computation(sweep: Sweep) -> None:
    """The oracle keeps other random tokens than the bundle: chosen differently, yet computed equally once forced."""
    recipe = RECIPES["random"]
    stage = recipe.stages[0]
    assert stage.score is not None
    other = replace(recipe, stages=(replace(stage, score=replace(stage.score, options={"seed": 12345})),))
    source = sweep.bundles(1).source
    oracle = Oracle(plan_job(source, sweep.bundles(1).geometry, other, 0.5), sweep.hf)
    parity = Parity()
    with sweep.bundles(1).borrow(recipe, 0.5) as path, Session(path, threads=1) as session:
        compare(session, oracle, parity)
    assert parity.chose_differently == 2
    assert not parity.passed
    assert max(parity.features, parity.cache, parity.logits) <= TOLERANCE


def test_another_computation_is_noticed(sweep: Sweep) -> None:
    """A bundle whose weights differ in one place computes differently, whatever it chose."""
    recipe = RECIPES["none"]
    source = sweep.bundles(1).source
    oracle = Oracle(plan_job(source, sweep.bundles(1).geometry, recipe, None), sweep.hf)
    parity = Parity()
    with sweep.bundles(1).borrow(recipe, 1.0) as path:
        weights = path / "weights.safetensors"
        raw = bytearray(weights.read_bytes())
        header = int.from_bytes(raw[:8], "little")
        start = 8 + header
        block = np.frombuffer(bytes(raw[start:]), np.float32).copy()
        block[::1000] *= 1.5
        weights.write_bytes(bytes(raw[:start]) + block.tobytes())
        with Session(path, threads=1) as session:  # graphs are hashed on opening, weights on `verify`
            compare(session, oracle, parity)
    assert parity.chose_equally == 2
    assert not parity.passed
    assert max(parity.features, parity.cache, parity.logits) > TOLERANCE
