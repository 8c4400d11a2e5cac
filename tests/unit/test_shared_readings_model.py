"""What the oracle shows a stage of a whole model, against the readings of what transformers itself computes.

The readings get layers' projections by their own arithmetic, and agree with the attention maps that transformers
returns of its plain ("eager") attention. So a wrong layer, projection, scale, mask or window shows wherever it is made.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur.compiler.bundle import outline
from secateur.compiler.compose import compose
from secateur.compiler.inputs import random_rows
from secateur.compiler.oracle import Oracle, RowRun
from secateur.compiler.parity import Parity, compare_runs
from secateur.compiler.pipeline import Geometry, Recipe, plan_job, prune, read_source
from secateur.compiler.recipe import Part, Site, Stage, Term
from secateur.compiler.runs import CompiledRun, EagerBackend, OracleRun, Weights
from secateur.passes.methods import own
from secateur.passes.methods.rows import Scored
from secateur.passes.signal_table import SIGNALS
from secateur.runtime.request import Request

from . import tiny_gemma3, tiny_model
from .own_words import forget_own
from .signal_readings import DECODER, TOWER, Array, Heads, Picture, Row, logits_of, softmax

SITES = ("vision.layer", "vision.out", "projector.out", "decoder.layer")
ATTENTION = ("received_attention", "self_attention", "last_query_attention", "text_attention",
             "text_to_text_attention", "text_rows", "slots", "real_slots")  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _vocabulary() -> Iterator[None]:
    """Scores that ask for every signal of a site, and one that tells later stages something of its own."""
    for kind, few in itertools.product(SITES, (False, True)):

        def ask(tokens: Tensor, **given: Tensor) -> Tensor:
            return tokens.sum(-1)

        names = ["tokens", *(n for n in asked_at(kind) if n != "tokens" and (not few or n in ATTENTION))]
        wanted = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, annotation=Tensor) for n in names]
        ask.__signature__ = inspect.Signature(wanted)  # type: ignore[attr-defined]
        ask.__annotations__ = dict.fromkeys(names, Tensor)
        ask.__name__ = ask_word(kind, few)
        own.score(ask)

    @own.score
    def tell(tokens: Tensor, carried: Tensor | None = None) -> Scored:
        score = tokens[..., 0] + (0.0 if carried is None else 2.0 * carried)
        return Scored(score, tokens[..., 1])

    @own.score
    def weigh(tokens: Tensor, size: Tensor, source: Tensor) -> Tensor:
        return tokens[..., 0] + size + torch.cos(source.float())

    @own.score
    def listen(tokens: Tensor, carried: Tensor | None = None) -> Tensor:
        return tokens[..., 2] if carried is None else tokens[..., 2] - 3.0 * carried

    yield
    forget_own()


def ask_word(kind: str, few: bool) -> str:
    return f"ask_{kind.replace('.', '_')}{'_few' * few}"


def asked_at(kind: str) -> list[str]:
    return [name for name, signal in SIGNALS.items() if kind in signal.sites and name != "carried"]


def ask(site: Site, few: bool = False, **options: Any) -> Recipe:
    """Every signal of a site but what earlier stages tell, with ``options`` as far as it has them."""
    signals = {name: {o: v for o, v in options.items() if o in SIGNALS[name].options} for name in asked_at(site.kind)
               if not few or name in ATTENTION}  # fmt: skip
    stage = Stage(
        site, Term("top_k"), Term(ask_word(site.kind, few)), share=0.5, signals={n: o for n, o in signals.items() if o}
    )
    return Recipe("asks", "asks", "", (stage,))


def shown(path: Path, recipe: Recipe, ids: Sequence[int], pixels: Tensor) -> dict[str, Tensor]:
    job = plan_job(read_source(path), Geometry(images=len(pixels), text_tokens=24, new_tokens=4), recipe, 0.5)
    return Oracle(job).run(ids, pixels, keep_signals=True).signals["stage0"]


def agree(found: Tensor, want: Array) -> None:
    assert tuple(found.shape) == want.shape
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-4, atol=2e-5)


# -- in the decoder ---------------------------------------------------------------------------------------


class Seen:
    """What transformers computes of a row with its eager attention: ``streams`` before every layer and ``maps`` of
    attention of every layer."""

    def __init__(self, path: Path, ids: Sequence[int], pixels: Tensor, image: int, blocks: bool) -> None:
        from transformers import AutoModelForImageTextToText

        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.decoder = self.model.model.language_model
        self.tower = self.model.model.vision_tower
        self.ids, self.image, self.blocks = torch.tensor([list(ids)]), image, blocks
        self.tower_inputs: list[Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(lambda module, args: self.tower_inputs.append(args[0]))
            for layer in self.tower_layers
        ]
        with torch.no_grad():
            # Processors of models whose images are blocks say which tokens are images'.
            kinds = {"token_type_ids": (self.ids == image).long()} if blocks else {}
            out = self.model(self.ids, pixel_values=pixels, output_attentions=True, output_hidden_states=True, **kinds)
        for hook in hooks:
            hook.remove()
        self.streams, self.maps = out.hidden_states, out.attentions

    @property
    def tower_layers(self) -> list[Any]:
        return list(getattr(self.tower, "vision_model", self.tower).encoder.layers)

    @torch.no_grad()
    def heads(self, number: int, stream: Tensor) -> Heads:
        """Projections of a decoder layer of a stream ``[1,L,D]`` at its input, by the layer's own weights."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        layer = self.decoder.layers[number]
        attention, normed = layer.self_attn, layer.input_layernorm(stream)
        places = torch.arange(stream.shape[1])[None]
        kind = [attention.layer_type] if getattr(attention, "layer_type", None) else []
        tables = self.decoder.rotary_emb(stream, places, *kind)
        query, key, value = (
            getattr(attention, f"{part}_proj")(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for part in "qkv"
        )
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        turned = apply_rotary_pos_emb(query, key, *tables)
        window = getattr(attention, "sliding_window", None)
        each = [part[0].double().numpy() for part in (*turned, value, query, key)]
        scale = getattr(attention.config, "query_pre_attn_scalar", attention.head_dim) ** -0.5
        return Heads(*each, scale, window)

    @torch.no_grad()
    def row(self, site: int) -> Row:
        """The whole row before layer ``site``."""
        stream, before = self.streams[site], self.streams[site - 1]
        layer = self.decoder.layers[site - 1]
        flags = (self.ids[0] == self.image).numpy()
        heads = {
            "previous": self.heads(site - 1, before),
            "own": self.heads(site - 1, stream),
            "next": self.heads(site, stream),
        }
        inputs, outputs = self.branches(layer, before, self.maps[site - 1][0].double().numpy(), heads["previous"])
        count, length = int(flags.sum()), len(flags)
        numbers = np.where(flags, np.cumsum(np.diff(flags, prepend=False) & flags) - 1, -1) if self.blocks else None
        double = [part[0].double().numpy() for part in (stream, self.decoder.norm(stream))]
        return Row(
            *double, inputs, outputs, heads, flags, flags, length - 1, count, np.ones(count), np.arange(count),
            np.zeros(count), np.arange(length), numbers,
        )  # fmt: skip

    def branches(self, layer: Any, before: Tensor, paid: Array, heads: Heads) -> tuple[Array, Array]:
        """What a layer's attention and MLP read, and what they add to the stream ``before`` it: ``[2,L,D]`` each."""
        groups = len(heads.query) // len(heads.value)
        gathered = np.concatenate([paid[head] @ heads.value[head // groups] for head in range(len(paid))], axis=1)
        attended = layer.self_attn.o_proj(torch.from_numpy(gathered).float())[None]
        read = layer.input_layernorm(before)
        if hasattr(layer, "post_feedforward_layernorm"):
            added = layer.post_attention_layernorm(attended)
            inner = layer.pre_feedforward_layernorm(before + added)
            made = layer.post_feedforward_layernorm(layer.mlp(inner))
        else:
            added, inner = attended, layer.post_attention_layernorm(before + attended)
            made = layer.mlp(inner)
        parts = [torch.cat(pair)[None] for pair in ((read, inner), (added, made))]
        return parts[0][0].double().numpy(), parts[1][0].double().numpy()


def write_ids(image: int, per_image: int) -> list[int]:
    text = [7, 9, 12, 15, 8, 21, 33, 6, 10, 11]
    return [*text[:2], *[image] * per_image, *text[2:4], *[image] * per_image, *text[4:]]


LLAVA_IDS = write_ids(tiny_model.IMAGE, tiny_model.PATCHES)


@pytest.fixture(scope="module")
def llava(model_dir: Callable[..., Path]) -> tuple[Path, Seen, Tensor]:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    path = model_dir("llama")
    return path, Seen(path, LLAVA_IDS, pixels, tiny_model.IMAGE, False), pixels


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen, Tensor]:
    """Layers 0, 1 and 3 attend through a window of twelve; images are blocks."""
    path = tiny_gemma3.write_model(tmp_path_factory.mktemp("gemma3") / "model", text={"sliding_window": 12})
    pixels = torch.randn(2, 3, tiny_gemma3.SIDE, tiny_gemma3.SIDE, generator=torch.Generator().manual_seed(0))
    ids = write_ids(tiny_gemma3.SOFT, tiny_gemma3.UNITS)
    return path, Seen(path, ids, pixels, tiny_gemma3.SOFT, True), pixels


DECODER_OPTIONS: list[dict[str, Any]] = [
    {"projections": "previous", "rotary": "applied", "softmax": "full", "which": "question"},
    {"projections": "next", "rotary": "none", "softmax": "none", "which": "all"},
    {"projections": "own", "rotary": "none", "softmax": "full", "which": "question"},
    {"projections": "own", "rotary": "applied", "softmax": "none", "which": "all"},
]


def hold(found: Mapping[str, Tensor], row: Row, options: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        given = {option: options[option] for option in SIGNALS[name].options if option in options}
        agree(found[name], np.stack([DECODER[name](row, group, 2, given) for group in range(2)]))


@pytest.mark.parametrize("options", DECODER_OPTIONS, ids=lambda options: "-".join(options.values()))
def test_signals_in_the_decoder_are_those_of_transformers(
    options: dict[str, Any], llava: tuple[Path, Seen, Tensor]
) -> None:
    path, seen, pixels = llava
    row = seen.row(2)
    hold(shown(path, ask(Site("decoder.layer", 2), **options), LLAVA_IDS, pixels), row, options,
         asked_at("decoder.layer"))  # fmt: skip


@pytest.mark.parametrize("site", [1, 2, 3])
@pytest.mark.parametrize("projections", ["previous", "next"])
def test_signals_through_windows_and_blocks_are_those_of_transformers(
    site: int, projections: str, gemma: tuple[Path, Seen, Tensor]
) -> None:
    """Of layers with a window (0, 1 and 3) and without (2)."""
    path, seen, pixels = gemma
    options = {"projections": projections, "softmax": "full", "which": "question"}
    recipe = ask(Site("decoder.layer", site), True, projections=projections)
    hold(shown(path, recipe, seen.ids[0].tolist(), pixels), seen.row(site), options, ATTENTION)


@pytest.mark.parametrize("model", ["llava", "gemma"])
def test_readings_attend_as_transformers_does(model: str, request: pytest.FixtureRequest) -> None:
    _, seen, _ = request.getfixturevalue(model)
    windows = set()
    for site in (1, 2, 3):
        row = seen.row(site)
        for where, layer in (("previous", site - 1), ("next", site)):
            paid = softmax(logits_of(row, row.heads[where]))
            np.testing.assert_allclose(paid, seen.maps[layer][0].numpy(), rtol=1e-4, atol=2e-5)
            windows.add(row.heads[where].window)
        # The stream behind a layer is what was before it and what its branches add.
        whole = seen.streams[site - 1][0].numpy() + row.branch_outputs.sum(0)
        np.testing.assert_allclose(whole, row.hidden, rtol=1e-4, atol=1e-4)
    assert windows == ({None} if model == "llava" else {None, 12})


# -- in the tower -----------------------------------------------------------------------------------------


def tower_heads(seen: Seen, number: int, image: int) -> Heads:
    layer = seen.tower_layers[number]
    attention = layer.self_attn
    with torch.no_grad():
        normed = layer.layer_norm1(seen.tower_inputs[number][image])
        query, key, value = (
            getattr(attention, f"{part}_proj")(normed).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
            for part in "qkv"
        )
    each = [part.double().numpy() for part in (query, key, value, query, key)]
    return Heads(*each, query.shape[-1] ** -0.5)


def pictures(seen: Seen, tokens: Tensor) -> list[Picture]:
    """Both images of a row, with ``tokens [2,N,D]`` at the site."""
    count = tokens.shape[1]

    def project(rows: Array) -> Array:
        with torch.no_grad():
            made: Tensor = seen.model.model.multi_modal_projector(torch.from_numpy(rows).float())
        return made.double().numpy()

    read = seen.tower_inputs[2][:, 1:]  # the projector reads the output of the last layer but one
    return [
        Picture(
            tokens[at].double().numpy(), {layer: tower_heads(seen, layer, at) for layer in range(3)}, True,
            np.eye(count), range(count), np.ones(count), np.arange(count), np.zeros(count),
            read[at].double().numpy(), project,
        )
        for at in range(2)
    ]  # fmt: skip


def stream_at(seen: Seen, site: Site) -> Tensor:
    if site.kind == "vision.layer":
        return seen.tower_inputs[site.layer or 0][:, 1:]
    read = seen.tower_inputs[2][:, 1:]
    with torch.no_grad():
        return read if site.kind == "vision.out" else seen.model.model.multi_modal_projector(read)  # type: ignore[no-any-return]


TOWER_CASES: list[tuple[Site, dict[str, Any], dict[str, tuple[int, ...]]]] = [
    # The tower has three layers, of which the projector reads the second's output.
    (Site("vision.layer", 1), {}, {"layer": (0,)}),
    (Site("vision.layer", 1), {"heads": "joint"}, {"layer": (0,)}),
    (Site("vision.out"), {}, {"layer": (1,), "layers": (1,)}),
    (Site("vision.out"), {"layer": "next", "heads": "joint", "layers": ["0", "next"]},
     {"layer": (2,), "layers": (0, 2)}),
    (Site("vision.out"), {"layer": "1/24", "layers": ["read", "1/24", "3/24"]}, {"layer": (0,), "layers": (0, 1)}),
    (Site("projector.out"), {"layer": "12/24", "layers": ["20/24"], "directions": 3, "seed": 4, "step": 0.02},
     {"layer": (1,), "layers": (1,)}),
]  # fmt: skip
"""Published layers scale as sites do, and none behind the one that is read; those that fall together count once."""


@pytest.mark.parametrize(("site", "options", "layers"), TOWER_CASES, ids=lambda part: str(part)[:40])
def test_signals_of_the_tower_are_those_of_transformers(
    site: Site, options: dict[str, Any], layers: dict[str, tuple[int, ...]], llava: tuple[Path, Seen, Tensor]
) -> None:
    path, seen, pixels = llava
    # Half of the tokens of each image reach the decoder.
    found = shown(path, ask(site, **options), write_ids(tiny_model.IMAGE, tiny_model.PATCHES // 2), pixels)
    images = pictures(seen, stream_at(seen, site))
    for name in asked_at(site.kind):
        read = layers.get("layers" if name.endswith("_layers") else "layer", ())
        given = {option: options[option] for option in SIGNALS[name].options if option in options}
        want = np.stack([TOWER[name](image, read, given) for image in images])
        if name == "probe_slopes":
            np.testing.assert_allclose(found[name].numpy(), want, rtol=0, atol=5e-4)
        else:
            agree(found[name], want)


def test_features_are_those_of_transformers(llava: tuple[Path, Seen, Tensor]) -> None:
    path, seen, pixels = llava
    nothing = Recipe("none", "none", "", ())
    job = plan_job(read_source(path), Geometry(images=2, text_tokens=24, new_tokens=4), nothing, None)
    with torch.no_grad():
        want = torch.cat(list(seen.model.model.get_image_features(pixel_values=pixels).pooler_output))
    found = Oracle(job).run(LLAVA_IDS, pixels)
    agree(found.features, want.numpy())


def test_what_is_projected_inside_a_projector_is_what_leaves_it(gemma: tuple[Path, Seen, Tensor]) -> None:
    """Where the module that reads one row per token lies inside the projector."""
    path, seen, pixels = gemma
    family = read_source(path).family
    assert family.project is not None
    projector, inner = (seen.model.get_submodule(name) for name in (family.projector, family.tower.entry))
    entering: list[Tensor] = []
    hook = inner.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    with torch.no_grad():
        want = projector(seen.tower(pixels).last_hidden_state)
        hook.remove()
        agree(family.project(projector, entering[0]), want.numpy())


def test_readings_of_the_tower_attend_as_transformers_does(llava: tuple[Path, Seen, Tensor]) -> None:
    _, seen, pixels = llava
    with torch.no_grad():
        maps = seen.tower(pixels, output_attentions=True).attentions
    image = pictures(seen, seen.tower_inputs[1][:, 1:])[1]
    for layer in range(3):
        np.testing.assert_allclose(image.attention(layer), maps[layer][1].numpy(), rtol=1e-4, atol=1e-5)


# -- what stages tell later ones --------------------------------------------------------------------------


def stage(site: str, share: float, score: str | None, **more: Any) -> Stage:
    return Stage(Site.parse(site), more.pop("select", Term("top_k")), score and Term(score), share=share, **more)


PAIRS = {"select": Term("bipartite_tokens"), "merge": Term("merge_assigned")}


def row(name: str, *stages: Stage) -> Recipe:
    return Recipe(name, name, "", stages)


TOLD: dict[str, Recipe] = {
    "over both sides": row(
        "told",
        stage("vision.layer[1]", 0.8, "tell"),
        stage("vision.out", 0.7, "listen"),
        stage("decoder.layer[1]", 0.5, "tell"),
        stage("decoder.layer[2]", 0.4, None, select=Term("bipartite_tokens")),
        stage("decoder.layer[3]", 0.2, "listen"),
    ),
    "parts inside the decoder": compose(
        "two",
        [
            Part(row("a", stage("vision.out", 0.8, "tell"), stage("decoder.layer[1]", 0.7, "listen")), 0.7),
            Part(row("b", stage("decoder.layer[2]", 0.6, "listen"), stage("decoder.layer[3]", 0.5, "listen")), 0.5),
        ],
    ),
    "parts before the decoder": compose(
        "three",
        [
            Part(row("a", stage("vision.layer[1]", 0.8, "tell")), 0.8),
            Part(row("b", stage("vision.out", 0.8, "listen")), 0.8),
            Part(row("c", stage("decoder.layer[1]", 0.5, "listen")), 0.5),
        ],
    ),
    "a later stage is the first to ask": row(
        "weighed",
        stage("vision.layer[1]", 0.75, None, select=Term("bipartite_tokens")),
        stage("vision.out", 0.5, "weigh"),
    ),
    "merges that a later stage weighs": row(
        "weighed",
        stage("vision.layer[0]", 0.75, None, **PAIRS),
        stage("vision.layer[1]", 0.6, None, **PAIRS),
        stage("vision.out", 0.4, "weigh"),
        stage("decoder.layer[1]", 0.3, None, **PAIRS),
        stage("decoder.layer[2]", 0.2, "weigh"),
    ),
}


def follow(run: RowRun, stages: Sequence[Any]) -> None:
    """What every stage was told, from what those before it kept and said: ``carried`` of its own part, ``source`` and
    ``size`` of its own program."""
    carried: Tensor | None = None
    source = torch.zeros(0)
    part, program, whole = 0, "", 0
    for function in stages:
        planned, seen = function.planned, run.signals[function.planned.name]
        groups, count = planned.groups, planned.length_in
        if planned.part != part:
            carried, part = None, planned.part
        side = "decoder" if planned.site.kind == "decoder.layer" else "vision"
        if side != program:
            source, program, whole = torch.arange(groups * count), side, count
        if "carried" in function.signals:
            assert ("carried" in seen) == (carried is not None)
            assert carried is None or torch.equal(seen["carried"].flatten(), carried)
        if "source" in function.signals:
            starts = torch.arange(groups)[:, None] * whole
            assert torch.equal((seen["source"] + starts).flatten(), source)
        kept = run.kept[planned.name]
        if planned.score is not None:
            own = planned.score.name == "tell"  # what it carries on is not its score
            carried = (seen["tokens"][..., 1] if own else run.score[planned.name]).flatten()
        carried = None if carried is None else carried[kept]
        source = source[kept]


@pytest.mark.parametrize("case", TOLD)
def test_stages_are_told_what_those_before_them_said(case: str, traced: Callable[..., Any]) -> None:
    trace = traced("llama", "fp32", 2, 2)
    pruned = prune(trace, TOLD[case], expose=True)
    oracle = Oracle(pruned.job)
    told = outline(pruned.job, pruned.programs)
    rows = random_rows(told, 2, 2, seed=3)
    for row in rows:
        run = oracle.run(row.input_ids, torch.from_numpy(row.pixel_values), keep_signals=True)
        follow(run, pruned.job.stages)
        check_sizes(run, pruned.job.stages)
    ours = CompiledRun(told, Request(EagerBackend(pruned.programs.programs, Weights(trace.source, trace.model)), told))
    found = Parity()
    compare_runs(ours, OracleRun(oracle), rows, 2, found)
    assert found.passed, found


def check_sizes(run: RowRun, stages: Sequence[Any]) -> None:
    """However tokens were merged, those that are left stand for all that entered their program; where none were, each
    stands for itself."""
    for place, function in enumerate(stages):
        planned = function.planned
        inside = planned.site.kind == "decoder.layer"
        before = [s.planned for s in stages[:place] if (s.planned.site.kind == "decoder.layer") == inside]
        if "size" not in function.signals or not before:
            continue
        size = run.signals[planned.name]["size"]
        if all(one.merge is not None for one in before):
            assert size.sum() == before[0].groups * before[0].length_in
            assert size.max() > 1
        else:
            assert torch.equal(size, torch.ones_like(size))
