"""Prompts, chat templates and the placeholders in them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from secateur.runtime.chat import ChatTemplate
from secateur.runtime.errors import BundleError, SecateurError, UserError
from secateur.runtime.manifest import read_manifest
from secateur.runtime.processing import Processor

BOS, IMAGE = 1, 3


def open_processor(directory: Path) -> Processor:
    return Processor(directory, read_manifest(directory))


@pytest.fixture
def processor(built: Path) -> Processor:
    return open_processor(built)


def text_of(processor: Processor, ids: list[int]) -> str:
    assert processor.prompts.decode(ids) is not None
    parts, run = [], []
    for token in [*ids, None]:
        if token in (BOS, IMAGE, None):
            parts.append(processor.prompts.decode(run))
            parts.append({BOS: "<s>", IMAGE: "#", None: ""}[token])
            run = []
        else:
            run.append(token)
    return "".join(parts)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("hi <image>?", "<s>hi ###?"),
        ("hi", "<s>user: ###hiassistant:"),
        ([{"role": "user", "content": "hi"}], "<s>user: ###hiassistant:"),
        ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "<s>user: ###hiassistant:"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}],
            "<s>user: a###assistant:",
        ),
        (
            [{"role": "s", "content": "t"}, {"role": "user", "content": "u"}],
            "<s>s: tuser: ###uassistant:",
        ),
    ],
)
def test_placeholders_are_put_and_expanded(processor: Processor, prompt: Any, text: str) -> None:
    assert text_of(processor, processor.encode(prompt)) == text


def test_a_template_that_writes_bos_gets_no_second_one(bundle: Path) -> None:
    (bundle / "chat_template.jinja").write_text("{{ bos_token }}<image>{{ messages[0]['content'][1]['text'] }}")
    processor = open_processor(bundle)
    assert text_of(processor, processor.encode("hi")) == "<s>###hi"


def test_without_a_template_placeholders_go_in_front(bundle: Path) -> None:
    (bundle / "chat_template.jinja").unlink()
    processor = open_processor(bundle)
    assert text_of(processor, processor.encode("hi")) == "<s>###\nhi"
    with pytest.raises(UserError, match="no chat template for messages"):
        processor.encode([{"role": "user", "content": "hi"}])


def test_a_template_in_the_tokenizer_config(bundle: Path) -> None:
    (bundle / "chat_template.jinja").unlink()
    for source in ('"T<image>:"', '[{"name": "default", "template": "T<image>:"}]'):
        (bundle / "tokenizer_config.json").write_text('{"chat_template": %s}' % source)  # noqa: UP031
        processor = open_processor(bundle)
        assert text_of(processor, processor.encode("hi")) == "<s>T###:"
    (bundle / "chat_template.json").write_text('{"chat_template": "J<image>:"}')
    processor = open_processor(bundle)
    assert text_of(processor, processor.encode("hi")) == "<s>J###:"


def test_a_batch_is_padded_on_the_right(tiny: ModuleType, tmp_path: Path, image: Image.Image) -> None:
    processor = open_processor(tiny.build(tmp_path / "two", tiny.Tiny(batch=2, images=2)))
    inputs = processor(["<image><image>a", "<image>a<image>bc"], [[image, image]] * 2)
    assert inputs.lengths.tolist() == [8, 10]
    assert inputs.input_ids.shape == (2, 30)
    assert (inputs.input_ids[0, 8:] == 0).all()
    assert inputs.pixel_values.shape == (4, 3, 8, 8)
    assert inputs.prompt_ids(0) == inputs.input_ids[0, :8].tolist()


def test_images_in_messages(processor: Processor, image: Image.Image, image_file: Path) -> None:
    for part in ({"image": image}, {"path": str(image_file)}, {"url": str(image_file)}, {"image": np.asarray(image)}):
        inputs = processor([[{"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "x"}]}]])
        assert inputs.pixel_values.shape == (1, 3, 8, 8)


def refusal(processor: Processor, prompts: Any, images: Any) -> str:
    with pytest.raises(UserError) as caught:
        processor(prompts, images)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_geometry_is_kept(processor: Processor, image: Image.Image) -> None:
    one = [[image]]
    said = refusal(processor, ["<image>" + "x" * 24], one)
    assert "25 text tokens, the bundle was compiled for at most 24" in said
    assert "compile with --text-tokens 25" in said
    said = refusal(processor, ["hi"], [[image] * 2])
    assert "2 image(s), the bundle was compiled for 1 per row (8x8); give 1, or compile with --images 2" in said
    assert "0 image(s)" in refusal(processor, ["hi"], [[]])
    assert "0 image(s)" in refusal(processor, ["hi"], None)
    assert "placeholders in the prompt: 2 image(s)" in refusal(processor, ["<image><image>"], one)
    assert "2 prompt(s) for a bundle of batch 1; give exactly 1, or compile with --batch 2" in refusal(
        processor, ["a", "b"], one
    )
    assert refusal(processor, [], []) == "0 prompt(s) for a bundle of batch 1; give exactly 1"
    assert "row 0: a int is not a prompt; give text" in refusal(processor, [5], one)
    assert refusal(processor, ["hi<image>"], one) == (
        "row 0: the prompt ends with its image; put text (a question) behind the image"
    )
    assert "images for 2 row(s)" in refusal(processor, ["a"], one * 2)
    assert len(processor(["<image>" + "x" * 23], one).prompt_ids(0)) == 27


def test_an_image_size_the_bundle_was_not_compiled_for(bundle: Path, image: Image.Image) -> None:
    (bundle / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 8}, "do_center_crop": false}')
    processor = open_processor(bundle)
    assert "9x8 after processing, the bundle was compiled for 8x8" in refusal(
        processor, ["hi"], [[image.resize((10, 12))]]
    )


@pytest.mark.parametrize(
    "messages", [["x"], [{"role": "user"}], [{"content": "x"}], [{"role": "u", "content": [1]}], []]
)
def test_messages_that_are_none(processor: Processor, messages: Any) -> None:
    with pytest.raises(UserError):
        processor.encode(messages)


def test_a_url_is_not_fetched(processor: Processor) -> None:
    message = {"role": "user", "content": [{"type": "image", "url": "https://example.org/a.png"}]}
    assert "is not a local file; download the image" in refusal(processor, [[message]], None)


HOSTILE = [
    "{{ messages.__class__.__mro__[-1].__subclasses__() }}",
    "{{ messages|attr('__class__') }}",
    "{{ ''.__class__.__base__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{% set _ = messages.append('x') %}",
    "{% set _ = messages[0].update({'role': 'x'}) %}",
    "{% set ns = namespace(__class__=1) %}",
    "{% for _ in range(10**9) %}x{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{{ lipsum.__globals__ }}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_a_hostile_template_gets_nowhere(source: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    # Jinja makes nothing of some of these names; the rest it refuses.
    text = ""
    with contextlib.suppress(SecateurError):
        text = ChatTemplate(source, {}).render(messages)
    assert text in ("", "[]")
    assert messages == [{"role": "user", "content": "x"}]


def test_a_template_that_reaches_for_python_is_named_so() -> None:
    with pytest.raises(BundleError, match="do not use this bundle unless you trust"):
        ChatTemplate("{{ messages.__class__.__mro__ }}", {}).render([])


def test_a_template_may_refuse_or_be_malformed() -> None:
    with pytest.raises(UserError, match="refuses these messages: no system role"):
        ChatTemplate("{{ raise_exception('no system role') }}", {}).render([])
    with pytest.raises(BundleError, match="malformed"):
        ChatTemplate("{% for %}", {})
    with pytest.raises(UserError, match="fails on these messages"):
        ChatTemplate("{{ 1 / 0 }}", {}).render([])


def test_what_templates_expect() -> None:
    source = (
        "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- if m.skip -%}{%- continue -%}{%- endif -%}"
        "{%- set ns.n = ns.n + 1 -%}{%- endfor -%}{{ ns.n }}{{ {'a': '<é>'}|tojson }}{{ eos_token }}"
        "{% generation %}kept{% endgeneration %}{{ strftime_now('%Y')|length }}{{ add_generation_prompt }}"
    )
    text = ChatTemplate(source, {"eos_token": "</s>"}).render([{"role": "u"}, {"skip": True}])
    assert text == '1{"a": "<é>"}</s>kept4True'


@pytest.mark.parametrize(
    ("name", "text"), [("tokenizer.json", "{"), ("tokenizer_config.json", "["), ("tokenizer.json", "{}")]
)
def test_broken_processor_files(bundle: Path, name: str, text: str) -> None:
    (bundle / name).write_text(text)
    with pytest.raises(BundleError, match=name):
        open_processor(bundle)


def test_a_template_that_is_not_text(bundle: Path) -> None:
    (bundle / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(BundleError, match="the chat template is not UTF-8"):
        open_processor(bundle)


def test_a_tokenizer_without_the_placeholder(tiny: ModuleType, bundle: Path) -> None:
    tiny.resign(bundle, model__image_token_id=5)
    with pytest.raises(BundleError, match="<image> is not token 5"):
        open_processor(bundle)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"crop_size": 9}', r"makes \(9, 9\), the bundle was compiled for \(8, 8\)"),
        ('{"crop_size": 8, "resample": 77}', "77 is not a valid Resampling"),
        ('{"crop_size": 8, "rescale_factor": "x"}', "could not convert"),
        ('{"crop_size": 8, "image_mean": [1, 2]}', "2 numbers for 3 colour channels"),
    ],
)
def test_broken_image_processor_settings(bundle: Path, text: str, says: str) -> None:
    (bundle / "preprocessor_config.json").write_text(text)
    with pytest.raises(BundleError, match=says):
        open_processor(bundle)
