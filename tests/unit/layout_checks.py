"""What the tests of every model layout share: pictures, bundles of one model, and how these are held against others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from secateur.compiler import pipeline
from secateur.compiler.parity import Parity
from secateur.compiler.pipeline import Geometry, read_source
from secateur.runtime.session import Session

NEW = 8
SIZES = ((40, 57), (36, 36), (31, 90), (64, 9))
TOLERANCE = 1e-4


def pictures(seed: int, count: int = 2) -> list[Image.Image]:
    """Noise, each picture in the next of ``SIZES``, height first."""
    draw = np.random.default_rng(seed)
    sizes = [SIZES[(seed + i) % len(SIZES)] for i in range(count)]
    return [Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def load_model(source: Path) -> Any:
    """The model of a directory as transformers runs it."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()


def bundle_maker(source: Path, factory: pytest.TempPathFactory, text_tokens: int) -> Callable[..., Path]:
    """``make(recipe="none", images=2, keep=None, batch=1, target="onnxruntime")`` -> a bundle; each is made once, and
    traced once per geometry."""
    made: dict[tuple[object, ...], Path] = {}
    traces: dict[Geometry, Any] = {}
    trace = pipeline.trace_model

    def make(
        recipe: str = "none", images: int = 2, keep: float | None = None, batch: int = 1, target: str = "onnxruntime"
    ) -> Path:
        key = (recipe, images, keep, batch, target)
        if key not in made:
            geometry = Geometry(batch=batch, images=images, text_tokens=text_tokens, new_tokens=NEW)
            if geometry not in traces:
                traces[geometry] = trace(read_source(source), geometry)
            made[key] = factory.mktemp("bundles") / "bundle"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pipeline, "trace_model", lambda *_: traces[geometry])
                pipeline.compile(source, made[key], recipe=recipe, geometry=geometry, keep=keep, target=target)
        return made[key]

    return make


def check_answers(
    bundle: Path, model: Any, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]],
    feeds: Callable[[int, Any], Mapping[str, torch.Tensor]],
) -> None:  # fmt: skip
    """Tokens and logits of every row are those of ``model.generate``, which gets ``feeds(row, inputs)``; ``inputs`` is
    what the bundle's own processor made of the batch."""
    with Session(bundle, threads=1) as session:
        answers = session.generate(list(prompts), list(images), ignore_eos=True)
        inputs = session.processor(prompts, images)
        request = session.request()
        seen = [session.prefill(request, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)]
        forced = np.array([answer.tokens for answer in answers])
        seen += [session.decode(request, forced[:, step]) for step in range(NEW - 1)]
    for row, answer in enumerate(answers):
        feed = feeds(row, inputs)
        with torch.no_grad():
            want = model.generate(
                **feed, do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW, return_dict_in_generate=True,
                output_logits=True,
            )  # fmt: skip
        tokens = want.sequences[0, feed["input_ids"].shape[1] :].tolist()
        assert answer.tokens == tokens
        assert len(set(tokens)) > 2, "a model that repeats itself shows little"
        for step, logits in enumerate(want.logits):
            np.testing.assert_allclose(seen[step][row], logits[0].numpy(), rtol=0, atol=TOLERANCE)


def check_parity(bundle: Path, source: Path, **how: Any) -> None:
    """A bundle computes what its eager oracle does; ``how`` goes to ``verify``."""
    found = pipeline.verify(bundle, source, threads=1, **how).parity
    assert found is not None
    check_found(found)


def check_found(found: Parity, rows: int | None = None, what: object = "") -> None:
    """Everything was compared, in ``rows`` rows if that is said, no choice differs, and no number by more than the
    tolerance, however large the numbers are."""
    assert found.complete, (what, found)
    assert found.chose_differently == 0, (what, found)
    assert found.worst[1] <= TOLERANCE, (what, found)
    assert rows in (None, found.rows), what
