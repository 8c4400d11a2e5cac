"""Facts per model family: where the parts are and how images become tokens. One small file each."""

from __future__ import annotations

from secateur.compiler.families.family import Family
from secateur.runtime.errors import UserError


def list_model_types() -> list[str]:
    """The ``model_type`` values of ``config.json`` that can be compiled."""
    return sorted(t for family in _families() for t in family.model_types)


def find_family(model_type: str | None, where: str) -> Family:
    """The family of a ``model_type``; ``where`` (a path) goes into the error."""
    for family in _families():
        if model_type in family.model_types:
            return family
    what = f"unknown model type {model_type!r}" if model_type else "no model_type"
    raise UserError(what, where=where, available=list_model_types(), fix="choose a model of a supported family")


def _families() -> list[Family]:
    from secateur.compiler.families.gemma3 import GEMMA3
    from secateur.compiler.families.internvl import INTERNVL
    from secateur.compiler.families.llava import LLAVA
    from secateur.compiler.families.llava_next import LLAVA_NEXT
    from secateur.compiler.families.llava_onevision import LLAVA_ONEVISION
    from secateur.compiler.families.qwen2_5_omni import QWEN2_5_OMNI
    from secateur.compiler.families.qwen2_5_vl import QWEN2_5_VL
    from secateur.compiler.families.qwen2_vl import QWEN2_VL
    from secateur.compiler.families.qwen3_omni import QWEN3_OMNI
    from secateur.compiler.families.qwen3_vl import QWEN3_VL, QWEN3_VL_MOE
    from secateur.compiler.families.smolvlm import SMOLVLM

    return [
        GEMMA3, INTERNVL, LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, QWEN2_5_OMNI, QWEN2_5_VL, QWEN2_VL, QWEN3_OMNI, QWEN3_VL,
        QWEN3_VL_MOE, SMOLVLM,
    ]  # fmt: skip
