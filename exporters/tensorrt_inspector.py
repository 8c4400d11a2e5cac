"""What a built engine is made of, as its library's own inspector tells: only where a GPU can open it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from secateur.exporters.gpu import has_driver
from secateur.exporters.tensorrt_library import listening, load_library
from secateur.runtime.errors import SecateurError


def engine_layers(path: Path | str, *, flavour: str) -> list[dict[str, Any]]:
    """The layers of an engine file, each with ``Name`` and, where the engine was built with it, ``LayerType`` and more.

    The file must be what was built: no library checks the body of one before it uses it. Raises SecateurError where
    there is no driver or the library does not open the engine, whose stripped weights need not be there.
    """
    path = Path(path)
    if not has_driver():
        raise SecateurError("no GPU driver is here (libcuda.so.1)", where=str(path))
    library = load_library(flavour)
    with listening() as speech:
        try:
            engine = library.loaders.engine_from_bytes(path.read_bytes())
            told = engine.create_engine_inspector().get_engine_information(library.trt.LayerInformationFormat.JSON)
        except Exception as error:
            reason = speech.last_error() if speech.errors else str(error)
            raise SecateurError(f"{flavour} does not open the engine: {reason}", where=str(path)) from None
    layers = json.loads(told).get("Layers", [])
    return [layer if isinstance(layer, dict) else {"Name": layer} for layer in layers]
