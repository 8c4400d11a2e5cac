"""Messages as clients write them: every spelling of a part, every source, and a line for each that cannot be taken."""

from __future__ import annotations

import base64
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from secateur.runtime.errors import BundleError, UserError
from secateur.runtime.manifest import read_manifest
from secateur.runtime.messages import PART_TYPES, read_messages
from secateur.runtime.processing import Processor
from secateur.runtime.row_media import gather
from secateur.runtime.session import Session

PIXELS = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)


def encode(kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, kind)
    return file.getvalue()


PNG = base64.b64encode(encode()).decode()
URL = f"data:image/png;base64,{PNG}"


@pytest.fixture
def processor(built: Path) -> Processor:
    return Processor(built, read_manifest(built))


def ask(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "x"}]}]


def refusal(messages: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_messages(messages, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value)


IMAGE_PARTS: dict[str, dict[str, Any]] = {
    "HF image, a picture": {"type": "image", "image": Image.fromarray(PIXELS)},
    "HF image, an array": {"type": "image", "image": PIXELS},
    "HF image, bytes": {"type": "image", "image": encode()},
    "HF image, a data: URL": {"type": "image", "image": URL},
    "HF url, a data: URL": {"type": "image", "url": URL},
    "HF url, base64": {"type": "image", "url": PNG},
    "HF base64": {"type": "image", "base64": PNG},
    "HF base64 of several lines": {"type": "image", "base64": "\n".join([PNG[:60], PNG[60:]])},
    "HF base64, a data: URL": {"type": "image", "base64": URL},
    "columns of datasets": {"type": "image", "image": Image.fromarray(PIXELS), "text": None, "url": None},
    "OpenAI image_url": {"type": "image_url", "image_url": {"url": URL}},
    "OpenAI image_url with detail": {"type": "image_url", "image_url": {"url": URL, "detail": "auto"}},
    "image_url, a string": {"type": "image_url", "image_url": URL},
    "OpenAI Responses input_image": {"type": "input_image", "image_url": URL, "file_id": None},
}


@pytest.mark.parametrize("part", IMAGE_PARTS.values(), ids=IMAGE_PARTS)
def test_every_spelling_of_an_image(processor: Processor, part: dict[str, Any]) -> None:
    before = dict(part)
    found, wanted = processor([ask(part)]), processor([ask({"type": "image"})], [[PIXELS]])
    np.testing.assert_array_equal(found.pixel_values, wanted.pixel_values)
    assert found.prompt_ids(0) == wanted.prompt_ids(0)
    assert part == before


def test_paths_in_messages(processor: Processor, tmp_path: Path) -> None:
    path = tmp_path / "a picture é.png"
    path.write_bytes(encode())
    wanted = processor(["x"], [[PIXELS]]).pixel_values
    with path.open("rb") as opened:
        for part in (
            {"type": "image", "path": str(path)}, {"type": "image", "url": str(path)}, {"type": "image", "image": path},
            {"type": "image", "url": path.as_uri()}, {"type": "image_url", "image_url": {"url": path.as_uri()}},
            {"type": "image_url", "image_url": {"url": str(path)}}, {"type": "image", "image": opened},
        ):  # fmt: skip
            np.testing.assert_array_equal(processor([ask(part)]).pixel_values, wanted)
    assert "no such image file" in refusal_of(processor, ask({"type": "image", "path": "nowhere.png"}))


def refusal_of(processor: Processor, prompt: Any, images: Any = None) -> str:
    with pytest.raises(UserError) as caught:
        processor([prompt], images)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value)


SOUND = np.linspace(-0.5, 0.5, 100, dtype=np.float32)
WAV = base64.b64encode(b"RIFF    WAVE").decode()


@pytest.mark.parametrize(
    ("part", "kind", "held"),
    [
        ({"type": "audio", "audio": SOUND}, "audio", SOUND),
        ({"type": "audio", "url": f"data:audio/wav;base64,{WAV}"}, "audio", b"RIFF    WAVE"),
        ({"type": "audio", "base64": WAV}, "audio", b"RIFF    WAVE"),
        ({"type": "input_audio", "input_audio": {"data": WAV, "format": "wav"}}, "audio", b"RIFF    WAVE"),
        ({"type": "input_audio", "input_audio": {"data": WAV}}, "audio", b"RIFF    WAVE"),
        ({"type": "input_audio", "input_audio": WAV}, "audio", b"RIFF    WAVE"),
        ({"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{WAV}"}}, "audio", b"RIFF    WAVE"),
        ({"type": "audio", "path": "a.wav"}, "audio", "a.wav"),
        ({"type": "video", "path": "a.mp4"}, "video", "a.mp4"),
        ({"type": "video", "video": ["a.png", "b.png"]}, "video", ["a.png", "b.png"]),
        ({"type": "video", "video": [URL, "file:///b.png"]}, "video", [encode(), "/b.png"]),
        ({"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{WAV}"}}, "video", b"RIFF    WAVE"),
        ({"type": "video_url", "video_url": f"data:image/gif;base64,{WAV}"}, "video", b"RIFF    WAVE"),
    ],
)
def test_every_spelling_of_video_and_sound(part: dict[str, Any], kind: str, held: Any) -> None:
    found = read_messages(ask(part))
    assert found.messages == ask({"type": kind})
    (got,) = found.media[kind]
    assert type(got) is type(held)
    assert got is held or got == held


def test_every_type_has_an_answer() -> None:
    """Each known type is read above, or holds text; each of the others that clients send is refused by name."""
    read = {part["type"] for part in IMAGE_PARTS.values()}
    read |= {"audio", "input_audio", "audio_url", "video", "video_url"}
    assert {name for name, part in PART_TYPES.items() if part.kind != "text"} == read
    for name in ("text", "input_text", "output_text"):
        assert read_messages([{"role": "user", "content": [{"type": name, "text": "hi"}]}]).messages == [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]}
        ]
    for name in ("file", "input_file", "refusal", "tool_use", "thinking", "point_cloud", 5):
        said = refusal(ask({"type": name, "x": 1}))
        assert said.startswith(f"messages[0].content[0]: a part of type {name!r} (available: text, input_text, ")
        assert "image_url" in said


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"image": URL}, "messages[0].content[0]: a part without a type (available: text,"),
        ({"type": "image", "image": URL, "url": URL}, "a part with image and url; give one of them"),
        ({"type": "image", "image": 5}, "a int is not an image; give a path"),
        ({"type": "image", "image": {"bytes": b""}}, "a dict is not an image"),
        ({"type": "audio", "audio": [0.1]}, "a list is not audio"),
        ({"type": "image", "base64": b"x"}, "a bytes is not base64"),
        ({"type": "image", "base64": "?"}, "base64 is broken"),
        ({"type": "image", "url": "data:audio/wav;base64,AAAA"}, "a data: URL of audio/wav; give one of image/…"),
        ({"type": "image", "url": "data:image/png"}, "a data: URL without a comma"),
        ({"type": "image_url"}, "a part of type image_url without image_url"),
        ({"type": "image_url", "url": URL}, "a part of type image_url without image_url (available: url)"),
        ({"type": "image_url", "image_url": {}}, "image_url without url; write {'image_url': {'url': …}}"),
        ({"type": "input_audio", "input_audio": {"data": 5}}, "input_audio without data"),
        ({"type": "input_image", "file_id": "file-1"}, "a part of type input_image without image_url"),
        ({"type": "text"}, "a part of type text with no text; write {'type': 'text', 'text': …}"),
        ({"type": "text", "text": 5}, "a part of type text with a int for text"),
        ({"type": "image", "url": "http://127.0.0.1/a.png"}, "http://127.0.0.1/a.png is not a local file; download"),
        ({"type": "image_url", "image_url": {"url": "HTTPS://x.org/a"}}, "ask for it with allow_network=True (--"),
        ({"type": "video_url", "video_url": {"url": "ftp://x.org/a"}}, "is not a local file; download the video"),
        ({"type": "image", "url": "gs://x/a"}, "addresses of gs: are not read (available: a path, file:, data:, http:"),
        ({"type": "image", "url": "file://host/a"}, "a file: URL of another machine (host)"),
    ],
)  # fmt: skip
def test_parts_that_cannot_be(part: dict[str, Any], says: str) -> None:
    assert says in refusal(ask(part))


@pytest.mark.parametrize(
    "message",
    ["x", None, {"role": "user"}, {"content": "x"}, {"role": 5, "content": "x"}, {"role": "user", "content": 5},
     {"role": "user", "content": ["x"]}, {"role": "user", "content": None}],
)  # fmt: skip
def test_messages_that_are_none(message: Any) -> None:
    assert refusal([{"role": "user", "content": "x"}, message]).startswith("messages[1]: a message must be {'role': …")


def test_what_is_none_is_left_out() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}], "name": None}
    assert read_messages([call]).messages == [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]


def test_fields_nobody_reads_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_messages(
            ask(
                {"type": "image", "url": URL, "fps": 2},
                {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
            )
        )
    assert caplog.messages == [
        "messages[0].content[0]: fps is left to the chat template",
        "messages[0].content[1]: detail of image_url is not used",
    ]


def test_media_are_in_the_messages_or_beside_them(processor: Processor) -> None:
    held, empty = {"type": "image", "image": PIXELS}, {"type": "image"}
    said = refusal_of(processor, ask(held), [[PIXELS]])
    assert said == (
        "images: 1 image(s) in the messages (messages[0].content[0]) and 1 beside them; give them in the messages, or "
        "by images with parts {'type': 'image'} for their places"
    )
    assert refusal_of(processor, ask({"type": "image_url", "image_url": URL}), [[PIXELS]]) == said
    said = refusal_of(processor, ask(empty))
    assert said == (
        "messages[0].content[0]: the image part holds nothing; give it in one of its fields image, url, path, base64, "
        "or by images"
    )
    said = refusal_of(processor, ask(empty, empty), [[PIXELS]])
    assert "images: 1 image(s), and 2 part(s) for them (the first is messages[0].content[0]); give as many" in said
    said = refusal_of(processor, ask(held, empty))
    assert said.startswith("messages[0].content[1]: the image part holds nothing, that of messages[0].content[0] does;")
    assert "2 image(s), the bundle was compiled for 1 per row" in refusal_of(processor, ask(held, held))


def test_rows_are_named() -> None:
    with pytest.raises(UserError, match=r"^row 1, messages\[0\].content\[0\]: a part of type 'x'"):
        gather(["a", ask({"type": "x"})], [None] * 3)
    with pytest.raises(UserError, match=r"^row 1, prompt: character 1 of the text is U\+D83D"):
        gather(["a", "b\ud83d"], [None] * 3)
    with pytest.raises(UserError, match=r"^row 1, images\[0\]: a data: URL of audio/x"):
        gather(["a", "b"], [[[PIXELS], ["data:audio/x,a"]], None, None])


def test_placeholders_in_words(processor: Processor) -> None:
    """As transformers takes them where they name every image; refused by name where they cannot."""
    wanted = processor.encode(ask({"type": "image"}))
    assert processor.encode([{"role": "user", "content": "<image>x"}]) == wanted
    assert processor.encode(ask({"type": "text", "text": "<image>"})) == wanted
    for messages, where in (
        ([{"role": "user", "content": "what is <image> and <image>?"}], "messages[0].content"),
        (ask({"type": "image"}, {"type": "text", "text": "what is <image>?"}), "messages[0].content[1]"),
        ([{"role": "system", "content": "<image>"}, *ask({"type": "image"})], "messages[0].content"),
    ):
        said = refusal_of(processor, messages, [[PIXELS]])
        assert said.startswith(
            f"row 0, {where}: the words hold '<image>', which is the place of an item of kind image; "
        )
        assert "give media as parts, such as {'type': 'image'}; in words spell" in said
    said = refusal_of(processor, "what is <image> and <image>?", [[PIXELS]])
    assert "name 1 image(s), or leave placeholders out of the words" in said


LONE = "half \ud83d of it"


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ([{"role": "user", "content": LONE}], "messages[0].content"),
        (ask({"type": "text", "text": LONE}), "messages[0].content[0].text"),
        ([{"role": LONE, "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": "x", "name": LONE}], "messages[0].name"),
        ([{"role": "user", "content": "x", "tool_calls": [{"f": [LONE]}]}], "messages[0].tool_calls[0].f[0]"),
        ([{"role": "user", "content": "x", LONE: "x"}], "a field of messages[0]"),
        (ask({"type": "image", "alt": LONE}), "messages[0].content[0].alt"),
    ],
)
def test_text_that_is_not_unicode(messages: Any, where: str) -> None:
    said = refusal(messages)
    place = LONE.index("\ud83d")
    assert f"{where}: character {place} of the text is U+D83D, half of a surrogate pair; give whole Unicode" in said


def test_text_that_is_not_unicode_on_every_road(built: Path, bundle: Path, processor: Processor) -> None:
    with pytest.raises(UserError, match="prompt: character 5"):
        processor.encode(LONE)
    with Session(built) as session:
        for prompt in (LONE, [{"role": "user", "content": LONE}]):
            with pytest.raises(UserError, match=r"(prompt|messages\[0\].content): character 5 of the text is U\+D83D"):
                session.generate(prompt, PIXELS)
        with pytest.raises(UserError, match=r"stop.*character 5 of the text is U\+D83D"):
            session.generate("x", PIXELS, stop=[LONE])
        with pytest.raises(UserError, match="stands for the byte 0xFF, which is not UTF-8"):
            session.generate(b"a\xff".decode("utf-8", "surrogateescape"), PIXELS)
    (bundle / "tokenizer_config.json").write_text('{"bos_token": "\\ud83d"}')
    with pytest.raises(BundleError, match=r"tokenizer_config.json: bos_token: character 0 of the text is U\+D83D"):
        Processor(bundle, read_manifest(bundle))
    (bundle / "tokenizer_config.json").write_text("{}")
    (bundle / "chat_template.jinja").write_text("<image>{{ '\\ud83d' }}")
    with pytest.raises(BundleError, match=r"chat_template.jinja: character 7 of the text is U\+D83D"):
        Processor(bundle, read_manifest(bundle)).encode("x")


def test_messages_nested_too_deeply() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    assert "nested too deeply" in refusal([{"role": "user", "content": "x", "meta": deep}])
