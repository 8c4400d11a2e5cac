"""YAML as users write it, with errors of one line."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from secateur.runtime.errors import UserError


def parse_yaml(text: str, where: str) -> Any:
    """Plain data of a YAML text. Raises UserError for what is not YAML and for keys that are given twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is given twice, of which YAML would silently take the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            keys = [key.value for key, _ in node.value]
            if twice := sorted({key for key in keys if keys.count(key) > 1}):
                line = node.start_mark.line + 1
                raise UserError(f"key {twice[0]!r} is given twice in the mapping at line {line}", where=where)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"not YAML: {getattr(error, 'problem', None) or error}{line}", where=where) from None
