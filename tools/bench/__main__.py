"""`python -m secateur.tools.bench`: all tables; or one of them, with its options, by name."""

from __future__ import annotations

import sys

from secateur.tools.bench import accuracy, engine_weights, gpu, kernels, latency, loops, overhead, seats


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    # Times first, while the machine is quiet.
    tables = {
        "latency": latency.main, "overhead": overhead.main, "seats": seats.main, "engine_weights": engine_weights.main,
        "accuracy": accuracy.main,
    }  # fmt: skip
    # What needs a GPU, or says nothing of our own graphs, is measured when asked for.
    named = {**tables, "kernels": kernels.main, "gpu": gpu.main, "loops": loops.main}
    if arguments and arguments[0] in named:
        named[arguments[0]](arguments[1:])
        return
    if arguments:
        usage = f"python -m secateur.tools.bench [{'|'.join(named)}] [options]"
        sys.stderr.write(f"usage: {usage}, without a name the first {len(tables)}\n")
        sys.exit(0 if arguments[0] in ("-h", "--help") else 2)
    for table in tables.values():
        table([])


if __name__ == "__main__":
    main()
