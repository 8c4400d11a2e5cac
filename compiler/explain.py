"""What a recipe does to a model, in numbers, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from secateur.compiler.flops import count_flops
from secateur.compiler.forecast import Needs
from secateur.compiler.geometry import Geometry
from secateur.compiler.program import ProgramSet
from secateur.compiler.pruned import Pruned
from secateur.passes.stage import StageFunction


@dataclass(frozen=True)
class ExplainedStage:
    """One stage: the functions it calls, the signals they read, and the tokens that come and go, per group."""

    name: str
    site: str
    score: str | None
    select: str | None
    merge: str | None
    signals: Mapping[str, Mapping[str, str]]
    """Options by signal, defaults filled in."""
    scope: str
    groups: int
    length_in: int
    length_out: int

    def __str__(self) -> str:
        terms = [("score", self.score), ("select", self.select), ("merge", self.merge)]
        lines = [f"{self.name} {self.site} scope {self.scope} tokens {self.groups}x{self.length_in} -> "
                 f"{self.groups}x{self.length_out}"]  # fmt: skip
        lines += [f"  {role} {term}" for role, term in terms if term is not None]
        for name, options in self.signals.items():
            chosen = "".join(f" {k}={','.join(v) if isinstance(v, tuple) else v}" for k, v in sorted(options.items()))
            lines.append(f"  signal {name}{chosen}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Change:
    """A quantity of the unpruned model and of the pruned one."""

    before: int
    after: int

    @property
    def ratio(self) -> float:
        """What is left: after / before."""
        return self.after / self.before if self.before else 1.0

    def __str__(self) -> str:
        return f"{self.before} -> {self.after} ({self.ratio:.1%})"


@dataclass(frozen=True)
class Explanation:
    """A recipe planned for a model and a geometry. ``str()`` is stable text, ``as_json()`` plain data."""

    recipe: str
    title: str
    link: str
    evidence: str
    notes: str
    positions: str
    cache: str
    keep: float
    model: str
    dtype: str
    geometry: Geometry
    tokens_per_image: int
    """Visual tokens of one image, padding of its tiles left out, or of one grid of a video, before pruning."""
    grids: int
    """Images of a row, or grids of its video. Images of several sizes count as one grid of all their tokens."""
    image_tokens: tuple[int, ...]
    """Of every image its visual tokens, where they are of several sizes."""
    audio_tokens: int
    """Tokens of a row's sound before pruning."""
    stages: tuple[ExplainedStage, ...]
    visual_tokens: tuple[int, ...]
    """Tokens of one row's media, those that are heard counted in, at each decoder layer; ``geometry.text_tokens`` slots
    of text come on top."""
    cached_tokens: tuple[int, ...]
    """Of those, how many each layer's cache holds when decoding begins."""
    extra_tokens: int
    """Slots of one row for what the family puts behind its images; no stage removes them."""
    flops: Mapping[str, Change]
    """By program, one run of the whole batch; see docs/flops.md."""
    kv_bytes: Change
    """Caches of one request: every layer, whole batch, at the capacity the runtime allocates."""
    forecast: Needs | None = None
    """What a bundle for a target is expected to take, where one was named."""

    @property
    def mean_keep(self) -> float:
        """Tokens of the media averaged over the decoder's layers, as a fraction of the unpruned ones."""
        return sum(self.visual_tokens) / (self.media_tokens * len(self.visual_tokens))

    @property
    def media_tokens(self) -> int:
        """Tokens of one row's media before pruning."""
        return self.tokens_per_image * self.grids + self.audio_tokens

    @property
    def kind(self) -> str:
        """What the media's tokens are called."""
        return "audio-visual" if self.audio_tokens else "visual"

    @property
    def row(self) -> str:
        """What a row holds, in tokens."""
        each = ", ".join(map(str, self.image_tokens))
        grids = f"images of {each}" if each else f"{self.grids} grids of {self.tokens_per_image}"
        seen = f"{self.tokens_per_image * self.grids} visual tokens ({grids})"
        heard = f", {self.audio_tokens} audio tokens" if self.audio_tokens else ""
        return f"{seen}{heard}, {self.geometry.text_tokens} text tokens"

    @property
    def _images(self) -> str:
        each = self.image_tokens
        return f"{len(each)} of {', '.join(map(str, each))}" if each else f"{self.grids} of {self.tokens_per_image}"

    def segments(self) -> list[tuple[int, int, int]]:
        """Runs of layers of one length: (first, last inclusive, visual tokens)."""
        runs: list[tuple[int, int, int]] = []
        for layer, count in enumerate(self.visual_tokens):
            if runs and runs[-1][2] == count:
                runs[-1] = (runs[-1][0], layer, count)
            else:
                runs.append((layer, layer, count))
        return runs

    def as_json(self) -> dict[str, Any]:
        """Plain data; every change carries its ratio, every layer its length."""
        text, extra = self.geometry.text_tokens, self.extra_tokens
        changes = {name: asdict(c) | {"ratio": c.ratio} for name, c in (*self.flops.items(), ("kv", self.kv_bytes))}
        kv_bytes = changes.pop("kv")
        layers = [
            {"layer": i, "visual": n, "text": text, "length": n + text + extra, "cached": held + text + extra}
            for i, (n, held) in enumerate(zip(self.visual_tokens, self.cached_tokens, strict=True))
        ]
        return asdict(replace(self, forecast=None)) | {
            "flops": changes, "kv_bytes": kv_bytes, "layers": layers, "mean_keep": self.mean_keep,
            "forecast": self.forecast.as_json() if self.forecast else None,
        }  # fmt: skip

    def __str__(self) -> str:
        g = self.geometry
        lines = [f"recipe {self.recipe} keep {self.keep:g} mean keep {self.mean_keep:.4g} positions {self.positions}"]
        lines[0] += f" cache {self.cache}" if self.cache != "ragged" else ""
        lines += [f"  {key} {value}" for key, value in self.paper() if value]
        lines.append(
            f"model {self.model} {self.dtype} batch {g.batch} images {self._images} tokens "
            + (f"audio tokens {self.audio_tokens} " if self.audio_tokens else "")
            + f"text tokens {g.text_tokens} new tokens {g.new_tokens}"
        )
        lines += map(str, self.stages)
        extra = f" + {self.extra_tokens} behind the images" if self.extra_tokens else ""
        for first, last, visual in self.segments():
            held = self.cached_tokens[first]
            told = f"; caches keep {held} {self.kind}" if held != visual else ""
            lines.append(f"layers {first}-{last}: {visual} {self.kind} + {g.text_tokens} text{extra}{told}")
        lines += [f"flops {name} {change}" for name, change in self.flops.items()]
        lines.append(f"kv bytes {self.kv_bytes}")
        if self.forecast:
            lines.append(str(self.forecast))
        return "\n".join(lines)

    def paper(self) -> list[tuple[str, str]]:
        """Where the recipe comes from, as (what, text)."""
        return [("title", self.title), ("link", self.link), ("evidence", self.evidence), ("notes", self.notes)]


def describe_pruned(pruned: Pruned, unpruned: Pruned) -> Explanation:
    """Read everything off the pruned programs and those of the same model and geometry without the recipe."""
    job = pruned.job
    recipe, source = job.plan.recipe, job.source
    extra = source.vision.extra_rows * source.vision.items
    grids, tokens = source.vision.images_of_tiles or (source.vision.frames, source.vision.tokens_per_image)
    fixed = job.geometry.text_tokens + extra
    segments = [s for s in pruned.programs.segments for _ in range(s.first_layer, s.last_layer)]
    programs, whole = pruned.programs, unpruned.programs
    return Explanation(
        recipe=recipe.name, title=recipe.title, link=recipe.link, evidence=recipe.evidence, notes=recipe.notes,
        positions=recipe.positions, cache=recipe.cache, keep=float(job.plan.keep),
        model=f"{source.path.resolve().name} ({source.config.model_type}, {source.text.model_type} decoder of "
              f"{source.decoder_layers} layers)",
        dtype=pruned.traced.dtype, geometry=job.geometry, tokens_per_image=tokens, grids=grids,
        audio_tokens=source.audio_tokens,
        image_tokens=tuple(image.tokens_per_image for image in source.vision.images) if source.vision.sizes else (),
        stages=tuple(_describe_stage(s) for s in job.stages), visual_tokens=tuple(s.length - fixed for s in segments),
        cached_tokens=tuple(s.length - s.evicted - fixed for s in segments), extra_tokens=extra,
        flops={
            name: Change(count_flops(whole[name]), count_flops(program)) for name, program in programs.programs.items()
        },
        kv_bytes=Change(_cache_bytes(whole), _cache_bytes(programs)),
    )  # fmt: skip


def _describe_stage(stage: StageFunction) -> ExplainedStage:
    planned = stage.planned
    return ExplainedStage(
        name=planned.name, site=str(planned.site), score=str(planned.score) if planned.score else None,
        select=str(planned.select) if planned.select else None, merge=str(planned.merge) if planned.merge else None,
        signals={name: dict(stage.signal_options[name]) for name in stage.signals}, scope=planned.scope,
        groups=planned.groups, length_in=planned.length_in, length_out=planned.length_out,
    )  # fmt: skip


def _cache_bytes(programs: ProgramSet) -> int:
    decode = programs["decode"].graph
    caches = [n.meta["val"] for n in decode.nodes if n.op == "placeholder" and n.name.startswith("past_")]
    return sum(c.numel() * c.element_size() for c in caches)
