"""The generation loop: vision, prefill, then one decode step per token, as an iterator of text."""

from __future__ import annotations

import logging
import statistics
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from time import perf_counter
from types import TracebackType

import numpy as np

from secateur.runtime.errors import UserError
from secateur.runtime.kv import cache_bytes
from secateur.runtime.processing import Inputs
from secateur.runtime.prompt_tokens import count_unpruned, spell_prompt
from secateur.runtime.request import Request
from secateur.runtime.results import FinishReason, Generation, Metrics, Piece
from secateur.runtime.sampling import Sampler, Sampling
from secateur.runtime.schema import Manifest
from secateur.runtime.text import AnswerText

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """When a row ends, and who may end all of them. ``max_time`` is in seconds from before vision runs."""

    max_new_tokens: int
    eos: frozenset[int]
    cancel: threading.Event | None = None
    max_time: float | None = None

    @property
    def cancelled(self) -> bool:
        return self.cancel is not None and self.cancel.is_set()


@dataclass
class _Row:
    """One row's answer while it grows."""

    answer: AnswerText
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: FinishReason | None = None

    def take(self, token: int, limits: Limits) -> str:
        """Add a token; the text that may be shown now."""
        self.tokens.append(token)
        shown = self.answer.push(token)
        self.text += shown
        if self.answer.stopped:
            self.reason = "stop"
        elif token in limits.eos:
            shown += self.end("eos")
        elif len(self.tokens) >= limits.max_new_tokens:
            shown += self.end("length")
        return shown

    def end(self, reason: FinishReason) -> str:
        """Close the row; the text that was held back."""
        rest = self.answer.flush()
        self.text += rest
        self.reason = "stop" if self.answer.stopped else reason
        return rest


class _Run:
    """What a stream works on. It does not know the stream, so that a stream nobody holds any more ends at once."""

    def __init__(
        self,
        manifest: Manifest,
        inputs: Inputs,
        sampling: Sampling,
        limits: Limits,
        new_answer: Callable[[], AnswerText],
        borrow: Callable[[], Request],
        give_back: Callable[[Request], None],
        metrics: Metrics,
    ) -> None:
        self.manifest, self.inputs, self.sampling, self.limits = manifest, inputs, sampling, limits
        self.prompts = [inputs.prompt_ids(row) for row in range(manifest.geometry.batch)]
        self.rows = [_Row(new_answer()) for _ in self.prompts]
        self.borrow, self.give_back, self.metrics = borrow, give_back, metrics
        self.closing = False
        """Set from any thread: nothing more is wanted."""
        self.over = threading.Event()

    @property
    def cancelled(self) -> bool:
        return self.closing or self.limits.cancelled

    def pieces(self) -> Generator[Piece, None, None]:
        request = self.borrow()
        failed = True
        try:
            yield from self._generate(request)
            failed = False
        except GeneratorExit:
            failed = False
            raise
        finally:
            steps = self.metrics.step_s
            self.metrics.tpot_s = statistics.median(steps) if steps else 0.0
            self.metrics.kept = request.kept
            if not failed:
                # After a failure the caches may hold NaN, which masking does not remove: let them go.
                self.give_back(request)
                self.finish()

    def _generate(self, request: Request) -> Iterator[Piece]:
        metrics, rows = self.metrics, self.rows
        begin = perf_counter()
        if self.cancelled:
            return
        request.encode(self.inputs.pixel_values, self.inputs.input_features)
        encoded = perf_counter()
        metrics.vision_s = encoded - begin
        if self.cancelled:
            return
        logits = request.prefill(self.inputs.input_ids, self.inputs.lengths)
        metrics.prefill_s = perf_counter() - encoded
        sampler = self._open_sampler(logits.shape[-1])
        tokens = sampler.draw(logits)
        metrics.ttft_s = metrics.preprocess_s + perf_counter() - begin
        while True:
            late = self.limits.max_time is not None and perf_counter() - begin > self.limits.max_time
            for index, row in enumerate(rows):
                if row.reason is None:
                    shown = row.take(int(tokens[index]), self.limits)
                    if late and row.reason is None:
                        shown += row.end("time")
                    if shown:
                        yield Piece(shown, index)
            if self.cancelled or all(row.reason for row in rows):
                return
            start = perf_counter()
            # Rows that have ended go on with padding; their logits are looked at no more.
            done = np.array([row.reason is not None for row in rows])
            tokens = sampler.draw(request.decode(np.where(done, self.manifest.model.pad_token_id, tokens)), done)
            metrics.step_s.append(perf_counter() - start)

    def _open_sampler(self, vocab_size: int) -> Sampler:
        return Sampler(
            self.sampling,
            [spell_prompt(self.manifest, prompt) for prompt in self.prompts],
            vocab_size,
            length=count_unpruned(self.manifest, self.inputs.lengths),
            max_new_tokens=self.limits.max_new_tokens,
            eos=self.limits.eos,
        )

    def finish(self) -> None:
        if self.over.is_set():
            return
        for row in self.rows:
            if row.reason is None:
                row.end("cancelled")
        self.over.set()
        _log.debug("generated %s tokens, ttft %.3f s", [len(r.tokens) for r in self.rows], self.metrics.ttft_s)


class TextStream(Iterator[Piece]):
    """Pieces of text as they are generated; :attr:`generations` when it is over.

    Nothing runs before the first ``next``. Closing it, leaving a ``with`` or letting go of it cancels the rest. Several
    threads may take pieces from it, one after another, and any of them may close it.
    """

    def __init__(
        self,
        manifest: Manifest,
        inputs: Inputs,
        sampling: Sampling,
        limits: Limits,
        new_answer: Callable[[], AnswerText],
        borrow: Callable[[], Request],
        give_back: Callable[[Request], None],
        preprocess_s: float = 0.0,
        variant: int = 0,
    ) -> None:
        metrics = Metrics(
            preprocess_s=preprocess_s,
            variant=variant,
            cache_bytes=cache_bytes(manifest),
            visual_tokens={s.name: s.length - manifest.geometry.fixed_tokens for s in manifest.segments},
        )
        self._run = _Run(manifest, inputs, sampling, limits, new_answer, borrow, give_back, metrics)
        self._pieces = self._run.pieces()
        self._turn = threading.Lock()
        """Held by the thread that is taking a piece."""

    def __next__(self) -> Piece:
        try:
            with self._turn:
                if self._run.closing:
                    raise StopIteration
                return next(self._pieces)
        finally:
            # Who closed the stream while this thread was at it left the rest to it.
            if self._run.closing:
                self._shut()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating; rows that had not ended are marked cancelled.

        From any thread, as often as one likes. Does not wait: where another thread is taking a piece, the stream ends
        after the step that is running, and that thread gets the last piece or none.
        """
        self._run.closing = True
        self._shut()

    @property
    def generations(self) -> list[Generation]:
        """One per row, once the stream is exhausted or closed; waits for the running step of one that was closed."""
        run = self._run
        if run.closing:
            run.over.wait()
        if not run.over.is_set():
            raise UserError("the stream is not over", fix="exhaust or close it first")
        return [
            Generation(
                row.text,
                row.tokens,
                row.reason or "cancelled",
                replace(run.metrics, prompt_tokens=len(prompt), new_tokens=len(row.tokens)),
            )
            for row, prompt in zip(run.rows, run.prompts, strict=True)
        ]

    def _shut(self) -> None:
        """End it unless a thread is at it: that one looks whether it is to end after it gave up its turn."""
        if self._turn.acquire(blocking=False):
            try:
                self._pieces.close()
                self._run.finish()
            finally:
                self._turn.release()
