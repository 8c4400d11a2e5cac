"""The generation loop: vision, prefill, then one decode step per token, as an iterator of text."""

from __future__ import annotations

import logging
import statistics
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from types import TracebackType

import numpy as np

from secateur.runtime.errors import UserError
from secateur.runtime.kv import cache_bytes
from secateur.runtime.processing import Inputs
from secateur.runtime.request import Request
from secateur.runtime.results import FinishReason, Generation, Metrics, Piece
from secateur.runtime.sampling import Sampler, Sampling
from secateur.runtime.schema import Manifest
from secateur.runtime.text import Detokenizer, StopStrings

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """When a row ends, and who may end all of them."""

    max_new_tokens: int
    eos: frozenset[int]
    stops: Sequence[str] = ()
    cancel: threading.Event | None = None

    @property
    def cancelled(self) -> bool:
        return self.cancel is not None and self.cancel.is_set()


@dataclass
class _Row:
    """One row's answer while it grows."""

    detokenizer: Detokenizer
    stops: StopStrings
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: FinishReason | None = None

    def take(self, token: int, limits: Limits) -> str:
        """Add a token; the text that may be shown now."""
        self.tokens.append(token)
        if token in limits.eos:
            return self.end("eos")
        shown = self.stops.push(self.detokenizer.push(token))
        self.text += shown
        if self.stops.found:
            self.reason = "stop"
        elif len(self.tokens) >= limits.max_new_tokens:
            shown += self.end("length")
        return shown

    def end(self, reason: FinishReason) -> str:
        """Close the row; the text that was held back."""
        rest = self.stops.push(self.detokenizer.flush()) + self.stops.flush()
        self.text += rest
        self.reason = "stop" if self.stops.found else reason
        return rest


class TextStream(Iterator[Piece]):
    """Pieces of text as they are generated; :attr:`generations` when it is over.

    Nothing runs before the first ``next``. Closing it (or leaving a ``with``) cancels the rest.
    """

    def __init__(
        self,
        manifest: Manifest,
        inputs: Inputs,
        sampling: Sampling,
        limits: Limits,
        decode: Callable[[Sequence[int]], str],
        borrow: Callable[[], Request],
        give_back: Callable[[Request], None],
        preprocess_s: float = 0.0,
    ) -> None:
        self._manifest, self._inputs, self._limits = manifest, inputs, limits
        self._prompts = [inputs.prompt_ids(row) for row in range(manifest.geometry.batch)]
        self._sampling = sampling
        self._rows = [_Row(Detokenizer(decode), StopStrings(limits.stops)) for _ in self._prompts]
        self._borrow, self._give_back = borrow, give_back
        self._metrics = Metrics(
            preprocess_s=preprocess_s,
            cache_bytes=cache_bytes(manifest),
            visual_tokens={s.name: s.length - manifest.geometry.fixed_tokens for s in manifest.segments},
        )
        self._over = False
        self._pieces = self._run()

    def __next__(self) -> Piece:
        return next(self._pieces)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating; rows that had not ended are marked cancelled."""
        self._pieces.close()
        self._finish()

    @property
    def generations(self) -> list[Generation]:
        """One per row, once the stream is exhausted or closed."""
        if not self._over:
            raise UserError("the stream is not over", fix="exhaust or close it first")
        return [
            Generation(
                row.text,
                row.tokens,
                row.reason or "cancelled",
                replace(self._metrics, prompt_tokens=len(prompt), new_tokens=len(row.tokens)),
            )
            for row, prompt in zip(self._rows, self._prompts, strict=True)
        ]

    def _run(self) -> Generator[Piece, None, None]:
        request = self._borrow()
        failed = True
        try:
            yield from self._generate(request)
            failed = False
        except GeneratorExit:
            failed = False
            raise
        finally:
            steps = self._metrics.step_s
            self._metrics.tpot_s = statistics.median(steps) if steps else 0.0
            self._metrics.kept = request.kept
            if not failed:
                # After a failure the caches may hold NaN, which masking does not remove: let them go.
                self._give_back(request)
                self._finish()

    def _generate(self, request: Request) -> Iterator[Piece]:
        limits, metrics, rows = self._limits, self._metrics, self._rows
        begin = perf_counter()
        if limits.cancelled:
            return
        request.encode(self._inputs.pixel_values, self._inputs.input_features)
        encoded = perf_counter()
        metrics.vision_s = encoded - begin
        if limits.cancelled:
            return
        logits = request.prefill(self._inputs.input_ids, self._inputs.lengths)
        metrics.prefill_s = perf_counter() - encoded
        sampler = Sampler(self._sampling, self._prompts, logits.shape[-1])
        tokens = sampler.draw(logits)
        metrics.ttft_s = metrics.preprocess_s + perf_counter() - begin
        while True:
            for index, row in enumerate(rows):
                if row.reason is None and (shown := row.take(int(tokens[index]), limits)):
                    yield Piece(shown, index)
            if limits.cancelled or all(row.reason for row in rows):
                return
            start = perf_counter()
            # Rows that have ended go on with padding; their logits are looked at no more.
            done = np.array([row.reason is not None for row in rows])
            tokens = sampler.draw(request.decode(np.where(done, self._manifest.model.pad_token_id, tokens)))
            metrics.step_s.append(perf_counter() - start)

    def _finish(self) -> None:
        if self._over:
            return
        self._over = True
        for row in self._rows:
            if row.reason is None:
                row.end("cancelled")
        _log.debug("generated %s tokens, ttft %.3f s", [len(r.tokens) for r in self._rows], self._metrics.ttft_s)
