"""Files of sound: every kind of WAV header and sample, what a library reads, every source, and what is refused."""

from __future__ import annotations

import base64
import contextlib
import io
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from secateur.runtime.errors import UserError
from secateur.runtime.waveform import read_waveform

PCM, FLOAT, ALAW, EXTENSIBLE = 1, 3, 6, 0xFFFE
RATE = 16000
SUBFORMAT = bytes.fromhex("000000001000800000aa00389b71")


def tone(count: int = 400, channels: int = 1) -> NDArray[np.float32]:
    angle = np.arange(count)[:, None] * np.linspace(0.1, 0.3, channels)
    return (0.6 * np.sin(angle)).astype(np.float32)


def pack(samples: NDArray[np.float32], tag: int, bits: int, order: str = "<") -> bytes:
    """Samples [n, channels] as a file holds them."""
    if tag == FLOAT:
        return samples.astype(f"{order}f{bits // 8}").tobytes()
    if bits == 8:
        return np.round(samples * 127 + 128).astype(np.uint8).tobytes()
    whole = np.round(samples.astype(np.float64) * (2 ** (bits - 1) - 1)).astype(np.int64)
    size = bits // 8
    raw = whole.astype(f"{order}i8").tobytes()
    columns = np.frombuffer(raw, np.uint8).reshape(-1, 8)
    return columns[:, :size].tobytes() if order == "<" else columns[:, 8 - size :].tobytes()


def make_wav(
    data: bytes, tag: int = PCM, bits: int = 16, channels: int = 1, rate: int = RATE, *, extensible: bool = False,
    form: bytes = b"RIFF", order: str = "<", size: int | None = None, whole: int | None = None, before: bytes = b"",
    behind: bytes = b"", valid: int | None = None,
) -> bytes:  # fmt: skip
    block = channels * bits // 8
    fields = (EXTENSIBLE if extensible else tag, channels, rate, rate * block, block, bits)
    head = struct.pack(f"{order}HHIIHH", *fields)
    if extensible:
        head += struct.pack(f"{order}HHIH", 22, valid or bits, 0, tag) + SUBFORMAT
    body = b"WAVE" + before + b"fmt " + struct.pack(f"{order}I", len(head)) + head
    body += b"data" + struct.pack(f"{order}I", len(data) if size is None else size) + data
    body += (b"\0" if len(data) % 2 and size is None else b"") + behind
    return form + struct.pack(f"{order}I", len(body) if whole is None else whole) + body


KINDS = [(PCM, 8), (PCM, 16), (PCM, 24), (PCM, 32), (FLOAT, 32), (FLOAT, 64)]


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize(("tag", "bits"), KINDS)
def test_every_kind_of_sample(tag: int, bits: int, channels: int, extensible: bool) -> None:
    samples = tone(channels=channels)
    data = make_wav(pack(samples, tag, bits), tag, bits, channels, extensible=extensible)
    found, rate = read_waveform(data)
    assert (rate, found.dtype, found.shape) == (RATE, np.float32, (400,))
    np.testing.assert_allclose(found, samples.mean(axis=1), atol=2 / 2 ** (min(bits, 24) - 1))


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize(("tag", "bits"), KINDS)
def test_samples_are_those_of_the_library(tag: int, bits: int, channels: int, extensible: bool) -> None:
    """soundfile's, averaged over the channels, which is what transformers' ``load_audio`` does."""
    data = make_wav(pack(tone(channels=channels), tag, bits), tag, bits, channels, extensible=extensible)
    found, _ = read_waveform(data)
    library = pytest.importorskip("soundfile", reason="the extra `sound`, which is in `dev`")
    wanted, _ = library.read(io.BytesIO(data), dtype="float32", always_2d=True)
    np.testing.assert_allclose(found, wanted.mean(axis=1), atol=2e-7)


def test_every_kind_of_file() -> None:
    samples = tone()
    right, list_chunk = pack(samples, PCM, 16), b"LIST" + struct.pack("<I", 5) + b"INFOx\0"
    long = b"ds64" + struct.pack("<IQQQI", 28, 0, len(right), 400, 0)
    for name, data in {
        "chunks around": make_wav(right, before=list_chunk, behind=list_chunk),
        "big-endian": make_wav(pack(samples, PCM, 16, ">"), form=b"RIFX", order=">"),
        "64-bit sizes": make_wav(right, form=b"RF64", before=long, size=0xFFFFFFFF, whole=0xFFFFFFFF),
        "written to a pipe": make_wav(right, size=0xFFFFFFFF, whole=0xFFFFFFFF),
        "written to a pipe by SoX": make_wav(right, size=0x7FFFF000, whole=0x7FFFF024),
        "never closed": make_wav(right, size=0, whole=36),
        "never closed, of size 0": make_wav(right, size=0, whole=0),
        "half a sample behind": make_wav(right + b"\1"),
        "12 of 16 bits": make_wav(right)[:34] + struct.pack("<H", 12) + make_wav(right)[36:],
        "12 valid bits": make_wav(right, extensible=True, valid=12),
    }.items():
        found, rate = read_waveform(data)
        assert rate == RATE, name
        np.testing.assert_allclose(found, samples[:, 0], atol=1e-4, err_msg=name)
    for bits in (16, 24, 32):
        data = make_wav(pack(samples, PCM, bits, ">"), bits=bits, form=b"RIFX", order=">")
        np.testing.assert_allclose(read_waveform(data)[0], samples[:, 0], atol=1e-4)


def refusal(audio: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_waveform(audio)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value)


def test_wav_files_that_cannot_be(tmp_path: Path) -> None:
    right = pack(tone(), PCM, 16)
    whole = make_wav(right)
    for data, says in (
        (whole[:-301], "the file ends after 249 of 400 samples; give a whole file"),
        (make_wav(right, size=900), "the file ends after 400 of 450 samples"),
        (make_wav(b""), "0 samples at 16000 Hz, there is nothing to hear"),
        (make_wav(b"", size=0xFFFFFFFF, whole=0xFFFFFFFF), "there is nothing to hear"),
        (make_wav(right, rate=0), "a WAV file of 1 channels at 0 Hz"),
        (make_wav(right, channels=0), "a WAV file of 0 channels"),
        (make_wav(right, bits=64), "samples of 64 bits, 8 bytes for 1 channel(s) (available: 8, 16, 24, 32)"),
        (make_wav(right, FLOAT, 16), "samples of 16 bits, 2 bytes for 1 channel(s) (available: 32, 64)"),
        (whole[:32] + b"\x03\0" + whole[34:], "samples of 16 bits, 3 bytes for 1 channel(s)"),
        (whole[:34] + b"\0\0" + whole[36:], "samples of 0 bits"),
        (whole[:12], "a WAV file without its format"),
        (whole[:36], "a WAV file without samples"),
        (whole[:16] + struct.pack("<I", 4) + whole[20:24] + whole[36:], "a WAV file whose header ends too early"),
        (whole[:12] + whole[36:] + whole[12:36], "a WAV file whose samples come before their format"),
        (make_wav(pack(tone() * np.nan, FLOAT, 32), FLOAT, 32), "values that are not finite"),
        (make_wav(pack(tone() * 30000, FLOAT, 32), FLOAT, 32), "the waveform reaches 1"),
    ):
        assert says in refusal(data)
        (tmp_path / "a.wav").write_bytes(data)
        assert refusal(tmp_path / "a.wav").startswith(str(tmp_path / "a.wav"))


def test_headers_cut_and_flipped_give_a_line_or_sound() -> None:
    """No header ends in another error than ours, and none in more samples than the file has bytes."""
    pytest.importorskip("soundfile", reason="the extra `sound`, which is in `dev`")
    rng = np.random.default_rng(0)
    whole = make_wav(pack(tone(50), PCM, 16), extensible=True)
    read = 0
    for _ in range(400):
        data = bytearray(whole)
        for place in rng.integers(0, 68, 2):
            data[place] = int(rng.integers(256))
        with contextlib.suppress(UserError):
            assert len(read_waveform(bytes(data[: rng.integers(20, len(data) + 1)]))[0]) <= len(data)
            read += 1
    assert 0 < read < 400


class _Stream(io.RawIOBase):
    """A file object that cannot seek."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._data.read(size)


def test_every_source(tmp_path: Path) -> None:
    samples = tone()[:, 0]
    data = make_wav(pack(tone(), FLOAT, 32), FLOAT, 32)
    path = tmp_path / "a sound.wav"
    path.write_bytes(data)
    packed = base64.b64encode(data).decode()
    with path.open("rb") as opened:
        for source in (
            path, str(path), path.as_uri(), data, bytearray(data), memoryview(data), opened, io.BytesIO(data),
            _Stream(data), f"data:audio/wav;base64,{packed}", f"data:;base64,{packed}", packed,
        ):  # fmt: skip
            found, rate = read_waveform(source)  # type: ignore[arg-type]
            assert rate == RATE
            np.testing.assert_array_equal(found, samples)
    np.testing.assert_array_equal(read_waveform(samples)[0], samples)


def test_sources_that_are_none(tmp_path: Path) -> None:
    assert "no such audio file" in refusal(tmp_path / "no.wav")
    assert "no such audio file" in refusal(tmp_path)
    assert "is not a local file; download the audio and give its path, or ask for it with allow_network" in refusal(
        "http://127.0.0.1/a.wav?key=secret"
    )
    assert "secret" not in refusal("http://me:secret@127.0.0.1/a.wav?key=secret")
    assert "a data: URL that holds nothing" in refusal("data:audio/wav;base64,")
    assert "addresses of s3: are not read (available: a path, file:, data:, http: with" in refusal("s3://bucket/a.wav")
    assert "a data: URL of image/png" in refusal("data:image/png;base64,AAAA")
    assert "a data: URL whose base64 is broken" in refusal("data:audio/wav;base64,A")
    assert "without a comma" in refusal("data:audio/wav")
    assert "a file: URL of another machine (host)" in refusal("file://host/a.wav")
    assert "the open file gives str" in refusal(io.StringIO("x"))
    assert "text of 5000 characters is no path" in refusal("x." * 2500)
    assert "an empty file" in refusal(b"")


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [
        ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_24"), ("AU", "PCM_16"),
        ("CAF", "PCM_16"), ("WAV", "ALAW"), ("WAV", "ULAW"), ("WAV", "IMA_ADPCM"), ("WAVEX", "PCM_24"),
        ("W64", "PCM_16"), ("RF64", "PCM_16"), ("OGG", "OPUS"),
    ],
)  # fmt: skip
def test_what_the_library_reads(kind: str, subtype: str, tmp_path: Path) -> None:
    """Samples are those of transformers' ``load_audio``: soundfile's, averaged over the channels."""
    library = pytest.importorskip("soundfile", reason="the extra `sound`, which is in `dev`")
    path = tmp_path / "sound"
    library.write(path, tone(4000, 2), RATE, format=kind, subtype=subtype)
    wanted, _ = library.read(path, dtype="float32", always_2d=True)
    for source in (path, path.read_bytes()):
        found, rate = read_waveform(source)
        assert rate == RATE
        np.testing.assert_allclose(found, wanted.mean(axis=1), atol=2e-7)
    with path.open("rb") as opened:
        assert len(read_waveform(opened)[0]) == len(found)


def test_what_the_library_does_not_read() -> None:
    library = pytest.importorskip("soundfile", reason="the extra `sound`, which is in `dev`")
    said = refusal(b"not a sound at all")
    assert said.startswith("18 bytes: a file of no known type, which soundfile does not read (Format not")
    assert "a file of type MP4 (M4A), which soundfile" in refusal(b"\0\0\0\x18ftypM4A \0\0\0\0")
    whole = io.BytesIO()
    library.write(whole, tone(40000), RATE, format="FLAC")
    assert "a file of type FLAC, which soundfile does not read (" in refusal(whole.getvalue()[:4000])


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    found, _ = read_waveform(make_wav(pack(tone(), PCM, 24), bits=24, extensible=True))
    np.testing.assert_allclose(found, tone()[:, 0], atol=1e-6)
    for data, says in ((b"fLaC", "a file of type FLAC"), (make_wav(b"1234", ALAW, 8), "a WAV file of format 6")):
        said = refusal(data)
        assert f"{says}; it is read by soundfile, which is not installed" in said
        assert "pip install 'secateur[sound]', or convert it: ffmpeg -i" in said
