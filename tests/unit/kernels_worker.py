"""Runs kernels in Triton's interpreter, in a process of its own: it must be chosen before triton is imported.

Reads pickled ``(plugin, inputs, settings, sizes)`` from stdin, writes the outputs, NumPy arrays both ways, to stdout.
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
    _index_by_item()
    # What a library prints must not end up between the answers.
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            name, inputs, settings, sizes = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            outputs = run_plugin(name, [torch.from_numpy(a) for a in inputs], settings, **sizes)
            answer: object = [tensor.numpy() for tensor in outputs]
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


def _index_by_item() -> None:
    """The interpreter takes a loop's bound from an array of one number; NumPy 2.4 wants that said."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_index


if __name__ == "__main__":
    main()
