"""Compile a kernel ahead of time, without a GPU: PTX, and machine code made of it.

Triton gives every kernel two parameters more than it was written with, for scratch memory of its own; it passes them
itself when it launches one. Whoever else launches the kernel passes what was written, and one parameter short is memory
read past its end. So they are taken off, where the kernel uses neither. Paths and line numbers are left out: the same
kernel gives the same bytes on every machine.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from secateur.exporters.plugins.launch import Launch
from secateur.runtime.errors import SecateurError, UserError

ARCHITECTURES = (80, 86, 89, 90, 120)
SHARED_LIMIT = 48 * 1024
"""Bytes of shared memory every GPU gives without being asked; who launches a plugin may not ask."""
_HIDDEN = 2


@dataclass(frozen=True)
class Compiled:
    """``ptx`` text with the one entry ``name``; ``shared`` bytes of shared memory, ``threads`` a block."""

    name: str
    ptx: str
    shared: int
    threads: int


def compile_launch(launch: Launch, sm: int) -> Compiled:
    """The kernel of a launch for GPUs of architecture ``sm``."""
    pointers = {name: "constexpr" if kind is None else f"*{kind}" for name, kind in launch.pointers.items()}
    constants = {**{name: None for name, kind in launch.pointers.items() if kind is None}, **launch.constants}
    signature = {**pointers, **dict.fromkeys(launch.constants, "constexpr")}
    return compile_kernel(launch.kernel, signature, constants, sm, warps=launch.warps, stages=launch.stages)


def compile_kernel(
    kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any], sm: int, *, warps: int = 4, stages: int = 2
) -> Compiled:
    """``signature``: Triton's type of every parameter in order ("*fp32", "i32", "constexpr"); ``constants``: the values
    of the last kind. Pointers must be aligned to 16 bytes.

    Nothing is kept anywhere: what Triton would cache goes to a directory that is gone afterwards. Raises UserError for
    an architecture that is not among ``ARCHITECTURES`` and where the kernels were imported for Triton's interpreter,
    SecateurError when the kernel needs what a plugin cannot have.
    """
    if sm not in ARCHITECTURES:
        raise UserError(f"no kernels for GPU architecture {sm}", where="--sm", available=ARCHITECTURES)
    if not isinstance(kernel, triton.JITFunction):
        raise UserError(
            "the kernels were imported for Triton's interpreter", where="kernels", fix="unset TRITON_INTERPRET"
        )
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, dict(signature), dict(constants), aligned)
    knobs = triton.knobs
    with tempfile.TemporaryDirectory() as directory, knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = directory
        knobs.compilation.disable_line_info = True
        made = triton.compile(
            source, target=GPUTarget("cuda", sm, 32),
            options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False},
        )  # fmt: skip
    facts, name = made.metadata, str(made.metadata.name)
    if facts.global_scratch_size or facts.profile_scratch_size:
        raise SecateurError("the kernel needs scratch memory, which a plugin has none of", where=f"kernel {name}")
    if facts.shared > SHARED_LIMIT:
        raise SecateurError(
            f"the kernel needs {facts.shared} bytes of shared memory, a plugin has {SHARED_LIMIT}",
            where=f"kernel {name} for architecture {sm}", fix="make its tiles smaller",
        )  # fmt: skip
    ptx = take_off_hidden(made.asm["ptx"], name, sum(kind != "constexpr" for kind in signature.values()))
    return Compiled(name, ptx, int(facts.shared), 32 * warps)


def take_off_hidden(ptx: str, name: str, count: int) -> str:
    """The text with ``count`` parameters of the entry left. Raises SecateurError when it reads one of the others, or
    has not ``count`` and the two that Triton adds."""
    head = re.search(rf"(\.visible \.entry {re.escape(name)}\(\n)(.*?)(\n\))", ptx, re.DOTALL)
    if head is None:
        raise SecateurError("Triton's PTX has no such entry", where=f"kernel {name}")
    parameters = head.group(2).split(",\n")
    hidden = [f"{name}_param_{i}" for i in range(count, len(parameters))]
    if len(hidden) != _HIDDEN or any(f"[{p}" in ptx[head.end() :] for p in hidden):
        raise SecateurError(
            f"{len(parameters)} parameters where {count} were written and Triton adds {_HIDDEN} unused ones",
            where=f"kernel {name}", fix="use the version of triton in constraints.txt",
        )  # fmt: skip
    kept = ",\n".join(parameters[:count])
    return f"{ptx[: head.start()]}{head.group(1)}{kept}{head.group(3)}{ptx[head.end() :]}"


def assemble(compiled: Compiled) -> bytes:
    """Machine code (a cubin) of the text, by the assembler that comes with triton."""
    (target,) = re.findall(r"^\.target (sm_\w+)", compiled.ptx, re.MULTILINE)
    assembler = triton.knobs.nvidia.ptxas_blackwell if target.startswith("sm_1") else triton.knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as directory:
        source, out = Path(directory, "kernel.ptx"), Path(directory, "kernel.cubin")
        source.write_text(compiled.ptx)
        done = subprocess.run(
            [assembler.path, f"--gpu-name={target}", str(source), "-o", str(out)], capture_output=True, text=True
        )
        if done.returncode:
            raise SecateurError(f"ptxas: {done.stderr.strip().splitlines()[0]}", where=f"kernel {compiled.name}")
        return out.read_bytes()
