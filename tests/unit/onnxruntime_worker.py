"""Run graphs on the onnxruntime that stands first on the path: `python onnxruntime_worker.py FOLDER`.

``graphs.json`` in the folder lists a graph per call; ``<number>.npz`` are its inputs, ``<number>.out.npz`` its outputs.
The release is printed.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort


def main(folder: Path) -> None:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    sessions: dict[str, ort.InferenceSession] = {}
    for number, graph in enumerate(json.loads((folder / "graphs.json").read_text())):
        if graph not in sessions:
            sessions[graph] = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        names = [port.name for port in sessions[graph].get_outputs()]
        with np.load(folder / f"{number}.npz") as held:
            values = sessions[graph].run(names, dict(held))
        np.savez(folder / f"{number}.out.npz", **dict(zip(names, values, strict=True)))
    sys.stdout.write(ort.__version__ + "\n")


main(Path(sys.argv[1]))
