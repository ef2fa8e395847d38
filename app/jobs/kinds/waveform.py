"""`waveform`: levels, silences and a picture of an uploaded recording."""

from typing import Annotated

from pydantic import Field

from app.jobs.kind import FileId, Kind, Model


class Payload(Model):
    file_id: FileId = Field(description="WAV: PCM of 8, 16, 24 or 32 bits, or float of 32 or 64.")
    chunk_seconds: int = Field(
        60, ge=1, le=600, description="What is measured at once; after a crash the job goes on behind the last chunk."
    )


class Result(Model):
    duration_seconds: float
    sample_rate: int = Field(description="Hz")
    channels: int
    peak_dbfs: float | None = Field(
        description="The largest sample of all channels, in dB relative to full scale; null for digital silence."
    )
    rms_dbfs: float | None = Field(
        description="The root mean square of all samples of all channels; null for digital silence."
    )
    silences: list[Annotated[tuple[float, float], Field(description="[from, to]")]] = Field(
        description="Where at least 0.5 s stay under -50 dBFS (RMS of 20 ms windows), in seconds."
    )
    image_file_id: FileId = Field(description="The waveform, a PNG of 1200 x 240 pixels.")


KIND = Kind(
    "waveform",
    Payload,
    Result,
    description="Measures a recording's levels, finds its silences and draws its waveform.",
)
