"""Types and fields of the parts of messages, walked from transformers' own source: each has an answer here."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
from transformers import ProcessorMixin
from transformers.cli.serving import utils as serving

from secateur.compiler.questions import read_questions
from secateur.runtime.errors import UserError
from secateur.runtime.messages import PART_TYPES, read_messages

LONE = "half \ud83d of it"
VALUES = {"text": "hi", "image": "a.png", "video": "a.mp4", "audio": "a.wav"}


def branches(function: Any) -> list[ast.If]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return [node for node in ast.walk(tree) if isinstance(node, ast.If)]


def strings(node: ast.AST) -> list[str]:
    return [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def list_fields() -> list[tuple[str, str]]:
    """Type and field of every part that transformers' processors read."""
    found = []
    for branch in branches(ProcessorMixin._multimodal_inputs_from_conversations):
        names = strings(branch.test)
        if isinstance(branch.test, ast.Compare) and ast.unparse(branch.test.left) == "block_type":
            lists = [n for n in ast.walk(branch) if isinstance(n, ast.comprehension) and isinstance(n.iter, ast.List)]
            found += [(names[0], field) for field in strings(lists[0].iter)]
    return found


def list_served_types() -> list[str]:
    """Types of the parts that transformers' server reads."""
    found = []
    for branch in branches(serving.BaseHandler.get_processor_inputs_from_messages):
        if "content_type" in ast.unparse(branch.test):
            found += [name for name in strings(branch.test) if name != "content_type"]
    return found


def read(part: dict[str, Any], kind: str) -> Any:
    conversation = read_messages([{"role": "user", "content": [part]}])
    if kind == "text":
        return conversation.messages[0]["content"][0]["text"]
    assert conversation.messages[0]["content"] == [{"type": kind}]
    return conversation.media[kind][0]


def test_the_walk_finds_them() -> None:
    assert {("image", "base64"), ("video", "path"), ("audio", "url")} <= set(list_fields())
    assert {"image_url", "input_audio", "video_url", "text"} <= set(list_served_types())


@pytest.mark.parametrize(("kind", "field"), list_fields())
def test_fields_that_processors_read(kind: str, field: str) -> None:
    value = "AAAA" if field == "base64" else VALUES[kind]
    assert read({"type": kind, field: value}, kind) == (b"\0\0\0" if field == "base64" else value)


@pytest.mark.parametrize("name", list_served_types())
def test_types_that_the_server_reads(name: str) -> None:
    kind, fields = PART_TYPES[name]
    value: Any = VALUES[kind]
    if name == "input_audio":
        assert read({"type": name, name: {"data": "AAAA", "format": "mp3"}}, kind) == b"\0\0\0"
        return
    assert read({"type": name, fields[0]: value}, kind) == value
    if kind != "text":
        assert read({"type": name, fields[0]: {"url": value}}, kind) == value


@pytest.mark.parametrize("name", ["question", "answer"])
def test_questions_that_are_not_unicode(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    path = tmp_path / "asked.jsonl"
    whole = {"image": "a.png", "question": "q", "answer": "a"}
    path.write_text("\n".join(json.dumps(line) for line in (whole, whole | {name: LONE})))
    with pytest.raises(UserError, match=rf"asked\.jsonl:2, {name}: character 5 of the text is U\+D83D, half"):
        read_questions(path)
