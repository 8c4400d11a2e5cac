"""Which of a checkpoint's files counts, held to transformers' own loaders over the same directories."""

from __future__ import annotations

import ast
import itertools
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers.utils as hf
from PIL import Image
from transformers import AutoTokenizer, GenerationConfig, LlavaProcessor
from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.tokenization_utils_base import (
    ADDED_TOKENS_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
)
from transformers.video_processing_utils import BaseVideoProcessor

import secateur
from secateur.compiler.families import list_model_types
from secateur.compiler.processor_files import VIDEO_TYPES, take_processor_files
from secateur.compiler.trace import read_source
from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.processor_files import find_settings, list_templates
from secateur.runtime.session import Session

from . import tiny_model, tiny_qwen
from .tiny_model import write_json

COMPARED = {
    hf.PROCESSOR_NAME, hf.IMAGE_PROCESSOR_NAME, hf.FEATURE_EXTRACTOR_NAME, hf.VIDEO_PROCESSOR_NAME,
    hf.GENERATION_CONFIG_NAME, hf.CHAT_TEMPLATE_FILE, hf.LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, hf.CHAT_TEMPLATE_DIR,
    FULL_TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_MAP_FILE, ADDED_TOKENS_FILE,
}  # fmt: skip
"""Files that say how something is processed; the tests below write them beside each other."""
ASIDE = {
    hf.CONFIG_NAME: "the model; generation defaults inside it are compared below",
    "adapter_config.json": "adapters are refused",
    "modelcard.json": "says nothing of processing",
    "audio_tokenizer_config.json": "of models that speak",
}
LOADERS: dict[str, Any] = {
    "image": ImageProcessingMixin.get_image_processor_dict,
    "video": BaseVideoProcessor.get_video_processor_dict,
    "audio": FeatureExtractionMixin.get_feature_extractor_dict,
}
SMALL = secateur.Geometry(text_tokens=24, new_tokens=4)
WITHOUT_VIDEO = {"internvl", "smolvlm"}
"""Families whose videos are not compiled."""
PART = {"image": "image_processor", "video": "video_processor", "audio": "feature_extractor"}


def test_every_file_that_transformers_reads_has_an_answer() -> None:
    """A release that reads one more file, or calls one by another name, fails here."""
    tokenizers = __import__("transformers.tokenization_utils_base", fromlist=["x"])
    names = {
        str(value)
        for module in (hf, tokenizers)
        for name, value in vars(module).items()
        if isinstance(value, str) and name.isupper() and name.endswith(("_NAME", "_FILE", "_DIR"))
    }
    files = {name for name in names if name.endswith((".json", ".jinja", "templates")) and "index" not in name}
    assert files == COMPARED | set(ASIDE)


def mark(kind: str, file: str) -> dict[str, Any]:
    """Settings that tell which file they came from."""
    types = {"image": "CLIPImageProcessor", "video": "Qwen2VLVideoProcessor", "audio": "WhisperFeatureExtractor"}
    key = "feature_extractor_type" if kind == "audio" else f"{PART[kind]}_type"
    return {key: types[kind], "mark": file}


def media_files() -> Iterator[tuple[str, tuple[str, ...]]]:
    for kind in LOADERS:
        said = ["nested", "nested without", hf.IMAGE_PROCESSOR_NAME]
        said += [hf.VIDEO_PROCESSOR_NAME] if kind == "video" else []
        for count in range(1, len(said) + 1):
            for files in itertools.combinations(said, count):
                if not {"nested", "nested without"} <= set(files):
                    yield kind, files


@pytest.mark.parametrize(("kind", "files"), list(media_files()), ids=lambda x: x if isinstance(x, str) else "+".join(x))
def test_settings_of_media_are_those_transformers_takes(tmp_path: Path, kind: str, files: tuple[str, ...]) -> None:
    for file in files:
        content = mark(kind, file)
        name = hf.PROCESSOR_NAME if file.startswith("nested") else file
        write_json(tmp_path, name, {PART[kind]: content} if file == "nested" else content if name == file else {})
    try:
        theirs, _ = LOADERS[kind](tmp_path, local_files_only=True)
    except OSError:
        theirs = {}
    assert find_settings(tmp_path, kind).values.get("mark") == theirs.get("mark")


TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json", "additional_chat_templates")


# transformers leaves the files of that folder to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize(
    "files",
    [files for count in range(1, 5) for files in itertools.combinations(TEMPLATES, count)],
    ids="+".join,
)
def test_the_chat_template_is_the_one_transformers_takes(tmp_path: Path, files: tuple[str, ...]) -> None:
    tiny_model.write_processor(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    words = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for file in files:
        if file == "additional_chat_templates":
            (tmp_path / file).mkdir()
            (tmp_path / file / "default.jinja").write_text(file)
        elif file.endswith(".jinja"):
            (tmp_path / file).write_text(file)
        else:
            write_json(tmp_path, file, {**(words if file == "tokenizer_config.json" else {}), "chat_template": file})
    if {"chat_template.json", "additional_chat_templates"} <= set(files):
        with pytest.raises(ValueError, match="chat template"):
            LlavaProcessor.from_pretrained(tmp_path, local_files_only=True, backend="pil")
        with pytest.raises(UserError, match=r"chat_template.json beside additional_chat_templates/"):
            take_processor_files(tmp_path)
        return
    processor = LlavaProcessor.from_pretrained(tmp_path, local_files_only=True, backend="pil")
    theirs = processor.chat_template or processor.tokenizer.chat_template
    theirs = theirs["default"] if isinstance(theirs, dict) else theirs
    assert [each.text for each in list_templates(tmp_path)][:1] == [theirs]
    taken = take_processor_files(tmp_path)
    assert taken.texts["chat_template.jinja"] == theirs
    assert bool([note for note in taken.notes if "the chat template" in note]) == (
        len({each.text for each in list_templates(tmp_path)}) > 1
    )


def test_special_tokens_that_only_the_map_names(tmp_path: Path) -> None:
    tiny_model.write_processor(tmp_path)
    write_json(tmp_path, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    write_json(tmp_path, "special_tokens_map.json", {"bos_token": "<s>", "pad_token": {"content": "<pad>"}})
    theirs = AutoTokenizer.from_pretrained(tmp_path).special_tokens_map
    taken = take_processor_files(tmp_path)
    words = json.loads(taken.texts["tokenizer_config.json"])
    assert (words["bos_token"], words["pad_token"]) == ("<s>", "<pad>") == (theirs["bos_token"], theirs["pad_token"])
    assert not taken.notes


def test_special_tokens_that_two_files_name_differently(tmp_path: Path) -> None:
    tiny_model.write_processor(tmp_path)
    write_json(tmp_path, "special_tokens_map.json", {"bos_token": "</s>"})
    theirs = AutoTokenizer.from_pretrained(tmp_path).bos_token
    taken = take_processor_files(tmp_path)
    assert json.loads(taken.texts["tokenizer_config.json"])["bos_token"] == theirs
    (note,) = taken.notes
    assert "tokenizer_config.json" in note
    assert "special_tokens_map.json" in note
    assert "bos_token" in note


def test_added_tokens_that_only_their_own_file_has(tmp_path: Path) -> None:
    tiny_model.write_processor(tmp_path)
    write_json(tmp_path, "added_tokens.json", {"<late>": tiny_model.VOCABULARY})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = take_processor_files(tmp_path).tokenizer.backend
    assert ours.token_to_id("<late>") == theirs.get_vocab().get("<late>")
    assert ours.encode("a<late>b").ids == theirs("a<late>b").input_ids


@pytest.mark.parametrize("own", [None, {}, {"temperature": 0.5}, {"repetition_penalty": 1.5, "eos_token_id": 2}])
@pytest.mark.parametrize("old", [{}, {"repetition_penalty": 1.25}])
def test_generation_defaults_are_those_transformers_takes(
    tmp_path: Path, own: dict[str, Any] | None, old: dict[str, Any]
) -> None:
    tiny_model.write_config(tmp_path, **old)
    tiny_model.write_processor(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    if own is not None:
        write_json(tmp_path, "generation_config.json", own)
    try:
        theirs = GenerationConfig.from_pretrained(tmp_path)
    except OSError:  # as from_pretrained of a model does where the file is missing
        theirs = GenerationConfig.from_pretrained(tmp_path, config_file_name="config.json", _from_model_config=True)
    taken = take_processor_files(tmp_path)
    ours = GenerationConfig.from_dict(json.loads(taken.texts.get("generation_config.json", "{}")))
    for key in ("repetition_penalty", "temperature", "eos_token_id"):
        assert getattr(ours, key) == getattr(theirs, key), key
    differs = own is not None and bool(old)
    assert any("repetition_penalty" in note for note in taken.notes) == differs


def test_an_old_file_beside_the_nested_one(tmp_path: Path, model_dir: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Of a directory saved by two releases the bundle has transformers' choice, alone, and a warning names both."""
    model = shutil.copytree(model_dir(), tmp_path / "a model")  # a space in its name
    layout = json.loads((model / "processor_config.json").read_text())
    old = json.loads((model / "preprocessor_config.json").read_text())
    nested = {**old, "image_mean": [0.25] * 3}
    write_json(model, "processor_config.json", {**layout, "image_processor": nested})
    with caplog.at_level(logging.WARNING):
        secateur.compile(model, tmp_path / "a bundle", recipe="none", geometry=SMALL)
    (note,) = [text for text in caplog.messages if "differ" in text]
    assert note.endswith(
        "processor_config.json, image_processor and preprocessor_config.json differ in image_mean: "
        "processor_config.json, image_processor is taken, as transformers does"
    )
    assert not (tmp_path / "a bundle" / "preprocessor_config.json").exists()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    theirs = LlavaProcessor.from_pretrained(model, backend="pil").image_processor(picture, return_tensors="np")
    with Session(tmp_path / "a bundle", threads=1) as session:
        ours = session.processor(["<image>what?"], [[picture]]).pixel_values
    np.testing.assert_allclose(ours, theirs["pixel_values"], atol=1e-6)


def test_processors_of_videos_are_those_transformers_lists() -> None:
    """Read from its source, since the table is emptied where torchvision is not installed."""
    from transformers.models.auto import auto_mappings, video_processing_auto

    listed: dict[str, str] = {}
    for module in (auto_mappings, video_processing_auto):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Tuple) and len(node.elts) == 2 and isinstance(node.elts[1], ast.Dict):
                with suppress(ValueError):
                    of, backends = ast.literal_eval(node)
                    if str(backends.get("torchvision")).endswith("VideoProcessor"):
                        listed[of] = backends["torchvision"]
    assert listed.items() >= VIDEO_TYPES.items()
    ours = {each for each in list_model_types() if each in listed}
    assert ours <= set(VIDEO_TYPES) | WITHOUT_VIDEO, "a family whose videos transformers processes has no answer"


@pytest.mark.parametrize(
    ("model_type", "image", "video"),
    [
        ("qwen3_vl", "Qwen2VLImageProcessorFast", "Qwen3VLVideoProcessor"),
        ("qwen3_vl", "Qwen2VLImageProcessor", "Qwen2VLVideoProcessor"),
        ("qwen2_5_vl", "Qwen2VLImageProcessorFast", "Qwen2VLVideoProcessor"),
    ],
)
def test_a_type_of_videos_is_inferred_as_transformers_does(
    tmp_path: Path, model_type: str, image: str, video: str
) -> None:
    """From a file that speaks of images alone: by its type where that names one of videos, else by the model's."""
    tiny_qwen.write_processor(tmp_path)
    write_json(tmp_path, "config.json", {"model_type": model_type})
    old = json.loads((tmp_path / "preprocessor_config.json").read_text())
    write_json(tmp_path, "preprocessor_config.json", {**old, "image_processor_type": image})
    nested = json.loads(take_processor_files(tmp_path).texts["processor_config.json"])
    assert nested["video_processor"]["video_processor_type"] == video


def test_a_part_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": "CLIPImageProcessor"}))
    with pytest.raises(
        BundleError, match=r"processor_config.json: image_processor is 'CLIPImageProcessor', not an obj"
    ):
        find_settings(tmp_path, "image")


def test_patches_of_an_old_file_beside_the_nested_one(tmp_path: Path) -> None:
    tiny_qwen.write_config(tmp_path)
    tiny_qwen.write_processor(tmp_path)
    old = json.loads((tmp_path / "preprocessor_config.json").read_text())
    write_json(tmp_path, "processor_config.json", {"image_processor": {**old, "image_std": [0.5] * 3}})
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    assert find_settings(tmp_path, "image").values["image_std"] == list(theirs.image_std) == [0.5] * 3
    assert [note for note in take_processor_files(tmp_path).notes if "image_std" in note]


def test_code_of_a_checkpoint_is_not_run_where_transformers_has_the_model(
    tmp_path: Path, model_dir: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = shutil.copytree(model_dir(), tmp_path / "model")
    own = {"auto_map": {"AutoConfig": "modeling.Config", "AutoModel": "modeling.Model"}}
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        write_json(model, name, {**json.loads((model / name).read_text()), **own})
    (model / "modeling.py").write_text("raise SystemExit('this code ran')")
    with caplog.at_level(logging.WARNING):
        secateur.compile(model, tmp_path / "bundle", recipe="none", geometry=SMALL)
    (note,) = [text for text in caplog.messages if "auto_map" in text]
    assert note == (
        f"{model}: code of the checkpoint's own (auto_map in config.json, tokenizer_config.json, "
        "preprocessor_config.json) was not run; transformers' classes are taken"
    )
    with Session(tmp_path / "bundle", threads=1) as own_code:
        secateur.compile(model_dir(), tmp_path / "native", recipe="none", geometry=SMALL)
        with Session(tmp_path / "native", threads=1) as native:
            picture = Image.new("RGB", (32, 32), "red")
            answers = [s.generate("what?", picture, max_new_tokens=4).text for s in (own_code, native)]
    assert answers[0] == answers[1]


def test_code_of_a_checkpoint_that_transformers_does_not_know(tmp_path: Path) -> None:
    config = tiny_model.make_config(model_type="their_own", auto_map={"AutoConfig": "modeling.Config"})
    write_json(tmp_path, "config.json", config)
    with pytest.raises(UserError) as caught:
        read_source(tmp_path)
    text = str(caught.value)
    assert text.startswith(
        f"{tmp_path / 'config.json'}: model type 'their_own' is code of the checkpoint's own (auto_map), "
        "which is never run (available: "
    )
    assert "\n" not in text


def test_a_snapshot_of_the_hub_cache(tmp_path: Path, model_dir: Any) -> None:
    """Every file of a snapshot is a link to a blob whose name says nothing."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model_dir().iterdir())):
        (blobs / f"{number:040x}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    taken = take_processor_files(snapshot)
    assert taken.texts == take_processor_files(model_dir()).texts
    secateur.compile(snapshot, tmp_path / "bundle", recipe="fastv", keep=0.5, geometry=SMALL)
    with Session(tmp_path / "bundle", threads=1) as session:
        picture = Image.new("RGB", (32, 32), "red")
        message = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "hi"}]}
        assert session.generate([message], max_new_tokens=2).tokens
