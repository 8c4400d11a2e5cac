"""`make demo`: what it greys out, what its table says, and the whole of it on a tiny model."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from secateur.runtime.errors import UserError
from secateur.tools.demo.__main__ import main
from secateur.tools.demo.ask import Asked, Bundle, Question, read_questions
from secateur.tools.demo.pictures import GREY, count_survived, draw_picture, grey_out
from secateur.tools.demo.show import draw_table, tokens_text, with_ratio

from .tiny_model import write_model

GRID = (4, 4)


def patches_of(image: Image.Image) -> np.ndarray:
    """[16, pixels, 3] of a picture that has 4x4 patches."""
    pixels = np.asarray(image, np.int64)
    side = pixels.shape[0] // 4
    return pixels.reshape(4, side, 4, side, 3).swapaxes(1, 2).reshape(16, side * side, 3)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 120, (32, 32, 3), dtype=np.uint8))


def test_kept_patches_stay_as_they_are_and_all_others_lose_their_colour(picture: Image.Image) -> None:
    kept = np.array([0, 5, 6, 15])
    before, after = patches_of(picture), patches_of(grey_out(picture, [kept], GRID))
    for patch in range(16):
        if patch in kept:
            assert np.array_equal(before[patch], after[patch])
        else:
            assert (after[patch].max(1) == after[patch].min(1)).all(), "grey has no colour"
            assert (abs(after[patch] - GREY) < abs(before[patch] - GREY).max()).all()


def test_a_patch_is_the_paler_the_earlier_it_went(picture: Image.Image) -> None:
    stages = [np.array([0, 1, 2, 3, 4, 5]), np.array([0, 1, 2]), np.array([1])]
    assert count_survived(stages, 16)[:7].tolist() == [2, 3, 2, 1, 1, 1, 0]
    after = patches_of(grey_out(picture, stages, GRID)).mean((1, 2))
    assert after[6] > after[3] > after[0] > after[1]


def test_nothing_pruned_leaves_the_picture_alone(picture: Image.Image) -> None:
    assert np.array_equal(np.asarray(grey_out(picture, [np.arange(16)], GRID)), np.asarray(picture))


def stub_bundle(label: str, tokens: list[int], divide: int, answers: list[Asked]) -> Bundle:
    program = SimpleNamespace(flops=8_000_000 // divide, unpruned_flops=8_000_000)
    manifest = SimpleNamespace(
        geometry=SimpleNamespace(
            batch=1, text_tokens=10, fixed_tokens=10, tokens_per_image=16, image_width=32, image_height=32
        ),
        segments=[
            SimpleNamespace(name=f"s{i}", first_layer=i, last_layer=i + 1, length=10 + n, capacity=12 + n)
            for i, n in enumerate(tokens)
        ],
        programs=dict.fromkeys(("vision", "prefill", "decode"), program),
        model=SimpleNamespace(kv_heads=1, head_dim=8),
        dtype="fp32",
    )
    seconds = dict.fromkeys(("vision", "prefill", "ttft", "tpot"), 0.012 / divide)
    return Bundle(label, SimpleNamespace(manifest=manifest, path=Path(label)), answers, seconds)


def test_table_marks_answers_and_says_how_many_times_less() -> None:
    questions = [Question(Path("a.png"), "what colour is the 7?", "red"), Question(Path("b.png"), "how many?", "3")]
    kept = [np.array([0, 1, 2, 3])]
    bundles = [
        stub_bundle("unpruned", [16, 16], 1, [Asked("red", True, []), Asked("3", True, [])]),
        stub_bundle("fastv 0.25", [16, 4], 4, [Asked("blue", False, kept), Asked("3", True, kept)]),
    ]
    console = Console(file=io.StringIO(), width=140)
    console.print(draw_table(bundles, questions))
    lines = console.file.getvalue().splitlines()
    assert next(line for line in lines if "colour is the 7" in line).split()[-4:] == ["✓", "red", "✗", "blue"]
    found = {label: next(line for line in lines if label in line) for label in ("answered", "prefill F", "next token")}
    assert "2 of 2" in found["answered"]
    assert "1 of 2" in found["answered"]
    assert "2 M (4.00×)" in found["prefill F"]
    assert "3.00 ms (4.00×)" in found["next token"]
    assert any("16 in 1 layer, 4 in 1" in line for line in lines)


def test_texts_of_the_table() -> None:
    assert tokens_text([(8, 196)]) == "196 in 8 layers"
    assert with_ratio("1 ms", 3.0, 1.5) == "1 ms (2.00×)"
    assert with_ratio("0", 3.0, 0.0) == "0"


def test_picture_has_a_panel_per_question_and_bundle(picture: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "scene.png"
    picture.save(path)
    questions = [Question(path, "which digit?", "1"), Question(tmp_path / "other.png", "-", "-")]
    bundles = [
        stub_bundle("unpruned", [16], 1, [Asked("1", True, [])] * 2),
        stub_bundle("half", [8], 2, [Asked("2", False, [np.arange(8)])] * 2),
    ]
    one = draw_picture(path, bundles, questions)
    two = draw_picture(path, bundles, [questions[0], questions[0]])
    assert one.width == two.width > 2 * 336
    assert two.height > one.height > 336


@pytest.mark.parametrize("content", ["{", '{"image": 1}', '[{"image": "a.png"}]'])
def test_malformed_questions_are_refused_in_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    path.write_text(content)
    with pytest.raises(UserError, match="not a list of questions"):
        read_questions(path)
    with pytest.raises(UserError, match="no such file"):
        read_questions(tmp_path / "absent.json")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_whole_demo_on_a_tiny_model(picture: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    model = write_model(tmp_path / "model")
    picture.save(tmp_path / "scene.png")
    entries = [{"image": "scene.png", "question": question, "answer": "?"} for question in ("red?", "blue?")]
    (tmp_path / "questions.json").write_text(json.dumps(entries))
    main(
        ["--model", str(model), "--questions", str(tmp_path / "questions.json"), "--out", str(tmp_path / "out"),
         "--recipes", "fastv", "--keep", "0.5", "--repeat", "1", "--threads", "1", "--json"]
    )  # fmt: skip
    figures = json.loads(capsys.readouterr().out)
    unpruned, pruned = figures["bundles"]
    assert [b["label"] for b in figures["bundles"]] == ["unpruned", "fastv 0.5"]
    assert unpruned["visual_tokens"] == [{"layers": 3, "tokens": 16}]
    assert pruned["visual_tokens"][-1]["tokens"] == 8
    assert pruned["flops"]["prefill"] < unpruned["flops"]["prefill"] == pruned["unpruned_flops"]["prefill"]
    assert pruned["cache_bytes"] < unpruned["cache_bytes"]
    assert all(seconds > 0 for seconds in pruned["median_seconds"].values())
    assert (tmp_path / "out" / "scene.png").is_file()
    assert json.loads((tmp_path / "out" / "demo.json").read_text()) == figures
    with pytest.raises(SystemExit, match="2"):
        main(["--questions", str(tmp_path / "absent.json")])
