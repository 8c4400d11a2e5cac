"""`make demo-omni`: what it draws and tells, and the files it is shipped with."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from secateur.tools.demo.ask import Asked as Answered
from secateur.tools.demo.ask import Bundle
from secateur.tools.demo.omni import architecture, inputs
from secateur.tools.demo.omni.__main__ import main
from secateur.tools.demo.omni.clips import make_clip
from secateur.tools.demo.omni.language import KINDS, SPECIAL_TOKENS, build_tokenizer, list_answers
from secateur.tools.demo.omni.pictures import draw_clip, draw_sound, pick_second
from secateur.tools.demo.omni.questions import held_out, load_shipped
from secateur.tools.demo.omni.run import encode_prompt, measure_kinds, split_places
from secateur.tools.demo.omni.ship import SAMPLE_SEEDS, format_accuracy
from secateur.tools.demo.omni.show import draw_table
from secateur.tools.demo.pictures import GREY

SHIPPED = Path(__file__).parents[2] / "demo" / "omni"


def stub_bundle(label: str, answered: list[Answered], tokens: int) -> Bundle:
    program = SimpleNamespace(flops=10_000 * tokens, unpruned_flops=1_640_000)
    manifest = SimpleNamespace(
        geometry=SimpleNamespace(batch=1, fixed_tokens=48, text_tokens=48, audio_seconds=4, sequence=212),
        segments=[SimpleNamespace(first_layer=0, last_layer=8, length=48 + tokens, capacity=52 + tokens, name="s0")],
        programs=dict.fromkeys(("vision", "prefill", "decode"), program),
        model=SimpleNamespace(kv_heads=2, head_dim=32, image_token_id=393, pad_token_id=380),
        dtype="fp32",
    )
    return Bundle(label, SimpleNamespace(manifest=manifest, path=Path(label)), answered)


def test_places_of_the_prompt_are_video_and_audio_tokens_in_turn() -> None:
    ids = build_tokenizer().encode(inputs.lay_out_media())[2:-2]
    kinds = np.array(ids) == build_tokenizer().convert_tokens_to_ids("<|VIDEO|>")
    video, audio = split_places(np.arange(164))
    assert video.tolist() == list(range(64))
    assert audio.tolist() == list(range(100))
    for place in (0, 31, 32, 81, 82, 113, 114, 163):
        assert [len(part) for part in split_places(np.array([place]))] == [int(kinds[place]), int(not kinds[place])]


def test_prompt_has_one_placeholder_per_token_of_the_clip() -> None:
    manifest = stub_bundle("b", [], 164).session.manifest
    row, length = encode_prompt("Which digit is heard?", manifest)
    assert row.shape == (1, 212)
    assert (row == 393).sum() == 164
    assert (row[0, length[0] :] == 380).all()
    assert length[0] == len(build_tokenizer().encode(inputs.write_prompt("Which digit is heard?")))
    assert build_tokenizer().decode(row[0, length[0] - 3 : length[0]]) == "<|im_start|>assistant\n"


def test_accuracy_is_told_per_kind() -> None:
    questions = held_out(2)
    right = [True, True, False, True, True, True, False, False, True, True]  # a clip after the other
    answered = [Answered("", ok, []) for ok in right]
    shares = measure_kinds(answered, questions)
    assert shares == {"seen": 1, "heard": 0.5, "when_seen": 0, "when_heard": 1, "same": 1, "all": 0.7}


def test_pictures_grey_out_what_did_not_survive_in_its_second() -> None:
    assert pick_second([np.array([3, 16, 31, 40])], 1, 16)[0].tolist() == [0, 15]
    asked = held_out(1)[0]
    kept = [np.r_[0:16, 32:57]]  # all of the first second, nothing else
    bundles = [
        stub_bundle("unpruned", [Answered("1", True, [])], 164),
        stub_bundle("b", [Answered("2", False, kept)], 41),
    ]
    sheet = np.asarray(draw_clip(asked.name, bundles, [asked]), np.int64)
    whole, pruned = np.split(sheet[14:238, 14:], [sheet.shape[1] // 2 - 7], axis=1)
    width = 225 + 6
    assert np.array_equal(whole[:, :224], pruned[:, :224])
    assert (pruned[:, width : width + 224].max(2) == pruned[:, width : width + 224].min(2)).all(), "grey has no colour"
    assert abs(pruned[:, width : width + 224] - GREY).mean() < abs(whole[:, width : width + 224] - GREY).mean()


def test_loud_is_light_and_low_is_below() -> None:
    mels = np.zeros((128, 10), np.float32)
    mels[5, 3] = 1
    pixels = np.asarray(draw_sound(mels)).sum(2)
    assert np.unravel_index(pixels.argmax(), pixels.shape) == (122, 3)


def test_table_shows_samples_and_measures_the_held_out() -> None:
    samples, questions = held_out(1)[:2], held_out(2)
    answered = [Answered(asked.answer, True, []) for asked in [*samples, *questions]]
    wrong = [Answered("?", False, []) for _ in answered]
    table = draw_table(
        [stub_bundle("unpruned", answered, 164), stub_bundle("seats", wrong, 41)], [*samples, *questions], 2
    )
    console = Console(file=io.StringIO(), width=150)
    console.print(table)
    lines = console.file.getvalue().splitlines()
    assert sum("✓" in line and "✗ ?" in line for line in lines) == 2
    told = next(line for line in lines if "right, when seen" in line)
    assert told.split()[-4:] == ["100.0", "%", "0.0", "%"]
    assert "(4.00×)" in next(line for line in lines if "prefill FLOPs" in line)
    assert format_accuracy({"x": {"accuracy": 0.5, "kinds": dict.fromkeys(KINDS, 0.25)}}).endswith(
        "| x | 50.0 | 25.0 | 25.0 | 25.0 | 25.0 | 25.0 |"
    )


def test_missing_questions_stop_the_demo_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--questions", str(tmp_path / "absent.json")])
    assert "no such file" in capsys.readouterr().err


def test_shipped_questions_are_answered_by_their_clips() -> None:
    asked = load_shipped(SHIPPED / "questions.json")
    assert len(asked) == 2 * len(SAMPLE_SEEDS)
    assert {question.answer for question in asked} <= set(list_answers())
    for number, seed in enumerate(SAMPLE_SEEDS):
        clip = make_clip(seed, "held_out")
        assert abs(asked[2 * number].frames.astype(int) - clip.video.frames).max() <= 3  # other versions of FreeType
        np.testing.assert_allclose(asked[2 * number].wave, clip.audio.wave, atol=1e-4)


def test_shipped_model_is_laid_out_as_the_familys_checkpoints() -> None:
    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer, WhisperFeatureExtractor

    directory = SHIPPED / "model"
    config = AutoConfig.from_pretrained(directory)
    assert config.model_type == "qwen2_5_omni_thinker"
    assert config.to_dict() == architecture.build_config().to_dict() | {
        name: config.to_dict()[name] for name in ("architectures", "dtype", "_name_or_path", "transformers_version")
    } | {part: config.to_dict()[part] for part in ("text_config", "vision_config", "audio_config")}
    text = config.text_config
    assert sum(text.rope_parameters["mrope_section"]) == text.hidden_size // text.num_attention_heads // 2
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert tokenizer.convert_tokens_to_ids("<|VIDEO|>") == config.video_token_id
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))[0] == config.text_config.pad_token_id
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Which digit is seen?"}]}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered.replace("<|vision_bos|><|VIDEO|><|vision_eos|>", inputs.lay_out_media()) == inputs.write_prompt(
        "Which digit is seen?"
    )
    assert WhisperFeatureExtractor.from_pretrained(directory).feature_size == config.audio_config.num_mel_bins
    processor = json.loads((directory / "preprocessor_config.json").read_text())
    assert processor == architecture.PREPROCESSOR
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) < 13_000_000
    with safe_open(directory / "model.safetensors", "np") as weights:
        names = set(weights.keys())
        assert {name.split(".")[0] for name in names} == {"audio_tower", "visual", "model", "lm_head"}
        assert all(weights.get_slice(name).get_dtype() == "F16" for name in names)


@pytest.mark.slow
def test_shipped_model_answers_held_out_clips() -> None:
    from secateur.tools.demo.omni.evaluate import evaluate

    assert evaluate(SHIPPED / "model", clips=6)["accuracy"] >= 0.9
