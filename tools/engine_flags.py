"""The options of `secateur compile` that say how graphs are written and engines built."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.runtime.errors import UserError
from secateur.tools.forecast import read_bytes

if TYPE_CHECKING:
    from secateur.compiler.pipeline import EngineOptions

Loops = Annotated[
    str | None,
    typer.Option(
        help="For plain. keep (default): selectors that choose token by token, and experts, are ONNX loops. unroll: no "
        "Loop, Scan or If, for toolchains without them; 1 to 7 kB of graph a step, and every expert is computed.",
        metavar="keep|unroll",
    ),
]
Sm = Annotated[
    list[int] | None,
    typer.Option(
        help="GPU architecture for tensorrt-rtx: 75, 80, 86, 89, 120, 121; 89 if not given. Given several times, one "
        "engine runs on all of them."
    ),
]
EngineWeights = Annotated[
    str | None,
    typer.Option(
        help="inputs (default): engines take their large weights as inputs, and all share one copy on the device. "
        "plan: each engine holds its own. stripped: engines hold none and are refitted when they are loaded.",
        metavar="inputs|plan|stripped",
    ),
]
StripWeights = Annotated[bool, typer.Option("--strip-weights", help="The same as --engine-weights stripped.")]
Workspace = Annotated[str | None, typer.Option(help="Scratch memory a layer may take, such as 4GiB.", metavar="SIZE")]
OptLevel = Annotated[int | None, typer.Option(help="How long the builder searches, 0 to 5.")]
VersionCompatible = Annotated[
    bool, typer.Option("--version-compatible", help="Engines run on later versions of tensorrt too.")
]
HardwareCompatible = Annotated[
    bool, typer.Option("--hardware-compatible", help="Engines of tensorrt run on every GPU from Ampere on.")
]
TimingCache = Annotated[
    Path | None, typer.Option(help="File of tensorrt's measurements, read first and added to.", metavar="FILE")
]
ScorePlugins = Annotated[
    bool,
    typer.Option(
        "--score-plugins",
        help="Heavy scores and selectors are kernels in the engines of tensorrt (docs/kernels.md).",
    ),
]


def read_engine_options(
    weights: str | None,
    strip: bool,
    workspace: str | None,
    opt_level: int | None,
    version_compatible: bool,
    hardware_compatible: bool,
    timing_cache: Path | None,
    score_plugins: bool,
) -> EngineOptions | None:
    """The options as one value; None when none is given. Raises UserError for two that contradict each other."""
    from secateur.compiler.pipeline import EngineOptions

    if strip and weights not in (None, "stripped"):
        raise UserError(f"says the opposite of --engine-weights {weights}", where="--strip-weights", fix="give one")
    weights = "stripped" if strip else weights
    flags = version_compatible or hardware_compatible or score_plugins
    if not any((weights, workspace, opt_level is not None, flags, timing_cache)):
        return None
    return EngineOptions(
        weights=weights or EngineOptions().weights, workspace=read_bytes(workspace, "--workspace"),
        opt_level=opt_level, version_compatible=version_compatible, hardware_compatible=hardware_compatible,
        timing_cache=timing_cache, score_plugins=score_plugins,
    )  # fmt: skip
