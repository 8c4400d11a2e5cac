"""Graphs in ONNX's reference evaluator: the specification as its authors run it. Slow, so for small graphs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from onnx.reference import ReferenceEvaluator


def run_in_reference(model_path: Path, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name of the graph at ``model_path``. Weights are read from the files they lie in, safetensors too."""
    model = onnx.load(model_path, load_external_data=False)
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            place = ExternalDataInfo(tensor)
            with (model_path.parent / place.location).open("rb") as file:
                file.seek(place.offset or 0)
                tensor.raw_data = file.read(place.length if place.length is not None else -1)
            del tensor.external_data[:]
            tensor.data_location = onnx.TensorProto.DEFAULT
    return evaluate(model, feeds)


def evaluate(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As :func:`run_in_reference`, of a model in memory."""
    names = [port.name for port in model.graph.output]
    return dict(zip(names, ReferenceEvaluator(model).run(names, dict(feeds)), strict=True))
