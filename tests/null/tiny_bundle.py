"""A bundle of a few plain nodes and two GroupQueryAttention layers, and the same model in NumPy.

Images of 8x8 make four patches of 4x4; a vision-side stage keeps ``features_per_image`` of them, a decoder-side
stage keeps half of those before layer 1. Tokens are bytes. Weights are random and drawn with a fixed seed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from secateur.runtime import schema
from secateur.runtime.manifest import file_entry, write_manifest

WIDTH, HEADS, HEAD = 16, 2, 8
PATCHES, PATCH = 4, 48
VOCAB = 260
PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
ONNX_TYPES = {"fp32": TensorProto.FLOAT, "int64": TensorProto.INT64}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True)
class Tiny:
    """What to build."""

    batch: int = 1
    images: int = 1
    text_tokens: int = 24
    new_tokens: int = 8
    features_per_image: int = 3
    position_offset: int = 0
    nan: bool = False
    original: bool = True
    """Whether prefill takes ``kept``."""

    @property
    def features(self) -> int:
        return self.images * self.features_per_image

    @property
    def left(self) -> int:
        return max(1, self.features // 2)

    @property
    def sequence(self) -> int:
        return self.text_tokens + self.features

    @property
    def removed(self) -> int:
        return self.features - self.left

    @property
    def capacities(self) -> tuple[int, int]:
        return self.sequence + self.new_tokens, self.sequence - self.removed + self.new_tokens


def weights(tiny: Tiny) -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)

    def draw(*shape: int, scale: float) -> np.ndarray:
        return (random.standard_normal(shape) * scale).astype(np.float32)

    found = {"patch": draw(PATCH, WIDTH, scale=0.3), "embed": draw(VOCAB, WIDTH, scale=1.0)}
    found["place"] = draw(256, WIDTH, scale=0.7)
    for layer in range(2):
        for name, size in (("q", WIDTH), ("k", HEAD), ("v", HEAD)):
            found[f"{name}.{layer}"] = draw(WIDTH, size, scale=0.5)
        found[f"o.{layer}"] = draw(WIDTH, WIDTH, scale=0.5)
    found["head"] = draw(WIDTH, VOCAB, scale=1.0)
    if tiny.nan:
        found["head"][0, 5] = np.nan
    return found


class Graph:
    """Collects nodes; every method returns the name of its output."""

    def __init__(self, names: set[str]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.used: set[str] = set()
        self._weights = names

    def __call__(self, op: str, *inputs: str, out: str | None = None, **attributes: object) -> str:
        name = out or f"t{len(self.nodes)}"
        self.used |= self._weights & set(inputs)
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def const(self, value: object, dtype: type = np.int64) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(np.array(value, dtype=dtype), name))
        return name

    def gather_rows(self, rows: str, indices: str) -> str:
        """rows [B,N,D] at indices [B,K]."""
        return self("GatherND", rows, self("Unsqueeze", indices, self.const([2])), batch_dims=1)

    def sorted_top(self, scores: str, count: int) -> str:
        """Indices of the ``count`` largest along axis 1, ascending."""
        names = [f"{kind}{len(self.nodes)}" for kind in ("u", "v", "x", "y")]
        for (source, largest), out in zip(((scores, 1), (names[1], 0)), (names[:2], names[2:]), strict=True):
            self.nodes.append(helper.make_node("TopK", [source, self.const([count])], out, largest=largest))
        return names[2]

    def attention(self, layer: int, rows: str, last: str, total: str) -> str:
        out = f"a{len(self.nodes)}"
        q, k, v = (self("MatMul", rows, f"{name}.{layer}") for name in "qkv")
        self.nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [q, k, v, f"past_key.{layer}", f"past_value.{layer}", last, total],
                [out, f"present_key.{layer}", f"present_value.{layer}"],
                domain="com.microsoft",
                num_heads=HEADS,
                kv_num_heads=1,
            )
        )
        return self("Add", rows, self("MatMul", out, f"o.{layer}"))


def vision_graph(g: Graph, t: Tiny) -> None:
    split = g("Reshape", "pixel_values", g.const([t.batch * t.images, 3, 2, 4, 2, 4]))
    patches = g("Reshape", g("Transpose", split, perm=[0, 2, 4, 1, 3, 5]), g.const([0, PATCHES, PATCH]))
    rows = g("MatMul", patches, "patch")
    keep = g.sorted_top(g("ReduceSum", rows, g.const([2]), keepdims=0), t.features_per_image)
    g("Reshape", g.gather_rows(rows, keep), g.const([t.batch, t.features, WIDTH]), out="features")
    offsets = g.const([[PATCHES * (i % t.images)] for i in range(t.batch * t.images)])
    g("Reshape", g("Add", keep, offsets), g.const([t.batch, t.features]), out="kept.stage0")


def prefill_graph(g: Graph, t: Tiny) -> None:
    image = g("Equal", "input_ids", g.const(IMAGE))
    rank = g("Sub", g("CumSum", g("Cast", image, to=TensorProto.INT64), g.const(1)), g.const(1))
    rank = g("Clip", rank, g.const(0), g.const(t.features - 1))
    marked = g("Add", "features", g("Gather", "place", "kept")) if t.original else "features"
    rows = g(
        "Where", g("Unsqueeze", image, g.const([2])), g.gather_rows(marked, rank), g("Gather", "embed", "input_ids")
    )
    rows = g("Add", rows, g("Gather", "place", g.const(np.arange(t.sequence))))
    last = g("Cast", g("Sub", "lengths", g.const(1)), to=TensorProto.INT32)
    rows = g.attention(0, rows, last, g.const(t.sequence, np.int32))
    kept = g("Identity", g.sorted_top(g("ReduceSum", "features", g.const([2]), keepdims=0), t.left), out="kept.stage1")
    match = g("Equal", g("Unsqueeze", rank, g.const([2])), g("Unsqueeze", kept, g.const([1])))
    chosen = g("ReduceMax", g("Cast", match, to=TensorProto.INT64), g.const([2]), keepdims=0)
    stays = g("Where", image, chosen, g.const(1))
    order = g("Sub", g("Mul", stays, g.const(10_000)), g.const(np.arange(t.sequence)))
    rows = g.gather_rows(rows, g.sorted_top(order, t.sequence - t.removed))
    last = g("Sub", last, g.const(t.removed, np.int32))
    rows = g.attention(1, rows, last, g.const(t.sequence - t.removed, np.int32))
    final = g("GatherND", rows, g("Unsqueeze", g("Cast", last, to=TensorProto.INT64), g.const([1])), batch_dims=1)
    g("MatMul", final, "head", out="logits")


def decode_graph(g: Graph, t: Tiny) -> None:
    place = g("Unsqueeze", g("Gather", "place", "position"), g.const([1]))
    rows = g("Add", g("Gather", "embed", "input_ids"), place)
    for layer in range(2):
        slot = g("Cast", f"slot.s{layer}", to=TensorProto.INT32)
        total = g("Add", g("ReduceMax", slot, keepdims=0), g.const(1, np.int32))
        rows = g.attention(layer, rows, slot, total)
    g("MatMul", g("Squeeze", rows, g.const([1])), "head", out="logits")


def ports(t: Tiny) -> dict[str, tuple[list[schema.Port], list[schema.Port]]]:
    def port(name: str, *shape: int, dtype: str = "int64") -> schema.Port:
        return schema.Port(name=name, dtype=dtype, shape=list(shape))

    def caches(when: str) -> list[schema.Port]:
        return [
            port(f"{when}_{kind}.{layer}", t.batch, 1, t.capacities[layer], HEAD, dtype="fp32")
            for layer in range(2)
            for kind in ("key", "value")
        ]

    features = port("features", t.batch, t.features, WIDTH, dtype="fp32")
    logits = port("logits", t.batch, VOCAB, dtype="fp32")
    return {
        "vision": (
            [port("pixel_values", t.batch * t.images, 3, 8, 8, dtype="fp32")],
            [features, port("kept.stage0", t.batch, t.features)],
        ),
        "prefill": (
            [
                port("input_ids", t.batch, t.sequence),
                port("lengths", t.batch),
                features,
                *([port("kept", t.batch, t.features)] if t.original else []),
                *caches("past"),
            ],
            [logits, port("kept.stage1", t.batch, t.left), *caches("present")],
        ),
        "decode": (
            [
                port("input_ids", t.batch, 1),
                port("position", t.batch),
                port("slot.s0", t.batch),
                port("slot.s1", t.batch),
                *caches("past"),
            ],
            [logits, *caches("present")],
        ),
    }


def write_weights(path: Path, tensors: dict[str, np.ndarray]) -> dict[str, tuple[int, int]]:
    """A safetensors file; returns where each tensor's bytes lie in it."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(t.tobytes() for t in tensors.values()))
    return {name: (8 + len(text) + e["data_offsets"][0], tensors[name].nbytes) for name, e in header.items()}


def external(name: str, tensor: np.ndarray, place: tuple[int, int]) -> onnx.TensorProto:
    proto = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT, dims=tensor.shape)
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights.safetensors"), ("offset", place[0]), ("length", place[1])):
        proto.external_data.add(key=key, value=str(value))
    return proto


def write_tokenizer(directory: Path) -> None:
    names = ["<pad>", "<s>", "</s>", "<image>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names + letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.add_special_tokens(names)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": {"content": "<pad>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    pixels = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 8}, "crop_size": 8}
    (directory / "preprocessor_config.json").write_text(json.dumps(pixels))
    (directory / "generation_config.json").write_text("{}")


def build(directory: Path, tiny: Tiny | None = None) -> Path:
    """Write the whole bundle."""
    t = tiny or Tiny()
    directory.mkdir(parents=True)
    tensors = weights(t)
    places = write_weights(directory / "weights.safetensors", tensors)
    programs = {}
    for name, fill in (("vision", vision_graph), ("prefill", prefill_graph), ("decode", decode_graph)):
        g = Graph(set(tensors))
        for layer in range(2):
            g.used |= set() if name == "vision" else {f"{w}.{layer}" for w in "qkvo"}
        fill(g, t)
        inputs, outputs = ports(t)[name]
        infos = [
            [helper.make_tensor_value_info(p.name, ONNX_TYPES[p.dtype], p.shape) for p in s] for s in (inputs, outputs)
        ]
        initializers = [external(n, tensors[n], places[n]) for n in sorted(g.used)] + g.constants
        graph = helper.make_graph(g.nodes, name, *infos, initializers)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), directory / f"{name}.onnx")
        programs[name] = schema.Program(
            graph=f"{name}.onnx", inputs=inputs, outputs=outputs, flops=1000, unpruned_flops=2000
        )
    write_tokenizer(directory)
    write_manifest(directory, manifest(t, directory, programs))
    return directory


def manifest(t: Tiny, directory: Path, programs: dict[str, schema.Program]) -> schema.Manifest:
    stage = {"score": "mass()", "select": "top_k()", "scope": "image"}
    lengths = (t.sequence, t.sequence - t.removed)
    return schema.Manifest(
        secateur="0.1.0",
        model=schema.Model(
            family="tiny", model_type="tiny", architecture="Tiny", source="tiny", config_sha256="0" * 64, layers=2,
            hidden_size=WIDTH, vocab_size=VOCAB, kv_heads=1, head_dim=HEAD, image_token="<image>", image_token_id=IMAGE,
            bos_token_id=BOS, eos_token_ids=[EOS], pad_token_id=PAD,
        ),
        recipe=schema.Recipe(
            name="tiny", title="Tiny", link="https://example.org", keep=0.5, positions="compact", sha256="0" * 64,
            stages=[
                schema.Stage(name="stage0", site="projector.out", groups=t.images, length_in=PATCHES,
                             length_out=t.features_per_image, **stage),
                schema.Stage(name="stage1", site="decoder.layer[1]", groups=1, length_in=t.features,
                             length_out=t.left, **stage),
            ],
        ),
        geometry=schema.GeometrySizes(
            batch=t.batch, images=t.images, text_tokens=t.text_tokens, new_tokens=t.new_tokens, image_height=8,
            image_width=8, tokens_per_image=PATCHES, features_per_image=t.features_per_image, sequence=t.sequence,
        ),
        target="onnxruntime", dialect="onnxruntime", dtype="fp32", opset=20, programs=programs,
        segments=[
            schema.Segment(name=f"s{i}", first_layer=i, last_layer=i + 1, length=lengths[i],
                           capacity=t.capacities[i], removed=i * t.removed)
            for i in range(2)
        ],
        position_offset=t.position_offset, versions={"onnx": "1"}, weights=["weights.safetensors"],
        files={p.name: file_entry(p) for p in sorted(directory.iterdir())},
    )  # fmt: skip


def resign(directory: Path, **changes: object) -> None:
    """Change fields of the manifest (dotted path -> value) and sign it again, as a hostile author could."""
    from secateur.runtime.manifest import _digest

    path = directory / "manifest.json"
    raw = json.loads(path.read_text())
    raw.pop("manifest_sha256")
    for key, value in changes.items():
        place = raw
        *parents, last = key.split("__")
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(json.dumps({**raw, "manifest_sha256": _digest(raw)}))


def relist(directory: Path) -> None:
    """Take the files as they are now into the manifest."""
    paths = [p for p in sorted(directory.rglob("*")) if p.is_file() and p.name != "manifest.json"]
    resign(directory, files={p.relative_to(directory).as_posix(): file_entry(p).model_dump() for p in paths})


class Reference:
    """The same model for one row, token by token, with no caches of fixed size."""

    def __init__(self, t: Tiny) -> None:
        self.t, self.w = t, weights(t)
        self.keys: list[np.ndarray] = [np.zeros((0, HEAD))] * 2
        self.values: list[np.ndarray] = [np.zeros((0, HEAD))] * 2
        self.kept: dict[str, np.ndarray] = {}

    def prefill(self, ids: list[int], pixels: np.ndarray) -> np.ndarray:
        """ids with one placeholder per feature, pixels [n,3,8,8] -> logits [vocab]."""
        w, t = self.w, self.t
        features, kept = [], []
        for j, image in enumerate(pixels):
            tiles = [image[:, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].reshape(-1) for r in range(2) for c in range(2)]
            rows = np.array(tiles) @ w["patch"]
            best = np.sort(np.argsort(-rows.sum(-1), kind="stable")[: t.features_per_image])
            features.append(rows[best])
            kept.append(best + PATCHES * j)
        feature, self.kept["stage0"] = np.concatenate(features), np.concatenate(kept)
        best = np.sort(np.argsort(-feature.sum(-1), kind="stable")[: t.left])
        self.kept["stage1"] = self.kept["stage0"][best]
        rows, stays, rank = [], [], 0
        for place, token in enumerate(ids):
            if token == IMAGE:
                rows.append(feature[rank] + w["place"][self.kept["stage0"][rank]])
                stays.append(rank in best)
                rank += 1
            else:
                rows.append(w["embed"][token])
                stays.append(True)
            rows[-1] = rows[-1] + w["place"][place]
        self.length = len(ids)
        x = self._layer(0, np.array(rows))
        return self._layer(1, x[np.array(stays)])[-1] @ w["head"]

    def decode(self, token: int, step: int) -> np.ndarray:
        place = self.length + self.t.position_offset + step
        x = (self.w["embed"][token] + self.w["place"][place])[None]
        return self._layer(1, self._layer(0, x))[-1] @ self.w["head"]

    def greedy(self, ids: list[int], pixels: np.ndarray, count: int) -> list[int]:
        logits, tokens = self.prefill(ids, pixels), []
        for step in range(count):
            tokens.append(int(np.argmax(logits)))
            if step + 1 < count:
                logits = self.decode(tokens[-1], step)
        return tokens

    def _layer(self, layer: int, x: np.ndarray) -> np.ndarray:
        w, old = self.w, len(self.keys[layer])
        self.keys[layer] = np.concatenate([self.keys[layer], x @ w[f"k.{layer}"]])
        self.values[layer] = np.concatenate([self.values[layer], x @ w[f"v.{layer}"]])
        queries = (x @ w[f"q.{layer}"]).reshape(len(x), HEADS, HEAD)
        out = np.zeros((len(x), HEADS, HEAD))
        for i in range(len(x)):
            seen = old + i + 1
            scores = queries[i] @ self.keys[layer][:seen].T / np.sqrt(HEAD)
            share = np.exp(scores - scores.max(-1, keepdims=True))
            out[i] = share / share.sum(-1, keepdims=True) @ self.values[layer][:seen]
        return x + out.reshape(len(x), WIDTH) @ w[f"o.{layer}"]
