"""A checkpoint of true size without its bytes: `python -m secateur.tools.bench.sparse_checkpoint DIRECTORY`.

The directory holds a `config.json`; beside it come safetensors shards as `save_pretrained` would write them: the hub's
names, real headers, an index. Their data are holes: a file of 5 GB takes a few blocks on disk, and reads as zeros.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.tools.console import results

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
_KINDS = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.int64": "I64"}


def write_sparse(directory: Path, dtype: str = "fp16", shard_bytes: int = SHARD_BYTES, *, original: bool = True) -> int:
    """Write the shards and their index; returns the bytes they seem to hold.

    ``dtype`` is fp32, fp16 or bf16; a shard holds at most ``shard_bytes`` of data, but one tensor at least.
    ``original`` says whether names and shapes are those of the hub's files, or those of the model in memory: experts
    that files keep apart are stacked there.
    """
    tensors = list_tensors(directory, dtype, original)
    shards = list(_fill(tensors, shard_bytes))
    places: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        total += _write_shard(directory / file, {name: tensors[name] for name in names})
        places |= dict.fromkeys(names, file)
    size = sum(_bytes(tensor) for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2))
    return total


def list_tensors(directory: Path, dtype: str, original: bool = True) -> dict[str, Any]:
    """The model's tensors on the ``meta`` device, by the names and in the shapes the hub's files or the model have."""
    from transformers.core_model_loading import revert_weight_conversion

    from secateur.compiler.pipeline import build_meta_model, read_source

    model: Any = build_meta_model(read_source(directory), dtype)
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return dict(sorted((revert_weight_conversion(model, state) if original else state).items()))


def _fill(tensors: Mapping[str, Any], shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, tensor in tensors.items():
        if names and held + _bytes(tensor) > shard_bytes:
            yield names
            names, held = [], 0
        names.append(name)
        held += _bytes(tensor)
    yield names


def _write_shard(path: Path, tensors: Mapping[str, Any]) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + _bytes(tensor)
        kind = _KINDS[str(tensor.dtype)]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return 8 + len(text) + end


def _bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m secateur.tools.bench.sparse_checkpoint", description=__doc__)
    parser.add_argument("directory", type=Path, help="where config.json lies and the shards go")
    parser.add_argument("--dtype", default="fp16", choices=("fp32", "fp16", "bf16"))
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES)
    parser.add_argument(
        "--in-memory", action="store_true", help="names and shapes of the model, not of the hub's files"
    )
    chosen = parser.parse_args(arguments)
    size = write_sparse(chosen.directory, chosen.dtype, chosen.shard_bytes, original=not chosen.in_memory)
    results.print(f"{chosen.directory}: {size / 2**30:.2f} GiB of holes")


if __name__ == "__main__":
    main()
