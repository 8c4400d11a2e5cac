"""Writes docs/manifest.md and docs/manifest.schema.json from the manifest's schema: `python -m
secateur.tools.manifest_page`."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from secateur.runtime.schema import SCHEMA_VERSION, Manifest

_USUAL = {"op": "What kind of step it is.", "rule": "Which rule it is."}
PAGE, SCHEMA = Path("docs/manifest.md"), Path("docs/manifest.schema.json")


def list_parts(model: type[BaseModel] = Manifest) -> list[type[BaseModel]]:
    """The manifest's classes, each behind the first that holds one."""
    found = [model]
    for each in found:
        for field in each.model_fields.values():
            found += [one for one in _models(field.annotation) if one not in found]
    return list(dict.fromkeys(found))


def describe_fields(model: type[BaseModel]) -> dict[str, str]:
    """Field -> what its docstring says, on one line; empty where it has none."""
    said: dict[str, str] = {}
    body = _classes(inspect.getsourcefile(model) or "")[model.__name__].body
    for line, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        text = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            text = " ".join(after.value.value.split())
        said[line.target.id] = text
    told = {name: said.get(name) or _USUAL.get(name, "") for name in model.model_fields}
    if model.__name__ == "Variant":
        whole = describe_fields(Manifest)
        told = {name: text or whole[name] for name, text in told.items()}
    return told


def write_schema() -> str:
    """The JSON Schema of a manifest as it is written, described."""
    schema = Manifest.model_json_schema(mode="serialization")
    for model in list_parts():
        own = schema if model is Manifest else schema["$defs"][model.__name__]
        # A reader made from it takes the fields that later versions add.
        own.pop("additionalProperties", None)
        own["description"] = _one_line(inspect.getdoc(model) or "")
        for name, text in describe_fields(model).items():
            own["properties"][name]["description"] = _plain(text)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps({**head, **schema}, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def write() -> str:
    """The page, whole."""
    sections = "\n".join(_write_part(model) for model in list_parts())
    return f"""# The manifest, field by field

Made from `runtime/schema*.py` by `python -m secateur.tools.manifest_page`; edits are overwritten. Schema version
{SCHEMA_VERSION}. [docs/ports.md](ports.md) says what a host does with them;
[manifest.schema.json](manifest.schema.json) is the same as a JSON Schema, from which readers in other languages can be
generated. A field with a default may be left out, and is in bundles of older versions.

{sections}"""


def _write_part(model: type[BaseModel]) -> str:
    lines = [
        f"## {model.__name__}",
        "",
        _one_line(inspect.getdoc(model) or ""),
        "",
        "| field | type | |",
        "|---|---|---|",
    ]
    said = model.model_json_schema(mode="serialization")["properties"]
    for name, text in describe_fields(model).items():
        field = model.model_fields[name]
        kind = _write_type(said[name])
        default = "" if field.is_required() else f" = {json.dumps(_default(field), ensure_ascii=False)}"
        lines.append(f"| `{name}` | {kind}{default} | {_plain(text)} |".replace("||", "|"))
    return "\n".join([*lines, ""])


def _default(field: Any) -> Any:
    return field.get_default(call_default_factory=True)


def _write_type(said: dict[str, Any]) -> str:
    if "$ref" in said:
        name = said["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in said:
            return " or ".join(dict.fromkeys(_write_type(one) for one in said[key]))
    if "const" in said:
        return f"`{json.dumps(said['const'])}`"
    if "enum" in said:
        return ", ".join(f"`{json.dumps(value)}`" for value in said["enum"])
    if said.get("type") == "array":
        return f"list of {_write_type(said['items'])}" if "items" in said else "list"
    if said.get("type") == "object":
        inside = said.get("additionalProperties")
        return f"object of {_write_type(inside)}" if isinstance(inside, dict) else "object"
    return str(said.get("type", "anything"))


def _plain(text: str) -> str:
    """Markdown: one pair of backquotes, no roles, no bars."""
    text = re.sub(r":[a-z]+:`~?\.?([^`]*)`", r"`\1`", text.replace("``", "`"))
    return text.replace("|", "\\|")


def _one_line(text: str) -> str:
    return "\n\n".join(_plain(" ".join(part.split())) for part in text.split("\n\n"))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inside in get_args(annotation):
        yield from _models(inside)


@cache
def _classes(file: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def main() -> None:
    argparse.ArgumentParser(prog="python -m secateur.tools.manifest_page", description="Writes both.").parse_args()
    PAGE.write_text(write(), encoding="utf-8")
    SCHEMA.write_text(write_schema(), encoding="utf-8")


if __name__ == "__main__":
    main()
