"""The words of the demo: kinds of question, their wordings, and the word-level tokenizer.

Nothing here knows about pixels. A question is rendered from a template by `phrase_question`; the
tokenizer covers every word a template can produce, and maps the rest to ``<unk>``.
"""

import re
from typing import Any

DIGITS = tuple(range(10))  # all have a word and a class; scenes may draw fewer
COLOURS = ("red", "green", "blue", "yellow", "cyan", "magenta")
KINDS = ("digit_of_colour", "colour_of_digit", "count", "exists", "left_of", "right_of")

TEMPLATES: dict[str, tuple[str, ...]] = {
    "digit_of_colour": (
        "which digit is {colour}?",
        "what is the {colour} digit?",
        "which number is written in {colour}?",
        "can you tell me which of the digits in this picture is {colour}?",
    ),
    "colour_of_digit": (
        "what colour is the {digit}?",
        "which colour does the {digit} have?",
        "what is the colour of the {digit}?",
        "please look at the {digit} and name its colour.",
    ),
    "count": (
        "how many digits are there?",
        "how many digits do you see in the image?",
        "count the digits.",
        "what is the number of digits in this picture?",
    ),
    "exists": (
        "is there a {colour} {digit}?",
        "do you see a {colour} {digit}?",
        "is there a {digit} in {colour}?",
        "does this image show a {digit} that is {colour}?",
    ),
    "left_of": (
        "which digit is left of the {digit}?",
        "what is to the left of the {digit}?",
        "which number stands on the left side of the {digit}?",
    ),
    "right_of": (
        "which digit is right of the {digit}?",
        "what is to the right of the {digit}?",
        "which number stands on the right side of the {digit}?",
    ),
}

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
CHAT_WORDS = ("user", "assistant", ":", "yes", "no")
# Words no template uses today; they let a prompt say a little more before it turns into <unk>.
SPARE_WORDS = str.split(
    ", ! ' a about above all an and any answer any are as at below beside big black both but by color colors "
    "colours could describe different down each find first five four from get give has he here hello how i if "
    "image it just large last let like many me more most my near next no not now number numbers object objects "
    "of on one only or orange other our photo picture pink question right same say second seen she short should "
    "show shown small so some tell ten than thank thanks that their them these they thing things third this "
    "three to two under up us very was we were when where white who whole why will with word words would write "
    "written you your zero"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def phrase_question(kind: str, wording: int, digit: int | None = None, colour: str | None = None) -> str:
    """Renders wording number `wording` (modulo the number there is) of a kind of question."""
    templates = TEMPLATES[kind]
    return templates[wording % len(templates)].format(digit=digit, colour=colour)


def list_words() -> list[str]:
    """Every word of the vocabulary after the special tokens, in a fixed order without repeats."""
    templates = " ".join(text for texts in TEMPLATES.values() for text in texts)
    template_words = re.findall(r"\w+|[^\w\s]", re.sub(r"\{\w+\}", " ", templates))
    words = [str(digit) for digit in DIGITS] + [*COLOURS, *CHAT_WORDS, *template_words, *SPARE_WORDS]
    return list(dict.fromkeys(words))


def build_tokenizer() -> Any:
    """A `PreTrainedTokenizerFast`: lower-cases, splits words and punctuation, one id per word."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*SPECIAL_TOKENS, *list_words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
