"""`thumbnail`: a small copy of an uploaded picture."""

from pydantic import Field

from app.jobs.kind import FileId, Kind, Model


class Payload(Model):
    file_id: FileId = Field(description="JPEG, PNG, WebP, GIF, BMP or TIFF: at most 100 megapixels and 512 MiB.")
    width: int = Field(ge=1, le=4096, description="Pixels of the picture as it is looked at; never more than it has.")


class Result(Model):
    file_id: FileId = Field(
        description="The small picture: sRGB, upright, without metadata, in its original's format (BMP and TIFF: PNG)."
    )
    width: int
    height: int


KIND = Kind(
    "thumbnail",
    Payload,
    Result,
    description="Makes a small copy of a picture, of an animation's first frame.",
    # The largest pictures take seconds; a file made to keep the decoder busy shall not have a worker for an hour.
    soft_time_limit=240,
    time_limit=300,
)
