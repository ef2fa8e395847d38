import io
import itertools
import json
import math
import struct
import tracemalloc
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from app.jobs.kinds.waveform import KIND, Payload, Result
from tests.unit.media_context import MemoryContext
from worker.errors import PermanentError, TransientError
from worker.handlers import waveform

Samples = npt.NDArray[np.float64]
SIZES = {"PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}
ENCODINGS = list(SIZES)


def wav(
    sound: bytes,
    bits: int = 16,
    channels: int = 1,
    rate: int = 8000,
    tag: int = 1,
    announced: int | None = None,
    riff: int | None = None,
) -> bytes:
    """A WAV file written by hand."""
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", tag, channels, rate, rate * frame % 2**32, frame, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form
    body += b"LIST\x03\x00\x00\x00abc\x00"  # of odd length, hence padded
    body += b"data" + struct.pack("<I", len(sound) if announced is None else announced) + sound
    return b"RIFF" + struct.pack("<I", len(body) if riff is None else riff) + body


def encoded(samples: Samples, encoding: str, rate: int = 8000) -> tuple[bytes, Samples]:
    """The file for samples of shape (frames, channels), and what those are after rounding, as parts of full scale."""
    samples = samples if samples.ndim == 2 else samples[:, None]
    channels = samples.shape[1]
    if encoding in ("FLOAT", "DOUBLE"):
        values = samples.astype("<f4" if encoding == "FLOAT" else "<f8")
        return wav(values.tobytes(), values.itemsize * 8, channels, rate, tag=3), values.astype(float)
    bits = int(encoding.removeprefix("PCM_").removeprefix("U"))
    full = 2 ** (bits - 1)
    integers = np.clip(np.round(samples * full), -full, full - 1).astype(np.int64)
    offset = full if bits == 8 else 0
    data = b"".join(int(n + offset).to_bytes(bits // 8, "little", signed=bits > 8) for n in integers.reshape(-1))
    return wav(data, bits, channels, rate), integers / full


def expected(values: Samples, rate: int) -> dict[str, Any]:
    """What the result should be, from all samples at once and window by window."""

    def decibels(amplitude: float) -> Any:
        return pytest.approx(20 * math.log10(amplitude), abs=1e-9) if amplitude else None

    silences, begin = [], None
    for window in itertools.count():
        part = values[window * rate // 50 : (window + 1) * rate // 50]
        if len(part) and np.sqrt(np.mean(part**2)) < 10 ** (-50 / 20):
            begin = window / 50 if begin is None else begin
            continue
        end = min(window / 50, len(values) / rate)
        if begin is not None and round(end - begin, 9) >= 0.5:
            silences.append((begin, end))
        begin = None
        if not len(part):
            break
    return {
        "duration_seconds": len(values) / rate,
        "sample_rate": rate,
        "channels": values.shape[1],
        "peak_dbfs": decibels(float(np.abs(values).max(initial=0))),
        "rms_dbfs": decibels(float(np.sqrt(np.mean(values**2))) if values.size else 0.0),
        "silences": silences,
    }


def run(ctx: MemoryContext, data: bytes | BinaryIO, chunk_seconds: int = 60) -> Result:
    return waveform.run(Payload(file_id=ctx.add(data), chunk_seconds=chunk_seconds), ctx.as_context())


def report(data: bytes, chunk_seconds: int = 60) -> dict[str, Any]:
    return run(MemoryContext(), data, chunk_seconds).model_dump(exclude={"image_file_id"})


def picture(data: bytes, chunk_seconds: int = 60) -> Image.Image:
    ctx = MemoryContext()
    name, png, content_type = ctx.saved[run(ctx, data, chunk_seconds).image_file_id]
    assert (name, content_type) == ("waveform.png", "image/png")
    return Image.open(io.BytesIO(png))


def recording(seconds: float, rate: int, channels: int) -> Samples:
    """Noise that comes and goes, other in each channel."""
    frames = round(seconds * rate)
    time = np.arange(frames)[:, None] / rate
    loudness = np.where(np.sin(time * 2 + np.arange(channels) / 9) > 0.2, 0.9, 0.0005)
    return np.random.default_rng(7).uniform(-1, 1, (frames, channels)) * loudness


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("channels", "rate"), [(1, 8000), (2, 8000), (3, 4410), (2, 11_025)])
@pytest.mark.parametrize("chunk_seconds", [1, 3, 600])
def test_each_encoding(encoding: str, channels: int, rate: int, chunk_seconds: int) -> None:
    data, values = encoded(recording(7.3, rate, channels), encoding, rate)
    assert report(data, chunk_seconds) == expected(values, rate)


@pytest.mark.parametrize("variant", ["WAVEX", "RF64"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_longer_headers(variant: str, encoding: str) -> None:
    samples = recording(3, 8000, 2)
    data, values = encoded(samples, encoding)
    file = io.BytesIO()
    soundfile.write(file, samples, 8000, format=variant, subtype=encoding)
    # Its writer rounds in its own way, so the sound is replaced by ours.
    longer = file.getvalue()[: -values.size * SIZES[encoding]] + data[-values.size * SIZES[encoding] :]
    assert longer[:4] == (b"RF64" if variant == "RF64" else b"RIFF")
    assert report(longer) == expected(values, 8000)


PARTS = st.lists(st.tuples(st.sampled_from([0.0, 0.001, 0.5]), st.integers(1, 90)), max_size=12)


@settings(deadline=None)
@given(parts=PARTS, tail=st.integers(0, 40), rate=st.sampled_from([50, 75, 101, 1000]), chunk=st.integers(1, 4))
def test_no_border_of_chunks_or_blocks_changes_the_result(
    parts: list[tuple[float, int]], tail: int, rate: int, chunk: int
) -> None:
    pieces = [np.full(windows * rate // 50, level) for level, windows in parts]
    samples = np.concatenate([*pieces, np.zeros(tail)])
    data, values = encoded(samples, "DOUBLE", rate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waveform, "BLOCK_SAMPLES", 70)
        patch.setattr(waveform, "drawn", lambda *_: b"")  # for speed
        assert report(data, chunk) == expected(values, rate)


def test_full_scale_is_zero_decibels() -> None:
    square = np.tile([-1.0, -1.0, 1.0, 1.0], 4000)
    assert report(wav((square * 32767).astype("<i2").tobytes()))["rms_dbfs"] == pytest.approx(0, abs=0.001)
    assert report(encoded(np.full(8000, -1.0), "PCM_16")[0])["peak_dbfs"] == 0
    sine = np.sin(np.arange(8000) * math.tau / 80)
    result = report(encoded(sine, "FLOAT")[0])
    assert result["peak_dbfs"] == pytest.approx(0, abs=1e-6)
    assert result["rms_dbfs"] == pytest.approx(-3.0103, abs=1e-4)
    assert report(encoded(sine * 2, "FLOAT")[0])["peak_dbfs"] == pytest.approx(6.0206, abs=1e-4)


def test_levels_are_over_all_channels() -> None:
    both = np.stack([np.full(8000, 0.5), np.zeros(8000)], axis=1)
    result = report(encoded(both, "DOUBLE")[0])
    assert result["peak_dbfs"] == pytest.approx(20 * math.log10(0.5))
    assert result["rms_dbfs"] == pytest.approx(10 * math.log10(0.25 / 2))


def test_digital_silence_has_no_level() -> None:
    result = report(encoded(np.zeros(8000), "PCM_16")[0])
    assert (result["peak_dbfs"], result["rms_dbfs"], result["silences"]) == (None, None, [(0, 1)])


def test_a_recording_without_samples() -> None:
    data = wav(b"", channels=2)
    assert report(data) == {
        "duration_seconds": 0,
        "sample_rate": 8000,
        "channels": 2,
        "peak_dbfs": None,
        "rms_dbfs": None,
        "silences": [],
    }
    assert picture(data).size == (1200, 240)


@pytest.mark.parametrize(
    ("level", "begin", "frames", "silences"),
    [
        (0.0, 8000, 4000, [(1, 1.5)]),  # just long enough
        (0.0, 8000, 3999, []),
        (0.0, 7680, 4000, [(0.96, 1.46)]),  # across the border of two chunks
        (0.0, 8000, 4080, [(1, 1.5)]),  # half a window more is none
        (10 ** (-50.01 / 20), 8000, 4000, [(1, 1.5)]),
        (10 ** (-49.99 / 20), 8000, 4000, []),
    ],
)
def test_what_is_a_silence(level: float, begin: int, frames: int, silences: list[tuple[float, float]]) -> None:
    samples = np.full(24_000, 0.5)
    samples[begin : begin + frames] = level
    assert report(encoded(samples, "DOUBLE")[0], 1)["silences"] == silences


def test_silence_is_over_all_channels() -> None:
    for decibels, silences in ((-50.01, [(0, 1)]), (-49.99, [])):
        samples = np.full((8000, 2), 10 ** (decibels / 20))
        assert report(encoded(samples, "DOUBLE")[0])["silences"] == silences


def test_the_last_window_may_be_a_part_of_one() -> None:
    for tail, silences in ((4040, [(0.5, 1.005)]), (4000, [(0.5, 1.0)]), (3999, [])):
        samples = np.concatenate([np.full(4000, 0.5), np.zeros(tail)])
        assert report(encoded(samples, "PCM_16")[0])["silences"] == silences


def test_the_picture_shows_the_recording() -> None:
    samples = np.concatenate([np.zeros(8000), np.tile([0.5, -0.25], 4000), np.tile([1.0, -1.0], 4000)])
    image = picture(encoded(samples, "FLOAT")[0]).convert("RGB")
    assert image.size == (1200, 240)
    blue = np.asarray(image)[:, :, 2] > 200  # the waveform, by its brightness
    heights = [(120 - column.argmax(), column[::-1].argmax() - 120) for column in blue[:, [200, 600, 1000]].T]
    assert heights == [(1, -1), (56, -28), (112, -112)]
    bands = np.asarray(image)[0]
    assert (bands[:400] == waveform.SILENCE).all()
    assert (bands[400:] == waveform.BACKGROUND).all()


@pytest.mark.parametrize("frames", [1, 10, 1199, 1200, 1201, 31_234])
def test_the_picture_is_that_of_all_samples_at_once(frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waveform, "BLOCK_SAMPLES", 70)
    values = recording(frames / 1000, 1000, 2)
    ctx = MemoryContext()
    run(ctx, encoded(values, "DOUBLE", 1000)[0], 1)
    chunks = [json.loads(value) for name, value in ctx.steps.items() if name.startswith("chunk-")]
    bins = min(1200, frames)
    at = np.arange(frames) * bins // frames
    for found, pick in zip(waveform.columns(chunks, frames, 1000), (np.min, np.max), strict=True):
        assert found.tolist() == [round(pick(values[at == n]) * 1000) for n in range(bins)]


def test_pictures_do_not_depend_on_the_chunks() -> None:
    data, _ = encoded(recording(30, 8000, 2), "PCM_16")
    assert picture(data, 1).tobytes() == picture(data, 7).tobytes() == picture(data, 600).tobytes()


def other_formats() -> Iterator[Any]:
    for file_format, encoding in [
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("MP3", "MPEG_LAYER_III"),
        ("AIFF", "PCM_16"),
        ("W64", "PCM_16"),
        ("WAV", "IMA_ADPCM"),
        ("WAV", "MS_ADPCM"),
        ("WAV", "ULAW"),
        ("WAV", "GSM610"),
    ]:
        file = io.BytesIO()
        soundfile.write(file, np.zeros(8000), 8000, format=file_format, subtype=encoding)
        wanted = f"encoded as {encoding}. Save it as PCM or float" if file_format == "WAV" else "not a WAV file"
        yield pytest.param(file.getvalue(), wanted, id=f"{file_format} {encoding}")


SOUND = bytes(16_000)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        *other_formats(),
        (b"", "not a WAV file"),
        (b"some text that is long enough for a header", "not a WAV file"),
        (b"RIFF\x00\x00\x00\x00AVI ", "not a WAV file"),
        (b"RIFX" + wav(SOUND)[4:], "not a WAV file"),
        (wav(SOUND)[:12], "there is no sound in it"),
        (wav(SOUND)[:40], "there is no sound in it"),
        (wav(SOUND)[:64], "announces 16,000 bytes of sound and has 8. Upload it again"),
        (wav(SOUND)[:-1], "announces 16,000 bytes of sound and has 15,999"),
        (wav(SOUND, announced=0, riff=0), "never finished"),
        (wav(SOUND, announced=0, riff=36), "never finished"),
        (wav(SOUND, rate=0), "damaged"),
        (wav(SOUND, rate=49), "claims 49 samples a second"),
        (wav(SOUND, rate=1_000_001), "claims 1,000,001 samples a second"),
        (wav(SOUND, channels=0), "damaged"),
        (wav(SOUND)[:12] + b"junk\0\0\0\0" * 2000 + wav(SOUND)[12:], "there is no sound in it"),
    ],
)
def test_what_is_no_recording_fails_for_good(data: bytes, message: str) -> None:
    with pytest.raises(PermanentError, match=message):
        report(data)


def test_an_rf64_file_that_ends_early_fails_for_good() -> None:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(8000), 8000, format="RF64", subtype="PCM_16")
    with pytest.raises(PermanentError, match="announces 16,000 bytes of sound and has 15,9"):
        report(file.getvalue()[:-100])


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFFFFF, 0x80000000])
def test_a_recording_from_a_pipe_is_as_long_as_it_is(length: int) -> None:
    assert report(wav(SOUND, announced=length, riff=0xFFFFFFFF))["duration_seconds"] == 1


def test_random_damage_never_raises_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waveform, "drawn", lambda *_: b"")  # for speed
    good = wav(bytes(range(256)) * 4, channels=2)
    rng = np.random.default_rng(3)
    for _ in range(600):
        data = bytearray(good[: rng.integers(len(good))] if rng.random() < 0.3 else good)
        for position in rng.integers(0, min(70, len(data)) or 1, rng.integers(1, 4)):
            data[position : position + 1] = rng.bytes(1)
        try:
            report(bytes(data))
        except PermanentError:
            continue


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_samples_that_are_no_numbers_fail_for_good(bad: float) -> None:
    samples = np.zeros(40_000)
    samples[36_000] = bad
    with pytest.raises(PermanentError, match=r"NaN, infinite or absurdly large samples at 4\.50 s"):
        report(encoded(samples, "DOUBLE")[0], 2)


def test_too_many_chunks_fail_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waveform, "MOST_CHUNKS", 10)
    assert report(wav(bytes(160_000)), 1)["duration_seconds"] == 10
    with pytest.raises(PermanentError, match=r"11 chunks of at most 10\. Ask for longer ones"):
        report(wav(bytes(160_002)), 1)


class Watched(io.BytesIO):
    """Tells which bytes were read, and fails where it is told to."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.reads: list[int] = []
        self.fails_at = len(data) + 1
        self.failure: BaseException | None = None

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= self.fails_at:
            if self.failure is None:
                return b""
            raise self.failure
        self.reads.append(self.tell())
        return super().read(size)


def test_a_second_attempt_does_not_repeat_finished_chunks() -> None:
    data, values = encoded(recording(20, 8000, 1), "PCM_16")
    ctx, file = MemoryContext(), Watched(data)
    payload = Payload(file_id=ctx.add(file), chunk_seconds=1)
    ctx.interrupt_at = 12
    with pytest.raises(KeyboardInterrupt):
        waveform.run(payload, ctx.as_context())
    assert list(ctx.steps) == [f"chunk-{n:04d}" for n in range(1, 13)]

    file.reads.clear()
    ctx.interrupt_at = None
    result = waveform.run(payload, ctx.as_context())
    assert result.model_dump(exclude={"image_file_id"}) == expected(values, 8000)
    assert min(position for position in file.reads if position > 8192) >= 12 * 16_000
    assert len(ctx.steps) == 21
    png = ctx.saved[result.image_file_id][1]
    assert Image.open(io.BytesIO(png)).tobytes() == picture(data, 1).tobytes()


@pytest.mark.parametrize("failure", [ConnectionError("away"), OSError("away"), KeyboardInterrupt()])
@pytest.mark.parametrize("fails_at", [0, 50_000])
def test_a_storage_that_fails_is_not_a_bad_recording(failure: BaseException, fails_at: int) -> None:
    data, values = encoded(recording(20, 8000, 1), "PCM_16")
    ctx, file = MemoryContext(), Watched(data)
    payload = Payload(file_id=ctx.add(file), chunk_seconds=1)
    file.fails_at, file.failure = fails_at, failure
    with pytest.raises(type(failure)) as raised:
        waveform.run(payload, ctx.as_context())
    assert raised.value is failure
    assert len(ctx.steps) <= 3

    file.fails_at = len(data) + 1
    result = waveform.run(payload, ctx.as_context())
    assert result.model_dump(exclude={"image_file_id"}) == expected(values, 8000)


def test_a_storage_that_stops_early_is_worth_another_try() -> None:
    file = Watched(wav(bytes(160_000)))
    file.fails_at, file.failure = 80_000, None
    with pytest.raises(TransientError, match="could not be read to its end"):
        run(MemoryContext(), file, 1)


def test_progress_is_told_in_chunks() -> None:
    ctx = MemoryContext()
    run(ctx, wav(bytes(48_000)), 1)
    assert ctx.reports == [(n, 3, "chunks measured") for n in (1, 2, 3)]


def test_samples_beyond_full_scale_are_drawn_up_to_the_edge() -> None:
    ctx = MemoryContext()
    run(ctx, encoded(np.tile([7.0, -7.0], 4000), "FLOAT")[0])
    chunk = json.loads(ctx.steps["chunk-0001"])
    assert (set(chunk["low"]), set(chunk["high"]), chunk["peak"]) == ({-1000}, {1000}, 7.0)


def test_what_a_chunk_records_is_small() -> None:
    """The worst: silences as short and as many as can be, and the whole picture in one chunk."""
    samples = np.tile(np.repeat([0.0, 0.123456789], [400, 16]), 700)
    ctx = MemoryContext()
    result = run(ctx, encoded(samples, "DOUBLE", 800)[0], 600)
    assert len(result.silences) > 300
    assert len(ctx.steps["chunk-0001"]) < 32 * 1024


class Hours(io.RawIOBase):
    """A recording that is nowhere: one second of noise again and again."""

    def __init__(self, seconds: int) -> None:
        self.second = np.random.default_rng(5).integers(-9999, 9999, 8000).astype("<i2").tobytes()
        self.header = wav(b"", announced=16_000 * seconds)
        self.size = len(self.header) + 16_000 * seconds
        self.position = 0

    def read(self, size: int = -1) -> bytes:
        if self.position < len(self.header):
            data = self.header[self.position :][:size]
        else:
            at = (self.position - len(self.header)) % 16_000
            data = (self.second[at:] + self.second * (size // 16_000 + 1))[: min(size, self.size - self.position)]
        self.position += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position


def test_two_hours_need_no_more_memory_than_ten_minutes() -> None:
    def peak(seconds: int) -> int:
        ctx = MemoryContext()
        tracemalloc.start()
        result = run(ctx, Hours(seconds), 600)  # type: ignore[arg-type]
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert result.duration_seconds == seconds
        return used

    peak(60)  # what is imported and cached at the first use is not counted
    short, long = peak(600), peak(7200)
    assert long < 1.1 * short
    assert long < 24 * 1024**2


@pytest.mark.parametrize("chunk_seconds", [0, 601, 1.5, "long", None])
def test_chunk_seconds_are_bounded(chunk_seconds: object) -> None:
    with pytest.raises(ValidationError, match="chunk_seconds"):
        Payload.model_validate({"file_id": "019ac000-0000-7000-8000-000000000000", "chunk_seconds": chunk_seconds})


def test_the_kind_protects_the_file() -> None:
    file_id = MemoryContext().add(b"")
    assert list(KIND.file_ids(Payload(file_id=file_id))) == [file_id]
