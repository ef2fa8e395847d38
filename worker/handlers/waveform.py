"""Measures a recording chunk by chunk. Each chunk is a recorded step: memory stays flat, a crash costs one chunk."""

import io
import math
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import BinaryIO, TypedDict

import numpy as np
import numpy.typing as npt
import soundfile
from PIL import Image

from app.jobs.kinds.waveform import Payload, Result
from worker.context import Context
from worker.errors import PermanentError, TransientError
from worker.handlers._reading import reading

ENCODINGS = {"PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"}
WINDOWS = 50  # a second: silence is looked for in windows of 20 ms
SHORTEST_SILENCE = WINDOWS // 2
QUIET = 10 ** (-50 / 10)  # the mean square at -50 dBFS
SAMPLE_RATES = range(WINDOWS, 1_000_001)
MOST_CHUNKS = 10_000  # steps of one job: nearly 3 hours by the second, 69 days by 600 seconds
BLOCK_SAMPLES = 2**17  # computed at once: 1 MB, which stays in the processor's cache
# A recorder that can't seek back writes such a length, and nobody knows how long the sound should be.
UNKNOWN_LENGTH = 0x7FFF_F000

WIDTH, HEIGHT = 1200, 240
LEVELS = 1000  # amplitudes in the picture are whole numbers up to this
BACKGROUND, SILENCE, LINE = (15, 23, 42), (36, 48, 70), (71, 85, 105)
INNER, OUTER = (56, 189, 248), (129, 140, 248)


class Chunk(TypedDict):
    """What is recorded of a chunk: a few kB. The columns of all of a file's chunks together are 1,200 and a few."""

    peak: float
    squares: float  # their sum, over all samples of all channels
    quiet: list[list[int]]  # [from, to) in the recording's windows: what is a silence, or may grow into one
    low: list[int]  # the smallest and the largest sample in each column of the picture
    high: list[int]


def run(payload: Payload, ctx: Context) -> Result:
    """Measures the file and saves its picture.

    Raises:
        PermanentError: no WAV file, a damaged one, another encoding, NaN or infinite samples, too many chunks.
    """
    with ctx.open_file(payload.file_id) as stored, reading(stored) as file, opened(file) as sound:
        frames, rate, channels = sound.frames, sound.samplerate, sound.channels
        count = math.ceil(frames / (payload.chunk_seconds * rate))
        if count > MOST_CHUNKS:
            raise PermanentError(f"That makes {count:,} chunks of at most {MOST_CHUNKS:,}. Ask for longer ones.")
        chunks: list[Chunk] = []
        for number in range(count):
            measure = partial(measured, sound, number, payload.chunk_seconds)
            chunks.append(ctx.once(f"chunk-{number + 1:04d}", measure))
            ctx.progress(number + 1, count, "chunks measured")

    peak = max((chunk["peak"] for chunk in chunks), default=0.0)
    squares = math.fsum(chunk["squares"] for chunk in chunks)
    silences = joined((quiet for chunk in chunks for quiet in chunk["quiet"]), frames, rate)
    image = drawn(*columns(chunks, frames, payload.chunk_seconds * rate), silences, frames / rate)
    return Result(
        duration_seconds=frames / rate,
        sample_rate=rate,
        channels=channels,
        peak_dbfs=20 * math.log10(peak) if peak else None,
        rms_dbfs=10 * math.log10(squares / (frames * channels)) if squares else None,
        silences=silences,
        image_file_id=ctx.save_file("waveform.png", image, "image/png"),
    )


@contextmanager
def opened(file: BinaryIO) -> Iterator[soundfile.SoundFile]:
    """The recording, once its header has been checked."""
    _check_complete(file)
    file.seek(0)
    try:
        sound = soundfile.SoundFile(file)
    except soundfile.LibsndfileError as error:
        raise PermanentError(f"The WAV file is damaged: {error.error_string}") from error
    with sound:
        if sound.subtype not in ENCODINGS:
            raise PermanentError(f"The WAV file is encoded as {sound.subtype}. Save it as PCM or float.")
        if sound.samplerate not in SAMPLE_RATES:
            raise PermanentError(f"The WAV file claims {sound.samplerate:,} samples a second: that is no recording.")
        yield sound


def _check_complete(file: BinaryIO) -> None:
    # libsndfile would take an incomplete file for a shorter one, and opens a dozen other formats.
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    riff = file.read(12)
    if riff[:4] not in (b"RIFF", b"RF64") or riff[8:] != b"WAVE":
        raise PermanentError("The file is not a WAV file.")
    long_length = 0
    for _ in range(1000):
        header = file.read(8)
        if len(header) < 8:
            break
        name, length = struct.unpack("<4sI", header)
        start = file.tell()
        if name == b"ds64":  # the lengths that don't fit into 32 bits
            long_length = int.from_bytes(file.read(16)[8:], "little")
        if name == b"data":
            if riff[:4] == b"RF64":
                length = long_length
            elif length >= UNKNOWN_LENGTH:
                return
            if length > size - start:
                raise PermanentError(
                    f"The WAV file is incomplete: it announces {length:,} bytes of sound and has "
                    f"{size - start:,}. Upload it again."
                )
            if length == 0 and int.from_bytes(riff[4:8], "little") + 8 < size:
                raise PermanentError("The WAV file was never finished: its header says that it is empty. Repair it.")
            return
        file.seek(start + length + length % 2)
    raise PermanentError("The WAV file is incomplete: there is no sound in it.")


def measured(sound: soundfile.SoundFile, number: int, chunk_seconds: int) -> Chunk:
    """One chunk, read in blocks of whole windows. Window w begins at frame w * rate // WINDOWS, at any sample rate."""
    frames, rate, channels = sound.frames, sound.samplerate, sound.channels
    bins = min(WIDTH, frames)  # the picture's columns: frame f is in column f * bins // frames
    first = number * chunk_seconds * WINDOWS
    last = min(first + chunk_seconds * WINDOWS, math.ceil(frames * WINDOWS / rate))
    start, end = first * rate // WINDOWS, min(last * rate // WINDOWS, frames)
    first_bin = start * bins // frames
    low = np.full((end - 1) * bins // frames + 1 - first_bin, np.inf)
    high = -low
    quiet = np.zeros(last - first, bool)
    squares = 0.0

    sound.seek(start)
    step = max(1, BLOCK_SAMPLES * WINDOWS // (rate * channels))
    for window in range(first, last, step):
        edges = np.minimum(np.arange(window, min(window + step, last) + 1) * rate // WINDOWS, frames)
        begin, length = edges[0], edges[-1] - edges[0]
        # All that is measured is measured over all channels: one row of interleaved samples is enough.
        samples = sound.read(length, dtype="float64", always_2d=True).reshape(-1)
        if len(samples) != length * channels:
            raise TransientError("The recording could not be read to its end.")
        with np.errstate(over="ignore", invalid="ignore"):
            energy = np.add.reduceat(samples * samples, (edges[:-1] - begin) * channels)
        squares += float(energy.sum())
        if not math.isfinite(squares):
            second = (window + int(np.isfinite(energy).argmin())) / WINDOWS
            raise PermanentError(f"The recording has NaN, infinite or absurdly large samples at {second:.2f} s.")
        quiet[window - first : window - first + len(energy)] = energy < QUIET * channels * np.diff(edges)

        touched = np.arange(begin * bins // frames, (edges[-1] - 1) * bins // frames + 1)
        starts = (np.maximum(-(-touched * frames // bins), begin) - begin) * channels
        at = touched - first_bin
        low[at] = np.minimum(low[at], np.minimum.reduceat(samples, starts))
        high[at] = np.maximum(high[at], np.maximum.reduceat(samples, starts))

    edges = np.flatnonzero(np.diff(quiet, prepend=False, append=False)) + first
    return Chunk(
        peak=float(max(high.max(), -low.min())),
        squares=squares,
        quiet=[
            [begin, end]
            for begin, end in edges.reshape(-1, 2).tolist()
            if end - begin >= SHORTEST_SILENCE or begin == first or end == last
        ],
        low=_levels(low),
        high=_levels(high),
    )


def _levels(samples: npt.NDArray[np.float64]) -> list[int]:
    levels: list[int] = np.rint(np.clip(samples, -1, 1) * LEVELS).astype(int).tolist()
    return levels


def joined(quiet: Iterable[list[int]], frames: int, rate: int) -> list[tuple[float, float]]:
    """The silences in seconds, from all chunks' quiet windows in their order."""
    runs: list[list[int]] = []
    for begin, end in quiet:
        if runs and runs[-1][1] == begin:
            runs[-1][1] = end
        else:
            runs.append([begin, end])
    # The last window may be a part of one. Whole numbers, since 0.1 + 0.5 may be less than 0.6.
    whole = frames * WINDOWS
    return [
        (begin / WINDOWS, min(end / WINDOWS, frames / rate))
        for begin, end in runs
        if min(end * rate, whole) - begin * rate >= SHORTEST_SILENCE * rate
    ]


def columns(chunks: list[Chunk], frames: int, chunk_frames: int) -> tuple[npt.NDArray[np.int_], npt.NDArray[np.int_]]:
    """The lowest and the highest level of each of the picture's columns; two chunks may share one."""
    bins = min(WIDTH, frames)
    low, high = np.full(bins, LEVELS), np.full(bins, -LEVELS)
    for number, chunk in enumerate(chunks):
        begin = number * chunk_frames * bins // frames
        at = slice(begin, begin + len(chunk["low"]))
        low[at] = np.minimum(low[at], chunk["low"])
        high[at] = np.maximum(high[at], chunk["high"])
    return low, high


def drawn(
    low: npt.NDArray[np.int_], high: npt.NDArray[np.int_], silences: list[tuple[float, float]], seconds: float
) -> bytes:
    """The PNG: the waveform over a line at zero, silences as bands of another shade."""
    canvas = np.full((HEIGHT, WIDTH, 3), BACKGROUND, float)
    for begin, end in silences:
        canvas[:, round(begin / seconds * WIDTH) : round(end / seconds * WIDTH)] = SILENCE
    middle = HEIGHT // 2
    canvas[middle - 1 : middle + 1] = LINE
    if len(low):
        at = np.arange(WIDTH) * len(low) // WIDTH
        top, bottom = (middle - levels[at] * (middle - 8) / LEVELS for levels in (high, low))
        thin = np.maximum(0, 2 - (bottom - top)) / 2  # the faintest sound is a line of two pixels
        row = np.arange(HEIGHT)[:, None]
        # How much of each pixel the waveform covers, which makes its edge smooth.
        cover = np.clip(np.minimum(row + 1, bottom + thin) - np.maximum(row, top - thin), 0, 1)[..., None]
        away = (np.abs(row + 0.5 - middle) / middle)[..., None]
        canvas += ((1 - away) * INNER + away * OUTER - canvas) * cover
    out = io.BytesIO()
    Image.fromarray(canvas.round().astype(np.uint8)).save(out, "PNG")
    return out.getvalue()
