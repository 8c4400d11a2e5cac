"""A prompt to the ids that ``prefill`` reads, from the manifest's ``prompt``, ``tokenizer`` and ``preprocessing``.

NumPy-free: jinja2 renders the chat template, tokenizers reads the bundle's ``tokenizer.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

Json = dict[str, Any]


class Text:
    """How one geometry of a bundle reads prompts."""

    def __init__(self, bundle: Path, manifest: Json) -> None:
        self.manifest, self.facts, self.how = manifest, manifest["prompt"], manifest["tokenizer"]
        self.tokenizer = Tokenizer.from_file(str(bundle / self.how["file"]))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.items = manifest["preprocessing"]["placeholders"]
        self.template = None
        if self.facts["template"] is not None:
            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
            environment.globals["raise_exception"] = _refuse
            self.template = environment.from_string((bundle / self.facts["template"]).read_text(encoding="utf-8"))

    def render(self, prompt: str | list[Json]) -> tuple[str, bool]:
        """Text, and whether a chat template wrote it."""
        spelled = self.facts["placeholders"]
        if isinstance(prompt, str):
            if any(text in prompt for text in spelled.values()):
                return prompt, False
            if self.template is None:
                return "".join(spelled[item["kind"]] for item in self.items) + "\n" + prompt, False
            media = [{"type": item["kind"]} for item in self.items]
            prompt = [{"role": "user", "content": [*media, {"type": "text", "text": prompt}]}]
        assert self.template is not None
        return self.template.render(
            messages=prompt, tools=None, documents=None, add_generation_prompt=True, **self.facts["variables"]
        ), True

    def encode(self, prompt: str | list[Json], times: list[float]) -> list[int]:
        """``times`` are the mean seconds of the frames of every grid of a video."""
        text, templated = self.render(prompt)
        for kind, space in zip(("image",) * 2, (self.manifest["model"]["image_space"],), strict=False):
            text = text.replace(self.facts["placeholders"][kind], self.facts["placeholders"][kind].join(space))
        ids = self._encode(text)
        begins = self.how["unless_begins"]
        if not (templated and begins is not None and text.startswith(begins)):
            ids = [*self.how["before"], *ids, *self.how["behind"]]
        return self._expand(ids, times)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _expand(self, ids: list[int], times: list[float]) -> list[int]:
        items, seconds, found = iter(self.items), iter(times), list[int]()
        named = {item["token"] for item in self.items}
        for token in ids:
            if token not in named:
                found.append(token)
                continue
            for run in next(items)["becomes"]:
                if run["token"] is None:
                    found += self._encode(self.manifest["media"]["timestamp"].format(next(seconds)))
                else:
                    found += [run["token"]] * run["count"]
        return found


def _refuse(message: str) -> None:
    raise ValueError(message)
