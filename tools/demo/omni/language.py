"""The words of the omni demo: kinds of question with their wordings, the tokenizer and the chat template.

The tokenizer is built as the family's: bytes and merges first, then the special tokens in the family's order. Its
merges make every word of the templates one token.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from secateur.tools.demo.omni.clips import DIGITS, Clip

KINDS = ("seen", "heard", "when_seen", "when_heard", "same")
SECOND_WORDS = ("first", "second", "third", "fourth")
TEMPLATES: dict[str, tuple[str, ...]] = {
    "seen": (
        "Which digit is seen?",
        "What digit is shown in the video?",
        "Which number can be seen in the clip?",
    ),
    "heard": (
        "Which digit is heard?",
        "What digit is dialled in the audio?",
        "Which number can be heard in the clip?",
    ),
    "when_seen": (
        "In which second is the digit seen?",
        "When is the digit shown in the video?",
        "During which second can the number be seen?",
    ),
    "when_heard": (
        "In which second is the digit heard?",
        "When is the digit dialled in the audio?",
        "During which second can the number be heard?",
    ),
    "same": (
        "Are the digit seen and the digit heard the same?",
        "Is the number shown in the video the same as the number dialled in the audio?",
        "Do you see and hear the same digit?",
    ),
}
# In the order of the checkpoints, where they follow the 151,643 tokens of the vocabulary.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_bos|>", "<|vision_eos|>", "<|vision_pad|>", "<|IMAGE|>", "<|VIDEO|>",
)  # fmt: skip
SYSTEM_PROMPT = "You are a helpful assistant."
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n%s<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['content'] is string %}{{ message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}{{ '<|vision_bos|><|IMAGE|><|vision_eos|>' }}
            {%- elif part['type'] == 'audio' %}{{ '<|audio_bos|><|AUDIO|><|audio_eos|>' }}
            {%- elif part['type'] == 'video' %}{{ '<|vision_bos|><|VIDEO|><|vision_eos|>' }}
            {%- elif part['type'] == 'text' %}{{ part['text'] }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""".replace("%s", SYSTEM_PROMPT)


def phrase_question(kind: str, wording: int) -> str:
    """Wording number ``wording`` (modulo the number there is) of a kind of question."""
    return TEMPLATES[kind][wording % len(TEMPLATES[kind])]


def answer_question(kind: str, clip: Clip) -> str:
    """The one word that answers a kind of question about a clip."""
    video, audio = clip.video, clip.audio
    return {
        "seen": str(video.digit),
        "heard": str(audio.digit),
        "when_seen": SECOND_WORDS[video.second],
        "when_heard": SECOND_WORDS[audio.second],
        "same": "yes" if video.digit == audio.digit else "no",
    }[kind]


def list_answers() -> list[str]:
    """Every possible answer: ten digits, four seconds, yes and no."""
    return [*(str(digit) for digit in DIGITS), *SECOND_WORDS, "yes", "no"]


@cache
def build_tokenizer() -> Any:
    """A ``Qwen2Tokenizer`` of bytes, merges for the words of the templates, and the family's special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    sample = Qwen2Tokenizer()
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = sample.backend_tokenizer.pre_tokenizer
    learner.decoder = decoders.ByteLevel()
    texts = [text for wordings in TEMPLATES.values() for text in wordings]
    texts += [SYSTEM_PROMPT, "system\n", "user\n", "assistant\n", *list_answers(), *(f" {a}" for a in list_answers())]
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    first = len(model["vocab"])
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"] | {word: first + number for number, word in enumerate(SPECIAL_TOKENS)},
        merges=[tuple(pair) for pair in model["merges"]],  # type: ignore[misc]  # pairs are what it takes
        unk_token=None,  # type: ignore[arg-type]  # bytes leave nothing unknown
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=32_768,
        extra_special_tokens={
            "image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>",
            "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
            "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
        },
    )  # fmt: skip
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL_TOKENS])
    return tokenizer
