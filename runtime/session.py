"""A loaded bundle: answers prompts, or runs its programs one by one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Literal, TypeAlias, overload

from secateur.runtime.backends import HOST_BACKEND, Backend, Shared, open_backend
from secateur.runtime.chat import Message
from secateur.runtime.errors import MisfitError, UserError, refuse_idle
from secateur.runtime.generate import Limits, TextStream
from secateur.runtime.generation_options import DEFAULTS_FILE, merge_given, resolve
from secateur.runtime.kv import check_room
from secateur.runtime.manifest import Level, check_files, read_manifest
from secateur.runtime.pick import Asked, order_by_size, pick
from secateur.runtime.pictures import MAX_PIXELS, ImageLike
from secateur.runtime.probe import warn_of_pixels
from secateur.runtime.processing import Inputs, Processor, Prompt
from secateur.runtime.processor_files import read_json
from secateur.runtime.prompt_tokens import count_unpruned
from secateur.runtime.request import Floats, Ints, Request
from secateur.runtime.results import Generation
from secateur.runtime.row_media import KINDS, gather, list_rows
from secateur.runtime.schema import Manifest
from secateur.runtime.text import AnswerText, encode_stop
from secateur.runtime.video import VideoLike
from secateur.runtime.waveform import AudioLike

_log = logging.getLogger(__name__)

Images: TypeAlias = "ImageLike | Sequence[ImageLike] | Sequence[Sequence[ImageLike]]"
Videos: TypeAlias = "VideoLike | Sequence[VideoLike] | Sequence[Sequence[VideoLike]]"
Audio: TypeAlias = "AudioLike | Sequence[AudioLike] | Sequence[Sequence[AudioLike]]"

# Requests kept per geometry for the next call, so that calls one after another reuse their caches.
_IDLE_REQUESTS = 1


class Session:
    """Opens a bundle. Several threads may use one session: each call owns its caches, weights exist once.

    ``backend`` None takes the one the bundle was compiled for; a :class:`Backend` of your own is used as it
    is. ``threads`` are an operator's on the CPU, ``cuda_graphs`` whether TensorRT's programs are replayed as CUDA
    graphs, as they are if nobody says. ``verify="full"`` also hashes the weights.
    A picture or frame may have ``max_image_pixels``, looked at
    before it is decoded; one takes 4 to 8 bytes.
    Of a bundle of several geometries ``manifest`` and ``processor`` are the first's, ``geometries`` and
    ``processors`` those of all; every prompt runs in the smallest that fits.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        backend: str | Backend | None = None,
        threads: int | None = None,
        cuda_graphs: bool | None = None,
        verify: Level = "graphs",
        max_image_pixels: int = MAX_PIXELS,
    ) -> None:
        if type(max_image_pixels) is not int or max_image_pixels < 1:
            raise UserError(f"max_image_pixels is {max_image_pixels!r}", fix="give a number of pixels, 1 or more")
        self.path = Path(path)
        self.manifest: Manifest = read_manifest(self.path)
        check_files(self.path, self.manifest, verify)
        self.geometries: list[Manifest] = self.manifest.each_variant()
        self.processor = Processor(self.path, self.geometries[0], max_image_pixels)
        self.processors = [self.processor, *(self.processor.at(one) for one in self.geometries[1:])]
        warn_of_pixels(self.path, self.manifest)
        self._defaults: dict[str, Any] = read_json(self.path / DEFAULTS_FILE)
        self._backend: Backend | None = (
            open_backend(backend, self.path, self.manifest, threads=threads, cuda_graphs=cuda_graphs)
            if backend is None or isinstance(backend, str)
            else _take_backend(backend, threads, cuda_graphs)
        )
        self._idle: list[Request] = []
        # A stream that is collected gives its request back, whatever this thread is doing at that moment.
        self._lock = threading.RLock()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the backend. Streams that have started keep its programs until they end."""
        with self._lock:
            backend, self._backend = self._backend, None
            self._idle.clear()
        if backend is not None:
            backend.close()

    def request(self, variant: int = 0) -> Request:
        """State for :meth:`prefill` and :meth:`decode`: caches, inputs and outputs of one generation.

        ``variant`` is which of ``geometries`` it is for; both run the programs of that one.
        """
        backend = self._backend
        if backend is None:
            raise UserError("the session is closed")
        if backend.name == HOST_BACKEND:
            check_room(self.manifest.variant(variant), f"{self.path}: geometry {variant}")
        return Request(backend, self.manifest, variant)

    def prefill(
        self,
        request: Request,
        input_ids: Ints,
        lengths: Ints,
        *,
        pixel_values: Floats | Shared | None = None,
        input_features: Floats | Shared | None = None,
        features: Floats | Shared | None = None,
        kept: Ints | None = None,
    ) -> Floats:
        """Logits [B, vocab] float32 of each row's last real token; fills the request's caches.

        ``input_ids`` int64 [B, N], right padded, placeholders expanded; ``lengths`` int64 [B]. Give either
        ``pixel_values`` [B*n, 3, H, W] or patches, with ``input_features`` where the bundle hears (vision runs
        first), or ``features`` [B, F, D]. Where the vision side prunes, features come with ``kept`` [B, V], their
        patches (see :meth:`Request.prefill`).
        """
        if (pixel_values is None) == (features is None):
            raise UserError("prefill takes either pixel_values or features", where="prefill")
        if pixel_values is not None:
            request.encode(pixel_values, input_features)
        elif input_features is not None:
            raise UserError("input_features beside features", where="prefill", fix="features hold the sound already")
        return request.prefill(input_ids, lengths, features, kept)

    def decode(self, request: Request, tokens: Ints) -> Floats:
        """Append one token per row, int64 [B], and get the next logits [B, vocab] float32."""
        return request.decode(tokens)

    @overload
    def generate(
        self,
        prompt: str | Sequence[Message],
        images: Images | None = None,
        *,
        stream: Literal[False] = False,
        **how: Any,
    ) -> Generation: ...
    @overload
    def generate(
        self, prompt: Sequence[Prompt], images: Images | None = None, *, stream: Literal[False] = False, **how: Any
    ) -> list[Generation]: ...
    @overload
    def generate(
        self, prompt: Prompt | Sequence[Prompt], images: Images | None = None, *, stream: Literal[True], **how: Any
    ) -> TextStream: ...
    def generate(
        self, prompt: Any, images: Images | None = None, *, stream: bool = False, **how: Any
    ) -> Generation | list[Generation] | TextStream:
        """Answer a prompt (text, or a list of messages), or a list of prompts as long as the batch.

        ``images``: one image or a list for a single prompt, per row for a list of prompts; None if the
        messages carry them. Other arguments, among them ``videos`` and ``audio``, are those of :meth:`stream`, which
        ``stream=True`` returns.
        """
        pieces = self.stream(prompt, images, **how)
        if stream:
            return pieces
        for _ in pieces:
            pass
        return pieces.generations[0] if _is_single(prompt) else pieces.generations

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],
        images: Images | None = None,
        videos: Videos | None = None,
        audio: Audio | None = None,
        *,
        video_fps: float | None = None,
        audio_rate: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        ignore_eos: bool = False,
        generation: Mapping[str, Any] | None = None,
        cancel: threading.Event | None = None,
        variant: int | None = None,
        allow_network: bool = False,
    ) -> TextStream:
        """An iterator of text pieces, each with the ``row`` it belongs to.

        ``videos`` and ``audio`` are given as ``images`` are (:meth:`generate`), one a row: a video as a file, a
        directory of frames, a list of them or an array; sound as a WAV file or an array of samples. A video that does
        not say its rate has ``video_fps`` frames a second, an array of sound ``audio_rate`` samples. Media may also lie
        in the parts of messages (docs/messages.md). Addresses (http, https, ftp) are refused unless ``allow_network``:
        they are then fetched from this machine, whoever wrote them.

        Input is processed and checked now, programs run on the first ``next``. Whatever is None is as the checkpoint's
        generation_config.json says, else as transformers' defaults are, but that an answer may take all the capacity. A
        ``temperature`` of 0 takes the likeliest token, one above 0 draws. ``stop`` are texts, special tokens among
        them, that end an answer. ``generation`` holds other options by their names in transformers' GenerationConfig,
        such as ``{"no_repeat_ngram_size": 3}``. Setting ``cancel`` ends the stream after the running step. ``variant``
        is which of ``geometries`` to run in; None takes the smallest that fits.
        """
        start = perf_counter()
        single = _is_single(prompt)
        prompts: Sequence[Prompt] = [prompt] if single else prompt  # type: ignore[list-item, assignment]  # by `single`
        listed = [list_rows(kind, given, single) for kind, given in zip(KINDS, (images, videos, audio), strict=True)]
        prompts, rows = gather(prompts, listed, allow_network)

        if not any(rows[KINDS.index("video")]):
            refuse_idle("no video is given", video_fps=video_fps)
        if not any(rows[KINDS.index("audio")]) and audio_rate is not None:
            raise UserError("says nothing: no sound is given", where="audio_rate", fix="leave it out")

        def process(processor: Processor) -> Inputs:
            return processor(prompts, *rows, video_fps=video_fps, audio_rate=audio_rate)

        named = {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
            "repetition_penalty": repetition_penalty, "stop_strings": stop,
        }  # fmt: skip
        how = resolve(self._defaults, merge_given(named, generation), seed, f"{self.path}: {DEFAULTS_FILE}")
        for text in how.stop:
            encode_stop(text)
        if seed is not None and how.sampling.temperature == 0:
            _log.warning("seed %s says nothing: the likeliest token is taken, none is drawn", seed)
        chosen, inputs = self._fit(process, Asked(prompts, rows, how.asked_tokens), variant)
        manifest, words = self.geometries[chosen], self.processor.prompts
        eos = self.manifest.model.eos_token_ids if how.eos is None else how.eos
        limits = Limits(
            max_new_tokens=how.room(manifest.geometry.new_tokens, count_unpruned(manifest, inputs.lengths)),
            eos=frozenset(() if ignore_eos else eos),
            cancel=cancel,
            max_time=how.max_time,
        )
        return TextStream(
            manifest,
            inputs,
            how.sampling,
            limits,
            new_answer=lambda: AnswerText(words.decode, how.stop, words.token_bytes),
            borrow=lambda: self._borrow(chosen),
            give_back=self._give_back,
            preprocess_s=perf_counter() - start,
            variant=chosen,
        )

    def _fit(self, process: Callable[[Processor], Inputs], asked: Asked, variant: int | None) -> tuple[int, Inputs]:
        """The geometry to run in, and its inputs."""

        def fit(index: int) -> tuple[int, Inputs]:
            _check_new_tokens(asked.new_tokens, self.manifest.variant(index))
            return index, process(self.processors[index])

        if variant is not None or len(self.geometries) == 1:
            return fit(variant or 0)
        return pick(self.geometries, order_by_size(self.geometries, asked), fit, asked)

    def _borrow(self, variant: int) -> Request:
        with self._lock:
            for place, idle in enumerate(self._idle):
                if idle.variant == variant:
                    return self._idle.pop(place)
        return self.request(variant)

    def _give_back(self, request: Request) -> None:
        with self._lock:
            alike = sum(idle.variant == request.variant for idle in self._idle)
            if self._backend is not None and alike < _IDLE_REQUESTS:
                self._idle.append(request)


def _take_backend(backend: Backend, threads: int | None, cuda_graphs: bool | None) -> Backend:
    refuse_idle("the backend that is given was opened already", threads=threads, cuda_graphs=cuda_graphs)
    return backend


def _check_new_tokens(wanted: int | None, manifest: Manifest) -> None:
    capacity = manifest.geometry.new_tokens
    if wanted is not None and wanted > capacity:
        raise MisfitError(
            f"{wanted} new tokens, the bundle's caches hold {capacity}",
            fix=f"ask for at most {capacity}, or compile with --new-tokens {wanted}",
        )


def _is_single(prompt: Any) -> bool:
    """A string or a list of messages, rather than a list of those."""
    if not isinstance(prompt, (str, list, tuple)):
        raise UserError(
            f"a {type(prompt).__name__} is not a prompt", fix="give text, a list of messages, or a list of those"
        )
    return isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], dict))
