"""Whether graphs have loops: the choice that ``plain`` has, and what other targets do instead."""

from __future__ import annotations

from secateur.runtime.errors import UserError

LOOPS = ("keep", "unroll")
"""How steps that depend on each other are written: as loops, or one after the other."""
_SETTLED = {
    "onnxruntime": "has loops, which ONNX Runtime runs as they are",
    "onnxruntime-cuda": "has a loop where a selector chooses token by token, and none for experts",
    "tensorrt": "always unrolls: TensorRT fails or crashes over a longer loop beside attention",
}
"""What dialects without a choice do about loops."""


def check_loops(target: str, loops: str | None) -> bool:
    """Whether a target's loops are to be unrolled. Raises UserError where nothing is left to say about it."""
    if loops is None:
        return False
    if loops not in LOOPS:
        raise UserError(f"no way {loops!r} of writing loops", where="--loops", available=LOOPS)
    if target != "plain":
        settled = _SETTLED["tensorrt" if target.startswith("tensorrt") else target]
        raise UserError(
            f"target {target} {settled}", where="--loops", fix="leave it out, or compile for --target plain"
        )
    return loops == "unroll"
