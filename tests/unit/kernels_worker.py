"""Runs kernels in Triton's interpreter, in a process of its own: it must be chosen before triton is imported.

Reads pickled ``(plugin, inputs, settings, sizes)`` from stdin, writes the outputs, tensors both ways, to stdout.
"""

from __future__ import annotations

import os
import pickle
import sys
from typing import Any


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from secateur.exporters.plugins.run import run_plugin

    torch.set_num_threads(1)
    mend_interpreter()
    # What a library prints must not end up between the answers.
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            name, inputs, settings, sizes = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: object = run_plugin(name, inputs, settings, **sizes)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


def mend_interpreter() -> None:
    """Two things triton's interpreter does (3.6 and 3.7) that a GPU does not: it takes a loop's bound from an array of
    one number without saying so, which NumPy 2.4 refuses, and multiplies the bits of bfloat16 in ``dot``, not its
    numbers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    dot = interpreter.InterpreterBuilder.create_dot

    def widen(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def dot_of_numbers(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot(self, widen(a), widen(b), *others)

    interpreter._patch_lang_tensor = patch_and_index
    interpreter.InterpreterBuilder.create_dot = dot_of_numbers


if __name__ == "__main__":
    main()
