"""Runs the three programs of a bundle on ONNX Runtime, from docs/ports.md and the manifest. NumPy and onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

Json = dict[str, Any]
Array = np.ndarray[Any, Any]
TYPES = {"fp32": np.float32, "int64": np.int64, "int32": np.int32, "bool": np.bool_}


class Programs:
    """One geometry of a bundle, and the caches of one request. ``manifest`` is that geometry's."""

    def __init__(self, bundle: Path, manifest: Json) -> None:
        self.manifest, self.sizes = manifest, manifest["geometry"]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.sessions = {
            name: onnxruntime.InferenceSession(
                str(bundle / program["graph"]), options, providers=["CPUExecutionProvider"]
            )
            for name, program in manifest["programs"].items()
        }
        self.held: dict[str, Array] = {}
        """What one program wrote where another reads it: features, caches, and what else has the same name."""

    def encode(self, read: dict[str, Array]) -> Array:
        """``pixel_values``, and ``input_features`` where the bundle hears -> features [B, F, D]."""
        self.written = self._run("vision", read)
        self.kept = np.tile(np.arange(self._count_places()), (self.sizes["batch"], 1))
        self.survivors: dict[str, Array] = {}
        self._follow(self.written, in_decoder=False)
        self.held = dict(self.written)
        return self.written["features"]

    def prefill(self, rows: list[list[int]]) -> Array:
        """Ids of every row without padding -> logits [B, vocab]."""
        ids = np.full((self.sizes["batch"], self.sizes["sequence"]), self.manifest["model"]["pad_token_id"])
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
        self.lengths, self.steps = np.array([len(row) for row in rows]), 0
        self.next = self.lengths + self.manifest["position_offset"]
        feeds = {"input_ids": ids, "lengths": self.lengths, "kept": self.kept}
        if self._reads("prefill", "positions"):
            feeds["positions"], self.next = self._number(rows)
        written = self._run("prefill", feeds)
        self._follow(written, in_decoder=True)
        self.held = written
        return written["logits"]

    def decode(self, tokens: Array) -> Array:
        """One token of every row, [B] -> logits [B, vocab]."""
        feeds = {"input_ids": tokens[:, None], "position": self.next + self.steps}
        for segment in self.manifest["segments"]:
            removed = segment["removed"] + segment["evicted"]
            feeds[f"slot.{segment['name']}"] = self.lengths - removed + self.steps
        self.steps += 1
        self.held |= self._run("decode", feeds)
        return self.held["logits"]

    def _run(self, program: str, feeds: dict[str, Array]) -> dict[str, Array]:
        declared, given = self.manifest["programs"][program], dict[str, Array]()
        for port in declared["inputs"]:
            name = port["name"]
            value = feeds.get(name, self.held.get(name.replace("past_", "present_", 1)))
            if value is None:  # caches before the first token
                value = np.zeros(port["shape"], TYPES[port["dtype"]])
            given[name] = np.ascontiguousarray(value, TYPES[port["dtype"]])
            assert list(given[name].shape) == port["shape"], name
        names = [port["name"] for port in declared["outputs"]]
        return dict(zip(names, self.sessions[program].run(names, given), strict=True))

    def _reads(self, program: str, name: str) -> bool:
        return any(port["name"] == name for port in self.manifest["programs"][program]["inputs"])

    def _count_places(self) -> int:
        """Tokens of a row's media before pruning, rows that no stage removes left out."""
        seen = sum(one["tokens"] for one in self.sizes["sizes"])
        return int(seen or self.sizes["images"] * self.sizes["tokens_per_image"]) + int(self.sizes["audio_tokens"])

    def _follow(self, written: dict[str, Array], in_decoder: bool) -> None:
        """Outputs ``kept.<stage>`` count within what entered the stage: to places among all tokens of the media."""
        for stage in self.manifest["recipe"]["stages"]:
            if stage["site"].startswith("decoder.") != in_decoder or stage["select"] is None:
                continue
            if stage["length_out"] == 0:
                self.kept = self.kept[:, :0]
            else:
                self.kept = np.take_along_axis(self.kept, written[f"kept.{stage['name']}"], axis=1)
            self.survivors[stage["name"]] = self.kept

    def _number(self, rows: list[list[int]]) -> tuple[Array, Array]:
        """``positions`` [B, N], and the position of every row's first new token [B]."""
        media, placeholder = self.manifest["media"], self.manifest["model"]["image_token_id"]
        positions = np.zeros((len(rows), self.sizes["sequence"]), np.int64)
        ends = []
        for number, row in enumerate(rows):
            items, now, reach, slot, last = iter(media["items"]), 0, 0, 0, None
            while slot < len(row):
                if row[slot] == placeholder:
                    last = next(items)
                    positions[number, slot : slot + last["tokens"]] = now
                    reach, now, slot = max(reach, now + last["reach"]), now + last["span"], slot + last["tokens"]
                    continue
                shares = not media["sound_marks_count"]
                before = shares and [row[slot]] == media["sound_before"] and row[slot + 1 : slot + 2] == [placeholder]
                behind = (
                    shares and [row[slot]] == media["sound_behind"] and row[slot - 1] == placeholder
                    and last is not None and last["kind"] == "video with sound"
                )  # fmt: skip
                positions[number, slot] = now - 1 if before else now
                now, slot = now + (not before and not behind), slot + 1
            ends.append(max(now, reach))
        return positions, np.array(ends)
