"""Scores that read learned weights from a file: what they compute, what a bundle says of them, what is refused."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from secateur.compiler import learned, pipeline
from secateur.compiler.learned import WeightsFile, read_weights
from secateur.compiler.pipeline import Geometry, verify
from secateur.compiler.recipe import Term
from secateur.passes.methods import own
from secateur.passes.methods.learned import Weights, learned_perceptron, learned_selector, load_weights
from secateur.passes.methods.registry import SCORES
from secateur.passes.recipe_file import digest_recipe, load_recipe, recipe_from_yaml, recipe_to_yaml
from secateur.passes.vocabulary import bind_term
from secateur.runtime.errors import UserError
from secateur.runtime.manifest import read_manifest

WIDTH, INNER = 64, 12
GEOMETRY = Geometry(batch=2, images=2, text_tokens=24, new_tokens=8)


def draw(width: int = WIDTH, seed: int = 0) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {
        "norm.weight": torch.rand(width, generator=source) + 0.5,
        "up.weight": torch.randn(INNER, width, generator=source),
        "up.bias": torch.randn(INNER, generator=source),
        "down.weight": torch.randn(1, INNER, generator=source),
    }


def write_recipe(
    folder: Path, tensors: dict[str, Tensor] | None = None, reference: str = "file:sieve.safetensors"
) -> Path:
    """A recipe of the kind EchoingPixels' is: one pool of all tokens before the first layer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(draw() if tensors is None else tensors, folder / "sieve.safetensors")
    path = folder / "sieve.yaml"
    score = f"{{name: learned_perceptron, options: {{weights: '{reference}'}}}}"
    stage = f"{{site: 'decoder.layer[0]', score: {score}, select: top_k, scope: whole, share: 0.2}}"
    path.write_text(f"name: sieve\nstages:\n  - {stage}\n")
    return path


def weights_of(tensors: dict[str, Tensor]) -> Weights:
    return Weights(WeightsFile("w.safetensors", "0" * 64, Path("w.safetensors")), tensors)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("plain", [False, True])
def test_the_perceptron_follows_its_formula(activation: Any, plain: bool) -> None:
    tensors = draw(5)
    if plain:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in ("norm.weight", "up.bias")}
    tokens = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
    got = learned_perceptron(tokens, weights_of(tensors), activation)
    assert got.shape == (2, 4)
    for group in range(2):
        for token in range(4):
            row = tokens[group, token].double().numpy()
            if not plain:
                row = row / math.sqrt(float(np.mean(row**2)) + 1e-6) * tensors["norm.weight"].double().numpy()
            total = 0.0
            for unit in range(INNER):
                x = float(row @ tensors["up.weight"][unit].double().numpy()) + (
                    0 if plain else float(tensors["up.bias"][unit])
                )
                half = 0.5 * (1 + math.erf(x / math.sqrt(2))) if activation == "gelu" else 1 / (1 + math.exp(-x))
                total += x * half * float(tensors["down.weight"][0, unit])
            assert float(got[group, token]) == pytest.approx(total, abs=1e-4)


def test_the_selector_is_the_mean_of_scaled_products() -> None:
    """In float64, by the definition: every token's query with every token's key, over the root of their width."""
    draws = [torch.randn(*shape, generator=torch.Generator().manual_seed(9)) for shape in ((INNER, 5), (INNER,))]
    names = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")
    tensors = dict(zip(names, (*draws, *(0.5 * tensor + 0.1 for tensor in draws)), strict=True))
    tokens = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
    rows = tokens.double().numpy()
    weight, bias, key_weight, key_bias = (tensors[name].double().numpy() for name in names)
    query, key = rows @ weight.T + bias, rows @ key_weight.T + key_bias
    want = (query @ key.transpose(0, 2, 1) / math.sqrt(INNER)).mean(axis=2)
    np.testing.assert_allclose(learned_selector(tokens, weights_of(tensors)).numpy(), want, rtol=1e-4, atol=1e-5)


# -- a bundle ---------------------------------------------------------------------------------------------


def test_a_bundle_sieves_as_the_model_does_and_names_the_file(
    model_dir: Callable[..., Path], traced: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "trace_model", lambda source, geometry, dtype: traced("llama", dtype, 2, 2))
    recipe, out = write_recipe(tmp_path / "mine"), tmp_path / "bundle"
    pipeline.compile(model_dir(), out, recipe=str(recipe), geometry=GEOMETRY)
    found = verify(out, model_dir(), recipe=str(recipe), rows=4, threads=1)
    assert found.parity is not None
    assert found.passed, found.parity
    assert found.parity.chose_equally == 4
    sha256 = hashlib.sha256((tmp_path / "mine" / "sieve.safetensors").read_bytes()).hexdigest()
    manifest = read_manifest(out)
    assert manifest.recipe.weights == {"sieve.safetensors": sha256}
    assert manifest.recipe.stages[0].score == f"learned_perceptron(weights=file:sieve.safetensors@{sha256[:12]})"
    assert str(tmp_path) not in (out / "manifest.json").read_text()
    # The same recipe over other weights is another recipe, and keeps other tokens.
    other = write_recipe(tmp_path / "other", draw(seed=1))
    with pytest.raises(UserError, match="recipe sieve is not the one the bundle was compiled with"):
        verify(out, model_dir(), recipe=str(other), rows=1, threads=1)
    pipeline.compile(model_dir(), tmp_path / "second", recipe=str(other), geometry=GEOMETRY)
    graphs = [(path / "prefill.onnx").read_bytes() for path in (out, tmp_path / "second")]
    assert graphs[0] != graphs[1]


def test_a_recipe_file_is_written_with_the_digest(tmp_path: Path) -> None:
    one, other = write_recipe(tmp_path / "one"), write_recipe(tmp_path / "other", draw(seed=1))
    recipe = load_recipe(str(one))
    text = recipe_to_yaml(recipe)
    assert "weights: file:sieve.safetensors@" in text
    assert recipe_from_yaml(text, folder=tmp_path / "one") == recipe
    assert digest_recipe(recipe) != digest_recipe(load_recipe(str(other)))
    with pytest.raises(
        UserError, match=r"options.weights: sieve.safetensors has another digest; end the reference with @"
    ):
        recipe_from_yaml(text, folder=tmp_path / "other")


def test_a_function_of_ones_own_takes_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"direction": torch.arange(3.0)}, tmp_path / "w.safetensors")
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\n"
        "from torch import Tensor\n"
        "from secateur.recipes import Recipe, Site, Stage, Term, Weights, read_weights, score\n"
        "@score\n"
        "def along(tokens: Tensor, weights: Weights) -> Tensor:\n"
        "    return tokens @ weights.take('direction', tokens.shape[2])\n"
        "FILE = read_weights('file:w.safetensors', Path(__file__).parent)\n"
        "ALONG = Recipe('along', '', '', (Stage(Site('projector.out'), Term('top_k'),\n"
        "    Term('along', {'weights': FILE})),))\n"
    )
    try:
        recipe = load_recipe(f"{tmp_path / 'mine.py'}:ALONG")
        assert recipe.stages[0].score is not None
        bound = bind_term("score", recipe.stages[0].score, "score")
        tokens = torch.eye(3)[None]
        assert bound.function(tokens, **bound.options).tolist() == [[0.0, 1.0, 2.0]]
    finally:
        SCORES.pop("along", None)
        own._OWN.pop("score along", None)


# -- refused ----------------------------------------------------------------------------------------------


def test_what_is_no_weights_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.safetensors").write_text("not weights, but long enough to look")
    (tmp_path / "short.safetensors").write_bytes(b"\x01")
    save_file(draw(), tmp_path / "sieve.safetensors")
    for text, message in (
        ("file:none.safetensors", "weights: cannot read none.safetensors: No such file or directory"),
        ("file:.", "weights: cannot read .: Is a directory"),
        ("file:text.safetensors", "weights: text.safetensors is no safetensors file; save the weights with"),
        ("file:short.safetensors", "weights: short.safetensors is no safetensors file"),
        ("file:sieve.safetensors@00000000", "weights: sieve.safetensors has another digest; end the reference with @"),
        ("file:sieve.safetensors@12", "weights: 'file:sieve.safetensors@12' names no weights file; write file:PATH"),
    ):
        with pytest.raises(UserError) as caught:
            read_weights(text, tmp_path)
        assert str(caught.value).startswith(message)
    monkeypatch.setattr(learned, "MOST_BYTES", 100)
    with pytest.raises(UserError, match=r"sieve.safetensors has [\d.]+ KiB, weights of a score 100 B at most"):
        read_weights("file:sieve.safetensors", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"down.weight": None},
            r"sieve.safetensors: no tensor 'down.weight' \(available: norm.weight, up.bias, up.weight",
        ),
        ({"up.weight": torch.zeros(3, 9)}, r"sieve.safetensors: tensor 'up.weight' is \[3, 9\], not \[any, 64\]"),
        (
            {"down.weight": torch.zeros(2, INNER)},
            r"tensor 'down.weight' is \[2, 12\], not \[1, 12\]; give weights that",
        ),
        (
            {"up.bias": torch.full((INNER,), math.nan)},
            "tensor 'up.bias' holds what are no finite floating-point numbers",
        ),
        ({"up.bias": torch.zeros(INNER, dtype=torch.int64)}, "tensor 'up.bias' holds what are no finite"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_written(
    change: dict[str, Tensor | None], message: str, model_dir: Callable[..., Path], traced: Callable[..., Any],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline, "trace_model", lambda source, geometry, dtype: traced("llama", dtype, 2, 2))
    tensors = {name: tensor for name, tensor in (draw() | change).items() if tensor is not None}
    recipe = write_recipe(tmp_path / "mine", tensors)
    with pytest.raises(UserError, match=message):
        pipeline.compile(model_dir(), tmp_path / "bundle", recipe=str(recipe), geometry=GEOMETRY)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_options_that_are_no_files_are_refused(tmp_path: Path) -> None:
    for value in ("sieve.safetensors", {"up.weight": 1.0}):
        with pytest.raises(
            UserError, match=r"options.weights: .* is no file of weights; write file:PATH of a safetensors"
        ):
            bind_term("score", Term("learned_perceptron", {"weights": value}), "score")
    with pytest.raises(UserError, match="learned_perceptron needs option 'weights'"):
        bind_term("score", Term("learned_perceptron"), "score")


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    save_file(draw(), tmp_path / "sieve.safetensors")
    file = read_weights("file:sieve.safetensors", tmp_path)
    save_file(draw(seed=1), tmp_path / "sieve.safetensors")
    with pytest.raises(UserError, match=r"sieve.safetensors: the file has changed since the recipe was read"):
        load_weights(file)


def test_the_vocabulary_shows_the_option() -> None:
    from secateur.passes.describe import list_functions

    (told,) = [f for f in list_functions() if f.name == "learned_perceptron"]
    assert told.options["weights"] == "Weights"
    assert json.dumps(told.options)
